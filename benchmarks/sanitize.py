"""compute-sanitizer's tools over the tests of the CUDA kernels, a few tests to a process, some processes to each GPU.

    python benchmarks/sanitize.py
    python benchmarks/sanitize.py --tools racecheck --seconds 600
    python benchmarks/sanitize.py --every 10                        one test of ten

What a process found is kept once it has ended, failures too. What failed, or had not ended when the seconds were over,
is left to the next call, which goes on from the results of the same commit. The tools look at our kernels alone, but
for initcheck, which would take what PyTorch's kernels wrote for unwritten. racecheck leaves the tests of CritiPrefill's
published score out, whose 16-bit products are PyTorch's: it fails on them (docs/notes/sanitizers.md).
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
FILES = ("tests/test_prompt_kernels.py", "tests/test_codes_gpu.py", "tests/test_kernels.py")
TOOLS = ("racecheck", "memcheck", "synccheck", "initcheck")
OF_A_CALL = ("processor", "command")  # of which a report may have several
LARGE = ("test_more_than_2_to_the_31_elements", "test_more_scores_than_shared_memory_holds")  # in one process, in turns
# Minutes under racecheck, so each in a process of its own:
SLOW = ("test_a_captured_graph_follows_the_storage", "test_a_captured_step_follows_the_storage")
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


def earlier_results(path, commit):
    """What earlier calls found at this commit, if it says what the files were."""
    if not path.exists() or commit is None or commit.endswith("-dirty"):
        return []
    earlier = json.loads(path.read_text())
    return earlier["results"] if earlier["environment"]["commit"] == commit else []


def passed_tests(results, tool):
    """The tests that a tool looked at in a process in which all passed."""
    whole = [result for result in results if result["tool"] == tool and result["passed"] == len(result["tests"])]
    return {test for result in whole for test in result["tests"]}


def visible_gpus():
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(idx) for idx in range(torch.cuda.device_count())]


def sanitize(tool, tests, gpus, deadline):
    """What a tool found in some tests, or None if it had not summed up when `deadline` came.

    `gpus` is a queue that has each GPU as often as processes may share it.
    """
    gpu = gpus.get()
    try:
        return sanitize_on(gpu, tool, tests, deadline)
    finally:
        gpus.put(gpu)


def sanitize_on(gpu, tool, tests, deadline):
    """The same on one GPU."""
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "100000", "--show-backtrace", "no"]
    if tool != "initcheck":
        command += ["--kernel-name", "kns=hf_quest"]
    # pytest's own timeout is for tests that run at their usual speed.
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=0", *tests]
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
    table = Table("tool", "tests", "passed", "reports", "lines with kernels of ours")
    for tool, num_tests in report["num_tests"].items():
        results = [result for result in report["results"] if result["tool"] == tool]
        sums = [sum(result[name] for result in results) for name in ("reports", "lines_of_ours")]
        table.add_row(tool, *(f"{number:,}" for number in (num_tests, len(passed_tests(results, tool)), *sums)))
    return table


def write(report, path):
    several = {name: "; ".join(dict.fromkeys(result[name] for result in report["results"])) for name in OF_A_CALL}
    conditions = "".join(f"- {name}: {value}\n" for name, value in (report["environment"] | several).items())
    page = f"# compute-sanitizer over the kernels' tests\n\n{markdown(summarise(report))}\n{conditions}"
    for file, content in ((path, json.dumps(report, indent=1) + "\n"), (path.with_suffix(".md"), page)):
        draft = file.with_name(f"{file.name}.draft")
        draft.write_text(content)
        draft.replace(file)  # at once, so that a call that is stopped leaves what there was


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--jobs", type=int, default=8, help="processes for each GPU; more need over 80 GB")
    parser.add_argument("--seconds", type=float, default=86_400, help="after which what has not ended is given up")
    parser.add_argument("--every", type=int, default=1, help="look at one of so many tests, spread over all of them")
    parser.add_argument("--output", type=Path, default=RESULTS / "sanitizers.json")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    tests = collect()[:: arguments.every]
    environment = describe("cuda")
    report = {
        "environment": environment,
        "num_tests": {tool: sum(map(len, parts_of(tests, tool))) for tool in TOOLS},
        "results": earlier_results(arguments.output, environment["commit"]),
    }
    todo = []
    for tool in arguments.tools:
        known = passed_tests(report["results"], tool)
        todo += [(tool, part) for part in parts_of([test for test in tests if test not in known], tool)]
    gpus = queue.SimpleQueue()
    for gpu in visible_gpus() * arguments.jobs:
        gpus.put(gpu)
    of_this_call = {name: environment[name] for name in OF_A_CALL}
    pool = ThreadPoolExecutor(gpus.qsize())
    try:
        for run in as_completed(pool.submit(sanitize, *part, gpus, deadline) for part in todo):
            if run.result() is not None:
                report["results"].append(run.result() | of_this_call)
                write(report, arguments.output)
    finally:
        pool.shutdown(cancel_futures=True)
    CONSOLE.print(summarise(report))


if __name__ == "__main__":
    main()
