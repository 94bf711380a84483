"""What the notebooks show besides what `make notebooks` runs."""

import json
import re
from pathlib import Path

import pytest

mathtext = pytest.importorskip("matplotlib.mathtext", reason='formulas are parsed with pip install "hf-quest[eval]"')

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def texts(path):
    return [
        "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"
    ]


def test_there_are_formulas():
    assert any("$" in text for path in NOTEBOOKS for text in texts(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_formulas_render(path):
    parser = mathtext.MathTextParser("path")
    for text in texts(path):
        for formula in re.findall(r"\$[^$\n]+\$", text):
            assert "\\\\" not in formula  # a line break
            parser.parse(formula)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_files_that_are_named_are_there(path):
    root = path.parent.parent
    for name in re.findall(r"`((?:hf_quest|csrc|benchmarks|examples|docs)/[\w./-]*)`", "\n".join(texts(path))):
        assert (root / name).exists(), name
