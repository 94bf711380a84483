"""What the README shows runs, and the figures in it are those that a command wrote to `benchmarks/results`."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_families import FAMILIES
from typer.testing import CliRunner

from hf_quest import CACHE_NAME, tiny
from hf_quest.cli import app
from hf_quest.evaluation.passkey import passkey_prompts

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def shown_code():
    """The README, and every script and notebook beside the package, whose outputs show what was printed too."""
    files = [file for folder in ("benchmarks", "examples", "notebooks") for file in (ROOT / folder).rglob("*")]
    return [ROOT / "README.md", *(file for file in files if file.suffix in (".py", ".ipynb"))]


@pytest.mark.parametrize("path", shown_code(), ids=lambda path: path.name)
def test_the_cache_has_the_name_that_it_keeps(path):
    """`past_key_values`, which Transformers warns of from 5.24 on and some day no longer knows, has another name."""
    assert not re.search(r"past_key_values(=|[\"']: )", path.read_text())


def numbers(text):
    return re.findall(r"\d{5,}", text)


@pytest.mark.filterwarnings("error:.*past_key_values:FutureWarning")
def test_snippets_print_what_their_comments_say(capsys):
    namespace = {}
    for snippet in blocks("python"):
        exec(re.sub(r"\bcache=", f"{CACHE_NAME}=", snippet), namespace)
        comments = re.findall(r"print\(.*# (.*)", snippet)
        assert comments
        assert numbers(capsys.readouterr().out) == numbers("\n".join(comments))


def commands(program):
    lines = (line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines())
    return [shlex.split(line) for line in lines if line.startswith(program)]


def test_families_are_tested():
    (listed,) = re.findall(
        r"^- Models with full attention layers\. Tested.*?: (.*?)\.", README, re.DOTALL | re.MULTILINE
    )
    tested = {family.model_type for family in FAMILIES.values() if family.sparse}
    assert set(re.findall(r"`(\w+)`", listed)) <= tested


@pytest.mark.parametrize("command", commands("make"), ids=" ".join)
def test_make_commands_are_targets(command):
    assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", commands("hf-quest"), ids=" ".join)
def test_commands_have_their_options(command):
    words = [word for word in command[1:] if word.isalpha()]
    num_words = 2 if words[0] == "eval" else 1
    result = CliRunner().invoke(app, [*words[:num_words], "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0
    for option in command:
        assert not option.startswith("--") or option in result.output


def test_tables_are_those_of_the_results():
    script = ROOT / "benchmarks" / "tables.py"
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    assert "|" in printed
    for table in printed.strip().split("\n\n"):
        assert table in README


def test_conditions_are_those_of_the_results():
    environment = json.loads((RESULTS / "decode_cpu.json").read_text())["environment"]
    assert environment["command"] in README
    assert environment["processor"] in README


def test_the_tokens_of_passkeys_prompts_are_counted():
    _, tokenizer = tiny.load()
    for length in (10_000, 22_000):
        (count,) = re.findall(
            rf"makes about ([\d,]+) of {length:,}|{length:,}, of which it makes about ([\d,]+)", README
        )
        count = int("".join(count).replace(",", ""))
        for prompt in passkey_prompts(tokenizer, length, 5, seed=1):
            # A key of other digits, at another place, is a few tokens more or less.
            assert abs(len(prompt.context) + len(prompt.tail) - count) < 25


def test_the_numbers_at_the_top_are_measured():
    context_length, ms, dense_ms = re.search(
        r"([\d,]+) tokens of context.*?\*\*([\d.]+) ms instead of ([\d.]+)\*\*", README, re.DOTALL
    ).groups()
    results = json.loads((RESULTS / "generate_gpu.json").read_text())["results"]
    measured = {
        result["way"]: round(result["ms_per_token"], 1)
        for result in results
        if result["context"] == int(context_length.replace(",", "")) and result["batch_size"] == 1
    }
    assert measured["QuestCache"] == float(ms)
    assert min(measured["DynamicCache, sdpa"], measured["StaticCache, sdpa, compiled"]) == float(dense_ms)

    context_length, speedup = re.search(
        r"with\s([\d,]+) tokens of context.*?\*\*([\d.]+)× faster\*\*", README, re.DOTALL
    ).groups()
    contexts = json.loads((RESULTS / "decode_cpu.json").read_text())["contexts"]
    (results,) = [row["results"] for row in contexts if row["context"] == int(context_length.replace(",", ""))]
    dense_ms = results[0]["ms_per_token"]
    sparse_ms = [row["ms_per_token"] for row in results if row["read_share"] < 1]
    assert float(speedup) == round(dense_ms / max(sparse_ms), 1)
