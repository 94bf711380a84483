"""The `hf-quest` command.

It is a package of its own because importing hf_quest takes seconds, for PyTorch and Transformers: what a command needs
is imported when it runs, so that help and mistakes in the options are answered at once.
"""

import importlib.util
import re
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .calibrate import calibrate_command
from .evaluation import EVALUATIONS
from .one_line import Commands, fail, in_one_line
from .options import Device, JsonOption
from .plan import plan_command

QUESTION = "what are the key points of this document, in order?"  # as demo.QUESTION, which is slow to import

app = typer.Typer(cls=Commands, help="Quest sparse attention for Hugging Face Transformers.", no_args_is_help=True)
evaluations = typer.Typer(help="Measure what Quest does to a model's answers.", no_args_is_help=True)
app.add_typer(evaluations, name="eval")
console = Console()

ModelOption = Annotated[
    str | None, typer.Option(help="A model on the Hugging Face hub, or a folder. By default the tiny one inside.")
]
DeviceOption = Annotated[Device, typer.Option(help="Where to run.")]


class Prefill(str, Enum):
    dense = "dense"
    critical = "critical"


def version():
    """Of hf_quest, without importing it."""
    source = Path(importlib.util.find_spec("hf_quest").origin).read_text()
    return re.search(r'__version__ = "(.+)"', source)[1]


def print_version(wanted: bool):
    if wanted:
        print(f"hf-quest {version()}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
):
    pass


@app.command("demo")
@in_one_line
def demo_command(
    file: Annotated[
        Path | None,
        typer.Argument(help="A .txt, .md, .pdf, .docx or .html file. By default a document with marked key points."),
    ] = None,
    question: Annotated[
        str, typer.Option(help="What to ask. The tiny model knows of marked key points, secret codes and pass keys.")
    ] = QUESTION,
    budget: Annotated[int, typer.Option(help="Tokens that each KV head may attend in one decode step.")] = 512,
    model: ModelOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="The longest answer.")] = 384,
    device: DeviceOption = Device.auto,
    prefill: Annotated[
        Prefill, typer.Option(help="How Quest's side reads the document: all of it, or by CritiPrefill.")
    ] = Prefill.dense,
    as_json: JsonOption = False,
):
    """Read a long document once, then let dense attention and Quest answer the same question, side by side."""
    if not question.strip():
        fail("There is no question. Write one, or leave out --question.")
    from .show import show

    show(file, question, budget, model, max_new_tokens, device.value, prefill is Prefill.critical, as_json)


@app.command("app")
@in_one_line
def app_command(
    model: ModelOption = None,
    device: DeviceOption = Device.auto,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in, and fixes the model.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 7860,
    root_path: Annotated[
        str, typer.Option(help="Where a proxy shows the page: a path such as /quest, or the whole URL.")
    ] = "",
):
    """Ask about a long document in a browser: dense attention and Quest side by side, and where Quest looked."""
    from hf_quest.app import check_port, check_root_path, serve

    check_root_path(root_path)
    check_port(host, port)
    with console.status(f"Loading {model or 'the tiny model inside'}"):
        page, url = serve(model, device.value, host, port or None, root_path=root_path)
    console.print(f"Open {url} in a browser. Ctrl+C ends.", highlight=False)
    page.block_thread()


@app.command("doctor")
@in_one_line
def doctor_command(as_json: JsonOption = False):
    """Print versions, the GPU, whether the kernels are built and where, and what to do about what is missing."""
    from .doctor import examine

    examine(as_json)


app.command("plan")(in_one_line(plan_command))
app.command("calibrate")(in_one_line(calibrate_command))
for name, command in EVALUATIONS.items():
    evaluations.command(name)(in_one_line(command))

if __name__ == "__main__":
    sys.exit(app())
