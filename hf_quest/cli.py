"""The `hf-quest` command."""

import functools
import time
from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
import typer
from huggingface_hub.utils import logging as huggingface_hub_logging
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from . import QuestError, __version__, demo, tiny
from .evaluation.commands import EVALUATIONS, Device, calibrate_command

app = typer.Typer(help="Quest sparse attention for Hugging Face Transformers.", no_args_is_help=True)
evaluation = typer.Typer(help="Measure what Quest does to a model's answers.", no_args_is_help=True)
app.add_typer(evaluation, name="eval")
console = Console()

PROGRESS_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("tokens"),
    TimeElapsedColumn(),
)


class Prefill(str, Enum):
    dense = "dense"
    critical = "critical"


def print_version(wanted: bool):
    if wanted:
        console.print(f"hf-quest {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
):
    pass


@app.command("demo")
def demo_command(
    file: Annotated[
        Path | None, typer.Argument(help="A .txt or .md file. By default a long document with marked key points.")
    ] = None,
    question: Annotated[
        str, typer.Option(help="What to ask. The tiny model knows of marked key points, secret codes and pass keys.")
    ] = demo.QUESTION,
    budget: Annotated[int, typer.Option(help="Tokens that each KV head may attend in one decode step.")] = 512,
    model: Annotated[
        str | None,
        typer.Option(help="A model on the Hugging Face hub, or a folder. By default the tiny one inside."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="The longest answer.")] = 384,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.auto,
    prefill: Annotated[
        Prefill, typer.Option(help="How Quest's side reads the document: all of it, or by CritiPrefill.")
    ] = Prefill.dense,
):
    """Read a long document once, then let dense attention and Quest answer the same question, side by side."""
    silence_libraries()
    try:
        device_name = demo.choose_device(device.value)
        critical = demo.CRITICAL if prefill is Prefill.critical else None
        compare(file, question, budget, model or tiny.PATH, max_new_tokens, device_name, critical)
    except demo.DemoError as error:
        fail(error)


@app.command("app")
def app_command(
    model: Annotated[
        str | None,
        typer.Option(help="A model on the Hugging Face hub, or a folder. By default the tiny one inside."),
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.auto,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in, and fixes the model.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 7860,
):
    """Ask about a long document in a browser: dense attention and Quest side by side, and where Quest looked."""
    silence_libraries()
    try:
        from .app import serve  # what it needs is an extra
    except ModuleNotFoundError as error:
        fail(f'The app needs {error.name}. Install it with: pip install "hf-quest[app]"')
    try:
        with console.status(f"Loading {model or tiny.PATH}"):
            page, url = serve(model, device.value, host, port or None)
    except (demo.DemoError, OSError) as error:
        fail(error)
    console.print(f"Open {url} in a browser. Ctrl+C ends.", highlight=False)
    page.block_thread()


def in_one_line(command):
    """The command, with one line of error for what it cannot do."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        silence_libraries()
        try:
            command(*args, **kwargs)
        except (demo.DemoError, QuestError, OSError, ValueError) as error:
            fail(error)

    return run


app.command("calibrate")(in_one_line(calibrate_command))
for name, command in EVALUATIONS.items():
    evaluation.command(name)(in_one_line(command))


def silence_libraries():
    """No warnings, retries and progress bars of the libraries between the lines of this program."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    huggingface_hub_logging.set_verbosity_error()


def fail(error):
    Console(stderr=True).print(Text(f"Error: {demo.first_line(error)}"), soft_wrap=True)
    raise typer.Exit(code=1) from None


def compare(file, question, budget, model_name, max_new_tokens, device, critical):
    cache = demo.make_cache(budget)
    text, points = demo.make_document() if file is None else (demo.read_document(file), [])
    with console.status(f"Loading {model_name}"):
        model, tokenizer = demo.load(model_name, device)
    document_ids, question_ids = (ids.to(device) for ids in demo.encode(tokenizer, text, question))
    num_tokens = document_ids.shape[1]
    num_total = num_tokens + question_ids.shape[1] + max_new_tokens
    demo.check_length(num_tokens, num_total, budget, model.config)
    demo.check_prefill(num_tokens, critical)

    source = "real text that the model never saw, with key points marked in it" if file is None else str(file)
    console.print(Text.assemble(("Document ", "bold"), f"{num_tokens:,} tokens, {source}"))
    console.print(Text.assemble(("Question ", "bold"), question))
    seconds = [read(model, cache, document_ids, "Prefill" if critical is None else "Prefill, dense")]
    dense_cache = demo.stock_copy(cache, model.config)
    if critical is not None:
        cache = demo.make_cache(budget, critical)
        seconds.append(read(model, cache, document_ids, "Prefill, CritiPrefill"))

    dense, quest = demo.Answer(tokenizer), demo.Answer(tokenizer)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        dense.show = quest.show = lambda: live.update(panels(dense, quest, console.height - 4), refresh=True)
        demo.answer_dense(model, dense_cache, document_ids, question_ids, dense, max_new_tokens)
        demo.answer_quest(model, cache, document_ids, question_ids, quest, max_new_tokens)
    console.print(panels(dense, quest))
    console.print(
        table(model.config, num_tokens, cache, dense, quest, points if question == demo.QUESTION else [], seconds)
    )


def read(model, cache, document_ids, description):
    """Read the document into the cache behind a progress bar; the seconds that it took."""
    started = time.perf_counter()
    with Progress(*PROGRESS_COLUMNS, console=console) as progress:
        task = progress.add_task(description, total=document_ids.shape[1])
        demo.prefill(model, cache, document_ids, lambda tokens: progress.advance(task, tokens))
    if document_ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def panels(dense, quest, height=None):
    """The answers side by side, of each the last `height` lines."""
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(panel("Dense (DynamicCache)", dense, height), panel("Quest", quest, height))
    return grid


def panel(title, answer, height):
    lines = Text(answer.text.strip()).wrap(console, console.width // 2 - 4)
    footer = f"{len(answer.token_ids)} tokens, {answer.milliseconds:.1f} ms each" if answer.seconds else "waiting"
    return Panel(Text("\n").join(lines[-height:] if height else lines), title=title, subtitle=footer)


def table(config, num_tokens, cache, dense, quest, points, seconds):
    """What the two answers cost, and whether they agree."""
    rows = Table("", "Dense", f"Quest, budget {cache.budget:,}")
    if cache.prefill is not None:
        kind = f"of the products q·k in a prompt, layers {cache.prefill.dense_layers} on"
        rows.add_row(kind, "100 %", f"{100 * cache.prefill.read_share(num_tokens):.1f} %")
        rows.add_row("s to read the document", *(f"{each:.1f}" for each in seconds))
    num_stored = cache.get_seq_length()
    rows.add_row("tokens in the document", f"{num_tokens:,}", f"{num_tokens:,}")
    attended = [demo.tokens_attended(tokens, config) for tokens in ([num_stored] * len(cache), cache.tokens_attended)]
    for layers, (in_dense, in_quest) in layer_kinds(zip(*attended, strict=True)):
        rows.add_row(f"tokens attended per step, {layers}", f"{in_dense:,}", f"{in_quest:,}")
    rows.add_row("share of the KV cache read", "100 %", f"{100 * cache.read_share:.1f} %")
    rows.add_row("ms per token, median", f"{dense.milliseconds:.1f}", f"{quest.milliseconds:.1f}")
    rows.add_row("speedup", "1.0×", f"{dense.milliseconds / quest.milliseconds:.1f}×")
    if points:
        rows.add_row("key points right", *(f"{answer.count(points)} of {len(points)}" for answer in (dense, quest)))
    num_common, num_longer = demo.num_common(dense, quest), max(len(dense.token_ids), len(quest.token_ids))
    rows.add_row("answers agree", "", "yes" if num_common == num_longer else f"for {num_common} of {num_longer} tokens")
    return rows


def layer_kinds(tokens_attended):
    """(name, tokens) of every run of layers that attend equally many tokens."""
    first = 0
    for tokens, run in groupby(tokens_attended):
        last = first + len(list(run)) - 1
        yield (f"layers {first} to {last}" if last > first else f"layer {first}"), tokens
        first = last + 1


if __name__ == "__main__":
    app()
