"""What several commands have in common: their choices, options, model and text."""

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
    """A document's text; what was assumed or left out of it is said on stderr."""
    from hf_quest.evaluation.documents import heldout_text
    from hf_quest.reading import read_document

    if file is None:
        return heldout_text()
    document = read_document(file)
    for note in document.notes:
        Console(stderr=True).print(f"{document.name}: {note}", markup=False, highlight=False, soft_wrap=True)
    return document.text


def names(values: list[Enum]) -> list[str]:
    return [value.value for value in values]
