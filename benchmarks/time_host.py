"""The process of bench_host.py that measures: prints, as JSON, ms of the host for a token in each round of each way.

    python benchmarks/time_host.py QuestCache "QuestCache, eager"

It imports nothing that version 0.1 of the package does not have, which it measures as well.
"""

import importlib
import json
import sys
import time

import numpy as np
import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.generation.streamers import BaseStreamer

import hf_quest
from hf_quest import QuestCache

IS_BEFORE_0_2 = not hasattr(hf_quest, "decode_ahead")
ops = importlib.import_module("hf_quest.ops" if IS_BEFORE_0_2 else "hf_quest.kernels.ops")
CACHE_NAME = importlib.import_module("hf_quest.cache" if IS_BEFORE_0_2 else "hf_quest").CACHE_NAME
PROMPT, BUDGET, VOCABULARY = 1024, 256, 512  # tokens
WAYS = {
    "StaticCache, sdpa": None,
    "QuestCache": {"budget": BUDGET},
    "QuestCache, codes": {"budget": BUDGET, "codes": 2},
    "QuestCache, everything": {"budget": 8192},
    "QuestCache, eager": {"budget": BUDGET, "compile": False},
}
NUM_LAYERS, NUM_STEPS, NUM_ROUNDS = 32, 300, 4


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


def make_model():
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).eval()


def make_cache(way, config, num_tokens):
    if WAYS[way] is None:
        return StaticCache(config=config, max_cache_len=num_tokens)
    return QuestCache(**WAYS[way])


def measure(model, way):
    """The fifth percentile of ms per token, of each round."""
    torch._dynamo.reset()
    model.set_attn_implementation("sdpa" if WAYS[way] is None else "quest")
    compilation = CompileConfig(backend=first_output, mode=None, fullgraph=True, dynamic=False)
    compilation._compile_all_devices = True
    ids = torch.randint(1, VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    found = []
    for round_idx in range(NUM_ROUNDS + 1):  # of which the first compiles
        clock, cache = Clock(), make_cache(way, model.config, PROMPT + NUM_STEPS + 1)
        options = {CACHE_NAME: cache, "max_new_tokens": NUM_STEPS, "min_new_tokens": NUM_STEPS, "do_sample": False}
        model.generate(ids, **options, streamer=clock, compile_config=compilation)
        if round_idx:
            found.append(round(1000 * float(np.percentile(np.diff(clock.times[4:]), 5)), 3))
    return found


def main():
    torch.set_num_threads(1)
    library = let_kernels_serve()  # for as long as it is referred to
    model = make_model()
    print(json.dumps({way: measure(model, way) for way in sys.argv[1:]}))
    del library


if __name__ == "__main__":
    main()
