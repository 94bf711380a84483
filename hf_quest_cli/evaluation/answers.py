"""`hf-quest eval` for answers: whether a model finds, adds up or writes what is asked."""

from pathlib import Path
from typing import Annotated

import typer

from ..options import (
    BatchOption,
    BudgetOption,
    Device,
    DeviceOption,
    DtypeOption,
    FractionOption,
    Job,
    JsonOption,
    LongBenchSet,
    Method,
    MethodOption,
    ModelOption,
    OutputOption,
    SeedOption,
    Task,
    loaded,
    names,
)


def passkey_command(
    model: ModelOption = None,
    length: Annotated[list[int], typer.Option(help="Tokens, as four characters each. May be repeated.")] = (10_000,),
    method: MethodOption = tuple(Method),
    budget: BudgetOption = (64, 256, 1024),
    iterations: Annotated[int, typer.Option(min=1, help="Prompts of each length, at equal steps of depth.")] = 100,
    fraction: FractionOption = 1.0,
    seed: SeedOption = 1,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    batch_size: BatchOption = 8,
    output: OutputOption = None,
    as_json: JsonOption = False,
):
    """The Quest paper's passkey retrieval: how often a number hidden in garbage is found."""
    from hf_quest.evaluation import evaluate_passkey
    from hf_quest.evaluation.commands import conclude

    report = evaluate_passkey(
        *loaded(model, device, dtype),
        lengths=list(length),
        methods=names(method),
        budgets=list(budget),
        iterations=iterations,
        fraction=fraction,
        seed=seed,
        batch_size=batch_size,
        output=output,
    )
    conclude(report, output, as_json)


def recall_command(
    model: ModelOption = None,
    job: Annotated[list[Job], typer.Option(help="What to find. May be repeated.")] = tuple(Job),
    length: Annotated[list[int], typer.Option(help="Tokens in a document, its question included. May be repeated.")] = (
        10_240,
    ),
    method: MethodOption = tuple(Method),
    budget: BudgetOption = (64, 256, 1024),
    documents: Annotated[int, typer.Option(min=1, help="Documents of each length.")] = 100,
    fraction: FractionOption = 1.0,
    seed: SeedOption = 1,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    batch_size: BatchOption = 8,
    output: OutputOption = None,
    as_json: JsonOption = False,
):
    """How often a model finds what a long document of real text holds. Made for the tiny model."""
    from hf_quest.evaluation import evaluate_recall
    from hf_quest.evaluation.commands import conclude

    report = evaluate_recall(
        *loaded(model, device, dtype),
        jobs=names(job),
        lengths=list(length),
        methods=names(method),
        budgets=list(budget),
        num_documents=documents,
        fraction=fraction,
        seed=seed,
        batch_size=batch_size,
        output=output,
    )
    conclude(report, output, as_json)


def ruler_command(
    model: ModelOption = None,
    task: Annotated[list[Task], typer.Option(help="May be repeated.")] = tuple(Task),
    length: Annotated[list[int], typer.Option(help="Tokens of a prompt, its answer included. May be repeated.")] = (
        4096,
    ),
    method: MethodOption = (Method.dense, Method.quest),
    budget: BudgetOption = (256, 1024),
    samples: Annotated[int, typer.Option(min=1, help="Of each task and length.")] = 20,
    at_least: Annotated[
        float, typer.Option(min=0, max=1, help="What dense attention must reach for a task to count.")
    ] = 0.5,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The longest answer. By default the task's in the paper, 30 to 128.")
    ] = None,
    fraction: FractionOption = 1.0,
    seed: SeedOption = 1,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    batch_size: BatchOption = 8,
    output: OutputOption = None,
    as_json: JsonOption = False,
):
    """Six tasks of RULER, made here at any length: dense first, and only those count that dense attention can do."""
    from hf_quest.evaluation import evaluate_ruler
    from hf_quest.evaluation.commands import conclude

    report = evaluate_ruler(
        *loaded(model, device, dtype),
        tasks=names(task),
        lengths=list(length),
        methods=names(method),
        budgets=list(budget),
        num_samples=samples,
        at_least=at_least,
        max_new_tokens=max_new_tokens,
        fraction=fraction,
        seed=seed,
        batch_size=batch_size,
        output=output,
    )
    conclude(report, output, as_json)


def longbench_command(
    model: ModelOption = None,
    sets: Annotated[list[LongBenchSet], typer.Option("--set", help="May be repeated.")] = tuple(LongBenchSet),
    folder: Annotated[
        Path | None, typer.Option(help="A folder of JSONL files, or LongBench's data.zip. By default from the hub.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a prompt, its middle left out beyond. By default the model's context.")
    ] = None,
    method: MethodOption = tuple(Method),
    budget: BudgetOption = (512, 1024, 2048),
    fraction: FractionOption = 1.0,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
):
    """LongBench's six sets of the Quest paper (its figure 7), with their prompts, lengths and metrics."""
    from hf_quest.evaluation import evaluate_longbench
    from hf_quest.evaluation.commands import conclude

    report = evaluate_longbench(
        *loaded(model, device, dtype),
        sets=names(sets),
        folder=folder,
        max_length=max_length,
        methods=names(method),
        budgets=list(budget),
        fraction=fraction,
        output=output,
    )
    conclude(report, output, as_json)


def harness_command(
    task: Annotated[list[str], typer.Option(help="A generation task that the harness knows. May be repeated.")],
    model: ModelOption = None,
    include: Annotated[Path | None, typer.Option(help="A folder with tasks of your own.")] = None,
    method: MethodOption = (Method.dense, Method.quest),
    budget: BudgetOption = (256, 1024),
    fed: Annotated[int, typer.Option(min=1, help="Tokens at the end of a prompt that are fed one by one.")] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task. By default all.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the model's chat template.")] = False,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Documents at a time.")] = 1,
    output: OutputOption = None,
    as_json: JsonOption = False,
):
    """Generation tasks of lm-evaluation-harness. (Its log-likelihood tasks would exercise no method.)"""
    from hf_quest.evaluation.commands import conclude
    from hf_quest.evaluation.harness import evaluate_harness

    report = evaluate_harness(
        *loaded(model, device, dtype),
        tasks=list(task),
        include=include,
        methods=names(method),
        budgets=list(budget),
        num_fed=fed,
        limit=limit,
        chat=chat,
        batch_size=batch_size,
        output=output,
    )
    conclude(report, output, as_json)
