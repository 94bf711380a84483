"""What the commands below `hf-quest eval`, and `hf-quest calibrate`, do with a report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from .calibration_report import calibration_table, write_html
from .compare_report import compare_table, draw_compare
from .harness import harness_table
from .hits import hits_table
from .longbench import longbench_table
from .passkey import passkey_table
from .perplexity import draw_over_length, perplexity_table
from .plots import draw_over_budget, save
from .prompts import prefill_table
from .recall import recall_table
from .report import write_table
from .ruler import counted, ruler_table
from .selection import draw_heads, draw_selection, selection_table
from .top10 import draw_by_layer, top10_table

TABLES = {
    "passkey": passkey_table,
    "recall": recall_table,
    "perplexity": perplexity_table,
    "top10": top10_table,
    "prefill": prefill_table,
    "longbench": longbench_table,
    "calibration": calibration_table,
    "ruler": ruler_table,
    "harness": harness_table,
    "selection": selection_table,
    "compare": compare_table,
    "hits": hits_table,
}
# By what is added to the results file's name.
PLOTS: dict[str, dict[str, Callable[[dict[str, Any]], Any]]] = {
    "passkey": {"": lambda report: draw_over_budget(report, ["length"])},
    "recall": {"": lambda report: draw_over_budget(report, ["job", "length"])},
    "perplexity": {"": draw_over_length},
    "top10": {
        "": lambda report: draw_over_budget(report, ["job"], label="top-10 tokens attended to"),
        "_by_layer": draw_by_layer,
    },
    "ruler": {"": lambda report: draw_over_budget(counted(report), ["length"], label="score")},
    "selection": {
        "": draw_selection,
        "_read": lambda report: draw_selection(report, over="read_share"),
        "_heads": draw_heads,
    },
    "compare": {"": draw_compare},
    "longbench": {"": lambda report: draw_over_budget(report, ["set"], label="score")},
}


WIDEST = 1_000  # columns of a table


def print_whole(table: Table) -> None:
    """Print a table of which no number is cut off: closer together in a narrow terminal, as wide as it is elsewhere."""
    console = Console()
    width = Measurement.get(console, console.options.update_width(WIDEST), table)
    if not console.is_terminal:
        console.width = max(console.width, width.maximum)
    elif width.maximum > console.width:
        squeeze(table, console.width)
    console.print(table)


def squeeze(table: Table, width: int) -> None:
    """Make columns as narrow as their numbers, and titles longer in turn: where there is no room, all of them fold."""
    numbers = [max((len(str(cell)) for cell in column.cells), default=1) for column in table.columns]
    space = 3 if sum(numbers) + 3 * len(numbers) < width else 1  # with a border and, if it fits, padding
    table.padding = (0, space // 2)
    left = width - 1 - sum(numbers) - space * len(numbers)
    for column, least in zip(table.columns, numbers, strict=True):
        column.overflow = "fold"
        if left >= 0:
            longest = max(map(len, str(column.header).split()), default=0)
            column.width = least + min(left, max(longest - least, 0))
            left -= column.width - least


def conclude(report: dict[str, Any], output: Path | None, as_json: bool = False) -> None:
    """Print the table, or the report as JSON; beside the results file, write it as Markdown, and the plots."""
    kind = report["configuration"]["evaluation"]
    table = TABLES[kind](report)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        print_whole(table)
    if output is None:
        return
    write_table(output, report, table)
    try:
        for name, draw in PLOTS.get(kind, {}).items():
            if name == "_heads" and not report["configuration"]["by_layer"]:
                continue
            save(draw(report), output.with_name(f"{output.stem}{name}.svg"))
        if kind == "calibration":
            write_html(report, output.with_suffix(".html"))
    except ValueError as error:  # no matplotlib; `hf-quest eval report` draws them where there is
        Console(stderr=True).print(str(error), style="yellow")
