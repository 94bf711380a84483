"""The model that ships inside: what it is, that it finds, and that it never saw the text it is measured on."""

import sys
from pathlib import Path

import pytest
import torch

from hf_quest import tiny
from hf_quest.evaluation.documents import HELDOUT_TEXT, JOBS, Library, documents, heldout_text
from hf_quest.evaluation.methods import make_ways
from hf_quest.evaluation.recall import Examiner, score

DEMOS = Path(__file__).parents[1] / "demos"
RIGHT = {"passkey": 1.0, "facts": 1.0, "digest": 0.9}


@pytest.fixture(scope="module")
def examiner():
    model, tokenizer = tiny.load(dtype=torch.float32)
    return Examiner(model, tokenizer, make_ways(["dense", "quest"], [512]))


@pytest.fixture(scope="module")
def library(examiner):
    return Library(examiner.tokenizer, heldout_text()[:300_000])


def test_weights_fit_in_15_mebibytes():
    assert sum(file.stat().st_size for file in tiny.PATH.glob("*.safetensors")) <= 15 * 2**20


def test_has_positions_for_40960_tokens(examiner):
    assert examiner.model.config.max_position_embeddings >= 40_960


@pytest.mark.parametrize("job", JOBS)
def test_answers_right_dense_and_with_quest(examiner, library, job):
    papers = list(documents(library, job, 2048, 2, seed=11))
    for way, answers in examiner.ask(papers):
        scores = [score(job, text, document) for text, document in zip(answers, papers, strict=True)]
        assert sum(scores) / len(scores) >= RIGHT[job], f"{way}: {answers}"


def test_shipped_text_is_of_held_out_files(monkeypatch):
    pytest.importorskip("lxml")
    monkeypatch.syspath_prepend(str(DEMOS))
    import corpus

    paths = HELDOUT_TEXT.with_name("heldout_files.txt").read_text().splitlines()
    assert paths
    assert all(corpus.held_out(path) for path in paths)
    assert {path.split("/")[0] for path in paths} <= set(corpus.SHIPPED_PACKAGES)
    sys.modules.pop("corpus")


def test_no_long_line_of_a_held_out_file_stays_in_training(monkeypatch):
    pytest.importorskip("lxml")
    monkeypatch.syspath_prepend(str(DEMOS))
    import corpus

    line = "A paragraph that two files of the documentation share, word for word."
    rest = [f"Line {number:d} of many others: " + "abcdefghij"[number % 10] * 60 for number in range(10)]
    heldout, training = corpus.deduplicate([corpus.Page("a", [line, *rest]), corpus.Page("b", [line, "x" * 600])])
    assert line in heldout.lines
    assert line not in training.lines
    sys.modules.pop("corpus")
