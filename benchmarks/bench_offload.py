"""Milliseconds per token, and memory of GPU and host, of a QuestCache with `offloading=True` beside one in the GPU's.

    python benchmarks/bench_offload.py
    python benchmarks/bench_offload.py --cases qwen2.5-7b-1m:1:1048576:24 --ways offloaded offloaded-pages
    python benchmarks/bench_offload.py --cases llama-3.1-8b:1:131072 --ways memory offloaded --prompt

Weights are random, and a context is put into the cache as random keys and values, as in bench_generate.py, which also
says what the figures are. But what is chosen moves from step to step as it does in real models, see `be_like_real`:
by default 73 % are chosen again by the next step, and the tokens chosen last, four times as many as a step chooses,
hold 96 %, nearly as of SmolLM2 with 8,192 tokens (docs/offloading.md). `hits` are those of the pools in the rounds
that are timed, `again` is the share of tokens that the step before chose, too, in some eager steps before them.

With `--prompt` a context is read by the model, in chunks, and how long that takes is measured, too.

A case may name the GiB that PyTorch may take of the GPU. What CUDA itself takes, about half of one, comes on top.
"""

import argparse
import gc
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch
from bench_generate import AHEAD, HEADROOM, SHAPES, SHORT, answer, free, make_model
from environment import describe
from rich.console import Console
from tables import RESULTS, markdown, offload_table
from transformers import DynamicCache

from hf_quest import CACHE_NAME, PageReads, QuestCache, QuestError, capture
from hf_quest.storage import host

SHAPES["qwen2.5-7b-1m"] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
CASES = ["llama-3.1-8b:1:131072", "llama-3.1-8b:1:524288", "qwen2.5-7b-1m:1:1048576:24"]
WAYS = {  # options of the cache, its pool in budgets, and whether the step is captured and decoded ahead
    "memory": ("in memory", {"codes": 2}, False),
    "offloaded": ("offloaded", {"codes": 2, "offloading": True}, False),
    "memory-ahead": ("in memory, captured, ahead", {"codes": 2}, True),
    "offloaded-ahead": ("offloaded, captured, ahead", {"codes": 2, "offloading": True}, True),
    "offloaded-no-pool": ("offloaded, no pool", {"codes": 2, "offloading": True, "pool": 0}, False),
    "offloaded-no-pool-ahead": (
        "offloaded, no pool, captured, ahead",
        {"codes": 2, "offloading": True, "pool": 0},
        True,
    ),
    "offloaded-small-pool-ahead": (
        "offloaded, pool of twice the budget, captured, ahead",
        {"codes": 2, "offloading": True, "pool": 2},
        True,
    ),
    "offloaded-pages-of-32": ("offloaded, pages of 32", {"codes": 2, "offloading": True, "page_size": 32}, False),
    "offloaded-pages-of-32-ahead": (
        "offloaded, pages of 32, captured, ahead",
        {"codes": 2, "offloading": True, "page_size": 32},
        True,
    ),
    "offloaded-pages-of-32-small-pool-ahead": (
        "offloaded, pages of 32, pool of twice the budget, captured, ahead",
        {"codes": 2, "offloading": True, "page_size": 32, "pool": 2},
        True,
    ),
    "offloaded-pages": ("offloaded, no codes", {"offloading": True}, False),
    "stock": ("DynamicCache(offloading=True), sdpa", None, False),
}
CHUNK = 8192  # tokens
NOISE = 0.1  # by which the embedding of a token differs from what all have in common
WATCHED = 8  # steps
GB = 1e9


def make_cache(way, config, context, budget):
    options = WAYS[way][1]
    if options is None:
        return DynamicCache(config=config, offloading=True)
    if options.get("pool"):
        options = {**options, "pool": options["pool"] * budget}
    cache = QuestCache(budget, max_cache_len=context + HEADROOM, **options)
    cache.take_config(config, config.max_position_embeddings)  # so that memory is pinned for all layers at once
    return cache


@torch.no_grad()
def be_like_real(model, noise):
    """Have a model with random weights ask for much the same from one token to the next.

    Embeddings have something in common, beside `noise`, and layers change them little. The next token, which what they
    have in common has no part in, is as good as random.
    """
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    common = torch.randn_like(embeddings[0]) * embeddings.std()
    embeddings.mul_(noise).add_(common)
    direction = common / common.norm()
    head.sub_((head @ direction)[:, None] * direction)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(1e-3)
        layer.mlp.down_proj.weight.mul_(1e-3)


def channel_sizes(config):
    """[D]: of keys. What turns fast with the position matters less, as in real models: pairs that turn by more than
    0.03 from a token to the next.
    """
    num_pairs = config.head_dim // 2
    turns = config.rope_parameters["rope_theta"] ** (-torch.arange(num_pairs) / num_pairs)
    return torch.where(turns > 0.03, 0.3, 1.0).repeat(2).to(torch.bfloat16)


@torch.no_grad()
def share_again(model, cache):
    """The share of what a step chooses that the step before has chosen, too, mean over layers, rows and heads."""
    cache.watcher = reads = PageReads()
    token = torch.ones(len(cache.left_padding), 1, dtype=torch.int64, device=model.device)
    for _ in range(WATCHED):
        token = model(token, **{CACHE_NAME: cache}).logits[:, -1:].argmax(dim=-1)
    cache.watcher = None
    cache.crop(-WATCHED)
    shares = []
    for selections in reads.selections.values():
        for before, now in pairwise(selection.choice.ids for selection in selections):
            shares.append(torch.isin(keyed(now), keyed(before)).float().mean())
    return round(float(torch.stack(shares).mean()), 3) if shares else None


def keyed(ids):
    """The ids in [B, Hkv, 1, K], where -1 is none, of which those of other rows and heads are others."""
    heads = torch.arange(ids.shape[0] * ids.shape[1], device=ids.device).view(*ids.shape[:2], 1, 1)
    return (ids + heads * 2**32)[ids >= 0]


def fill(cache, config, batch_size, num_tokens):
    """Put random keys and values into every layer, a chunk at a time, so that they take little memory on the way."""
    sizes = channel_sizes(config).cuda()
    for layer_idx in range(config.num_hidden_layers):
        for start in range(0, num_tokens, 8 * CHUNK):
            num_new = min(8 * CHUNK, num_tokens - start)
            shape = (batch_size, config.num_key_value_heads, num_new, config.head_dim)
            keys, values = (torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
            handed_over, _ = cache.update(keys * sizes, values, layer_idx)
            if isinstance(cache, QuestCache):
                handed_over.quest_layer.handed.end()  # no attention follows


def read(model, cache, batch_size, num_tokens):
    """Have the model read random tokens in chunks; return seconds."""
    ids = torch.randint(1, model.config.vocab_size, (batch_size, num_tokens), device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        for chunk in ids.split(CHUNK, dim=1):
            model(chunk, **{CACHE_NAME: cache}, logits_to_keep=1)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model, way, batch_size, context, arguments):
    """A dict of one way at one context."""
    _, options, is_ahead = WAYS[way]
    if is_ahead:
        capture(model, compile=True)
    model.set_attn_implementation("sdpa" if options is None else "quest")
    empty_gb, start = torch.cuda.memory_allocated() / GB, time.perf_counter()
    result, cache = {}, make_cache(way, model.config, context, arguments.budget)
    torch.cuda.reset_peak_memory_stats()
    if arguments.prompt:
        result["prompt_s"] = round(read(model, cache, batch_size, context - 1), 2)
        result["prompt_peak_gb"] = round(torch.cuda.max_memory_allocated() / GB, 2)
    else:
        fill(cache, model.config, batch_size, context - 1)
        torch.cuda.synchronize()
        result["fill_s"] = round(time.perf_counter() - start, 1)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    result["cache_gb"] = round(torch.cuda.memory_allocated() / GB - empty_gb, 2)
    result["host_gb"] = round(host_bytes(cache) / GB, 2)
    if isinstance(cache, QuestCache):
        result["again"] = share_again(model, cache)
    generated = AHEAD if is_ahead else {}
    ids = torch.randint(1, model.config.vocab_size, (batch_size, context), device="cuda")
    ids, result["start_s"] = answer(model, cache, ids, SHORT, generated)
    ids, _ = answer(model, cache, ids, SHORT, generated)
    rounds, before = [], pool_counts(cache)
    for _ in range(arguments.rounds):
        ids, short_s = answer(model, cache, ids, SHORT, generated)
        ids, long_s = answer(model, cache, ids, SHORT + arguments.steps, generated)
        rounds.append((long_s - short_s) / arguments.steps * 1e3)
    looked_up, found = (now - then for now, then in zip(pool_counts(cache), before, strict=True))
    if looked_up:
        result["hits"] = round(found / looked_up, 4)
    if is_ahead:
        del model._compiled_call, model.get_compiled_call
    return result | {
        "ms_per_token": round(statistics.median(rounds), 2),
        "round_ms": [round(ms, 2) for ms in rounds],
        "start_s": round(result["start_s"], 1),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / GB, 2),
    }


def pool_counts(cache):
    return cache.pool_counts if isinstance(cache, QuestCache) else (0, 0)


def host_bytes(cache):
    """Bytes that a cache has in the host's memory."""
    if isinstance(cache, QuestCache):
        return sum(host.blocks.values())
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.nbytes for tensor in tensors if not tensor.is_cuda)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, help="model shape:rows:tokens of context[:GiB]")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS)[:6])
    parser.add_argument("--budget", type=int, default=512, help="tokens")
    parser.add_argument("--steps", type=int, default=32, help="tokens timed per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--noise", type=float, default=NOISE, help="in the embeddings; more of it moves more")
    parser.add_argument("--prompt", action="store_true", help="have the model read the context, and measure that")
    parser.add_argument("--output", type=Path, default=RESULTS / "offload_gpu.json")
    return parser.parse_args()


def write(report, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    conditions = "".join(f"- {name}: {value}\n" for name, value in report["environment"].items())
    title = "Keys and values in the host's memory: ms per token, GB of the cache on GPU and host"
    path.with_suffix(".md").write_text(f"# {title}\n\n{markdown(offload_table(report))}\n{conditions}")


def main():
    arguments = parse_arguments()
    report = {"environment": describe("cuda"), "budget": arguments.budget, "noise": arguments.noise, "results": []}
    model, shape_of_model = None, None
    for case in arguments.cases:
        shape, batch_size, context, *limit = case.split(":")
        batch_size, context = int(batch_size), int(context)
        free()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, float(limit[0]) * 2**30 / total) if limit else 1.0)
        if shape != shape_of_model:
            model = None
            free()
            model, shape_of_model = make_model(shape, 2**21), shape
            be_like_real(model, arguments.noise)
        for way in arguments.ways:
            result = {"shape": shape, "batch_size": batch_size, "context": context, "way": WAYS[way][0]}
            result |= {"limit_gib": float(limit[0])} if limit else {}
            try:
                result |= measure(model, way, batch_size, context, arguments)
            except (torch.OutOfMemoryError, QuestError) as error:  # of the GPU or of the host
                result["error"] = str(error).splitlines()[0]
            model.__dict__.pop("_compiled_call", None)
            model.__dict__.pop("get_compiled_call", None)
            report["results"].append(result)
            print(json.dumps(result), flush=True)
            write(report, arguments.output)
            free()
    Console(width=160).print(offload_table(report))


if __name__ == "__main__":
    main()
