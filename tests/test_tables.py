"""No number of a table is cut off, in a narrow terminal or in a pipe; what is between measurements is interpolated."""

import io

import pytest
import tables
from rich.console import Console
from rich.table import Table

from hf_quest.evaluation import commands

TITLES = ["budget", "attention mass", "top-10 tokens", "KL, nats", "same first choice", "perplexity", "ms per token"]
NUMBERS = ["1,024", "100.0%", "95.25%", "0.19987", "75.00%", "16059.614", "100.5"]


def printed(monkeypatch, width, is_terminal):
    table = Table(*TITLES)
    table.add_row(*NUMBERS)
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=is_terminal, color_system=None)
    monkeypatch.setattr(commands, "Console", lambda: console)
    commands.print_whole(table)
    return out.getvalue()


@pytest.mark.parametrize("width", [56, 60, 61, 70, 80, 90, 200])
def test_numbers_are_whole_in_a_terminal(monkeypatch, width):
    shown = printed(monkeypatch, width, is_terminal=True)
    assert all(number in shown for number in NUMBERS)
    lengths = set(map(len, shown.splitlines()))
    assert max(lengths) <= width
    assert len(lengths) == 1  # no border is missing


def test_nothing_is_left_out_where_nothing_fits(monkeypatch):
    shown = printed(monkeypatch, 36, is_terminal=True)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 36


def test_a_pipe_gets_titles_and_numbers_in_one_line_each(monkeypatch):
    shown = printed(monkeypatch, 80, is_terminal=False)
    assert all(cell in shown for cell in TITLES + NUMBERS)


@pytest.mark.parametrize(
    ("attended", "expected"), [(64, "0.0156"), (100, "0.0100"), (256, "0.0039"), (50, "-"), (257, "-")]
)
def test_between_budgets_a_power_law_is_exact_and_beyond_them_nothing_is_said(attended, expected):
    rows = [{"attended": budget, "kl": 1 / budget} for budget in (256, 64, 128)]
    assert tables.interpolated(rows, {"attended": attended}, "attended") == expected


def test_the_fixed_budget_beside_a_mass_has_all_other_settings():
    assert tables.without_mass("codes-tokens,candidates=16,mass=0.95,bits=3") == (
        "codes-tokens,candidates=16,bits=3",
        "0.95",
    )
    assert tables.without_mass("half,page_size=8") == ("half,page_size=8", None)
