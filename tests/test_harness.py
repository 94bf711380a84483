"""Tasks of lm-evaluation-harness are answered by each method, and only tasks that generate are taken."""

import functools
import json

import pytest
import torch
from typer.testing import CliRunner

from hf_quest import tiny
from hf_quest.cli import app
from hf_quest.evaluation.documents import Library, documents, heldout_text
from hf_quest.evaluation.methods import Way, answer, new_cache, prefill

pytest.importorskip("lm_eval")

from hf_quest.evaluation import harness
from hf_quest.evaluation.harness import MethodLM, evaluate_harness, harness_table
from hf_quest.models import load

pytestmark = pytest.mark.long

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
GENERATION = 'generation_kwargs:\n  until: ["\\n", "."]\n  max_gen_toks: 8\n  do_sample: false\n'


@pytest.fixture(autouse=True, scope="module")
def indexed_once():
    """The harness reads some thousand files to know its tasks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "TaskManager", functools.cache(harness.TaskManager))
        yield


@pytest.fixture(scope="module")
def loaded():
    return load(str(tiny.PATH), "cpu")


@pytest.fixture(scope="module")
def papers(loaded):
    return list(documents(Library(loaded[1], heldout_text()[:60_000]), "passkey", 600, 3, seed=2))


@pytest.fixture(scope="module")
def folder(papers, tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    data = path / "keys.jsonl"
    rows = [{"question": paper.context + paper.question, "answer": paper.answer} for paper in papers]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data": data, "metric": "exact_match"}
    (path / "keys.yaml").write_text(TASK.format(name="keys", kind="generate_until", **options) + GENERATION)
    likelihood = TASK.format(name="likelihood", kind="loglikelihood", data=data, metric="acc")
    (path / "likelihood.yaml").write_text(likelihood)
    return path


def test_methods_find_what_they_attend(loaded, papers, folder):
    options = {"methods": ["dense", "quest", "streamingllm"], "budgets": [64], "batch_size": 2}
    report = evaluate_harness(*loaded, tasks=["keys"], include=folder, **options)
    found = {record["method"]: record["value"] for record in report["records"]}
    in_window = sum(paper.depths[0] > 0.9 for paper in papers) / len(papers)
    assert found == {"dense": 1, "quest": 1, "streamingllm": in_window}
    assert in_window == 1 / 3
    assert list(harness_table(report).columns[3].cells) == ["1.000"]


def test_an_answer_is_the_methods_own(loaded, papers):
    model, tokenizer = loaded
    ids = torch.tensor([papers[0].ids])
    lm = MethodLM(model, tokenizer, Way("quest", 48), num_fed=40)
    found = lm._model_generate(ids, ids.shape[1] + 12, ["\n\n\n"])
    with torch.no_grad():
        cache = new_cache(model, "quest", 48)
        prefill(model, cache, ids[:, :-40])
        expected = answer(model, cache, ids, None, 12)
    assert torch.equal(found[0, ids.shape[1] :], expected[0])


def test_log_likelihood_is_refused(loaded, folder):
    with pytest.raises(ValueError, match="likelihood is a task of kind loglikelihood, which reads each text in one"):
        evaluate_harness(*loaded, tasks=["likelihood"], include=folder, budgets=[64])


def test_command(folder, tmp_path):
    options = ["--task", "keys", "--include", folder, "--method", "quest", "--budget", 64, "--limit", 1]
    options = ["eval", "harness", *options, "--device", "cpu", "--output", tmp_path / "keys.json"]
    result = CliRunner().invoke(app, [str(option) for option in options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "| keys | exact_match | 64 | 1.000 |" in (tmp_path / "keys.md").read_text()
    result = CliRunner().invoke(app, ["eval", "harness", "--task", "no_such_task"], catch_exceptions=False)
    assert result.exit_code == 1
    assert "lm-evaluation-harness has no task no_such_task" in result.stderr
