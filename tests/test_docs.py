"""What README.md and docs/ show runs, and the tables in them are those that a command wrote to `benchmarks/results`."""

import functools
import itertools
import json
import re

import chart
import pytest
import tables
from pages import DOCS, PAGES, README, ROOT, blocks, commands, name_of
from test_families import FAMILIES
from typer.testing import CliRunner

from hf_quest import CACHE_NAME, tiny
from hf_quest.cli import app
from hf_quest.evaluation.methods import CACHES
from hf_quest.evaluation.passkey import passkey_prompts

RESULTS = ROOT / "benchmarks" / "results"
MEASURED = (ROOT / "docs" / "measured.md").read_text()


def shown_code():
    """The pages, and every script and notebook beside the package, whose outputs show what was printed too."""
    files = [file for folder in ("benchmarks", "examples", "notebooks") for file in (ROOT / folder).rglob("*")]
    return [*PAGES, *(file for file in files if file.suffix in (".py", ".ipynb"))]


@pytest.mark.parametrize("path", shown_code(), ids=name_of)
def test_the_cache_has_the_name_that_it_keeps(path):
    """`past_key_values`, which Transformers warns of from 5.24 on and some day no longer knows, has another name."""
    assert not re.search(r"past_key_values(=|[\"']: )", path.read_text())


def facts(text):
    return re.findall(r"\d+(?:[.,]\d+)*|True|False|None", text)


@pytest.mark.filterwarnings("error:.*past_key_values:FutureWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_snippets_print_what_their_comments_say(page, capsys):
    namespace = {}
    for snippet in blocks(page, "python"):
        exec(re.sub(r"\bcache=", f"{CACHE_NAME}=", snippet), namespace)
        comments = re.findall(r"print\(.*# (.*)", snippet)
        assert comments
        assert facts(capsys.readouterr().out) == facts("\n".join(comments))


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "models.md"], ids=name_of)
def test_families_are_tested(page):
    (listed,) = re.findall(r"Tested, sparse.*?:\s+(`.*?)\.", page.read_text(), re.DOTALL)
    tested = {family.model_type for family in FAMILIES.values() if family.sparse}
    assert set(re.findall(r"`(\w+)`", listed)) <= tested


@pytest.mark.parametrize("command", commands("make"), ids=" ".join)
def test_make_commands_are_targets(command):
    assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", commands("hf-quest"), ids=" ".join)
def test_commands_have_their_options(command):
    words = [word for word in command[1:] if word.isalnum()]
    num_words = 2 if words[0] == "eval" else 1
    result = CliRunner().invoke(app, [*words[:num_words], "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0
    for option in command:
        assert not option.startswith("--") or option in result.output


@pytest.mark.parametrize("command", commands("python"), ids=" ".join)
def test_scripts_exist(command):
    script = next(word for word in command if word.endswith(".py"))
    assert (ROOT / script).is_file()


found_tables = functools.cache(tables.tables)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_are_those_of_the_results(page):
    assert tables.written(page.read_text(), found_tables()) == page.read_text()


def test_every_result_is_on_a_page():
    shown = set(re.findall(r"<!-- results: (\w+) -->", "".join(page.read_text() for page in PAGES)))
    assert shown == set(found_tables())


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_links_lead_to_files(page):
    for link, place in re.findall(r"\]\((?!https?://|#)([^)#\s]+)(?:#([^)\s]+))?", page.read_text()):
        if link == "changelog.md":  # which the site makes of CHANGELOG.md
            continue
        assert (page.parent / link).exists(), link
        if place and not place.startswith("hf_quest."):  # an entry of the API, which `make docs` looks at
            headings = re.findall(r"^#+ (.+)", (page.parent / link).read_text(), re.MULTILINE)
            assert place in [re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings], place


def prose(page):
    """What a page says outside of code, tables and links, without versions and papers."""
    text = re.sub(r"^```.*?^```|^\|.*?$|`[^`]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\]\([^)]*\)|(Python|PyTorch|sm_)\s?[\d.]+|5\.(17|20|24)|\d{4}\.\d{5}|Llama-[\d.]+", "", text)


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "notes"], ids=name_of)
def test_figures_in_prose_are_measured(page):
    """They stand in a table or in a note, which have their conditions."""
    notes = "".join(each.read_text() for each in DOCS if each.parent.name == "notes")
    measured = set(re.findall(r"\d+\.\d+", "".join(found_tables().values()) + notes))
    assert set(re.findall(r"\d+\.\d+", prose(page))) <= measured | {"2.0"}  # of the licence


def test_conditions_are_those_of_the_results():
    environment = json.loads((RESULTS / "decode_cpu.json").read_text())["environment"]
    assert environment["command"] in MEASURED
    assert environment["processor"] in MEASURED


def test_the_tokens_of_passkeys_prompts_are_counted():
    _, tokenizer = tiny.load()
    for length in (10_000, 22_000):
        (count,) = re.findall(
            rf"makes\s+about\s+([\d,]+)\s+of\s+{length:,}|{length:,}, of which it makes about ([\d,]+)", MEASURED
        )
        count = int("".join(count).replace(",", ""))
        for prompt in passkey_prompts(tokenizer, length, 5, seed=1):
            # A key of other digits, at another place, is a few tokens more or less.
            assert abs(len(prompt.context) + len(prompt.tail) - count) < 25


def test_the_charts_figures_are_those_of_the_results():
    drawn = re.findall(r">([^<>]+)</text>", chart.CHART.read_text())
    for label in (label for panel in chart.labels() for pair in panel for label in pair):
        assert label in drawn


@pytest.mark.parametrize("name", tables.METHODS)
def test_a_method_has_a_page_in_the_site(name):
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    for part in ("**Source**", "**Use it**", "**It cannot**", f"<!-- results: method_{name} -->"):
        assert page.count(part) == 1
    assert f": methods/{name}.md\n" in (ROOT / "mkdocs.yml").read_text()
    assert f"](methods/{name}.md)" in (ROOT / "docs" / "methods.md").read_text()


def test_the_pages_are_about_every_method():
    assert sorted(itertools.chain(*tables.METHODS.values())) == sorted(CACHES)
