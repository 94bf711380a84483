"""The figures at the top of the README are those that a command wrote to `benchmarks/results`."""

import json
import re

from pages import README, ROOT

RESULTS = ROOT / "benchmarks" / "results"
README = README.read_text()


def test_the_numbers_at_the_top_are_measured():
    context_length, ms, dense_ms = re.search(
        r"([\d,]+) tokens of context.*?\*\*([\d.]+) ms instead of ([\d.]+)\*\*", README, re.DOTALL
    ).groups()
    results = json.loads((RESULTS / "generate_gpu.json").read_text())["results"]
    measured = {
        result["way"]: round(result["ms_per_token"], 1)
        for result in results
        if result["context"] == int(context_length.replace(",", "")) and result["batch_size"] == 1
    }
    assert measured["QuestCache"] == float(ms)
    assert min(measured["DynamicCache, sdpa"], measured["StaticCache, sdpa, compiled"]) == float(dense_ms)

    context_length, speedup = re.search(
        r"with\s([\d,]+) tokens of context.*?\*\*([\d.]+)× faster\*\*", README, re.DOTALL
    ).groups()
    contexts = json.loads((RESULTS / "decode_cpu.json").read_text())["contexts"]
    (results,) = [row["results"] for row in contexts if row["context"] == int(context_length.replace(",", ""))]
    dense_ms = results[0]["ms_per_token"]
    sparse_ms = [row["ms_per_token"] for row in results if row["read_share"] < 1]
    assert float(speedup) == round(dense_ms / max(sparse_ms), 1)
