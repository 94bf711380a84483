"""The one table of `hf-quest eval compare`, a method's lines in it, and its plot: loss over bytes read."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.table import Table

from .compare import QUESTIONS, SPEED, TEXT
from .compare_runs import FIRST, LATER
from .methods import DENSE, METHODS, Way
from .oracles import ORACLES
from .plots import MARKERS, add_legend, figure
from .report import mean, way_of

Row = dict[Any, float]  # by the name of a measure, or by task and protocol
Column = Callable[[Row, Row], str]  # of a row and dense attention's
COLORS = (*(f"C{index}" for index in range(10)), "navy", "darkgreen", "salmon", "gold")
ORDER = (*METHODS, *ORACLES)

OF_TEXT: dict[str, Column] = {
    "tokens kept": lambda row, dense: f"{row['kept']:,.0f}",
    "keys and values, MB": lambda row, dense: f"{row['kv_bytes'] / 1e6:.2f}",
    "metadata, MB": lambda row, dense: f"{row['metadata_bytes'] / 1e6:.2f}",
    "read in a step, MB": lambda row, dense: (
        f"{row['read_bytes'] / 1e6:.2f} ({100 * row['read_bytes'] / dense['read_bytes']:.0f} %)"
    ),
    "KL, nats": lambda row, dense: f"{row['kl']:.3f}",
    "perplexity": lambda row, dense: (
        f"{math.exp(row['losses']):.2f}" if row is dense else f"{100 * math.expm1(row['loss_rise']):+.1f} %"
    ),
}


def rows_of(report: dict[str, Any]) -> dict[tuple[int, Way], Row]:
    """The measures of each length and way in the table's order: means, but of time the least and of memory the most."""
    lists: dict[tuple[int, Way], dict[Any, list[float]]] = {}
    for record in report["records"]:
        if record["method"] not in ORDER:
            continue
        found = lists.setdefault((record["length"], way_of(record)), {})
        for name, value in record.items():
            if name == "scores":
                found.setdefault((record["task"], record["protocol"]), []).extend(value)
            elif name not in ("answers", "length", "budget") and not isinstance(value, str | None):
                found.setdefault(name, []).extend(value if isinstance(value, list) else [value])
    reductions = {"ms": min, "cpu_ms": min, "peak_bytes": max}
    keys = sorted(lists, key=lambda key: (key[0], key[1].budget or 0, ORDER.index(key[1].method)))
    return {key: {name: reductions.get(name, mean)(values) for name, values in lists[key].items()} for key in keys}


def answers(tasks: Sequence[str]) -> Column:
    """Right answers to these tasks, those that were asked: with the question asked later / asked first, which is the
    same of dense attention."""

    def cell(row: Row, dense: Row) -> str:
        shares = []
        for protocol in (LATER, FIRST):
            scores = [row[task, protocol] for task in tasks if (task, protocol) in row]
            shares += [f"{100 * mean(scores):.0f}"] if scores else []
        return f"{' / '.join(shares)} %" if shares else "-"

    return cell


def columns(report: dict[str, Any], by_task: bool) -> dict[str, Column]:
    """What the table says of a way, by the title of its column."""
    configuration, recorded = report["configuration"], {record["task"] for record in report["records"]}
    tasks = [task for task in QUESTIONS if task in recorded]
    found = dict(OF_TEXT) if TEXT in recorded else {}
    if by_task:
        found |= {f"{task}, later / first": answers([task]) for task in tasks}
    elif tasks:
        counted = {record["task"] for record in report["records"] if record.get("protocol") == FIRST}
        found["answers, later / first"] = answers([task for task in tasks if task in counted])
    if SPEED in recorded:
        machine = configuration["machine"] or report["environment"]["processor"]
        found[f"ms a token ({machine})"] = lambda row, dense: f"{row['ms']:.0f}"
        found["processor, ms"] = lambda row, dense: f"{row['cpu_ms']:.0f}"
        found["peak memory, MB"] = lambda row, dense: f"{row['peak_bytes'] / 1e6:.0f}"
    return found


def lines(report: dict[str, Any], by_task: bool) -> list[tuple[int, Way, dict[str, str]]]:
    """The table's lines: of each length and way the cells by their columns. What is not measured is left out."""
    rows, found = rows_of(report), []
    for (length, way), row in rows.items():
        cells = {}
        for column, cell in columns(report, by_task).items():
            with suppress(KeyError):
                cells[column] = cell(row, rows[length, Way(DENSE, None)])
        found.append((length, way, cells))
    return found


def compare_table(report: dict[str, Any]) -> Table:
    """One line for each length, budget and method."""
    titles = list(columns(report, by_task=True))
    table = Table("tokens", "budget", "method", *titles)
    for length, way, cells in lines(report, by_task=True):
        table.add_row(f"{length:,}", budget_of(way), way.method, *(cells.get(column, "-") for column in titles))
    return table


def method_table(reports: Sequence[dict[str, Any]], methods: Sequence[str]) -> Table:
    """The lines of some methods, and of dense attention, in the tables of several models."""
    titles = list(dict.fromkeys(column for report in reports for column in columns(report, by_task=False)))
    table = Table("model", "tokens", "budget", "method", *titles)
    for report in reports:
        for length, way, cells in lines(report, by_task=False):
            if way.method in (DENSE, *methods):
                known = (title(report), f"{length:,}", budget_of(way), way.method)
                table.add_row(*known, *(cells.get(column, "-") for column in titles))
    return table


def budget_of(way: Way) -> str:
    return "all" if way.budget is None else f"{way.budget:,}"


def title(report: dict[str, Any]) -> str:
    """What the model is called, and that the one inside was made for this."""
    name = report["configuration"]["model"]
    return "the model inside, made for this" if name == "hf_quest.tiny" else Path(name).name


def draw_compare(report: dict[str, Any]) -> Any:
    """Divergence from dense attention over the share of its bytes that a step reads, a panel for each length.

    Raises:
        ValueError: where no text was predicted by any method.
    """
    rows = {key: row for key, row in rows_of(report).items() if "kl" in row}
    lengths = list(dict.fromkeys(length for length, way in rows if way.budget))
    if not lengths:
        raise ValueError("Nothing is drawn, since no method here has predicted a text.")
    drawing = figure(figsize=(5 * len(lengths) + 1.6, 4))
    for length, axes in zip(lengths, drawing.subplots(1, len(lengths), squeeze=False)[0], strict=True):
        dense = rows[length, Way(DENSE, None)]
        points: dict[str, list[tuple[float, float]]] = {}
        for (of_length, way), row in rows.items():
            if of_length == length and way.budget:
                share = 100 * row["read_bytes"] / dense["read_bytes"]
                points.setdefault(way.method, []).append((share, row["kl"]))
        for index, (method, line) in enumerate(points.items()):
            axes.plot(*zip(*sorted(line), strict=True), label=method, **style_of(method, index))
        axes.set(xscale="log", yscale="log", title=f"{title(report)}, {length:,} tokens")
        axes.set_xlabel("bytes that a step reads, % of dense attention's")
        for formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            formatter("{x:g}")
    drawing.axes[0].set_ylabel("KL from dense attention, nats")
    add_legend(drawing, drawing.axes[0])
    return drawing


def style_of(method: str, index: int) -> dict[str, Any]:
    """Oracles are black."""
    if method in ORACLES:
        return {"color": "black", "linestyle": ":", "marker": "+" if method == "best-pages" else "x", "zorder": 3}
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[method], "markersize": 5}
