"""The comparison runs every method as a user would, counts what it says it counts, and is one table and one plot."""

import json

import pytest
import torch
from small_llama import make_model, tokens
from transformers import DynamicCache
from typer.testing import CliRunner

from hf_quest import CACHE_NAME, MethodCache, QuestCache, SqueezedAttentionCache, TokenSelectCache, tiny
from hf_quest.cli import app
from hf_quest.evaluation import evaluate_compare, measure
from hf_quest.evaluation.choices import Choice
from hf_quest.evaluation.compare import WAYS
from hf_quest.evaluation.compare_report import compare_table, draw_compare, method_table, rows_of
from hf_quest.evaluation.compare_runs import FIRST, LATER, read_parts, up_to_end
from hf_quest.evaluation.documents import heldout_text
from hf_quest.evaluation.forced import Forced
from hf_quest.evaluation.measure import BytesRead, held, measured_generate, peak_memory
from hf_quest.evaluation.methods import CACHES, DENSE, KINDS, Way, answer, left_padded, make_ways, prefill, step
from hf_quest.evaluation.oracles import ORACLES, Best
from hf_quest.evaluation.ruler import UNCOUNTED
from hf_quest.models import load

pytestmark = pytest.mark.long

TEXT = heldout_text()[:60_000]
BUDGET = 48
NUM_CONTEXT, NUM_PROMPT = 90, 100


@pytest.fixture(scope="module")
def small():
    return make_model()


@pytest.fixture(scope="module")
def padded():
    """Two rows that end together, and their mask."""
    return left_padded([tokens(NUM_PROMPT, seed=1)[0].tolist(), tokens(77, seed=2)[0].tolist()], torch.device("cpu"))


class TestProtocols:
    @pytest.mark.parametrize("method", KINDS)
    def test_asked_first_is_generate_behind_the_prompt(self, small, padded, method):
        ids, mask = padded
        (way,) = make_ways([method], [BUDGET])
        with torch.no_grad():
            *_, (_, part) = read_parts(small, [way], ids, mask, (NUM_CONTEXT, NUM_PROMPT))
            begun = torch.cat([ids, part.next], dim=1)
            rest = answer(small, part.cache, begun, torch.nn.functional.pad(mask, (0, 1), value=1), 7, pad_token_id=0)
            cache = KINDS[method](budget=way.budget)
            if isinstance(cache, SqueezedAttentionCache):  # which is told when the document has ended
                prefill(small, cache, ids, mask)
                cache.squeeze()
                expected = answer(
                    small, cache, begun, torch.nn.functional.pad(mask, (0, 1), value=1), 7, pad_token_id=0
                )
                assert torch.equal(rest, expected)
                return
            options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
            expected = small.generate(ids, **{CACHE_NAME: cache}, **options)[:, NUM_PROMPT:]
        assert torch.equal(torch.cat([part.next, rest], dim=1), expected)

    @pytest.mark.parametrize("method", KINDS)
    def test_asked_later_is_fed_to_a_cache_that_holds_the_context(self, small, padded, method):
        ids, mask = padded
        (way,) = make_ways([method], [BUDGET])
        with torch.no_grad():
            _, part = next(read_parts(small, [way], ids, mask, (NUM_CONTEXT, NUM_PROMPT)))
            found = answer(small, part.cache, ids, mask, 8, pad_token_id=0)
            cache = KINDS[method](budget=way.budget)
            prefill(small, cache, ids[:, :NUM_CONTEXT], mask)
            if isinstance(cache, SqueezedAttentionCache):
                cache.squeeze()
            assert part.end == NUM_CONTEXT
            assert torch.equal(found, answer(small, cache, ids, mask, 8, pad_token_id=0))

    def test_an_answer_ends_where_the_model_ends_it(self):
        model = make_model(eos_token_id=[7, 9])
        assert up_to_end(model, torch.tensor([1, 2, 9, 4, 7])).tolist() == [1, 2]
        assert up_to_end(model, torch.tensor([9, 1])).tolist() == []
        assert up_to_end(model, torch.tensor([1, 2])).tolist() == [1, 2]
        assert up_to_end(make_model(), torch.tensor([1, 2])).tolist() == [1, 2]


class TestOracles:
    @pytest.mark.parametrize("size", [1, 16])
    def test_are_those_of_the_selection_where_a_group_has_one_head(self, size):
        """With several heads the weights are shares of all tokens here, and there of those before the newest page."""
        model, ids = make_model(num_key_value_heads=4), tokens(203, batch_size=2)
        num_steps = 12
        with torch.no_grad():
            choice = Choice(by="keys", group="sum", page_size=size)
            expected, _ = Forced(model, ids, num_steps).log_probs(choice, BUDGET)
            model.set_attn_implementation("quest")
            cache = MethodCache(Best(BUDGET, size))
            prefill(model, cache, ids[:, : -num_steps - 1])
            fed = ids[:, -num_steps - 1 : -1].split(1, dim=1)
            found = torch.stack([step(model, cache, token).log_softmax(dim=-1) for token in fed], dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # logits of about 10, other orders of sums

    def test_no_method_attends_more_of_the_weight(self, small):
        """Of the first layer that chooses, whose queries are the same by every method."""
        ids = tokens(160, batch_size=2)
        masses = {}
        for method in [method for method in KINDS if not KINDS[method]().method.evicts]:
            shares = []

            def note(read, shares=shares):
                if read.layer.layer_idx == 2:
                    shares.append(
                        (read.all_logits().softmax(dim=-1).unflatten(1, (2, 2)) * read.tokens()[:, :, None]).sum(-1)
                    )

            cache = KINDS[method](budget=BUDGET)
            with torch.no_grad():
                prefill(small, cache, ids[:, :150])
                cache.watcher = note
                for token in ids[:, 150:].split(1, dim=1):
                    step(small, cache, token)
            masses[method] = torch.stack(shares).sum(dim=3)  # of the heads of a group together
        for method in ("quest", "quest-published", "best-pages"):
            assert (masses[method] <= masses["best-pages"] + 1e-4).all(), method
        for method in ("quest", "quest-codes", "tokenselect", "best-pages", "best-tokens"):
            assert (masses[method] <= masses["best-tokens"] + 1e-4).all(), method


class TestBytes:
    @pytest.fixture(scope="class")
    @classmethod
    def read(cls, small):
        def bytes_of(cache):
            ids = tokens(161)
            with torch.no_grad():
                prefill(small, cache, ids[:, :160])
                count = BytesRead(cache)
                step(small, cache, ids[:, 160:])
            return count.total

        return bytes_of

    token = 2 * 16 * 4  # bytes of a key and a value
    dense = 2 * 2 * 161 * token  # of the two layers and two heads that read everything

    def test_of_quest_are_its_read_share(self, read):
        for codes in (None, 2):
            cache = QuestCache(budget=BUDGET, codes=codes)
            found = read(cache) + 2 * 2 * 15 * self.token  # that the newest page, chosen as a whole, does not hold yet
            assert found == pytest.approx(cache.read_share * 2 * self.dense, rel=1e-9)

    def test_of_what_evicts_are_all_that_it_holds(self, read):
        # One token more than the budget, which goes at the end of the step, and what tells their worth.
        assert read(CACHES["h2o"](budget=BUDGET)) == self.dense + 2 * 2 * (BUDGET + 1) * (self.token + 4)
        assert read(CACHES["streamingllm"](budget=BUDGET)) == self.dense + 2 * 2 * (BUDGET + 1) * self.token

    def test_of_a_vote_are_all_keys(self, read):
        votes = read(TokenSelectCache(budget=BUDGET, similarity=None))
        kept = (BUDGET - 2 - 9) * 8 + 4 * 16 * 4 / 2 + 8 / 2  # per KV head: ids, the queries, and a number of tokens
        assert votes == self.dense + 2 * 2 * (161 * self.token / 2 + BUDGET * self.token + kept)

    def test_of_clusters_are_the_centroids(self, read, small):
        cache = SqueezedAttentionCache(budget=BUDGET)
        ids = tokens(161)
        with torch.no_grad():
            prefill(small, cache, ids[:, :160])
            cache.squeeze()
            count = BytesRead(cache)
            step(small, cache, ids[:, 160:])
        num_clusters = -(-(160 - BUDGET // 2) // 20)
        beside = num_clusters * (16 * 4 + 8) + (160 - BUDGET // 2) * 8 + 8 / 2
        attended = 2 * 2 * BUDGET * self.token  # at most: clusters are whole
        assert self.dense + 4 * beside < count.total <= self.dense + 4 * beside + attended

    def test_of_dense_attention_are_all(self, read, small):
        small.set_attn_implementation("sdpa")
        cache, ids = DynamicCache(config=small.config), tokens(161)
        with torch.no_grad():
            prefill(small, cache, ids[:, :160])
            count = BytesRead(cache)
            step(small, cache, ids[:, 160:])
        count.step_is_done()
        small.set_attn_implementation("quest")
        assert count.total == 2 * self.dense

    def test_held_are_tokens_and_what_is_beside_them(self, small):
        ids = tokens(160, batch_size=3)
        caches = {method: KINDS[method](budget=BUDGET) for method in ("quest", "quest-codes", "tova", "h2o")}
        for cache in caches.values():
            with torch.no_grad():
                prefill(small, cache, ids)
        found = {method: held(cache) for method, cache in caches.items()}
        of_dense = 2 * 2 * 160 * self.token
        bounds = 10 * (2 * 16 + 1)  # per KV head: of 16 channels in 8 bits, and a scale
        assert found["quest"] == {"kept": 160, "kv_bytes": 2 * of_dense, "metadata_bytes": 4 * bounds}
        assert found["quest-codes"]["metadata_bytes"] == 4 * (bounds + 160 * 16 / 4)
        assert found["tova"]["kept"] == found["h2o"]["kept"] == BUDGET
        assert found["h2o"]["kv_bytes"] == of_dense + 4 * BUDGET * self.token
        # Where a token was, whether it is visible, and its score.
        assert found["h2o"]["metadata_bytes"] == 4 * BUDGET * (8 + 1 + 1 + 4)
        assert found["tova"]["metadata_bytes"] < found["h2o"]["metadata_bytes"] + 4 * BUDGET * 4


class TestGenerate:
    def test_memory_is_the_most_at_a_time(self):
        with peak_memory(torch.device("cpu")) as most_bytes:
            first = torch.zeros(1000, 250)
            second = first + first
            del first
            (second + second).sum()
        assert 2_000_000 <= most_bytes() < 2_100_000

    def test_time_and_memory_are_of_the_model(self, small):
        found = measured_generate(small, QuestCache(budget=BUDGET), tokens(500))
        cache_bytes = 4 * 2 * 500 * TestBytes.token
        assert found["peak_bytes"] > cache_bytes
        assert 0.1 < found["ms"] < 10_000
        assert 0.1 < found["cpu_ms"] < found["ms"] * torch.get_num_threads() + 1


class TestCommand:
    options = "--length 300 --budget 64 --windows 1 --steps 4 --samples 1 --max-new-tokens 4 --rounds 1".split()

    @pytest.fixture(scope="class")
    @classmethod
    def output(cls, tmp_path_factory):
        output = tmp_path_factory.mktemp("compare") / "compare.json"
        text = output.with_name("text.txt")
        text.write_text(TEXT)
        tasks = [f"--task={task}" for task in ("text", "passkey", "fwe", "speed")]
        machine = ["--machine", "CPU, 2 shared cores"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(measure, "NUM_TIMED", 4)  # which is too few to be exact, and nothing here asks how long
            result = CliRunner().invoke(
                app, ["eval", "compare", *cls.options, *tasks, *machine, f"--text={text}", f"--output={output}"]
            )
        assert result.exit_code == 0, result.output
        return output

    def test_every_way_is_a_line(self, output):
        report = json.loads(output.read_text())
        assert report["is_complete"]
        rows = rows_of(report)
        assert [way for _, way in rows] == [Way(DENSE, None), *(Way(method, 64) for method in WAYS if method != DENSE)]
        for (_, way), row in rows.items():
            assert {
                "kl",
                "losses",
                "kept",
                "kv_bytes",
                "metadata_bytes",
                "read_bytes",
                "ms",
                "cpu_ms",
                "peak_bytes",
            } <= {*row}
            assert {
                protocol for task, protocol in (key for key in row if isinstance(key, tuple)) if task == "passkey"
            } == ({LATER} if way.method == DENSE else {LATER, FIRST})
        dense, quest = rows[300, Way(DENSE, None)], rows[300, Way("quest", 64)]
        assert dense["kl"] == 0 < quest["kl"]
        assert dense["read_bytes"] > quest["read_bytes"]
        assert dense["passkey", LATER] == quest["passkey", LATER] == quest["passkey", FIRST] == 1

    def test_what_dense_attention_cannot_do_is_not_asked(self, output):
        report = json.loads(output.read_text())
        assert {record["method"] for record in report["records"] if record["task"] == "fwe"} == {DENSE, UNCOUNTED}
        table = compare_table(report)
        (column,) = [list(column.cells) for column in table.columns if column.header == "fwe, later / first"]
        assert column == ["0 %", *["-"] * (len(WAYS) - 1)]

    def test_the_table_names_the_machine_and_the_command(self, output):
        page = output.with_suffix(".md").read_text()
        assert "ms a token (CPU, 2 shared cores)" in page
        assert page.startswith("`hf-quest")
        assert page.count("\n| 300 |") == len(WAYS)
        report = json.loads(output.read_text())
        assert len(compare_table(report).rows) == len(WAYS)
        of_method = method_table([report, report], ["quest", "quest-codes"])
        assert len(of_method.rows) == 2 * 3
        assert {*of_method.columns[0].cells} == {"the model inside, made for this"}

    def test_the_plot_has_every_method(self, output):
        pytest.importorskip("matplotlib")
        drawn = output.with_suffix(".svg").read_text()
        for method in WAYS:
            assert (f">{method}<" in drawn) == (method != DENSE)
        report = json.loads(output.read_text())
        report["records"] = [record for record in report["records"] if record["method"] == DENSE]
        with pytest.raises(ValueError, match="no method here has predicted"):
            draw_compare(report)


@pytest.fixture(scope="module")
def loaded():
    return load(str(tiny.PATH), "cpu")


def test_methods_and_tasks_can_be_added_to_a_file(loaded, tmp_path):
    output = tmp_path / "compare.json"
    options = {"lengths": [200], "budgets": [64], "num_windows": 1, "num_steps": 2, "num_samples": 1, "output": output}
    options["tasks"] = ["text"]
    first = evaluate_compare(*loaded, TEXT, methods=["quest"], **options)
    both = evaluate_compare(*loaded, TEXT, methods=["h2o"], **options)
    assert both["configuration"]["methods"] == ["quest", "h2o"]
    assert [record["method"] for record in both["records"]] == [DENSE, "quest", "h2o"]
    assert both["records"][:2] == first["records"]
    more = evaluate_compare(*loaded, TEXT, methods=["h2o"], **{**options, "tasks": ["passkey"]})
    assert more["configuration"]["tasks"] == ["text", "passkey"]
    assert more["records"][:3] == both["records"]
    with pytest.raises(ValueError, match="another configuration"):
        evaluate_compare(*loaded, TEXT, methods=["h2o"], **{**options, "budgets": [32]})


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tasks": ["chess"]}, "There is no task 'chess'. The tasks are text, passkey"),
            ({"methods": ["magic"]}, "There is no method 'magic'. The methods are dense, quest.*best-tokens"),
            ({"lengths": [30]}, "30 tokens are too few to decode"),
            ({"lengths": [300], "budgets": [288]}, "covers all"),
            ({"lengths": [50_000]}, "more than this model's context"),
        ],
        ids=["task", "method", "short", "budget", "long"],
    )
    def test_come_before_anything_is_computed(self, loaded, tmp_path, options, message):
        output = tmp_path / "compare.json"
        with pytest.raises(ValueError, match=message):
            evaluate_compare(*loaded, TEXT, output=output, **options)
        assert not output.exists()


def test_every_method_is_compared():
    assert set(WAYS) == {DENSE, *CACHES, *ORACLES}
