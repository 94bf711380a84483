"""`hf-quest eval` for tokens: how well a model predicts a text, and what its attention chose."""

from pathlib import Path
from typing import Annotated

import typer

from ..options import (
    BUDGETS,
    CHOICES,
    BatchOption,
    BudgetedMethod,
    BudgetOption,
    Device,
    DeviceOption,
    DtypeOption,
    FractionOption,
    Job,
    JsonOption,
    Method,
    MethodOption,
    ModelOption,
    OutputOption,
    SeedOption,
    loaded,
    names,
    text_of,
)


def perplexity_command(
    model: ModelOption = None,
    text: Annotated[Path | None, typer.Option(help="A document. By default the tiny model's held-out text.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Instead, a data set of the hub, such as emozilla/pg19-test: its first document.")
    ] = None,
    length: Annotated[list[int], typer.Option(help="Tokens of input. May be repeated.")] = (1024, 4096, 16_384),
    method: MethodOption = tuple(Method),
    budget: BudgetOption = (),
    share: Annotated[
        float | None, typer.Option(min=0, max=1, help="The budget as a share of the length. By default an eighth.")
    ] = None,
    scored: Annotated[
        int | None, typer.Option(min=1, help="How many tokens at the end are fed one by one, and count.")
    ] = 128,
    token_by_token: Annotated[
        bool, typer.Option("--token-by-token", help="Feed all one by one, from the first, as the paper does.")
    ] = False,
    rows: Annotated[int, typer.Option(min=1, help="Windows of the text, at equal steps through it.")] = 16,
    fraction: FractionOption = 1.0,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    batch_size: BatchOption = 8,
    output: OutputOption = None,
    as_json: JsonOption = False,
):
    """Perplexity over the length of the input (the Quest paper's figure 6)."""
    from hf_quest.evaluation.commands import conclude
    from hf_quest.evaluation.perplexity import evaluate_perplexity, hub_text

    if dataset and text:
        raise ValueError("Give --text or --dataset, not both.")
    content = hub_text(dataset) if dataset else text_of(text)
    source = dataset or (text.name if text else "heldout.txt")
    report = evaluate_perplexity(
        *loaded(model, device, dtype),
        content,
        source=source,
        lengths=list(length),
        methods=names(method),
        budgets=list(budget),
        share=1 / 8 if share is None and not budget else share,
        num_scored=None if token_by_token else scored,
        num_rows=rows,
        fraction=fraction,
        batch_size=batch_size,
        output=output,
    )
    conclude(report, output, as_json)


def selection_command(
    model: ModelOption = None,
    text: Annotated[Path | None, typer.Option(help="A document. By default the tiny model's held-out text.")] = None,
    length: Annotated[list[int], typer.Option(help="Tokens of a window of the text. May be repeated.")] = (4096,),
    method: Annotated[
        list[str],
        typer.Option(
            help=f"{', '.join(CHOICES)}; with other settings behind it, such as half,page_size=8. May be repeated."
        ),
    ] = tuple(CHOICES),
    budget: BudgetOption = BUDGETS,
    steps: Annotated[
        int, typer.Option(min=1, help="Tokens at the end of a window that choose what they attend.")
    ] = 128,
    windows: Annotated[int, typer.Option(min=1, help="Windows, at equal steps through the text.")] = 10,
    dense_layers: Annotated[int, typer.Option(min=0, help="Layers at the start that attend everything.")] = 2,
    by_layer: Annotated[bool, typer.Option("--by-layer", help="Keep attention mass by layer and head, too.")] = False,
    fraction: FractionOption = 1.0,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows at a time.")] = 1,
    output: OutputOption = None,
    as_json: JsonOption = False,
):
    """What choosing costs: KL, perplexity and attention mass by method and budget, beside the best pages and tokens."""
    from hf_quest.evaluation import evaluate_selection
    from hf_quest.evaluation.commands import conclude

    report = evaluate_selection(
        *loaded(model, device, dtype),
        text_of(text),
        source=text.name if text else "heldout.txt",
        lengths=list(length),
        methods=list(method),
        budgets=list(budget),
        num_steps=steps,
        num_windows=windows,
        dense_layers=dense_layers,
        by_layer=by_layer,
        fraction=fraction,
        batch_size=batch_size,
        output=output,
    )
    conclude(report, output, as_json)


def hits_command(
    model: ModelOption = None,
    text: Annotated[Path | None, typer.Option(help="A document. By default the tiny model's held-out text.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a window of the text.")] = 8192,
    budget: BudgetOption = (256, 512),
    steps: Annotated[int, typer.Option(min=1, help="Tokens at the end of a window that are fed one by one.")] = 256,
    windows: Annotated[int, typer.Option(min=1, help="Windows, at equal steps through the text.")] = 2,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
):
    """How many of the tokens that a step chooses were chosen lately: hits of pools, by their size."""
    from hf_quest.evaluation import evaluate_hits
    from hf_quest.evaluation.commands import conclude

    report = evaluate_hits(
        *loaded(model, device, dtype),
        text_of(text),
        source=text.name if text else "heldout.txt",
        length=length,
        budgets=list(budget),
        num_steps=steps,
        num_windows=windows,
        output=output,
    )
    conclude(report, output, as_json)


def top10_command(
    model: ModelOption = None,
    job: Annotated[list[Job], typer.Option(help="The documents. May be repeated.")] = (Job.passkey,),
    length: Annotated[int, typer.Option(help="Tokens in a document, its question included.")] = 10_240,
    method: Annotated[list[BudgetedMethod], typer.Option("--method", help="What to compare. May be repeated.")] = tuple(
        BudgetedMethod
    ),
    budget: BudgetOption = (64, 128, 256, 512, 1024),
    documents: Annotated[int, typer.Option(min=1, help="Documents for each job.")] = 10,
    fraction: FractionOption = 1.0,
    seed: SeedOption = 1,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    batch_size: BatchOption = 8,
    output: OutputOption = None,
    as_json: JsonOption = False,
):
    """How many of the ten tokens that dense attention weighs most each method attends to (the paper's figure 4)."""
    from hf_quest.evaluation import evaluate_top10
    from hf_quest.evaluation.commands import conclude

    report = evaluate_top10(
        *loaded(model, device, dtype),
        jobs=names(job),
        length=length,
        methods=names(method),
        budgets=list(budget),
        num_documents=documents,
        fraction=fraction,
        seed=seed,
        batch_size=batch_size,
        output=output,
    )
    conclude(report, output, as_json)


def prefill_command(
    model: ModelOption = None,
    job: Annotated[list[Job], typer.Option(help="What to find. May be repeated.")] = tuple(Job),
    length: Annotated[list[int], typer.Option(help="Tokens in a document, its question included. May be repeated.")] = (
        16_384,
    ),
    prefill_budget: Annotated[
        list[int], typer.Option(help="Tokens that a segment of the prompt reads before itself. May be repeated.")
    ] = (1024,),
    documents: Annotated[int, typer.Option(min=1, help="Documents of each length, and windows of text at most.")] = 100,
    seed: SeedOption = 1,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    batch_size: BatchOption = 8,
    output: OutputOption = None,
    as_json: JsonOption = False,
):
    """What CritiPrefill costs: answers, perplexity and attention mass, beside prompts that are read dense."""
    from hf_quest.evaluation.commands import conclude
    from hf_quest.evaluation.prompts import evaluate_prefill

    report = evaluate_prefill(
        *loaded(model, device, dtype),
        jobs=names(job),
        lengths=list(length),
        prefill_budgets=list(prefill_budget),
        num_documents=documents,
        seed=seed,
        batch_size=batch_size,
        output=output,
    )
    conclude(report, output, as_json)
