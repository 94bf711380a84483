"""What an evaluation leaves behind: a results file that an interrupted run goes on with, a table and a plot."""

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedModel

from .. import __version__, tiny
from .methods import Way


class Results:
    """Records of an evaluation, unit by unit, kept in a JSON file if there is a path.

    Units that the file already has are not run again, so the same command goes on after an interruption. So does one
    with more values of the `growing` names of the configuration, which are lists.

    Raises:
        ValueError: if the file was written with another configuration, or is no results file.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        configuration: dict[str, Any],
        output: Path | str | None = None,
        growing: Sequence[str] = (),
    ):
        self.growing = growing
        self.path = None if output is None else Path(output)
        self.report = {
            "command": shlex.join(["hf-quest", *sys.argv[1:]]),
            "configuration": {
                **configuration,
                "model": "hf_quest.tiny" if model.name_or_path == str(tiny.PATH) else model.name_or_path,
                "weights": fingerprint(model),
                "dtype": str(model.dtype).removeprefix("torch."),
            },
            "environment": environment(model.device),
            "is_complete": False,
            "records": [],
        }
        # What JSON makes of a configuration, to compare with what a file holds.
        self.report = json.loads(json.dumps(self.report))
        if self.path is not None and self.path.exists():
            self._continue()

    def _continue(self) -> None:
        try:
            earlier = json.loads(self.path.read_text())
            before, now = earlier["configuration"], self.report["configuration"]
            grown = {name: list(dict.fromkeys([*before[name], *now[name]])) for name in self.growing}
            is_same = before | grown == now | grown
            self.report["configuration"] = now | grown
            self.report["records"] = earlier["records"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path} exists and is not a results file. Give another --output.") from None
        if not is_same:
            raise ValueError(
                f"{self.path} holds results of another configuration or other weights. Delete it or give another "
                "--output."
            )

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.report["records"]

    def run(self, units: Iterable[str], evaluate: Callable[[str], Iterable[dict[str, Any]]]) -> None:
        """Add the records of each unit, with a progress bar; `evaluate` is called for those that are missing."""
        units = list(units)
        done = {record["unit"] for record in self.records}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), transient=True, console=Console(stderr=True)
        ) as progress:
            task = progress.add_task("", total=len(units))
            for unit in units:
                progress.update(task, description=unit)
                if unit not in done:
                    with torch.no_grad():
                        self.report["records"] += [{"unit": unit, **record} for record in evaluate(unit)]
                    self.write()
                progress.advance(task)
        self.report["is_complete"] = True
        self.write()

    def write(self) -> None:
        """At once or not at all, one record a line."""
        if self.path is None:
            return
        head = {name: value for name, value in self.report.items() if name != "records"}
        records = ",\n".join(json.dumps(record) for record in self.records)
        text = json.dumps(head, indent=1)[:-2] + f',\n "records": [\n{records}\n ]\n}}\n'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(self.path.name + ".part")
        unfinished.write_text(text)
        os.replace(unfinished, self.path)


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of the model's vectors (norms and biases), which no training leaves as they were."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def environment(device: torch.device) -> dict[str, str | None]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "processor": processor(device),
        **versions,
        "transformers": transformers.__version__,
        "hf_quest": __version__,
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of this checkout, with `-dirty` where its code differs from it, or None outside of git.

    HF_QUEST_COMMIT tells it where the files are without their repository.
    """
    if "HF_QUEST_COMMIT" in os.environ:
        return os.environ["HF_QUEST_COMMIT"]
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed, perhaps below another repository
        return None
    result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return result.stdout.strip() or None


def processor(device: torch.device) -> str:
    """The name of the GPU or CPU behind `device`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def read_text(path: Path | str) -> str:
    """The text of a UTF-8 file.

    Raises:
        ValueError: in one line, for a file that cannot be read, is not text or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    if not text.strip():
        raise ValueError(f"{path} is empty.")
    return text


def way_of(record: dict[str, Any]) -> Way:
    return Way(record["method"], record["budget"])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def comparison(names: Sequence[str], cells: Iterable[tuple[tuple[str, ...], Way, str]]) -> Table:
    """One row for what `names` tell and each budget, one column for each method.

    `cells` are (what `names` tell, way, text), in the order of rows and columns wanted. Dense attention has no budget
    and stands beside each.
    """
    methods: dict[str, None] = {}
    rows: dict[tuple[str, ...], dict[Way, str]] = {}
    for row, way, text in cells:
        methods[way.method] = None
        rows.setdefault(row, {})[way] = text
    table = Table(*names, "budget", *methods)
    for row, texts in rows.items():
        budgets = sorted({way.budget for way in texts if way.budget is not None})
        for budget in budgets or [None]:
            of_budget = (texts.get(Way(method, budget)) or texts.get(Way(method, None), "") for method in methods)
            table.add_row(*row, "-" if budget is None else f"{budget:,}", *of_budget)
    return table


def merged(records: Iterable[dict[str, Any]], names: Sequence[str], values: str) -> dict[tuple, list]:
    """The lists `values` of all units' records of the same `names`, method and budget, put together."""
    together: dict[tuple, list] = {}
    for record in records:
        key = (tuple(record[name] for name in names), way_of(record))
        together.setdefault(key, []).extend(record[values])
    return together


def spread(items: Sequence, fraction: float) -> list:
    """A `fraction` of the items, at least one, spread evenly over all."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is a share above 0 and up to 1, not {fraction}.")
    count = max(1, round(len(items) * fraction))
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


def markdown(table: Table) -> str:
    """A rich table as Markdown."""
    header = [str(column.header) for column in table.columns]
    rows = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, ["---"] * len(header), *rows])


def write_table(path: Path, report: dict[str, Any], table: Table) -> None:
    """Markdown beside the results file: the command, where it ran, and the table."""
    where = report["environment"]
    commit = f", commit {where['commit']}" if where.get("commit") else ""
    path.with_suffix(".md").write_text(
        f"`{report['command']}`\n\n{where['processor']}, torch {where['torch']}, transformers "
        f"{where['transformers']}, hf_quest {where['hf_quest']}{commit}, {report['configuration']['dtype']}\n\n"
        f"{markdown(table)}"
    )
