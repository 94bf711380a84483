"""RULER's tasks have their answers in the text, fit their length, and are asked in the model's chat template once."""

import re
from collections import Counter

import numpy as np
import pytest
from transformers import AutoTokenizer

from hf_quest import tiny
from hf_quest.evaluation import evaluate_ruler, ruler
from hf_quest.evaluation.ruler import encode, make_samples, ruler_table, score
from hf_quest.evaluation.ruler_tasks import TASKS
from hf_quest.models import load

pytest.importorskip("wonderwords")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny.PATH)


def sample_of(task, num_units=200, length=8192, seed=0):
    return TASKS[task][0](num_units, np.random.default_rng(seed), length)


@pytest.mark.parametrize("task", TASKS)
class TestEveryTask:
    @pytest.mark.parametrize("length", [2048, 6000])
    def test_fits_its_length_and_fills_it(self, tokenizer, task, length):
        limit = TASKS[task][1]
        for context, tail, _ in make_samples(tokenizer, task, length, range(3), 1, limit):
            assert 0.85 * length < len(context) + len(tail) + limit <= length

    def test_comes_again_with_the_same_seed_and_not_with_another(self, tokenizer, task):
        first, again, other = (make_samples(tokenizer, task, 2048, [0], seed, 30) for seed in (1, 1, 2))
        assert first == again != other

    def test_all_answers_are_a_right_answer(self, task):
        sample = sample_of(task)
        assert score(" ".join(sample.answers).upper(), sample.answers) == 1
        assert score("none of them", sample.answers) == 0
        assert all(answer in sample.text for answer in sample.answers)

    def test_a_length_that_is_too_short_is_said(self, tokenizer, task):
        with pytest.raises(ValueError, match=rf"60 tokens are too few for {task} and its answer of 30 tokens\."):
            make_samples(tokenizer, task, 60, [0], 1, 30)


class TestTasks:
    @pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "niah_multikey_3"])
    def test_the_asked_key_has_one_value(self, task):
        sample = sample_of(task)
        (key,) = re.findall(r" for (\S+) mentioned", sample.question)
        values = re.findall(rf"One of the special magic \w+ for {key} is: (\S+)\.\n", sample.text)
        assert tuple(values) == sample.answers
        assert sample.text.count("One of the special magic") == (1 if task == "niah_single_1" else 201)

    def test_variables_are_a_chain_in_order(self):
        sample = sample_of("vt")
        assignments = re.findall(r"VAR (\w{5}) = (?:VAR )?(\w+)", sample.text)
        value = re.search(r"\d{5}", sample.question).group()
        assert assignments == list(zip(sample.answers, (value, *sample.answers), strict=False))
        assert len(sample.answers) == 5

    @pytest.mark.parametrize(("length", "often", "seldom"), [(2048, 6, 1), (4096, 30, 3)])
    def test_common_words_are_counted_as_in_the_paper(self, length, often, seldom):
        sample = sample_of("cwe", 100, length)
        listed = sample.text.rpartition("most often.\n")[2]
        counts = Counter(re.findall(r"\d+\. (.*?)(?= \d+\. |\n)", listed))
        assert {counts.pop(word) for word in sample.answers} == {often}
        assert set(counts.values()) == {seldom}
        assert len(counts) == 100

    def test_frequent_words_are_the_three_behind_the_dots(self):
        sample = sample_of("fwe", 2000)
        counts = Counter(sample.text.rpartition("coded words. ")[2].split())
        dots, *three = counts.most_common(4)
        assert dots[0] == "...."
        assert tuple(word for word, _ in three) == sample.answers
        for rank, (_, count) in enumerate(three, start=2):
            assert count == pytest.approx(2000 * rank**-2 / (np.pi**2 / 6), abs=1)

    def test_a_uuid_has_its_form(self):
        (answer,) = sample_of("niah_multikey_3").answers
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", answer)


class TestTemplate:
    def test_without_one_the_text_begins_as_the_tokenizer_begins_it(self, tokenizer):
        sample = sample_of("niah_single_1")
        context, tail = encode(tokenizer, sample)
        assert tokenizer.decode(context + tail) == sample.text + sample.question + sample.prefix

    def test_it_is_applied_once(self):
        tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        tokenizer.chat_template = (
            "<s>{% for message in messages %}[{{ message.content }}]{% endfor %}{{ 'Answer:\\n' }}"
        )
        sample = sample_of("vt")
        context, tail = encode(tokenizer, sample)
        assert (context + tail).count(tokenizer.bos_token_id) == 1
        text = tokenizer.decode(context + tail)
        assert text == f"<s>[{sample.text}{sample.question}]Answer:\n{sample.prefix.strip()}"


class TestReport:
    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls):
        return load(str(tiny.PATH), "cpu")

    options = {"lengths": [1100], "budgets": [64], "num_samples": 2, "max_new_tokens": 8}  # noqa: RUF012

    def test_only_what_dense_attention_can_do_is_asked_of_others(self, loaded, monkeypatch):
        tasks = {"tasks": ["niah_single_1", "vt"], "methods": ["dense", "quest"]}
        monkeypatch.setattr(ruler, "score", lambda text, answers: float(len(answers) == 1))
        report = evaluate_ruler(*loaded, **tasks, **self.options)
        asked = [(record["task"], record["method"]) for record in report["records"]]
        assert asked == [
            ("niah_single_1", "dense"),
            ("vt", "dense"),
            ("niah_single_1", "quest"),
            ("vt", ruler.UNCOUNTED),
        ]
        table = ruler_table(report)
        assert [str(column.header) for column in table.columns] == ["task", "tokens", "budget", "dense", "quest"]
        assert list(table.columns[0].cells) == ["niah_single_1", "vt", "mean of the 1 that count"]
        assert list(table.columns[4].cells) == ["100.0%", "", "100.0%"]

    def test_rows_of_a_batch_answer_as_alone(self, loaded):
        """Of a task whose questions are equally long: what is fed token by token begins at once in all rows."""
        tasks = {"tasks": ["fwe"], "methods": ["quest"], "at_least": 0}
        together, alone = (
            evaluate_ruler(*loaded, **tasks, **self.options, batch_size=batch_size)["records"] for batch_size in (2, 1)
        )
        assert [text for record in together for text in record["answers"]] == [
            record["answers"][0] for method in ("dense", "quest") for record in alone if record["method"] == method
        ]

    def test_an_unknown_task(self, loaded):
        with pytest.raises(ValueError, match=r"There is no task 'qa_1'\. The tasks are niah_single_1,"):
            evaluate_ruler(*loaded, tasks=["qa_1"])
