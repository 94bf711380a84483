"""`hf-quest eval compare`."""

from pathlib import Path
from typing import Annotated

import typer

from ..options import (
    AnyMethod,
    BudgetOption,
    CompareTask,
    Device,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OutputOption,
    SeedOption,
    loaded,
    names,
    text_of,
)


def compare_command(
    model: ModelOption = None,
    text: Annotated[Path | None, typer.Option(help="A document to predict. By default the held-out text.")] = None,
    task: Annotated[
        list[CompareTask],
        typer.Option(
            help="text: loss, bytes held and read; speed: ms a token and peak memory; the others are questions. "
            "By default all but digest. May be repeated."
        ),
    ] = tuple(task for task in CompareTask if task != CompareTask.digest),
    length: Annotated[list[int], typer.Option(help="Tokens of a prompt. May be repeated.")] = (2048,),
    method: Annotated[
        list[AnyMethod], typer.Option("--method", help="What to compare with dense attention. May be repeated.")
    ] = tuple(AnyMethod),
    budget: BudgetOption = (256,),
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text, at equal steps through it.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Tokens at the end of a window that are predicted.")] = 32,
    samples: Annotated[int, typer.Option(min=1, help="Questions of each task and length.")] = 4,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="The longest answer to a task of RULER. By default the paper's."),
    ] = None,
    at_least: Annotated[
        float, typer.Option(min=0, max=1, help="What dense attention must reach for a task to be asked of others.")
    ] = 0.5,
    rounds: Annotated[int, typer.Option(min=1, help="Times that all take turns at speed; the fastest counts.")] = 2,
    machine: Annotated[
        str | None, typer.Option(help="What the table calls this machine. By default its processor.")
    ] = None,
    seed: SeedOption = 1,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows or questions at a time.")] = 4,
    output: OutputOption = None,
    as_json: JsonOption = False,
):
    """All methods beside dense attention and the best there is: loss, answers, memory, bytes read, and time."""
    from hf_quest.evaluation import evaluate_compare
    from hf_quest.evaluation.commands import conclude

    report = evaluate_compare(
        *loaded(model, device, dtype),
        text_of(text),
        source=text.name if text else "heldout.txt",
        tasks=names(task),
        lengths=list(length),
        methods=names(method),
        budgets=list(budget),
        num_windows=windows,
        num_steps=steps,
        num_samples=samples,
        max_new_tokens=max_new_tokens,
        at_least=at_least,
        num_rounds=rounds,
        machine=machine,
        seed=seed,
        batch_size=batch_size,
        output=output,
    )
    conclude(report, output, as_json)
