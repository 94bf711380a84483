"""The evaluations measure what they say, go on after an interruption, and refuse what they cannot do in one line."""

import json
import math
import re
import zipfile

import pytest
import torch
from small_llama import make_model, tokens
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from hf_quest import CACHE_NAME, QuestCache, TOVACache, tiny
from hf_quest.cli import app
from hf_quest.evaluation import (
    calibrate,
    evaluate_longbench,
    evaluate_passkey,
    evaluate_perplexity,
    evaluate_recall,
    evaluate_top10,
    longbench,
    passkey,
)
from hf_quest.evaluation.calibration import default_budgets
from hf_quest.evaluation.calibration_report import (
    calibration_table,
    limit_of,
    line_of_code,
    of_method,
    recommended,
    write_html,
)
from hf_quest.evaluation.documents import heldout_text
from hf_quest.evaluation.methods import METHODS, Way, answer, left_padded, make_ways, new_cache, prefill, read
from hf_quest.evaluation.perplexity import draw_over_length, hub_text, losses, windows
from hf_quest.evaluation.plots import draw_over_budget
from hf_quest.evaluation.report import merged, read_text, spread
from hf_quest.evaluation.top10 import share_found, top_tokens
from hf_quest.models import load

pytestmark = pytest.mark.long

TEXT = heldout_text()[:40_000]


@pytest.fixture(scope="module")
def loaded():
    return load(str(tiny.PATH), "cpu")


@pytest.fixture(scope="module")
def small():
    return make_model()


def scores_of(report, *names):
    return {key: sum(values) / len(values) for key, values in merged(report["records"], names, "scores").items()}


class TestProtocol:
    """What all evaluations do with a document."""

    def test_ways_are_every_method_at_every_budget(self):
        assert make_ways(["dense", "quest"], [64, 32, 64]) == [Way("dense", None), Way("quest", 32), Way("quest", 64)]

    def test_every_way_goes_on_from_what_it_would_have_read_itself(self, small):
        ids = tokens(100, batch_size=2)
        ways = make_ways(METHODS, [32, 48])
        with torch.no_grad():
            for way, cache in read(small, ways, ids[:, :80], None):
                output = answer(small, cache, ids, None, 8, pad_token_id=0)
                own = new_cache(small, way.method, way.budget or 1000)
                prefill(small, own, ids[:, :80])
                assert torch.equal(output, answer(small, own, ids, None, 8, pad_token_id=0)), way

    def test_left_padded_rows_are_rows_alone(self, small):
        rows = [tokens(90, seed=1)[0].tolist(), tokens(77, seed=2)[0].tolist()]
        with torch.no_grad():
            ids, mask = left_padded(rows, small.device)
            for way, cache in read(small, make_ways(METHODS, [32]), ids[:, :-10], mask[:, :-10]):
                output = answer(small, cache, ids, mask, 6, pad_token_id=0)
                for row, expected in zip(rows, output, strict=True):
                    alone = torch.tensor([row])
                    _, own = next(read(small, [way], alone[:, :-10], None))
                    assert torch.equal(answer(small, own, alone, None, 6, pad_token_id=0)[0], expected), way

    @pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 1.0])
    def test_a_fraction_is_spread_over_all(self, fraction):
        chosen = spread(range(100), fraction)
        assert len(chosen) == max(1, round(100 * fraction))
        assert abs(sum(chosen) / len(chosen) - 49.5) <= 1


class TestPasskey:
    def test_text_is_the_papers(self):
        lines = passkey.passkey_text(1000, 0.25, 48213).split("\n")
        assert len(lines) == 5
        assert lines[0].startswith("There is an important info hidden inside a lot of irrelevant text.")
        assert lines[1] == (passkey.GARBAGE + " ") * 11 + (passkey.GARBAGE + " ")[: 1000 - 11 * 90]
        assert lines[2] == "The pass key is 48213. Remember it. 48213 is the pass key."
        assert len(lines[1]) + len(lines[3]) == 4000
        assert lines[3].startswith("The grass is green.")
        assert lines[4] == "What is the pass key? The pass key is"

    def test_the_last_400_characters_are_the_tail(self, loaded):
        tokenizer = loaded[1]
        for prompt in passkey.passkey_prompts(tokenizer, 200, 5, seed=1):
            text = passkey.passkey_text(200, prompt.depth, prompt.key)
            assert tokenizer.decode(prompt.tail) == text[-400:]
            assert tokenizer.decode(prompt.context) == text[:-400]

    @pytest.mark.parametrize(
        ("text", "expected"), [(" 48213. The", 1), ("48213", 1), (" 4821", 0), (" 1 48213", 0), (" no", 0), ("", 0)]
    )
    def test_the_first_number_counts(self, text, expected):
        assert passkey.passkey_score(text, 48213) == expected

    def test_quest_finds_what_eviction_has_lost(self, loaded):
        options = {"lengths": [700], "methods": ["quest", "streamingllm"], "budgets": [64]}
        report = evaluate_passkey(*loaded, **options, iterations=3, fraction=0.34)
        assert {way: value for (_, way), value in scores_of(report, "length").items()} == {
            Way("quest", 64): 1,
            Way("streamingllm", 64): 0,
        }


class TestResume:
    options = {"lengths": [150], "methods": ["dense"], "iterations": 2, "batch_size": 1}  # noqa: RUF012

    def test_only_what_is_missing_is_run(self, loaded, tmp_path, monkeypatch):
        output = tmp_path / "results" / "passkey.json"
        whole = evaluate_passkey(*loaded, **self.options)
        asked = []

        def until_interrupted(*arguments, **options):
            asked.append(arguments)
            if len(asked) == 2:
                raise KeyboardInterrupt
            return answer(*arguments, **options)

        monkeypatch.setattr(passkey, "answer", until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate_passkey(*loaded, **self.options, output=output)
        assert not json.loads(output.read_text())["is_complete"]
        report = evaluate_passkey(*loaded, **self.options, output=output)
        assert len(asked) == 3
        assert report["records"] == whole["records"]
        assert json.loads(output.read_text()) == report
        assert report["is_complete"]

    def test_results_of_another_configuration_are_not_mixed_in(self, loaded, tmp_path):
        output = tmp_path / "passkey.json"
        evaluate_passkey(*loaded, **self.options, output=output, fraction=0.5)
        before = output.read_text()
        with pytest.raises(ValueError, match="another configuration or other weights"):
            evaluate_passkey(*loaded, **self.options, output=output)
        assert output.read_text() == before

    def test_another_file_is_not_overwritten(self, loaded, tmp_path):
        output = tmp_path / "letter.json"
        output.write_text("Dear reader")
        with pytest.raises(ValueError, match="exists and is not a results file"):
            evaluate_passkey(*loaded, **self.options, output=output)
        assert output.read_text() == "Dear reader"


class TestRecall:
    def test_the_fact_is_found_dense_and_by_quest(self, loaded):
        options = {"jobs": ["facts"], "lengths": [1024], "num_documents": 1}
        report = evaluate_recall(*loaded, **options, methods=["dense", "quest", "h2o"], budgets=[512])
        scores = scores_of(report, "job")
        assert set(scores) == {(("facts",), way) for way in make_ways(["dense", "quest", "h2o"], [512])}
        assert scores[("facts",), Way("quest", 512)] == scores[("facts",), Way("dense", None)] == 1


class TestPerplexity:
    def test_windows_end_at_equal_steps(self, loaded):
        rows = windows(loaded[1], TEXT, 1000, 4)
        ids = loaded[1].encode(TEXT)
        assert rows.shape == (4, 1000)
        assert rows[0].tolist() == ids[:1000]
        assert rows[-1].tolist() == ids[-1000:]

    def test_one_by_one_is_one_forward(self, loaded):
        model, tokenizer = loaded
        ids = torch.from_numpy(windows(tokenizer, TEXT, 120, 2))
        with torch.no_grad():
            ((_, cache),) = read(model, [Way("dense", None)], ids[:, :99], None)
            by_token = losses(model, cache, ids, 20)
            expected = cross_entropy(model(ids).logits[:, 99:-1].transpose(1, 2), ids[:, 100:], reduction="none")
        torch.testing.assert_close(by_token, expected, rtol=1e-3, atol=1e-3)  # float32, other order of sums

    def test_every_length_scores_the_same_tokens(self, loaded):
        options = {"methods": ["dense", "quest"], "num_scored": 4, "num_rows": 2}
        report = evaluate_perplexity(*loaded, TEXT, lengths=[256, 512], share=1 / 8, **options)
        alone = evaluate_perplexity(*loaded, TEXT, lengths=[512], budgets=[64], **options)
        assert [record["budget"] for record in report["records"]] == [None, 32, None, 64]
        longest = [record["losses"] for record in report["records"] if record["length"] == 512]
        assert longest == [record["losses"] for record in alone["records"]]

    def test_token_by_token_is_the_mean_from_the_first_token_on(self, loaded):
        model, tokenizer = loaded
        options = {"methods": ["dense", "tova"], "budgets": [40], "num_scored": None, "num_rows": 1}
        report = evaluate_perplexity(model, tokenizer, TEXT, lengths=[48, 64], **options)
        ids = torch.from_numpy(windows(tokenizer, TEXT, 64, 1))
        with torch.no_grad():
            expected = cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        found = {(record["length"], record["method"]): record["losses"][0] for record in report["records"]}
        assert found[48, "dense"] == pytest.approx(expected[:47].mean().item(), rel=1e-3)
        assert found[64, "dense"] == pytest.approx(expected.mean().item(), rel=1e-3)
        assert found[64, "tova"] != pytest.approx(found[64, "dense"], rel=1e-4)

    def test_no_plot_of_dense_attention_alone(self, loaded):
        pytest.importorskip("matplotlib")
        report = evaluate_perplexity(*loaded, TEXT, lengths=[64], methods=["dense"], num_scored=2, num_rows=1)
        with pytest.raises(ValueError, match="no method here has a budget"):
            draw_over_length(report | {"configuration": report["configuration"] | {"share": None}})
        with pytest.raises(ValueError, match="no method here has a budget"):
            draw_over_budget(
                {"records": [{"length": 64, "method": "dense", "budget": None, "scores": [1.0]}]}, ["length"]
            )

    def test_a_data_set_gives_its_first_text(self, tmp_path):
        pytest.importorskip("datasets")
        (tmp_path / "test.jsonl").write_text('{"text": "The first book."}\n{"text": "The second."}\n')
        assert hub_text(str(tmp_path)) == "The first book."


class TestWatching:
    @pytest.mark.parametrize("make_cache", [QuestCache, TOVACache], ids=lambda cache: cache.__name__)
    def test_nothing_else_is_read(self, small, make_cache):
        """Another value of what is not said to be attended changes nothing."""
        outputs, counts = [], []

        def note(read):
            if read.layer.layer_idx < 2:
                return
            tokens_attended = read.tokens()
            counts.append(tokens_attended.sum(dim=-1))
            if outputs and make_cache is QuestCache:
                read.layer.values[:, :, : read.layer.length][~tokens_attended] = 1e4

        for _ in range(2):
            cache = make_cache(budget=48)
            with torch.no_grad():
                small.set_attn_implementation("quest")
                small(tokens(150), past_key_values=cache)
                cache.watcher = note
                outputs.append(small(tokens(1, seed=3), past_key_values=cache).logits)
        assert torch.equal(*outputs)
        # Quest's newest page holds 7 of its 16 tokens; an evicting cache attends to the new one too.
        expected = 2 * 16 + 7 if make_cache is QuestCache else 49
        assert all((count == expected).all() for count in counts)

    def test_logits_and_top_tokens_are_those_of_eager_attention(self, small):
        ids, cache, rows = tokens(150), QuestCache(budget=10_000), []
        eager = make_model(attn_implementation="eager")
        with torch.no_grad():
            weights = eager(ids, output_attentions=True).attentions
            small.set_attn_implementation("quest")
            small(ids[:, :-1], past_key_values=cache)
            (tops,) = top_tokens(small, cache, ids)
            cache.crop(-1)
            cache.watcher = lambda read: rows.append(read.all_logits().softmax(dim=-1))
            small(ids[:, -1:], past_key_values=cache)
        for top, row, expected in zip(tops, rows, weights, strict=True):
            torch.testing.assert_close(row, expected[:, :, -1], rtol=1e-3, atol=1e-5)  # float32, other order of sums
            assert torch.equal(top, expected[:, :, -1].topk(10, dim=-1).indices)

    def test_share_found_counts_by_the_kv_head_of_each_query_head(self):
        is_attended = torch.tensor([[[True, True, False, False], [False, False, True, True]]])
        top = torch.tensor([[[0, 1], [1, 2], [0, 1], [1, 2]]])
        assert share_found(top, is_attended).tolist() == [[1.0, 0.5, 0.0, 0.5]]

    def test_top10_grows_with_the_budget(self, loaded):
        report = evaluate_top10(
            *loaded, length=600, budgets=[32, 544], num_documents=1, methods=["quest", "streamingllm"]
        )
        scores = scores_of(report, "job")
        for method in ("quest", "streamingllm"):
            assert 0 < scores[("passkey",), Way(method, 32)] < scores[("passkey",), Way(method, 544)] <= 1
        assert {len(record["by_layer"]) for record in report["records"]} == {4}


class LargestTensor(TorchDispatchMode):
    """The most elements that any tensor had that was made meanwhile."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        made = output if isinstance(output, (list, tuple)) else [output]
        self.numel = max([self.numel, *(tensor.numel() for tensor in made if isinstance(tensor, torch.Tensor))])
        return output


class TestCalibration:
    @pytest.fixture(scope="class")
    @classmethod
    def calibrated(cls, loaded, tmp_path_factory):
        output = tmp_path_factory.mktemp("calibration") / "calibration.json"
        options = {"budgets": [32, 64, 1408], "num_scored": 6, "max_tokens": 1500, "tolerance": 0.02}
        with LargestTensor() as largest:
            report = calibrate(*loaded, TEXT, **options, output=output)
        return report, output, largest.numel

    def test_never_holds_a_dense_attention_matrix(self, loaded, calibrated):
        assert calibrated[2] < 1500 * 1500

    def test_more_budget_changes_less(self, calibrated):
        dense, *by_budget = of_method(calibrated[0], "dense") + of_method(calibrated[0], "quest")
        assert (dense["kl"], dense["top1_agreement"], dense["read_share"]) == (0, 1, 1)
        assert by_budget[0]["kl"] > by_budget[1]["kl"] > by_budget[2]["kl"] >= 0
        assert by_budget[0]["read_share"] < by_budget[1]["read_share"]
        for layers in zip(*(record["layers"] for record in by_budget), strict=True):
            assert len({layer["layer"] for layer in layers}) == 1
            for heads in zip(*(layer["mass"] for layer in layers), strict=True):
                assert 0 < heads[0] <= heads[1] + 0.05  # the queries are those of each run
                assert heads[1] < heads[2] <= 1

    def test_the_best_stand_beside_each_budget_and_lose_less(self, calibrated):
        report = calibrated[0]
        quest, pages, tokens = (of_method(report, name) for name in ("quest", "best-pages", "best-tokens"))
        assert [record["budget"] for record in pages] == [record["budget"] for record in quest] == [32, 64, 1408]
        for records in zip(quest, pages, tokens, strict=True):
            masses = [sum(sum(layer["mass"]) for layer in record["layers"]) for record in records]
            assert masses == sorted(masses)
        assert pages[0]["kl"] < quest[0]["kl"]
        assert [len(record["layers"]) for record in (*quest, *pages)] == [4] * 6
        assert "best tokens" in limit_of(report)
        assert calibration_table(report).row_count == 1 + len(quest)

    def test_perplexity_is_that_of_the_evaluation(self, loaded, calibrated):
        model, tokenizer = loaded
        ids = torch.tensor([tokenizer.encode(TEXT)[:1500]])
        with torch.no_grad():
            for record in calibrated[0]["records"][:2]:
                way = Way(record["method"], record["budget"])
                ((_, cache),) = read(model, [way], ids[:, :-7], None)
                expected = losses(model, cache, ids, 6).mean().exp().item()
                assert record["perplexity"] == pytest.approx(expected, rel=1e-3)

    def test_recommends_the_smallest_budget_above_which_all_are_within_the_tolerance(self):
        def report(*divergences):
            records = [{"method": "dense", "budget": None, "kl": 0.0}]
            records += [{"method": "quest", "budget": 64 * 2**index, "kl": kl} for index, kl in enumerate(divergences)]
            return {"configuration": {"tolerance": 0.01}, "records": records}

        assert recommended(report(0.5, 0.005, 0.001)) == 128
        assert recommended(report(0.005, 0.5, 0.001)) == 256
        assert recommended(report(0.001, 0.001, 0.001)) == 64
        assert recommended(report(0.5, 0.5, 0.5)) is None
        assert recommended(report(math.log(1.0101))) is None

    @pytest.mark.parametrize(
        ("num_context", "budgets"),
        [
            (33, [32]),
            (128, [32, 64]),
            (129, [128]),
            (1025, [128, 256, 512, 1024]),
            (9999, [2**i for i in range(7, 13)]),
        ],
    )
    def test_the_budgets_fit_the_document(self, num_context, budgets):
        assert default_budgets(num_context) == budgets

    def test_the_line_of_code_covers_a_document_of_which_nothing_can_be_left_out(self):
        report = {"configuration": {"num_tokens": 2049}, "recommended_budget": None}
        assert line_of_code(report) == f"model.generate(**inputs, {CACHE_NAME}=QuestCache(budget=3072))"

    def test_page_names_the_budget_and_shows_both_plots(self, calibrated, tmp_path):
        pytest.importorskip("matplotlib")
        report, output, _ = calibrated
        assert json.loads(output.read_text()) == report
        write_html(report, tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        assert page.count("<svg") == 2
        assert page.count("<tr") == 1 + 1 + len(of_method(report, "quest"))
        assert line_of_code(report) in page
        assert "http-equiv" not in page
        assert "src=" not in page  # one page, nothing fetched


class TestLongBench:
    """Scores by hand: F1 of the words in common without case, punctuation and articles, ROUGE-L of the longest common
    subsequence; the best over the references."""

    @pytest.mark.parametrize(
        ("metric", "prediction", "references", "expected"),
        [
            ("f1", "The red cat.", ["a red cat"], 1),
            ("f1", "red cat sat", ["cat"], 0.5),  # precision 1/3, recall 1
            ("f1", "red cat sat", ["dog", "Red Cat"], 0.8),  # precision 2/3, recall 1
            ("f1", "cat cat", ["cat"], 2 / 3),  # as bags: precision 1/2, recall 1
            ("f1", "no", ["yes"], 0),
            ("rouge-l", "the cat sat on the mat", ["the cat lay on the mat"], 5 / 6),
            ("rouge-l", "one two three four", ["four three two one", "one three"], 2 / 3),  # of 2: 2/4 and 2/2
        ],
    )
    def test_scores_are_those_worked_out_by_hand(self, metric, prediction, references, expected):
        pytest.importorskip("torchmetrics")
        pytest.importorskip("rouge_score")
        assert longbench.score(metric, prediction, references) == pytest.approx(expected)

    @pytest.fixture
    def folder(self, tmp_path):
        context = " ".join(TEXT.split()[:150])
        samples = {
            "hotpotqa": {"context": context, "input": "Where is it?", "answers": ["here"]},
            "qasper": {"context": context, "input": "What is said?", "answers": ["nothing", "the"], "length": 150},
            "gov_report": {"context": context, "input": "", "answers": [context[:200]]},
            "triviaqa": {"context": context, "input": "Question: who?\nAnswer:", "answers": ["nobody"]},
        }
        for name, sample in samples.items():
            (tmp_path / f"{name}.jsonl").write_text(json.dumps(sample) + "\n")
        return tmp_path

    def test_a_folder_and_the_hubs_archive_are_the_same(self, folder):
        with zipfile.ZipFile(folder / "data.zip", "w") as archive:
            archive.write(folder / "qasper.jsonl", "data/qasper.jsonl")
        assert longbench.load_set("qasper", folder / "data.zip") == longbench.load_set("qasper", folder)

    @pytest.mark.parametrize("name", longbench.SETS)
    def test_the_question_is_fed_token_by_token(self, loaded, name):
        chosen = longbench.SETS[name]
        sample = {"context": "A long story. " * 50, "input": "Who was it?"}
        context, tail = (loaded[1].decode(ids) for ids in longbench.encode(loaded[1], chosen, sample, 10_000))
        assert context + tail == chosen.prompt.format(**sample)
        assert len(tail) == 100 or tail.startswith(chosen.marker)
        assert len(tail) <= 100

    def test_a_long_prompt_keeps_its_first_and_last_half(self, loaded):
        sample = {"context": TEXT, "input": "Who was it?"}
        ids = loaded[1].encode(longbench.SETS["qasper"].prompt.format(**sample))
        context, tail = longbench.encode(loaded[1], longbench.SETS["qasper"], sample, 1000)
        assert loaded[1].decode(context + tail) == loaded[1].decode(ids[:500]) + loaded[1].decode(ids[-500:])

    def test_scores_the_models_own_answers(self, loaded, folder):
        pytest.importorskip("torchmetrics")
        pytest.importorskip("rouge_score")
        options = {"sets": ["hotpotqa", "triviaqa"], "methods": ["dense", "h2o"], "budgets": [64], "max_length": 300}
        report = evaluate_longbench(*loaded, folder=folder, **options)
        assert [(record["set"], record["method"]) for record in report["records"]] == [
            (name, method) for name in options["sets"] for method in options["methods"]
        ]
        for record in report["records"]:
            answers = longbench.load_set(record["set"], folder)[0]["answers"]
            assert record["scores"] == [longbench.score("f1", record["answer"], answers)]
            assert record["set"] != "triviaqa" or "\n" not in record["answer"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


class TestCommands:
    def test_results_table_and_plot_lie_beside_each_other(self, tmp_path):
        pytest.importorskip("matplotlib")
        output = tmp_path / "passkey.json"
        options = ["--length", 150, "--iterations", 1, "--method", "dense", "--method", "quest", "--budget", 32]
        result = run("eval", "passkey", *options, "--device", "cpu", "--output", output)
        assert result.exit_code == 0, result.output
        table = output.with_suffix(".md").read_text()
        assert "| tokens | prompts | budget | dense | quest |" in table
        assert output.with_suffix(".svg").read_text().count("<svg") == 1
        for path in (output.with_suffix(".md"), output.with_suffix(".svg")):
            before = path.read_text()
            path.unlink()
            assert run("eval", "report", output).exit_code == 0
            assert path.read_text() == before

    def test_calibrate_prints_the_line_of_code(self, tmp_path):
        pytest.importorskip("matplotlib")
        text = tmp_path / "document.txt"
        text.write_text(TEXT[:2500])
        options = [
            "--budget",
            64,
            "--budget",
            128,
            "--scored",
            3,
            "--tolerance",
            1000,
            "--output",
            tmp_path / "page.html",
        ]
        result = run("calibrate", "--text", text, *options)
        assert result.exit_code == 0, result.output
        assert f"model.generate(**inputs, {CACHE_NAME}=QuestCache(budget=64))" in result.output
        assert (tmp_path / "page.html").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["passkey", "--budget", 3], r"budget is a number of tokens and at least two pages.* It is 3\."),
            (["passkey", "--length", 200, "--budget", 4096], r"A budget of 4,096 tokens covers all \d+ tokens .*"),
            (["passkey", "--length", 50_000], r"[\d,]+ tokens are more than this model's context of 40,960\. .*"),
            (["passkey", "--fraction", 0], r"fraction is a share above 0 and up to 1, not 0\.0\."),
            (["passkey", "--dtype", "int8"], r"dtype is float32, bfloat16 or float16, not int8\."),
            (["passkey", "--model", "/nowhere/at/all"], r"/nowhere/at/all cannot be loaded: .+"),
            (["recall", "--length", 512, "--budget", 512], r"A budget of 512 tokens covers all 512 tokens .*"),
            (["top10", "--budget", 20_000], r"A budget of 20,000 tokens covers all 10,240 tokens .*"),
            (["perplexity", "--text", "nowhere.txt"], r"nowhere\.txt is not there\."),
            (["perplexity", "--text", "EMPTY"], r".*empty\.txt holds no text that can be seen: it is blank\."),
            (["perplexity", "--text", "BINARY"], r".*binary\.txt is a binary file.*"),
            (["perplexity", "--text", "SHORT"], r"The text has 3 tokens, fewer than the length of 16,384\."),
            (["perplexity", "--length", 512, "--scored", 512], r"Of 512 tokens 512 cannot be scored: .*"),
            (["perplexity", "--budget", 64, "--share", 0.5], r"Give budgets in tokens or a share of each length.*"),
            (["perplexity", "--dataset", "NOWHERE"], r"The data set .*nowhere cannot be read: .+"),
            (["longbench", "--folder", "NOWHERE"], r"LongBench's qasper cannot be read: .+"),
            (["longbench", "--folder", "FOLDER"], r".* has no qasper in LongBench's format: .*"),
            (["report", "SHORT"], r".*short\.txt is not a results file of hf-quest eval\."),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
    )
    def test_one_line_for_what_cannot_be_done(self, tmp_path, arguments, message):
        (tmp_path / "empty.txt").write_text(" \n")
        (tmp_path / "binary.txt").write_bytes(b"\xff\x00\x01\x02" * 9)
        (tmp_path / "short.txt").write_text("One two.")
        (tmp_path / "qasper.jsonl").write_text('{"context": "A story."}\n')
        paths = {"EMPTY": "empty.txt", "BINARY": "binary.txt", "SHORT": "short.txt", "NOWHERE": "nowhere", "FOLDER": ""}
        arguments = [tmp_path / paths[word] if word in paths else word for word in arguments]
        result = run("eval", *arguments)
        assert result.exit_code == 1, result.output
        assert re.fullmatch(f"Error: {message}\n", result.stderr), result.stderr

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--text", "nowhere.txt"], r"nowhere\.txt is not there\."),
            (["--text", "TEXT", "--budget", 4096], r"A budget of 4,096 tokens covers all \d+ tokens of .*"),
            (["--text", "TEXT", "--max-tokens", 40, "--scored", 8], r"The context has 31 tokens, which the .*"),
            (["--text", "TEXT", "--tolerance", 0], r"tolerance is a share above 0, such as 0\.01, not 0\.0\."),
            (["--text", "TEXT", "--scored", 2000], r"The document has \d+ tokens, too few to score 2000 of them\."),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
    )
    def test_one_line_for_what_cannot_be_calibrated(self, tmp_path, options, message):
        (tmp_path / "text.txt").write_text(TEXT[:2000])
        options = [tmp_path / "text.txt" if word == "TEXT" else word for word in options]
        result = run("calibrate", *options)
        assert result.exit_code == 1, result.output
        assert re.fullmatch(f"Error: {message}\n", result.stderr), result.stderr

    @pytest.mark.parametrize("method", ["snapkv", ""])
    def test_an_unknown_method(self, loaded, method):
        assert run("eval", "passkey", "--method", method).exit_code == 2
        with pytest.raises(ValueError, match=f"There is no method '{method}'. The methods are dense, quest,"):
            make_ways([method], [64])

    def test_a_text_is_read_as_it_is(self, tmp_path):
        (tmp_path / "text.txt").write_text("Größe\n")
        assert read_text(tmp_path / "text.txt") == "Größe\n"
