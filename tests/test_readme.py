"""The README is short, and the figures at its top are those that a command wrote to `benchmarks/results`."""

import json
import re

import chart
import pages
from pages import ROOT

RESULTS = ROOT / "benchmarks" / "results"
README = " ".join(pages.README.read_text().split())


def test_the_numbers_at_the_top_are_measured():
    context_length, ms, dense_ms = re.search(
        r"([\d,]+) tokens of context.*?\*\*([\d.]+) ms instead of ([\d.]+)\*\*", README
    ).groups()
    results = json.loads((RESULTS / "generate_gpu.json").read_text())["results"]
    measured = {
        result["way"]: round(result["ms_per_token"], 1)
        for result in results
        if result["context"] == int(context_length.replace(",", "")) and result["batch_size"] == 1
    }
    assert measured["QuestCache"] == float(ms)
    assert min(measured["DynamicCache, sdpa"], measured["StaticCache, sdpa, compiled"]) == float(dense_ms)


def test_with_what_the_gain_was_measured_is_said_beside_it():
    version, score = chart.made_with()
    assert f"This was version {version}, with {score}" in README
    assert f"version {version}, {score}" in chart.CHART.read_text()


def test_budgets_of_the_chart_cost_what_is_said():
    small, large = re.search(r"256 raises its perplexity by (\d+) %.*? 2,048 raises it by (\d+) %", README).groups()
    by_budget = {budget: default for budget, _, default, _ in chart.losses()}
    assert (round(by_budget[256]), round(by_budget[2048])) == (int(small), int(large))
    assert f"At {chart.LENGTH:,} tokens" in README


def test_it_is_read_in_a_minute():
    assert pages.README.stat().st_size <= 10_240
