"""Milliseconds per token of `generate` with int4 weights (torchao), Quest and dense through the same cache and kernels.

    python benchmarks/bench_quantised.py

Weights are random, made and quantised on the GPU; contexts are filled and times taken as in `bench_generate.py`.
"""

import argparse
import gc
import json
from pathlib import Path

import bench_generate
import torch
import torchao
from bench_generate import BEYOND, HEADROOM, make_model, measure
from environment import describe
from tables import RESULTS
from torchao.quantization import Int4WeightOnlyConfig, quantize_

# The step recorded as it stands comes first: it needs no compilation, so short runs have at least these figures.
WAYS = ("quest-recorded", "quest-compiled", "quest-compiled-ahead", "quest-overlapped-ahead", "quest", "quest-eager")


def int4_weights(group_size=128):
    """torchao's packing for PyTorch's own int4 matrix product; the default one needs further kernels."""
    return Int4WeightOnlyConfig(group_size=group_size, int4_packing_format="tile_packed_to_4d")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b", choices=bench_generate.SHAPES)
    parser.add_argument("--context", type=int, default=32768, help="tokens")
    parser.add_argument("--budget", type=int, default=2048, help="tokens")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--steps", type=int, default=128, help="tokens timed per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "quantised_gpu.json")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    report = {
        "environment": describe("cuda") | {"torchao": torchao.__version__},
        "shape": arguments.shape,
        "weights": "int4, groups of 128, tile_packed_to_4d; embedding and lm_head bfloat16",
        "batch_size": 1,
        "context": arguments.context,
        "budget": arguments.budget,
        "results": [],
    }
    model = make_model(arguments.shape, arguments.context + 8 * HEADROOM)
    quantize_(model.model.layers, int4_weights())
    gc.collect()
    for name in arguments.ways:
        result = {"way": bench_generate.WAYS[name].title}
        for kind, budget in (("dense", BEYOND), ("quest", arguments.budget)):
            result[kind] = measure(model, name, 1, arguments.context, budget, arguments.steps, arguments.rounds)
            gc.collect()
            torch.cuda.empty_cache()
        result["speedup"] = round(result["dense"]["ms_per_token"] / result["quest"]["ms_per_token"], 2)
        report["results"].append(result)
        print(json.dumps(result), flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
