"""Laws of the documents that recall is measured on."""

import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from hf_quest import tiny
from hf_quest.evaluation.documents import JOBS, Library, documents, facts, heldout_text
from hf_quest.evaluation.recall import score

LENGTHS = (1024, 1031, 4096)


@pytest.fixture(scope="module")
def library():
    return Library(AutoTokenizer.from_pretrained(tiny.PATH), heldout_text()[:300_000])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("job", JOBS)
class TestEveryDocument:
    def test_has_exactly_the_length_asked_for(self, library, job, length):
        assert {len(document.ids) for document in documents(library, job, length, 10, seed=3)} == {length}

    def test_is_what_its_tokenizer_makes_of_its_text(self, library, job, length):
        for document in documents(library, job, length, 10, seed=3):
            assert library.tokenizer.encode(document.context + document.question) == document.ids

    def test_holds_its_answer(self, library, job, length):
        for document in documents(library, job, length, 10, seed=3):
            assert all(line.strip() in document.context for line in document.answer.splitlines())

    def test_scores_its_own_answer_as_right_and_another_as_wrong(self, library, job, length):
        document, other = documents(library, job, length, 2, seed=3)
        assert score(job, document.answer, document) == 1
        assert score(job, other.answer, document) == 0

    def test_comes_again_with_the_same_seed_and_not_with_another(self, library, job, length):
        first, again, other = (list(documents(library, job, length, 3, seed=seed)) for seed in (3, 3, 4))
        assert first == again
        assert all(document.ids not in [document.ids for document in other] for document in first)


@pytest.mark.parametrize("job", ["passkey", "facts"])
def test_depths_cover_the_document(library, job):
    depths = sorted(document.depths[0] for document in documents(library, job, 8192, 21, seed=0))
    assert depths[0] < 0.05
    assert depths[-1] > 0.9
    assert max(np.diff(depths)) < 0.15


def test_the_fact_stands_where_its_depth_says(library):
    document = facts(library, 8192, 0.5, np.random.default_rng(0))
    place = document.context.index(document.answer.strip()) / len(document.context)
    assert place == pytest.approx(document.depths[0], abs=0.1)


def test_every_fact_of_a_document_is_about_someone_else(library):
    document = facts(library, 8192, 0.5, np.random.default_rng(0), count=24)
    names = re.findall(r"The secret code of (\w+) is \d{6}\.\n", document.context)
    assert len(names) == len(set(names)) == 24


def test_key_points_stand_in_order(library):
    for document in documents(library, "digest", 4096, 10, seed=5):
        places = [document.context.index(point) for point in document.answer.strip().splitlines()]
        assert places == sorted(places)
        assert list(document.depths) == sorted(document.depths)


def test_pieces_encode_as_the_whole_does(library):
    for text in ("Key point 12 of 12: It's (nearly) 3.5 times, a-b.\n", " 1 2\n\nx  y", *library.sentences[:200]):
        assert library.encode(text) == library.tokenizer.encode(text)


def test_a_library_that_is_too_small_says_so(library):
    small = Library(library.tokenizer, "One line.\nAnother line.\n")
    with pytest.raises(ValueError, match="too few for a passage of 500"):
        small.passage(500, np.random.default_rng(0))
