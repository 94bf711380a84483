"""The `hf-quest` command.

It is a package of its own because importing hf_quest takes seconds, for PyTorch and Transformers: what a command needs
is imported when it runs, so that help and mistakes in the options are answered at once.
"""

import functools
import importlib.util
import logging
import os
import re
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from .evaluation import EVALUATIONS, Device, JsonOption, calibrate_command
from .plan import plan_command

QUESTION = "what are the key points of this document, in order?"  # as demo.QUESTION, which is slow to import
DEBUG = "HF_QUEST_DEBUG"
# Loggers that complain when PyTorch and Transformers are imported, about what nobody asked for.
NOISY = ("torch", "torch.utils._pytree", "torchao", "transformers", "huggingface_hub", "pypdf")

app = typer.Typer(help="Quest sparse attention for Hugging Face Transformers.", no_args_is_help=True)
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


def fail(error):
    lines = str(error).strip().splitlines() or [type(error).__name__]
    Console(stderr=True).print(Text(f"Error: {lines[0]}"), soft_wrap=True)
    raise typer.Exit(code=1) from None


def silence_libraries():
    """No warnings, retries and progress bars of the libraries between the lines of this program."""
    if os.environ.get(DEBUG):
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    import huggingface_hub.utils.logging
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    for name in NOISY:  # some set their level when they are imported
        logging.getLogger(name).setLevel(logging.ERROR)


def in_one_line(command):
    """The command, with one line of error for whatever goes wrong."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        silence_libraries()
        try:
            command(*args, **kwargs)
        except typer.Exit:
            raise
        except ModuleNotFoundError as error:
            extra = "app" if error.name == "gradio" else "eval"
            fail(f'This needs {error.name}. Install it with: pip install "hf-quest[{extra}]"')
        except Exception as error:
            if os.environ.get(DEBUG):
                raise
            fail(error if is_explained(error) else f"{described(error)} ({DEBUG}=1 shows where.)")

    return run


def is_explained(error):
    """Whether the message was written for the user."""
    from hf_quest import QuestError
    from hf_quest.demo import DemoError
    from hf_quest.reading import DocumentError

    return isinstance(error, (DemoError, DocumentError, QuestError, OSError, ValueError))


def described(error):
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


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
