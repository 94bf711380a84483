"""Milliseconds per token of `generate` over several GPUs, Quest and dense through the same cache and kernels.

    python benchmarks/bench_parallel.py save FOLDER             # random weights for the two commands below
    python benchmarks/bench_parallel.py load FOLDER             # on one GPU
    torchrun --nproc-per-node 2 benchmarks/bench_parallel.py load FOLDER
    python benchmarks/bench_parallel.py layers                  # the 70B shape, its layers over all GPUs

`load` also compares the logits after a prompt that is really read: those of several GPUs and those that one GPU has
left in FOLDER; in bfloat16 sums over GPUs round otherwise. `layers` makes the weights where they stay, in bfloat16 if
the GPUs hold them beside the cache and otherwise in int4 (torchao). Contexts are filled and times taken as in
`bench_generate.py`.
"""

import argparse
import gc
import json
import os
from functools import partial
from pathlib import Path

import bench_generate
import torch
import torch.distributed as dist
from bench_generate import BEYOND, SHAPES, make_model, measure
from environment import describe
from tables import RESULTS
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_quest import CACHE_NAME, QuestCache

SHAPES["llama-3.1-70b"] = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
RESERVE = 10e9  # bytes per GPU for what is neither weights nor cache
PROMPT, ANSWER = 8192, 32  # tokens of the comparison


def layers_over_gpus(shape, num_layers, context):
    """A model of random weights whose layers are spread over all GPUs in order, and what its weights are."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    sizes = SHAPES[shape] | ({"num_hidden_layers": num_layers} if num_layers else {})
    config = LlamaConfig(**sizes, head_dim=128, max_position_embeddings=2**18, bos_token_id=None, eos_token_id=None)
    config._attn_implementation = "quest"
    num_gpus = torch.cuda.device_count()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    cache_bytes = config.num_hidden_layers * context * config.num_key_value_heads * config.head_dim * 4 * 1.25
    weight_bytes = 2 * sum(weight.numel() for weight in model.parameters())
    total = sum(torch.cuda.get_device_properties(gpu).total_memory - RESERVE for gpu in range(num_gpus))
    is_int4 = weight_bytes + cache_bytes > total

    device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": num_gpus - 1, "lm_head": num_gpus - 1}
    for idx in range(config.num_hidden_layers):
        gpu = idx * num_gpus // config.num_hidden_layers
        device_map[f"model.layers.{idx}"] = gpu
        with torch.device("cuda", gpu), torch.cuda.device(gpu):
            model.model.layers[idx] = layer = LlamaDecoderLayer(config, idx).eval()
            if is_int4:
                from bench_quantised import int4_weights
                from torchao.quantization import quantize_

                quantize_(layer, int4_weights())
    with torch.device("cuda", 0):
        model.model.embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    with torch.device("cuda", num_gpus - 1):
        model.model.norm = type(model.model.norm)(config.hidden_size, config.rms_norm_eps)
        model.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    torch.set_default_dtype(torch.float32)
    # The hooks of `device_map`, without the moves that bring weights to their device: they are there.
    for name, gpu in device_map.items():
        add_hook_to_module(model.get_submodule(name), AlignDevicesHook(execution_device=gpu))
    add_hook_to_module(model, AlignDevicesHook(execution_device=0, io_same_device=True))
    model.hf_device_map = device_map
    return model.requires_grad_(False), "int4" if is_int4 else "bfloat16"


def fill(num_gpus, cache, config, batch_size, num_tokens):
    """As bench_generate's, with the KV heads of this process and the layers over its GPUs."""
    num_kv_heads = config.num_key_value_heads // (dist.get_world_size() if dist.is_initialized() else 1)
    for layer_idx in range(config.num_hidden_layers):
        gpu = layer_idx * num_gpus // config.num_hidden_layers
        device = torch.device("cuda", torch.cuda.current_device() if num_gpus == 1 else gpu)
        shape = (batch_size, num_kv_heads, num_tokens, config.head_dim)
        keys, values = (torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
        handed_over, _ = cache.update(keys, values, layer_idx)
        handed_over.quest_layer.handed.is_under_way = False  # no attention follows


@torch.no_grad()
def read_and_answer(model, budget):
    """Logits [ANSWER, V] after a prompt that is read in chunks, teacher-forced."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (1, PROMPT + ANSWER), generator=generator).to(model.device)
    cache = QuestCache(budget=budget)
    model(ids[:, :PROMPT], **{CACHE_NAME: cache}, logits_to_keep=1)
    steps = (ids[:, idx : idx + 1] for idx in range(PROMPT, PROMPT + ANSWER))
    return torch.cat([model(step, **{CACHE_NAME: cache}).logits[0].float().cpu() for step in steps])


def compared(logits, expected):
    return {
        "relative_error": ((logits - expected).norm() / expected.norm()).item(),
        "same_tokens": (logits.argmax(-1) == expected.argmax(-1)).float().mean().item(),
    }


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["save", "load", "layers"])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--shape", choices=SHAPES, help="llama-3.1-8b to save, llama-3.1-70b in layers")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--context", type=int, default=131072, help="tokens")
    parser.add_argument("--budget", type=int, default=2048, help="tokens")
    parser.add_argument("--ways", nargs="+", default=["quest-eager", "quest-recorded"])
    parser.add_argument("--steps", type=int, default=32, help="tokens timed per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    bench_generate.fill = partial(fill, torch.cuda.device_count() if arguments.job == "layers" else 1)
    torch.manual_seed(0)  # the same tokens in every process
    num_ranks = int(os.environ.get("WORLD_SIZE", 1))
    weights, comparison = "bfloat16", None
    if arguments.job == "save":
        make_model(arguments.shape or "llama-3.1-8b", 2**18).save_pretrained(arguments.folder)
        return
    if arguments.job == "load":
        where = {"tp_plan": "auto"} if num_ranks > 1 else {"device_map": "cuda:0"}
        options = {"dtype": torch.bfloat16, "attn_implementation": "quest"}
        model = AutoModelForCausalLM.from_pretrained(arguments.folder, **options, **where).eval()
        path = arguments.folder / "expected.pt"
        logits = {budget: read_and_answer(model, budget) for budget in (arguments.budget, BEYOND)}
        if num_ranks == 1:
            torch.save(logits, path)
        elif path.exists():
            expected = torch.load(path)
            names = {arguments.budget: "quest", BEYOND: "dense"}
            comparison = {names[budget]: compared(logits[budget], expected[budget]) for budget in logits}
        name = f"parallel_tp{num_ranks}"
    else:
        model, weights = layers_over_gpus(arguments.shape or "llama-3.1-70b", arguments.layers, arguments.context)
        name = f"parallel_layers{torch.cuda.device_count()}"
    report = {
        "environment": describe("cuda"),
        "gpus": num_ranks if arguments.job == "load" else torch.cuda.device_count(),
        "weights": weights,
        "num_layers": model.config.num_hidden_layers,
        "hidden_size": model.config.hidden_size,
        "context": arguments.context,
        "budget": arguments.budget,
        "beside_one_gpu": comparison,
        "results": [],
    }
    for way in arguments.ways:
        result = {"way": bench_generate.WAYS[way].title}
        for kind, budget in (("dense", BEYOND), ("quest", arguments.budget)):
            gpus = range(torch.cuda.device_count()) if num_ranks == 1 else [torch.cuda.current_device()]
            for gpu in gpus:
                torch.cuda.reset_peak_memory_stats(gpu)
            result[kind] = measure(model, way, 1, arguments.context, budget, arguments.steps, arguments.rounds)
            result[kind]["peak_gb_per_gpu"] = [round(torch.cuda.max_memory_allocated(gpu) / 1e9, 1) for gpu in gpus]
            gc.collect()
            torch.cuda.empty_cache()
        result["speedup"] = round(result["dense"]["ms_per_token"] / result["quest"]["ms_per_token"], 2)
        report["results"].append(result)
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(result), flush=True)
            arguments.output.mkdir(parents=True, exist_ok=True)
            (arguments.output / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
