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


def test_selection_loss_is_the_cross_entropy_that_it_says(monkeypatch):
    monkeypatch.syspath_prepend(str(DEMOS))
    import train_tiny

    rng = torch.Generator().manual_seed(0)
    query = 3 * torch.randn(2, 4, 96, 8, generator=rng)
    key = torch.randn(2, 2, 96, 8, generator=rng)
    positions = torch.tensor([[5, 40, 95], [16, 47, 64]])
    parts = []
    for row, kv_head, position in ((r, h, int(p)) for r in range(2) for h in range(2) for p in positions[r]):
        heads = query[row, 2 * kv_head : 2 * kv_head + 2, position]
        weights = (heads @ key[row, kv_head, : position + 1].T * 8**-0.5).softmax(-1)
        pages = key[row, kv_head].split(16)[: position // 16]
        bounds = [torch.maximum(heads * page.amin(0), heads * page.amax(0)).sum(-1).max() * 8**-0.5 for page in pages]
        log_shares = torch.tensor(bounds).log_softmax(0)
        focus = [weights[:, 16 * idx : 16 * idx + 16].sum(-1).square().mean() for idx in range(len(pages))]
        parts.append(-sum(weight * share for weight, share in zip(focus, log_shares, strict=True)))
    expected = sum(parts) / len(parts)
    torch.testing.assert_close(train_tiny.selection_loss(query, key, positions), torch.as_tensor(expected))
    sys.modules.pop("train_tiny")
