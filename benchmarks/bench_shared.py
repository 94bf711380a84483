"""The GPU's memory, and milliseconds per token step, of rows that go on from one prompt, which is kept once.

    python benchmarks/bench_shared.py
    python benchmarks/bench_shared.py --cases llama-3.1-8b:16:131072 --ways recorded

Weights are random, and the prompt is put into the cache of one row as random keys and values, as in bench_generate.py,
which also says what a time is. Then the rows begin alike, and each writes an answer of its own. The context is that of
both, and the cache has room for so much: `max_cache_len`.

Bytes are those that the whole device lacks, CUDA's own included, by `cudaMemGetInfo`: with the prompt read by one row,
at most while it is repeated, and at the end. `beams` has a QuestCache of one row repeat itself, `beams-copied` begins
with a prompt in every row.
"""

import argparse
import gc
import json
import statistics
import threading
import time
from pathlib import Path

import torch
from bench_generate import AHEAD, HEADROOM, SHAPES, SHORT, answer, fill, make_model
from environment import describe
from rich.console import Console
from tables import RESULTS, markdown, shared_table

from hf_quest import QuestCache, capture

CASES = ["llama-3.1-8b:16:131072"]
WAYS = {  # title, whether the captured step is compiled or there is none, options of generate
    "recorded": ("capture(model), decode_ahead", False, AHEAD),
    "compiled": ("capture(model, compile=True), decode_ahead", True, AHEAD),
    "beams-copied": ("4 beams, a prompt in each", None, {"num_beams": 4}),
    "beams": ("4 beams, a prompt for all", None, {"num_beams": 4}),
}
GB = 1e9


def used():
    """Bytes that the device lacks."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def used_at_most(work):
    """(seconds of `work`, bytes that the device lacks at most meanwhile)."""
    sizes, is_done = [], threading.Event()

    def watch():
        while not is_done.wait(0.001):
            sizes.append(used())

    watcher = threading.Thread(target=watch)
    torch.cuda.synchronize()
    start = time.perf_counter()
    watcher.start()
    try:
        work()
        torch.cuda.synchronize()
    finally:
        is_done.set()
        watcher.join()
    return time.perf_counter() - start, max([*sizes, used()])


def measure(model, way, num_rows, context, arguments):
    """A dict of one way."""
    _, compiles, options = WAYS[way]
    num_beams = options.get("num_beams")
    if compiles is not None:
        capture(model, compile=compiles)
    codes = {"codes": 2} if arguments.codes else {}
    cache = QuestCache(arguments.budget, max_cache_len=context, **codes)
    context -= HEADROOM
    fill(cache, model.config, num_beams if way == "beams-copied" else 1, context)
    result = {"read_gb": round(used_now() / GB, 2)}
    if num_beams is None:
        seconds, most = used_at_most(lambda: cache.batch_repeat_interleave(num_rows))
        result |= {"repeat_s": round(seconds, 2), "repeat_gb": round(most / GB, 2)}
    num_ids = 1 if num_beams else num_rows
    ids = torch.randint(1, model.config.vocab_size, (1, context), device="cuda").expand(num_ids, -1)
    ids = torch.cat([ids, torch.randint(1, model.config.vocab_size, (num_ids, 1), device="cuda")], dim=1)
    ids, start_s = answer(model, cache, ids, SHORT, options)
    ids, _ = answer(model, cache, ids, SHORT, options)
    rounds = []
    for _ in range(arguments.rounds):
        ids, short_s = answer(model, cache, ids, SHORT, options)
        ids, long_s = answer(model, cache, ids, SHORT + arguments.steps, options)
        rounds.append((long_s - short_s) / arguments.steps * 1e3)
    prefixes = [layer.storage.prefix for layer in cache.layers]
    return result | {
        "ms_per_token": round(statistics.median(rounds), 2),
        "round_ms": [round(ms, 2) for ms in rounds],
        "start_s": round(start_s, 1),
        "end_gb": round(used() / GB, 2),
        "shares": all(prefix is not None for prefix in prefixes),
    }


def used_now():
    """`used`, without what PyTorch keeps for later."""
    gc.collect()
    torch.cuda.empty_cache()
    return used()


def release(model):
    for name in ("_compiled_call", "get_compiled_call"):
        model.__dict__.pop(name, None)
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, help="model shape:rows:tokens of context")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--budget", type=int, default=2048, help="tokens")
    parser.add_argument("--codes", action="store_true", help="choose single tokens, by codes of 2 bits")
    parser.add_argument("--steps", type=int, default=32, help="tokens timed per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "shared_gpu.json")
    return parser.parse_args()


def write(report, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    conditions = "".join(f"- {name}: {value}\n" for name, value in report["environment"].items())
    title = "Rows that go on from one prompt: GB of the device, ms per token step"
    path.with_suffix(".md").write_text(f"# {title}\n\n{markdown(shared_table(report))}\n{conditions}")


def main():
    arguments = parse_arguments()
    environment = describe("cuda")
    report = {"environment": environment, "budget": arguments.budget, "codes": arguments.codes, "results": []}
    for case in arguments.cases:
        shape, num_rows, context = case.split(":")
        num_rows, context = int(num_rows), int(context)
        assert shape in SHAPES, shape
        model = make_model(shape, 2**18)
        for way in arguments.ways:
            rows = WAYS[way][2].get("num_beams", num_rows)
            result = {"shape": shape, "rows": rows, "context": context, "way": WAYS[way][0]}
            try:
                result |= measure(model, way, num_rows, context, arguments)
            except RuntimeError as error:  # of memory, QuestError too
                result["error"] = str(error).splitlines()[0]
            report["results"].append(result)
            print(json.dumps(result), flush=True)
            write(report, arguments.output)
            release(model)
        del model
        release(torch.nn.Module())
    Console(width=160).print(shared_table(report))


if __name__ == "__main__":
    main()
