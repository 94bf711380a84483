"""A fuzzer of operations on caches: `python tests/fuzz.py --seconds 600 --seed 1`.

Every seed makes a family of model, a cache and a sequence of operations: forwards, modes of `generate`, masks that
change, crops, copies. After each the logits must be those of the specification, computed afresh without a cache, or
of each row in a cache alone. What fails is made smaller and printed, as a line to repeat it by.
"""

import argparse
import contextlib
import json
import mmap
import os
import random
import re
import sys
import time
import traceback
from collections import Counter
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from fuzz_operations import Operations
from fuzz_run import CACHES, Skip, Wrong
from fuzz_truth import Unsure

from hf_quest.kernels import native
from hf_quest.reference import DEFAULT, PUBLISHED
from hf_quest.storage import mapped, ring, shared

# Local layers with and without full ones among them, softcaps, sinks, norms of queries and keys, no rotary embedding.
LOCAL_FAMILIES = ("mistral-window", "gemma2", "gemma3", "gpt_oss", "cohere2", "olmo3")
FAMILIES = ("llama", "qwen3")


def prompt(random):
    """Numbers of a prompt: at first longer than budgets, windows and segments."""
    return {
        "tokens": random.choice((1, 2, 3, 5, 8, 13, 17, 30)),
        "padding": [random.choice((0.0, 0.3, 0.9, 1.0)) for _ in range(3)],
    }


def answer(random):
    return {**prompt(random), "answer": random.randint(2, 6)}


def rows(random):
    return [random.randrange(4) for _ in range(random.randint(1, 4))]


KINDS = {
    "prompt": lambda r: {**prompt(r), "leave_out": r.random() < 0.3},
    "pieces": lambda r: {**prompt(r), "piece": r.choice((1, 2, 4, 8, 16))},
    "steps": lambda r: {"tokens": r.randint(1, 5), "leave_out": r.random() < 0.3},
    "hide": lambda r: {
        "tokens": r.choice((1, 1, 1, 3)),
        "begin": (begin := r.choice((0.0, 0.0, 0.2, 0.5))),
        "end": begin + r.random() * (0.95 - begin),
        "row": r.choice((None, 0, 1)),
    },
    "window": lambda r: {
        "tokens": r.choice((1, 1, 2)),
        "begin": 0.0,
        "end": r.uniform(0.02, 0.5),
        "row": r.choice((None, None, 0, 1)),
    },
    "pause": lambda r: {"tokens": r.choice((1, 1, 2, 4)), "rows": rows(r), "where": r.choice(("all", "first", "last"))},
    "own_mask": lambda r: {"tokens": r.choice((1, 4)), "share": r.choice((0.0, 0.2, 0.6))},
    "greedy": lambda r: {**answer(r), "hide": r.choice((None, None, (0.1, 0.6)))},
    "sample": lambda r: {**answer(r), "copies": r.choice((1, 1, 2, 3))},
    "ahead": lambda r: {**answer(r), "late": r.choice((0, 1, 2)), "do_sample": r.random() < 0.5},
    "chunked": lambda r: {**answer(r), "chunk": r.choice((1, 4, 8, 16))},
    "lookup": lambda r: {**answer(r), "drafts": r.randint(1, 4)},
    "assistant": answer,
    "beams": lambda r: {**answer(r), "beams": r.choice((2, 3, 4))},
    "crop": lambda r: {"share": r.choice((0.0, 1.0, r.random(), r.uniform(0.8, 1.0)))},
    "reorder": lambda r: {"rows": rows(r)},
    "repeat": lambda r: {"repeats": r.choice((1, 2, 3))},
    "select": lambda r: {"rows": rows(r), "by_mask": r.random() < 0.3},
    "deepcopy": lambda r: {"spoil": r.random() < 0.5},
    "pickle": lambda r: {"spoil": r.random() < 0.5, "by_torch": r.random() < 0.5},
    "saved": lambda r: {"spoil": r.random() < 0.5},
    "reset": lambda r: {"rows": r.randint(1, 3)},
    "budget": lambda r: {"pages": r.randint(2, 8)},
    "offload": lambda r: {},
    "by_hand": lambda r: {},
    "from_cache": lambda r: {},
    "interrupted": lambda r: {
        "tokens": r.choice((1, 1, 3)),
        "layer": r.randrange(4),
        "place": r.choice(("self_attn", "mlp")),
    },
    "refused": lambda r: {"what": r.choice(("rows", "budget", "crop"))},
}
# What every sequence has much of, and what is tried now and then.
OFTEN = ("prompt", "prompt", "pieces", "steps", "steps", "hide", "window", "pause", "greedy", "ahead", "crop")
FIRST = ("prompt", "pieces", "greedy", "sample", "ahead", "chunked", "lookup", "assistant", "beams")
# Kinds of configuration that can be left out as those of operations can.
CONFIGS = ("local", "critiprefill", "autocast", "bfloat16", "inference", "grad", "padding", "batch", "compile")
CONFIGS += ("codes", "scores", "compile_prompts", "watched", "without_kernels", "shared")
SCORES = [list(DEFAULT)] * 3 + [list(PUBLISHED), [0.3, True, "sum"], [1.0, False, "share"]]


def new_program(seed, kinds, families=None, caches=None):
    """A dict of JSON: a configuration and a list of operations."""
    r = random.Random(seed)
    config = new_config(r, kinds, families, caches) | new_ways(random.Random(f"ways {seed}"), kinds)
    modes = ["no_grad"] * 3 + [mode for mode in ("inference", "grad") if mode in kinds]
    possible = [kind for kind in KINDS if kind in kinds]
    often, first = ([kind for kind in some if kind in kinds] for some in (OFTEN, FIRST))
    operations = []
    for _ in range(r.randint(3, 9)):
        is_first = not operations or operations[-1]["kind"] == "reset"
        kind = r.choice((r.random() < 0.5 and (first if is_first else often)) or possible)
        operation = {"kind": kind, "seed": r.randrange(1000), "mode": r.choice(modes), **KINDS[kind](r)}
        if is_first:  # more than budgets, windows and segments
            operation |= {"tokens": r.randint(20, 90)} if "tokens" in operation else {}
        if "padding" in operation and "padding" not in kinds:
            operation["padding"] = [0.0]
        operations.append(operation)
    return {"config": config, "operations": operations}


def new_config(r, kinds, families, caches):
    cache = r.choice(caches or ["quest"] * (len(CACHES) - 1) + list(CACHES)[1:])
    families = families or (FAMILIES + LOCAL_FAMILIES if "local" in kinds else FAMILIES)
    page_size = r.choice((4, 4, 8))
    precisions = ["float32"] * 4 + [name for name in ("bfloat16", "autocast") if name in kinds]
    prefill = None
    if cache == "quest" and "critiprefill" in kinds and r.random() < 0.5:
        segment_size = r.choice((8, 16))
        prefill = {
            "budget": (budget := r.choice((8, 16))),
            "segment_size": segment_size,
            "block_size": 8,
            "threshold": r.choice((budget, 32)),
            "dense_layers": r.choice((0, 1, 1, 2)),
            "layer_fusion": r.choice((0.0, 0.0, 0.25)),
            "score": r.choice(("mass", "published")),
        }
    return {
        "family": r.choice(families),
        "cache": cache,
        "budget": r.choice((None, 2 * page_size, 16, 24)),
        "page_size": page_size,
        "dense_layers": r.choice((0, 1, 1, 2)),
        "int8": r.random() < 0.6,
        "max_cache_len": r.choice((None, None, 160)),
        "compile": r.random() < 0.6 if "compile" in kinds else False,
        "prefill": prefill,
        "room": r.choice((256, 8, 16)),  # tokens that local layers keep beyond their reach
        "precision": r.choice(precisions),
        "rows": r.choice((1, 2, 2, 3)) if "batch" in kinds else 1,
    }


def new_ways(r, kinds):
    """How a cache chooses, and by which of the ways that must come to the same."""
    codes = r.choice((None, None, 1, 2, 2, 4, 8)) if "codes" in kinds else None
    return {
        "codes": codes,
        "candidates": r.choice((1, 2, 8, None)),
        "mass": r.choice((None, None, 0.5, 0.9)) if codes else None,
        "score": r.choice(SCORES if "scores" in kinds else SCORES[:1]),
        "offloading": r.random() < 0.5,
        "compiles_prompts": "compile_prompts" in kinds and r.random() < 0.1,
        "is_watched": "watched" in kinds and r.random() < 0.1,
        "has_kernels": "without_kernels" not in kinds or r.random() < 0.7,
        "shares": "shared" in kinds and r.random() < 0.5,
    }


@contextlib.contextmanager
def patched(config):
    """What a configuration changes in the package: room beyond windows, kernels, and how soon prefixes are shared."""
    with contextlib.ExitStack() as stack:

        def patch(*change):
            stack.enter_context(mock.patch.object(*change))

        patch(ring, "ROOM", config["room"])
        if not config["has_kernels"]:
            patch(native, "serves", lambda *tensors: False)
        if config["shares"]:
            patch(mapped.memory_of(torch.device("cpu")), "granule", mmap.PAGESIZE)
            patch(shared, "LEAST", 1)
            patch(shared, "SPARE", 16)
        yield


def run(program, counts=None):
    """None, or how the program failed: the index of an operation, and the error. `counts` is a Counter."""
    counts, operations, index = Counter() if counts is None else counts, program["operations"], -1
    try:
        with patched(program["config"]):
            state = Operations(program["config"])
            while index + 1 < len(operations):
                index += 1
                with contextlib.suppress(Skip):
                    state.do(operations[index])
                    counts[operations[index]["kind"]] += 1
    except Unsure:
        counts["unsure"] += 1
    except Exception as error:
        return index, error
    return None


def signature(program, failure):
    """What failures of one fault have in common."""
    index, error = failure
    kind = program["operations"][index]["kind"] if index >= 0 else "start"
    message = re.sub(r"[-+]?\d[\d.e+-]*", "#", str(error).split("\n")[0])
    return f"{kind}: {type(error).__name__}: {message[:150]}"


def shrink(program, failure, num_runs=80):
    """A smaller program that fails with the same kind of error, and its failure."""
    name = type(failure[1]).__name__
    program = {**program, "operations": program["operations"][: failure[0] + 1]}

    def candidates():
        operations, config = program["operations"], program["config"]
        for index in range(len(operations) - 1):
            yield {**program, "operations": operations[:index] + operations[index + 1 :]}
        plain = {"family": "llama", "prefill": None, "precision": "float32", "rows": 1, "compile": False}
        plain |= {"codes": None, "mass": None, "candidates": 8, "score": list(DEFAULT), "offloading": False}
        plain |= {"compiles_prompts": False, "is_watched": False, "has_kernels": True, "shares": False}
        plain |= {"max_cache_len": None, "int8": False, "budget": None, "dense_layers": 1, "page_size": 4, "room": 256}
        for option, value in plain.items():
            if config[option] != value:
                yield {**program, "config": {**config, option: value}}
        for index, operation in enumerate(operations):
            for option, value in (("mode", "no_grad"), ("padding", [0.0]), ("tokens", 1), ("answer", 2)):
                if operation.get(option, value) != value:
                    changed = [*operations[:index], {**operation, option: value}, *operations[index + 1 :]]
                    yield {**program, "operations": changed}

    found = True
    while found and num_runs > 0:
        found = False
        for candidate in candidates():
            num_runs -= 1
            other = run(candidate)
            if other is not None and type(other[1]).__name__ == name:
                candidate["operations"] = candidate["operations"][: other[0] + 1]
                program, failure, found = candidate, other, True
                break
            if num_runs <= 0:
                break
    return program, failure


def report(seed, program, failure, is_traced):
    index, error = failure
    kind = program["operations"][index]["kind"] if index >= 0 else "start"
    print(f"\nseed {seed}: {kind}: {type(error).__name__}: {error}")
    if is_traced and not isinstance(error, Wrong):
        print("".join(traceback.format_exception(error)[-4:]).rstrip())
    print(f"python tests/fuzz.py --replay '{json.dumps(program)}'", flush=True)


def parse(arguments):
    every = [*KINDS, *CONFIGS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long to go on")
    parser.add_argument("--seed", type=int, default=0, help="the first; the next ones follow")
    parser.add_argument("--count", type=int, help="how many seeds, whatever time it takes")
    parser.add_argument("--only", nargs="+", choices=every, help="kinds of operations and configurations")
    parser.add_argument("--without", nargs="+", choices=every, default=[])
    parser.add_argument("--family", nargs="+", help=f"of {', '.join(FAMILIES + LOCAL_FAMILIES)}")
    parser.add_argument("--cache", nargs="+", choices=CACHES)
    parser.add_argument("--replay", help="a program as a failure prints it, to run it alone")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--traceback", action="store_true")
    parser.add_argument("--first", action="store_true", help="stop at the first failure")
    options = parser.parse_args(arguments)
    options.kinds = set(options.only or every) - set(options.without)
    return options


def main(arguments=None):
    options = parse(arguments)
    torch.set_num_threads(1)
    if options.replay:
        program = json.loads(options.replay)
        failure = run(program)
        if failure:
            report("replayed", program, failure, True)
        return int(failure is not None)
    begin, seed, failures, counts = time.monotonic(), options.seed, Counter(), Counter()
    while seed < options.seed + options.count if options.count else time.monotonic() < begin + options.seconds:
        program = new_program(seed, options.kinds, options.family, options.cache)
        failure = run(program, counts)
        if failure is not None:
            name = signature(program, failure)
            failures[name] += 1
            if failures[name] <= 2:  # what else there is of a kind is counted
                if not options.no_shrink:
                    program, failure = shrink(program, failure)
                report(seed, program, failure, options.traceback)
            if options.first:
                break
        seed += 1
    print(f"\n{seed - options.seed} sequences in {time.monotonic() - begin:.0f} s, {failures.total()} failed")
    for name, count in failures.most_common():
        print(f"{count:5} {name}")
    print("done:", ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
