"""Plots of evaluations, as SVG, by matplotlib (`pip install "hf-quest[eval]"`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .methods import DENSE, METHODS
from .report import mean, merged

MARKERS = dict(zip(METHODS, " os^DPX*v", strict=True))


def figure(**options) -> Any:
    """A matplotlib figure whose file is the same for the same content.

    Raises:
        ValueError: where matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('Plots need matplotlib: pip install "hf-quest[eval]"') from None
    matplotlib.rcParams.update({"svg.hashsalt": "hf_quest", "svg.fonttype": "none", "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3})
    return Figure(layout="constrained", **options)


def save(drawing: Any, path: Path) -> None:
    drawing.savefig(path, format="svg", metadata={"Date": None})


def draw_methods(axes: Any, points: dict[str, list[tuple[float, float]]]) -> None:
    """A line for each method through its (x, y) points."""
    for method, line in points.items():
        xs, ys = zip(*sorted(line), strict=True)
        style = {"color": "black", "linestyle": "--", "zorder": 3} if method == DENSE else {"marker": MARKERS[method]}
        axes.plot(xs, ys, label=method, **style)


def add_legend(drawing: Any, axes: Any) -> None:
    """The legend of one panel, beside all of them."""
    drawing.legend(*axes.get_legend_handles_labels(), loc="outside center right", frameon=False)


def draw_over_budget(report: dict[str, Any], names: Sequence[str], label: str = "accuracy") -> Any:
    """Scores from 0 to 1 over the budget, one panel for each value of `names`.

    Raises:
        ValueError: where no method has a budget.
    """
    scores = merged(report["records"], names, "scores")
    panels = list(dict.fromkeys(key for key, _ in scores))
    budgets = sorted({way.budget for _, way in scores if way.budget})
    if not budgets:
        raise ValueError("Nothing is drawn, since no method here has a budget.")
    drawing = figure(figsize=(4 * len(panels) + 1.4, 3.2))
    for panel, axes in zip(panels, drawing.subplots(1, len(panels), squeeze=False)[0], strict=True):
        points: dict[str, list[tuple[float, float]]] = {}
        for (key, way), values in scores.items():
            if key == panel:
                places = budgets if way.budget is None else [way.budget]
                points.setdefault(way.method, []).extend((budget, mean(values)) for budget in places)
        draw_methods(axes, points)
        axes.set(xscale="log", ylim=(-0.03, 1.03), xlabel="budget, tokens", ylabel=label)
        axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
        axes.minorticks_off()
        axes.set_title(", ".join(f"{value:,} tokens" if isinstance(value, int) else str(value) for value in panel))
    add_legend(drawing, axes)
    return drawing
