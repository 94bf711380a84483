"""Milliseconds that the host takes for one token of `generate`, beside the model's own kernels. It needs no GPU.

    python benchmarks/bench_host.py

A compiled step is a graph that the host starts and waits for. What it does in between, `generate`'s own loop, masks,
the cache, guards of the compiled code, is time in which a GPU has nothing to do. Here the graph is replaced by its
first output, so that nothing else is left. The kernels are taken to serve the CPU, whose storage they never see. A
figure is the least of the rounds' fifth percentiles, in time of the processor, so that others on the machine do not
count.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from environment import describe
from rich.console import Console
from tables import RESULTS, host_table, markdown
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.generation.streamers import BaseStreamer

from hf_quest import CACHE_NAME, QuestCache
from hf_quest.kernels import ops

PROMPT, BUDGET, VOCABULARY = 1024, 256, 512  # tokens
WAYS = ("StaticCache, sdpa", "QuestCache", "QuestCache, codes", "QuestCache, everything")


class Clock(BaseStreamer):
    """The processor's time at every token."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.thread_time())

    def end(self):
        pass


def first_output(graph, example_inputs):
    """A backend of torch.compile: run once, and give that again."""
    output = None

    def run(*inputs):
        nonlocal output
        if output is None:
            output = graph(*inputs)
        return output

    return run


def let_kernels_serve():
    """Have storage on the CPU be such as the kernels have, and their operators do nothing there."""
    library = torch.library.Library("hf_quest", "IMPL", "CPU")
    library.impl("append", lambda *arguments: None)
    for name in ("decode", "chain", "attend"):
        library.impl(name, lambda query, *arguments: torch.zeros_like(query))
    ops.serves = lambda *arguments: True
    for name in [name for name in vars(ops) if name.startswith("_check")]:
        setattr(ops, name, lambda *arguments, **options: None)
    return library


def make_model(num_layers):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).eval()


def make_cache(way, model, num_tokens):
    if way == "StaticCache, sdpa":
        return StaticCache(config=model.config, max_cache_len=num_tokens)
    return QuestCache(8192 if way.endswith("everything") else BUDGET, codes=2 if way.endswith("codes") else None)


def measure(model, way, steps, rounds):
    """The least fifth percentile of ms per token of some rounds, and those."""
    torch._dynamo.reset()
    model.set_attn_implementation("sdpa" if way == "StaticCache, sdpa" else "quest")
    compilation = CompileConfig(backend=first_output, mode=None, fullgraph=True, dynamic=False)
    compilation._compile_all_devices = True
    ids = torch.randint(1, VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    found = []
    for round_idx in range(rounds + 1):  # of which the first compiles
        clock, cache = Clock(), make_cache(way, model, PROMPT + steps + 1)
        options = {CACHE_NAME: cache, "max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
        model.generate(ids, **options, streamer=clock, compile_config=compilation)
        if round_idx:
            found.append(1000 * float(np.percentile(np.diff(clock.times[4:]), 5)))
    return min(found), found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS / "host.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    library = let_kernels_serve()  # for as long as it is referred to
    model = make_model(arguments.layers)
    report = {"environment": describe("cpu"), "layers": arguments.layers, "results": []}
    for way in WAYS:
        least, rounds = measure(model, way, arguments.steps, arguments.rounds)
        report["results"].append({"way": way, "ms": round(least, 3), "round_ms": [round(each, 3) for each in rounds]})
    del library
    table = host_table(report)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    conditions = "".join(f"- {name}: {value}\n" for name, value in report["environment"].items())
    title = f"# The host's part of a token: a compiled step of {arguments.layers} layers, its kernels left out"
    arguments.output.with_suffix(".md").write_text(f"{title}\n\n{markdown(table)}\n{conditions}")
    Console().print(table)


if __name__ == "__main__":
    main()
