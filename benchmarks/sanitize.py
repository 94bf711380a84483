"""compute-sanitizer's tools over the tests of the CUDA kernels, a few tests to a process, some processes to each GPU.

    python benchmarks/sanitize.py
    python benchmarks/sanitize.py --tools racecheck --seconds 600

What a process found is kept once it has ended. What failed, or had not ended when the seconds were over, is left to the
next call, which goes on from the results of the same commit. The tools look at our kernels alone, but for initcheck,
which would take what PyTorch's kernels wrote for unwritten. racecheck leaves the tests of CritiPrefill's published
score out, whose 16-bit products are PyTorch's: it fails on them (NOTES.md).
"""

import argparse
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import groupby
from pathlib import Path

import torch
from environment import describe
from rich.console import Console
from rich.table import Table
from tables import RESULTS, markdown

ROOT = Path(__file__).parents[1]
FILES = ("tests/test_prompt_kernels.py", "tests/test_kernels.py")
TOOLS = ("racecheck", "memcheck", "synccheck", "initcheck")
LARGE = ("test_more_than_2_to_the_31_elements", "test_more_scores_than_shared_memory_holds")  # in one process, in turns
SLOW = ("test_a_captured_graph_follows_the_storage",)  # minutes under racecheck, so each in a process of its own
MOST_TESTS = {"racecheck": 10, "memcheck": 120, "synccheck": 120, "initcheck": 60}  # in a process
CONSOLE = Console(width=160)


def collect():
    """The ids of all tests, the last ones first, since they take longest."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *FILES]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [line for line in printed.splitlines() if line.startswith(FILES)][::-1]


def parts_of(tests, tool):
    """Lists of the tests that a tool looks at, of one class each, but for those that take much memory or time."""
    if tool == "racecheck":
        tests = [test for test in tests if "published" not in test]
    large = [test for test in tests if any(name in test for name in LARGE)]
    slow = [test for test in tests if any(name in test for name in SLOW)]
    parts = [part for part in (large, *([test] for test in slow)) if part]
    most = MOST_TESTS[tool]
    others = [test for test in tests if test not in large + slow]
    for _, group in groupby(others, key=lambda test: test.rpartition("::")[0]):
        group = list(group)
        parts += [group[first : first + most] for first in range(0, len(group), most)]
    return parts


def kept_results(path, commit):
    """What earlier calls found at this commit, but for processes of which a test failed."""
    earlier = json.loads(path.read_text()) if path.exists() else None
    if earlier is None or earlier["environment"]["commit"] != commit:
        return []
    return [result for result in earlier["results"] if result["passed"] == len(result["tests"])]


def left_of(tests, results, tool):
    """The tests that no process of a tool has looked at."""
    known = {test for result in results if result["tool"] == tool for test in result["tests"]}
    return [test for test in tests if test not in known]


def visible_gpus():
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(idx) for idx in range(torch.cuda.device_count())]


def sanitize(tool, tests, gpus, deadline):
    """What a tool found in some tests, or None if it did not come to its end before `deadline`.

    `gpus` is a queue that has each GPU as often as processes may share it.
    """
    gpu = gpus.get()
    try:
        return sanitize_on(gpu, tool, tests, deadline)
    finally:
        gpus.put(gpu)


def sanitize_on(gpu, tool, tests, deadline):
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "100000", "--show-backtrace", "no"]
    if tool != "initcheck":
        command += ["--kernel-name", "kns=hf_quest"]
    # pytest's own timeout is for tests that run at their usual speed.
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=0", *tests]
    start = time.monotonic()
    if start >= deadline:
        return None
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=deadline - start)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    result = {"tool": tool, "tests": tests, **findings(printed), "seconds": round(time.monotonic() - start)}
    if result["passed"] < len(tests) or result["reports"] != 0:
        CONSOLE.print(printed[-4000:], markup=False, highlight=False)
    CONSOLE.print(f"{tool} {tests[0]}: {result['passed']} of {len(tests)} passed, {result['reports']} reports")
    return result if result["reports"] is not None else None


def findings(printed):
    """From what a tool has printed: tests that passed, reports (None without a summary), lines with kernels of ours."""
    passed = re.search(r"(\d+) passed", printed)
    summary = re.search(r"^=+ \w+ SUMMARY: (\d+) ", printed, re.MULTILINE)
    return {
        "passed": int(passed[1]) if passed else 0,
        "reports": int(summary[1]) if summary else None,
        "lines_of_ours": len(re.findall(r"^=========.*hf_quest", printed, re.MULTILINE)),
    }


def summarise(report):
    table = Table("tool", "tests", "looked at", "passed", "reports", "lines with kernels of ours")
    for tool, num_tests in report["num_tests"].items():
        results = [result for result in report["results"] if result["tool"] == tool]
        looked_at = sum(len(result["tests"]) for result in results)
        sums = [sum(result[name] for result in results) for name in ("passed", "reports", "lines_of_ours")]
        table.add_row(tool, *(f"{number:,}" for number in (num_tests, looked_at, *sums)))
    return table


def write(report, path):
    processors = ", ".join(sorted({result["processor"] for result in report["results"]}))
    path.write_text(json.dumps(report, indent=1) + "\n")
    environment = report["environment"] | {"processor": processors}
    conditions = "".join(f"- {name}: {value}\n" for name, value in environment.items())
    path.with_suffix(".md").write_text(
        f"# compute-sanitizer over the kernels' tests\n\n{markdown(summarise(report))}\n{conditions}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--jobs", type=int, default=8, help="processes for each GPU; more need over 80 GB")
    parser.add_argument("--seconds", type=float, default=86_400, help="until what has not ended is given up")
    parser.add_argument("--output", type=Path, default=RESULTS / "sanitizers.json")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    tests = collect()
    environment = describe("cuda")
    report = {
        "environment": environment,
        "num_tests": {tool: sum(map(len, parts_of(tests, tool))) for tool in TOOLS},
        "results": kept_results(arguments.output, environment["commit"]),
    }
    left = {tool: left_of(tests, report["results"], tool) for tool in arguments.tools}
    todo = [(tool, part) for tool in arguments.tools for part in parts_of(left[tool], tool)]
    gpus = queue.SimpleQueue()
    for gpu in visible_gpus() * arguments.jobs:
        gpus.put(gpu)
    with ThreadPoolExecutor(gpus.qsize()) as pool:
        for run in as_completed(pool.submit(sanitize, *part, gpus, deadline) for part in todo):
            if run.result() is not None:
                report["results"].append({**run.result(), "processor": environment["processor"]})
                write(report, arguments.output)
    CONSOLE.print(summarise(report))


if __name__ == "__main__":
    main()
