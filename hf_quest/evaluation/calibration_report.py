"""What a calibration says: a budget, a line of code, a table, and a page with pictures."""

import io
import math
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from .. import CACHE_NAME
from .plots import figure, save

BEST = ("best-pages", "best-tokens")


def recommended(report: dict[str, Any], method: str = "quest") -> int | None:
    """The smallest budget of a method that is within the tolerance, and so are all larger ones."""
    budget = None
    for record in sorted(of_method(report, method), key=lambda record: -record["budget"]):
        if math.expm1(record["kl"]) > report["configuration"]["tolerance"]:
            break
        budget = record["budget"]
    return budget


def of_method(report: dict[str, Any], method: str) -> list[dict[str, Any]]:
    return [record for record in report["records"] if record["method"] == method]


def limit_of(report: dict[str, Any]) -> str:
    """The budgets that would do if the best pages or tokens were chosen, if the report has them."""
    said = []
    for name in BEST:
        if of_method(report, name):
            budget = recommended(report, name)
            said.append(f"{f'{budget:,}' if budget else 'none of these'} with the {name.replace('-', ' ')}")
    return f"No estimate could do with less than the best there is: {', '.join(said)}." if said else ""


def line_of_code(report: dict[str, Any]) -> str:
    """What to write to use the recommended budget, or where there is none a budget that covers the document."""
    budget = report["recommended_budget"] or 1024 * -(-report["configuration"]["num_tokens"] // 1024)
    return f"model.generate(**inputs, {CACHE_NAME}=QuestCache(budget={budget}))"


def mean_of(record: dict[str, Any], name: str) -> float:
    """The mean over layers and heads of `mass` or `top10`."""
    values = [value for layer in record["layers"] for value in layer[name]]
    return statistics.fmean(values) if values else 1.0


def calibration_table(report: dict[str, Any]) -> Table:
    names = [name for name in BEST if of_method(report, name)]
    table = Table(
        "budget",
        "attention mass",
        "top-10 tokens",
        "KL, nats",
        *(f"KL, {name.replace('-', ' ')}" for name in names),
        "same first choice",
        "perplexity",
        "KV read",
        "ms per token",
    )
    best = {(record["method"], record["budget"]): f"{record['kl']:.5f}" for record in report["records"]}
    for record in of_method(report, "dense") + of_method(report, "quest"):
        table.add_row(
            "all" if record["budget"] is None else f"{record['budget']:,}",
            f"{mean_of(record, 'mass'):.1%}",
            f"{mean_of(record, 'top10'):.1%}",
            f"{record['kl']:.5f}",
            *(best.get((name, record["budget"]), "-") for name in names),
            f"{record['top1_agreement']:.1%}",
            f"{record['perplexity']:.3f}",
            f"{record['read_share']:.1%}",
            f"{record['ms_per_token']:.1f}",
        )
    return table


def draw_divergence(report: dict[str, Any]) -> Any:
    """exp(KL) - 1 over the budget, with the tolerance."""
    drawing = figure(figsize=(5, 3.2))
    axes = drawing.subplots()
    budgets = [record["budget"] for record in of_method(report, "quest")]
    styles = {"quest": {"marker": "o", "label": "Quest"}, "best-pages": {"linestyle": "--", "label": "the best pages"}}
    styles["best-tokens"] = {"linestyle": ":", "label": "the best tokens"}
    for method, style in styles.items():
        records = of_method(report, method)
        rises = [100 * math.expm1(record["kl"]) for record in records]
        axes.plot([record["budget"] for record in records], rises, **style)
    axes.axhline(100 * report["configuration"]["tolerance"], color="black", label="tolerance")
    axes.set(xscale="log", yscale="log", xlabel="budget, tokens", ylabel="expected rise of perplexity, %")
    axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    axes.minorticks_off()
    axes.legend()
    return drawing


def draw_mass(report: dict[str, Any]) -> Any:
    """For each budget the share of attention mass that is attended to, by layer and head."""
    records = of_method(report, "quest")
    layers = [layer["layer"] for layer in records[0]["layers"]]
    drawing = figure(figsize=(2.2 * len(records) + 1, 1.2 + 0.25 * len(layers)))
    panels = drawing.subplots(1, len(records), squeeze=False, sharey=True)[0]
    for record, axes in zip(records, panels, strict=True):
        image = axes.imshow([layer["mass"] for layer in record["layers"]], vmin=0, vmax=1, aspect="auto")
        axes.set(title=f"budget {record['budget']:,}", xlabel="query head")
        axes.set_yticks(range(len(layers)), layers)
        axes.grid(visible=False)
    panels[0].set_ylabel("layer")
    drawing.colorbar(image, ax=list(panels), label="attention mass")
    return drawing


def write_html(report: dict[str, Any], path: Path | str) -> None:
    """The report as one page, plots included."""
    try:
        import jinja2
    except ImportError:
        raise ValueError('The HTML report needs jinja2: pip install "hf-quest[eval]"') from None

    def svg(drawing: Any) -> str:
        file = io.StringIO()
        save(drawing, file)
        return file.getvalue()[file.getvalue().index("<svg") :]

    table = calibration_table(report)
    page = jinja2.Environment(autoescape=True).from_string(Path(__file__).with_name("calibration.html").read_text())
    text = page.render(
        report=report,
        line_of_code=line_of_code(report),
        header=[column.header for column in table.columns],
        rows=list(zip(*(column.cells for column in table.columns), strict=True)),
        divergence=svg(draw_divergence(report)),
        limit=limit_of(report),
        mass=svg(draw_mass(report)) if any(record["layers"] for record in of_method(report, "quest")) else "",
    )
    Path(path).write_text(text)
