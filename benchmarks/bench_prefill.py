"""Seconds to the first token of stock `generate` on a GPU: stock, dense behind QuestCache, by CritiPrefill, compiled.

    python benchmarks/bench_prefill.py
    python benchmarks/bench_prefill.py --cases yi-9b:131072 --ways dense critical
    python benchmarks/bench_prefill.py --cases llama-3.1-8b:131072 --ways critical critical-compiled --profile
    python benchmarks/bench_prefill.py --cases llama-3.1-8b:262144:32768 --ways dense critical

Weights are random, and so are attention and what is selected. The prompt is written as a text is: stretches on a topic,
whose words come again, among words that are frequent everywhere. Each way runs once, after a warm-up at the same length
in the model's first two layers, of which CritiPrefill leaves one dense and reads one by segments, so that kernels are
loaded and planned for all shapes, and graphs are compiled. `start_s` are the seconds of that warm-up over those of the
same again, and `graphs` how many were compiled in it. What PyTorch keeps on the disk of earlier compilations makes the
start shorter. SDPA takes cuDNN by itself where that is fastest; "flash" allows it FlashAttention 2 only. Results are
written as they come.
"""

import argparse
import gc
import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from bench_generate import make_model
from environment import describe
from rich.console import Console
from tables import RESULTS, STOCK, first_token_table, markdown
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from hf_quest import CACHE_NAME, CritiPrefill, QuestCache, compile_prompts

CASES = ["llama-3.1-8b:32768", "llama-3.1-8b:131072", "yi-9b:131072", "llama-3.1-8b:262144:32768"]
TITLES = {
    "stock": "DynamicCache, sdpa",
    "flash": "DynamicCache, sdpa by flash",
    "dense": "QuestCache, dense",
    "critical": "QuestCache, CritiPrefill",
    "dense-compiled": "QuestCache, dense, compile_prompts(model)",
    "critical-compiled": "QuestCache, CritiPrefill, compile_prompts(model)",
}
TOPIC = 2048  # tokens about one thing
NUM_KERNELS = 25  # that a profile names


def make_prompt(num_tokens, vocab_size):
    """[1, num_tokens]: half of the words by Zipf's law from all, half from the hundred of each topic."""
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"generator": generator, "device": "cuda"}
    common = (vocab_size ** torch.rand(num_tokens, **options)).long()
    num_topics = -(-num_tokens // TOPIC)
    topics = torch.randint(1, vocab_size, (num_topics, 100), **options).repeat_interleave(TOPIC, dim=0)[:num_tokens]
    topical = topics.gather(1, torch.randint(0, 100, (num_tokens, 1), **options))[:, 0]
    return torch.where(torch.rand(num_tokens, **options) < 0.5, common, topical).clamp(1, vocab_size - 1)[None]


def make_cache(kind, context, prefill):
    if kind in STOCK:
        return DynamicCache()
    length = -(-(context + 1) // prefill.block_size) * prefill.block_size
    return QuestCache(max_cache_len=length, prefill=prefill if kind.startswith("critical") else None)


def first_token(model, input_ids, cache, chunk):
    """Seconds of a `generate` of one token."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        **{CACHE_NAME: cache},
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model, kind, context, chunk, prefill):
    """A dict of one way to read a prompt: seconds, those of the start, and GB of memory at its peak, weights too."""
    model.set_attn_implementation("sdpa" if kind in STOCK else "quest")
    input_ids = make_prompt(context, model.config.vocab_size)
    layers, counts = model.model.layers, counters["stats"]["unique_graphs"]
    model.model.layers = layers[:2]
    try:
        first, second = (first_token(model, input_ids, make_cache(kind, context, prefill), chunk) for _ in range(2))
    finally:
        model.model.layers = layers
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = first_token(model, input_ids, make_cache(kind, context, prefill), chunk)
    return {
        "seconds": round(seconds, 3),
        "start_s": round(first - second, 1),
        "graphs": counters["stats"]["unique_graphs"] - counts,
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
    }


def kernels_of(model, kind, context, chunk, prefill):
    """Milliseconds of the GPU by kernel, those that take longest, of one more prompt."""
    input_ids = make_prompt(context, model.config.vocab_size)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        first_token(model, input_ids, make_cache(kind, context, prefill), chunk)
    averages = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return {event.key[:100]: round(event.self_device_time_total / 1e3, 1) for event in averages[:NUM_KERNELS]}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, help="model shape:tokens[:prefill_chunk_size]")
    parser.add_argument("--ways", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--budget", type=int, default=2048, help="tokens")
    parser.add_argument("--dense-layers", type=int, default=1, help="layers that CritiPrefill leaves dense")
    parser.add_argument("--profile", action="store_true", help="print the GPU's time by kernel of each way, too")
    parser.add_argument("--output", type=Path, default=RESULTS / "first_token_gpu.json")
    return parser.parse_args()


def write(report, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    conditions = "".join(f"- {name}: {value}\n" for name, value in report["environment"].items())
    table = markdown(first_token_table(report))
    path.with_suffix(".md").write_text(f"# Reading a prompt: seconds to the first token\n\n{table}\n{conditions}")


def main():
    arguments = parse_arguments()
    prefill = CritiPrefill(budget=arguments.budget, dense_layers=arguments.dense_layers)
    report = {"environment": describe("cuda"), "prefill": str(prefill), "results": []}
    model, shape_of_model = None, None
    for case in arguments.cases:
        shape, context, chunk = [*case.split(":"), None][:3]
        context, chunk = int(context), None if chunk is None else int(chunk)
        if shape != shape_of_model:
            model = None
            gc.collect()
            torch.cuda.empty_cache()
            model, shape_of_model = make_model(shape, 2**19), shape
        for kind in arguments.ways:
            result = {"shape": shape, "context": context, "chunk": chunk, "kind": kind, "way": TITLES[kind]}
            way = (model, kind, context, chunk, prefill)
            compile_prompts(model, kind.endswith("compiled"))
            try:
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if kind == "flash" else nullcontext():
                    result |= measure(*way)
                    if arguments.profile:
                        print(json.dumps({"way": result["way"], "kernel_ms": kernels_of(*way)}, indent=1), flush=True)
            except RuntimeError as error:  # out of memory, or flash asked for chunks, which want a mask
                result["error"] = str(error).splitlines()[0]
            report["results"].append(result)
            print(json.dumps(result), flush=True)
            write(report, arguments.output)
            gc.collect()
            torch.cuda.empty_cache()
    Console(width=160).print(first_token_table(report))


if __name__ == "__main__":
    main()
