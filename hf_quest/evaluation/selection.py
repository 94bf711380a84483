"""What each way to choose what a decode step reads costs a model's predictions, beside the best there is."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..seam.local import head_dims_of
from .choices import CHOICES, Choice, parse_choice
from .forced import Forced, Observed
from .methods import Way, check_length
from .perplexity import windows
from .plots import add_legend, figure
from .report import Results, mean, merged, spread

BUDGETS = (128, 256, 512, 1024, 2048)
MEANS = ("kl", "loss_rise", "agreement", "mass", "top10", "attended")


def evaluate_selection(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    source: str = "text",
    lengths: Sequence[int] = (4096,),
    methods: Sequence[str] = tuple(CHOICES),
    budgets: Sequence[int] = BUDGETS,
    num_steps: int = 128,
    num_windows: int = 10,
    dense_layers: int = 2,
    by_layer: bool = False,
    fraction: float = 1.0,
    batch_size: int = 1,
    output: Path | str | None = None,
) -> dict[str, Any]:
    """Predictions of the last `num_steps` tokens of windows of a text, by method and budget, beside dense attention's.

    Args:
        model, tokenizer: as `methods.load` brings them.
        text: what to predict. source: its name, for the report.
        lengths: tokens of a window, the steps included.
        methods: as `choices.parse_choice` reads them.
        budgets: tokens. Those that cover a window are left out.
        num_steps: tokens at the end of a window that choose.
        num_windows: at equal steps through the text; fewer where it holds fewer.
        dense_layers: how many layers at the start attend everything.
        by_layer: keep attention mass and top-10 tokens for each layer and query head.
        fraction: the share of the windows to run.
        batch_size: windows at a time.
        output: a JSON file, with which an interrupted run goes on.

    Returns:
        The report: configuration, environment and records, each with the measures of a batch by method and budget.

    Raises:
        ValueError: for what cannot be evaluated, before anything is.
    """
    choices = {method: parse_choice(method) for method in methods}
    ways = {}
    for length in lengths:
        check_length(model, length, [])
        if not 1 <= num_steps < length - 1:
            raise ValueError(f"Of {length:,} tokens {num_steps:,} cannot be steps: give at least 1 and fewer than all.")
        ways[length] = make_ways(choices, budgets, length - num_steps - 1)
    configuration = {
        "evaluation": "selection",
        "source": source,
        "lengths": list(lengths),
        "methods": list(methods),
        "budgets": list(budgets),
        "num_steps": num_steps,
        "num_windows": num_windows,
        "dense_layers": dense_layers,
        "by_layer": by_layer,
        "fraction": fraction,
        "batch_size": batch_size,
    }
    results = Results(model, configuration, output)
    units: dict[str, tuple[int, np.ndarray]] = {}
    for length in lengths:
        rows = np.array(spread(windows(tokenizer, text, length + 1, num_windows), fraction))
        for first in range(0, len(rows), batch_size):
            units[f"{length:,} tokens, from window {first + 1}"] = (length, rows[first : first + batch_size])

    def evaluate(unit: str) -> Iterator[dict[str, Any]]:
        length, rows = units[unit]
        forced = Forced(model, torch.from_numpy(rows).to(model.device), num_steps, dense_layers)
        dense, _ = forced.log_probs(None)
        dense_losses = forced.losses(dense)
        yield {"length": length, "method": "dense", "budget": None, "losses": dense_losses.tolist()}
        for way in ways[length]:
            log_probs, layers = forced.log_probs(choices[way.method], way.budget)
            record = {"length": length, **way._asdict(), **compare(dense, log_probs), **kept(layers)}
            record["loss_rise"] = (forced.losses(log_probs) - dense_losses).tolist()
            record["read_share"] = read_share(model, choices[way.method], way.budget, length, mean(record["attended"]))
            if by_layer:
                record["layers"] = {
                    str(layer_idx): {name: getattr(layer, name).mean(dim=0).tolist() for name in ("mass", "top10")}
                    for layer_idx, layer in layers.items()
                }
            yield record

    results.run(units, evaluate)
    return results.report


def make_ways(choices: dict[str, Choice], budgets: Sequence[int], num_context: int) -> list[Way]:
    """Every method at every budget that leaves something of the context out.

    Raises:
        ValueError: for a budget that a method cannot have, or if there is none left.
    """
    ways = []
    for method, choice in choices.items():
        for budget in sorted(set(budgets)):
            if choice.num_pages(budget) < 2 or budget % choice.page_size:
                raise ValueError(
                    f"{method} with pages of {choice.page_size} tokens needs a budget of whole pages, at least two. It "
                    f"is {budget}."
                )
            if budget < num_context:
                ways.append(Way(method, budget))
    if not ways:
        raise ValueError(
            f"The budgets cover all {num_context:,} tokens of the context, so nothing would be left out. Give smaller "
            "budgets, longer text, or at least one method and budget."
        )
    return ways


def compare(dense: Tensor, log_probs: Tensor) -> dict[str, list[float]]:
    """By window, of [B, steps, V] log-probabilities: the mean Kullback-Leibler divergence from dense attention's, in
    nats, and how often the likeliest token is the same."""
    divergence = torch.nn.functional.kl_div(log_probs, dense, reduction="none", log_target=True).sum(dim=-1)
    agrees = log_probs.argmax(dim=-1) == dense.argmax(dim=-1)
    return {
        "kl": divergence.clamp(min=0).mean(dim=1).tolist(),
        "agreement": agrees.float().mean(dim=1).tolist(),
    }


def kept(layers: dict[int, Observed]) -> dict[str, list[float]]:
    """By window, means over layers and heads."""
    if not layers:
        raise ValueError("No layer of this model chooses: all of them are dense, local, or masked in another way.")
    return {
        name: torch.stack([getattr(layer, name).flatten(1).mean(dim=1) for layer in layers.values()])
        .mean(dim=0)
        .tolist()
        for name in ("mass", "top10")
    } | {
        "attended": torch.stack([layer.attended for layer in layers.values()]).mean(dim=0).tolist(),
        "most": torch.stack([layer.most for layer in layers.values()]).amax(dim=0).tolist(),
    }


def read_share(model: PreTrainedModel, choice: Choice, budget: int, length: int, attended: float) -> float:
    """Bytes that a step reads in a layer that chooses, over those of all its keys and values, at 16 bits.

    `attended` tokens are what a choice by mass reads; what the others read is their budget.
    """
    num_attended = attended if choice.mass else None
    head_dims = head_dims_of(model.config.get_text_config(decoder=True))
    return mean([choice.bytes_of(budget, length, dim, num_attended) / (4 * dim * length) for dim in head_dims])


def means(report: dict[str, Any]) -> dict[tuple[int, Way], dict[str, float]]:
    """Each measure's mean over windows, by length and way, and as `most` the largest; as `loss` dense attention's."""
    records = report["records"]
    dense = [record for record in records if record["method"] == "dense"]
    found = {key: {"loss": mean(losses)} for key, losses in merged(dense, ("length",), "losses").items()}
    others = [record for record in records if record["method"] != "dense"]
    for name in MEANS:
        for key, values in merged(others, ("length",), name).items():
            found.setdefault(key, {})[name] = mean(values)
    for record in others:
        found[(record["length"],), Way(record["method"], record["budget"])]["read_share"] = record["read_share"]
    counted = [record for record in others if "most" in record]  # results of before have none
    for key, values in merged(counted, ("length",), "most").items():
        found[key]["most"] = max(values)
    return {(length, way): values for ((length,), way), values in found.items()}


def selection_table(report: dict[str, Any]) -> Table:
    """One row for each length, budget and method, the methods of a budget below each other."""
    table = Table(
        "tokens",
        "budget",
        "method",
        "KL, nats",
        "perplexity",
        "same first choice",
        "attention mass",
        "top-10 tokens",
        "KV read",
        "attended, mean / most",
    )
    rows = means(report)
    for (length, way), values in sorted(rows.items(), key=lambda row: (row[0][0], row[0][1].budget or 0)):
        if way.budget is None:
            table.add_row(f"{length:,}", "all", "dense", "0", f"{math.exp(values['loss']):.2f}", *["100 %"] * 4, "all")
            continue
        most = f"{values['most']:,.0f}" if "most" in values else "-"
        table.add_row(
            f"{length:,}",
            f"{way.budget:,}",
            way.method,
            f"{values['kl']:.4f}",
            f"{100 * math.expm1(values['loss_rise']):+.1f} %",
            *(f"{100 * values[name]:.1f} %" for name in ("agreement", "mass", "top10", "read_share")),
            f"{values['attended']:,.0f} / {most}",
        )
    return table


def draw_selection(report: dict[str, Any], over: str = "budget") -> Any:
    """KL over the budget, or over the share of keys and values read: one panel for each length, a line for a method."""
    rows = {key: values for key, values in means(report).items() if key[1].budget}
    lengths = sorted({length for length, _ in rows})
    drawing = figure(figsize=(4 * len(lengths) + 2.5, 4))
    place: dict[str, Callable] = {
        "budget": lambda way, values: way.budget,
        "read_share": lambda way, values: 100 * values["read_share"],
    }
    for length, axes in zip(lengths, drawing.subplots(1, len(lengths), squeeze=False, sharey=True)[0], strict=True):
        for index, method in enumerate(dict.fromkeys(way.method for _, way in rows)):
            line = sorted(
                (place[over](way, values), values["kl"])
                for (of_length, way), values in rows.items()
                if of_length == length and way.method == method
            )
            axes.plot(*zip(*line, strict=True), label=method, **line_style(method, index))
        axes.set(xscale="log", yscale="log", title=f"{length:,} tokens")
        axes.set_xlabel("budget, tokens" if over == "budget" else "share of keys and values read, %")
        for formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            formatter("{x:g}")
        if over == "budget":
            budgets = sorted({way.budget for of_length, way in rows if of_length == length})
            axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
            axes.minorticks_off()
    drawing.axes[0].set_ylabel("KL from dense attention, nats")
    add_legend(drawing, drawing.axes[0])
    return drawing


def line_style(method: str, index: int) -> dict[str, Any]:
    """Oracles are black, the published way is heavy."""
    if parse_choice(method).by == "keys":
        return {"color": "black", "linestyle": "--" if parse_choice(method).unit == "pages" else ":", "zorder": 3}
    return {"color": f"C{index % 10}", "marker": "os^Dvx"[index // 10 % 6], "markersize": 4}


def draw_heads(report: dict[str, Any], name: str = "mass") -> Any:
    """For the longest length and each method and budget, the share of `name` that every layer and head keeps.

    Raises:
        ValueError: if the report was made without `by_layer`.
    """
    length = max(record["length"] for record in report["records"])
    by_way: dict[Way, list[dict[str, Any]]] = {}
    for record in report["records"]:
        if record["length"] == length and "layers" in record:
            by_way.setdefault(Way(record["method"], record["budget"]), []).append(record["layers"])
    if not by_way:
        raise ValueError("There is nothing by layer in these results. Run the evaluation with --by-layer.")
    methods, budgets = (list(dict.fromkeys(values)) for values in zip(*by_way, strict=True))
    layer_names = list(next(iter(by_way.values()))[0])
    drawing = figure(figsize=(2.4 * len(budgets) + 1, (0.6 + 0.15 * len(layer_names)) * len(methods) + 0.6))
    panels = drawing.subplots(len(methods), len(budgets), squeeze=False, sharex=True, sharey=True)
    for way, runs in by_way.items():
        axes = panels[methods.index(way.method)][budgets.index(way.budget)]
        heads = np.mean([[layers[layer][name] for layer in layer_names] for layers in runs], axis=0)
        image = axes.imshow(heads, vmin=0, vmax=1, aspect="auto")
        axes.set_title(f"{way.method}, {way.budget:,}", fontsize=7)
        axes.set_yticks(range(len(layer_names)), layer_names, fontsize=5)
        axes.grid(visible=False)
    drawing.supxlabel("query head")
    drawing.supylabel("layer")
    drawing.colorbar(
        image, ax=panels.ravel().tolist(), label={"mass": "attention mass", "top10": "top-10 tokens"}[name]
    )
    return drawing
