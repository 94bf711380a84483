"""What the warps of the one kernel by codes wait for, section by section between its barriers, by Nsight Compute.

    python benchmarks/profile_codes.py

A section ends where the whole block, the cluster or a message is waited for. `ncu` empties all caches before it
measures, that of instructions too, so code that runs once or twice waits for itself (no_inst) more than where the
kernel has just run; in a model's step other kernels run in between. Shares are of samples of all warps, so of time.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import bench_stages
import torch
from environment import describe
from rich.console import Console
from tables import RESULTS, markdown, profile_table

from hf_quest.kernels import ops

CASES = [(1, 32, 8, 32768), (1, 32, 8, 131072), (1, 32, 32, 32768), (8, 32, 8, 32768)]
PAGE_SIZES = (bench_stages.PAGE_SIZE, bench_stages.LARGER_PAGE)
KERNEL = "chain_by_codes"
ENDS = ("BAR.SYNC", "UCGABAR_WAIT", "SYNCS.PHASECHK", "EXIT")
STALL = "stall_"
# What a section does, by an instruction that it has and that those before do not rule out.
WORK = {
    "IMMA": "scores of pages",
    "LDGSTS HMMA": "attention",
    "HMMA": "logits of codes",
    "STAS": "sends",
    "VOTE": "choice",
}


def launch():
    """Run the kernel once for every case and page size."""
    keys = torch.empty(1, 1, 1, bench_stages.HEAD_DIM, dtype=bench_stages.DTYPE, device="cuda")
    if not ops.serves(keys, keys, bench_stages.PAGE_SIZE):
        raise SystemExit("This benchmark needs the CUDA kernels.")
    torch.manual_seed(0)
    for case in CASES:
        layer = bench_stages.make_layer(*case, bench_stages.CODE_BUDGET)
        layer.chain_by_codes()
        layer.chain_by_codes_of_larger_pages()
        torch.cuda.synchronize()


def profile():
    """ncu's rows of instructions for every launch of the kernel: lists of dicts."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.ncu-rep"
        ncu = ["ncu", "--section", "SourceCounters", "--clock-control", "none", "--kernel-name", f"regex:{KERNEL}"]
        this = [sys.executable, __file__, "--launch"]
        subprocess.run([*ncu, "--export", str(report), *this], check=True, stdout=subprocess.DEVNULL)
        page = ["ncu", "--import", str(report), "--page", "source", "--print-source", "sass", "--csv"]
        printed = subprocess.run(page, check=True, capture_output=True, text=True).stdout
    kernels = []
    for line in csv.reader(printed.splitlines()):
        if line[0] == "Kernel Name":
            kernels.append([])
        elif line[0] == "Address":
            titles = line
        else:
            kernels[-1].append(dict(zip(titles, line, strict=True)))
    return kernels


def stalls(instruction):
    """Samples of an instruction by what was waited for."""
    names = (name for name in instruction if name.startswith(STALL) and "Not Issued" not in name)
    return Counter({name.removeprefix(STALL): int(instruction[name]) for name in names})


def sections(instructions):
    """The sections of a kernel in the order of its code, each with its shares of all samples."""
    total = sum(sum(stalls(instruction).values()) for instruction in instructions)
    found, samples, operations, executed = [], Counter(), set(), 0
    for instruction in instructions:
        operation = next(word for word in instruction["Source"].split() if not word.startswith("@"))
        waited = stalls(instruction)
        if found:  # at the first instruction behind a barrier
            found[-1]["shares"]["barrier"] = found[-1]["shares"].get("barrier", 0) + waited.pop("barrier", 0) / total
        samples += waited
        operations.add(operation.partition(".")[0])
        executed += int(instruction["Instructions Executed"])
        if operation.startswith(ENDS):
            work = next((name for needs, name in WORK.items() if operations.issuperset(needs.split())), "")
            shares = {reason: number / total for reason, number in samples.most_common() if number}
            found.append({"work": work, "ends_with": operation, "executed": executed, "shares": shares})
            samples, operations, executed = Counter(), set(), 0
    return found


def write(report, path):
    path.write_text(json.dumps(report, indent=1) + "\n")
    conditions = "".join(f"- {name}: {value}\n" for name, value in report["environment"].items())
    title = "What the kernel by codes waits for"
    path.with_suffix(".md").write_text(f"# {title}\n\n{markdown(profile_table(report))}\n{conditions}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launch", action="store_true", help="run the kernel only, as this runs itself under ncu")
    parser.add_argument("--output", type=Path, default=RESULTS / "profile_codes.json")
    arguments = parser.parse_args()
    if arguments.launch:
        launch()
        return
    kernels = profile()
    launches = [(case, page_size) for case in CASES for page_size in PAGE_SIZES]
    report = {"environment": describe("cuda"), "launches": []}
    for (case, page_size), instructions in zip(launches, kernels, strict=True):
        report["launches"].append({"case": case, "page_size": page_size, "sections": sections(instructions)})
    write(report, arguments.output)
    Console(width=160).print(profile_table(report))


if __name__ == "__main__":
    main()
