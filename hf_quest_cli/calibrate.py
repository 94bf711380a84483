"""`hf-quest calibrate`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, DeviceOption, DtypeOption, JsonOption, ModelOption, console, loaded, text_of


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

    if output.suffix != ".html":
        raise ValueError(f"The report is an HTML page, so --output ends in .html, not as {output} does.")
    content = text_of(text)
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
