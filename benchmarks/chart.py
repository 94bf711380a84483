"""Draws docs/chart.svg, what Quest gains and what it costs, from the results that are kept in `benchmarks/results`.

python benchmarks/chart.py
"""

import json
import math

from tables import RESULTS, ROOT

from hf_quest.evaluation.plots import figure, save
from hf_quest.evaluation.selection import means

CHART = ROOT / "docs" / "chart.svg"
SPEED, LOSS = RESULTS / "generate_gpu.json", RESULTS / "selection_smollm2.json"
DENSE = ("DynamicCache, sdpa", "StaticCache, sdpa, compiled")
LENGTH = 8192  # tokens of the loss
METHODS = {"published": "the paper's score", "default": "default score", "codes-tokens": "tokens by codes"}
PAPERS_SCORE = "0.1.0"  # the version whose caches had no other score
GREEN, GREY, LIGHT = "#0f766e", "#94a3b8", "#5eead4"


def speeds():
    """(tokens, ms per token of the best dense way, of Quest) of one row of Llama-3.1-8B's shape, by tokens."""
    found = {}
    for result in json.loads(SPEED.read_text())["results"]:
        if result["shape"] == "llama-3.1-8b" and result["batch_size"] == 1 and "ms_per_token" in result:
            found.setdefault(result["context"], {})[result["way"]] = result["ms_per_token"]
    return [
        (tokens, min(ways[way] for way in DENSE if way in ways), ways["QuestCache"])
        for tokens, ways in sorted(found.items())
        if set(DENSE) & set(ways)
    ]


def made_with():
    """(version, score) of the speeds."""
    version = json.loads(SPEED.read_text())["environment"]["hf_quest"]
    return version, "the paper's score" if version == PAPERS_SCORE else "default score"


def losses():
    """(budget, rise of perplexity in percent by each of METHODS) at LENGTH, by budget."""
    found = {}
    for (length, way), values in means(json.loads(LOSS.read_text())).items():
        if length == LENGTH and way.method in METHODS:
            found.setdefault(way.budget, {})[way.method] = 100 * math.expm1(values["loss_rise"])
    return [(budget, *(found[budget][method] for method in METHODS)) for budget in sorted(found) if budget >= 256]


def labels():
    """What is written at the bars of each panel."""
    of_speeds = [(f"{dense:.1f}", f"{quest:.1f}") for _, dense, quest in speeds()]
    return of_speeds, [[f"+{rise:.0f}" if rise > 9.5 else f"+{rise:.1f}" for rise in rises] for _, *rises in losses()]


def draw_groups(axes, groups, names, texts, ticks):
    width = 0.8 / len(names)
    for place, (_, *values) in enumerate(groups):
        for side, (value, name, color) in enumerate(zip(values, names, (GREY, GREEN, LIGHT), strict=False)):
            x = place + width * (side - (len(names) - 1) / 2)
            axes.bar(x, value, 0.95 * width, color=color, label=name if place == 0 else None, zorder=2)
            axes.text(x, value, texts[place][side], ha="center", va="bottom", fontsize=8.5)
    axes.set_xticks(range(len(groups)), ticks)
    axes.grid(visible=False, axis="x")
    axes.legend(
        frameon=False,
        loc="upper center",
        ncols=len(names),
        columnspacing=1,
        handlelength=1.2,
        bbox_to_anchor=(0.5, -0.2),
    )
    axes.margins(y=0.12)


def chart():
    drawing = figure(figsize=(10.4, 3.9))
    left, right = drawing.subplots(1, 2, width_ratios=(2, 3))
    speed_labels, loss_labels = labels()
    version, score = made_with()
    draw_groups(
        left,
        speeds(),
        ("dense, best stock cache", "Quest, budget 2,048"),
        speed_labels,
        [f"{tokens:,}" for tokens, *_ in speeds()],
    )
    left.set_xlabel("context, tokens")
    left.set_title(
        f"Gain: ms for one token, version {version}, {score}\nLlama-3.1-8B's shape, random weights, H200", fontsize=11
    )
    draw_groups(
        right,
        losses(),
        list(METHODS.values()),
        loss_labels,
        [f"{budget:,}" for budget, *_ in losses()],
    )
    right.set_xlabel("budget, tokens")
    right.set_title(f"Cost: rise of perplexity over dense, %\nSmolLM2-135M, pretrained, {LENGTH:,} tokens", fontsize=11)
    return drawing


if __name__ == "__main__":
    save(chart(), CHART)
