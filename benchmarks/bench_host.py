"""Milliseconds that the host takes for one token of `generate`, beside the model's own kernels. It needs no GPU.

    python benchmarks/bench_host.py
    git worktree add OLDER e676e7e; python benchmarks/bench_host.py --before OLDER    # another version in turns with it

A compiled step is a graph that the host starts and waits for. What it does in between, `generate`'s own loop, masks,
the cache, guards of the compiled code, is time in which a GPU has nothing to do. Here the graph is replaced by its
first output, so that nothing else is left. An eager step has the products of its small model in it, always the same
ones: it is there to be compared with another version's. The kernels are taken to serve the CPU, whose storage they
never see. A figure is the least of the rounds' fifth percentiles, in time of the processor, so that others on the
machine do not count, over processes that take turns.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from environment import describe
from rich.console import Console
from tables import RESULTS, host_table, markdown
from time_host import NUM_LAYERS, WAYS

PROCESSES = 3
OF_0_1 = ["QuestCache", "QuestCache, everything", "QuestCache, eager"]  # that the first version has, too


def run(tree, ways):
    """By way, the ms of each round of one process that imports the package of a folder."""
    command = [sys.executable, Path(__file__).with_name("time_host.py"), *ways]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return json.loads(printed.splitlines()[-1])


def commit_of(tree):
    command = ["git", "-C", tree, "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of another version")
    parser.add_argument("--output", type=Path, default=RESULTS / "host.json")
    arguments = parser.parse_args()
    report = {"environment": describe("cpu"), "layers": NUM_LAYERS}
    trees = {"after": (Path(__file__).parents[1], list(WAYS))}
    if arguments.before:
        report["before"] = commit_of(arguments.before)
        trees["before"] = (arguments.before.resolve(), OF_0_1)
    rounds = {which: {way: [] for way in ways} for which, (_, ways) in trees.items()}
    for _ in range(PROCESSES):
        for which, tree in trees.items():
            for way, ms in run(*tree).items():
                rounds[which][way] += ms
    report["results"] = [{"way": way, "ms": min(ms), "round_ms": ms} for way, ms in rounds["after"].items()]
    for result in report["results"]:
        if result["way"] in rounds.get("before", {}):
            ms = rounds["before"][result["way"]]
            result |= {"before_ms": min(ms), "before_round_ms": ms}
    table = host_table(report)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    conditions = "".join(f"- {name}: {value}\n" for name, value in report["environment"].items())
    title = f"# The host's part of a token: a step of {NUM_LAYERS} layers, its kernels left out"
    arguments.output.with_suffix(".md").write_text(f"{title}\n\n{markdown(table)}\n{conditions}")
    Console().print(table)


if __name__ == "__main__":
    main()
