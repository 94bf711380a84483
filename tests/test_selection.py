"""The teacher-forced measurement is what decode steps do, and its oracles are the best there is."""

import dataclasses
import json
import math

import pytest
import torch
from small_llama import make_model, tokens
from transformers import Gemma3ForCausalLM, GptOssForCausalLM
from typer.testing import CliRunner

from hf_quest import CACHE_NAME, QuestCache, tiny
from hf_quest.cli import app
from hf_quest.evaluation import choices, evaluate_selection, scores
from hf_quest.evaluation.choices import CHOICES, LEAST, Choice, attended_tokens, grouped_logits, parse_choice
from hf_quest.evaluation.documents import heldout_text
from hf_quest.evaluation.forced import Forced, chosen_attention, is_causal
from hf_quest.evaluation.selection import means, selection_table
from hf_quest.methods.quest import TOKEN_GROUP
from hf_quest.models import load
from hf_quest.reference import PUBLISHED, Score

TEXT = heldout_text()[:40_000]
FLOAT32 = {"rtol": 1e-3, "atol": 1e-3}  # logits of about 10, other orders of sums
LOCAL = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 32}


@torch.no_grad()
def decoded(model, ids, num_steps, **settings):
    """[B, num_steps, V] log-probabilities of the next token in decode steps of a QuestCache."""
    model.set_attn_implementation("quest")
    cache = QuestCache(score="published", **settings)
    model(ids[:, : -num_steps - 1], **{CACHE_NAME: cache})
    steps = [model(token, **{CACHE_NAME: cache}).logits for token in ids[:, -num_steps - 1 : -1].split(1, dim=1)]
    return torch.cat(steps, dim=1).log_softmax(dim=-1)


class TestForced:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"num_key_value_heads": 1},
            {"model_class": Gemma3ForCausalLM, "head_dim": 16, **LOCAL},
            {
                "model_class": GptOssForCausalLM,
                "head_dim": 16,
                "num_local_experts": 2,
                "num_experts_per_tok": 1,
                **LOCAL,
            },
        ],
        ids=["llama", "mqa", "gemma3", "gpt-oss"],
    )
    @pytest.mark.parametrize(
        ("num_tokens", "bits"), [(256, 8), (263, 8), (263, 16)], ids=["whole pages", "any end", "wide bounds"]
    )
    def test_is_decode_steps_with_a_quest_cache(self, options, num_tokens, bits):
        model = make_model(**options)
        ids = tokens(num_tokens, batch_size=2)
        with torch.no_grad():
            forced = Forced(model, ids, 21)
            found, layers = forced.log_probs(Choice(bounds_bits=bits), 64)
            dense, none = forced.log_probs(None)
        torch.testing.assert_close(
            found, decoded(model, ids, 21, budget=64, bounds_dtype=torch.int8 if bits == 8 else None), **FLOAT32
        )
        torch.testing.assert_close(dense, decoded(model, ids, 21, budget=4096), **FLOAT32)
        assert (found - dense).abs().max() > 0.1  # the budget is felt
        assert list(layers) == ([2] if LOCAL.keys() <= options.keys() else [2, 3])
        assert none == {}

    @pytest.mark.parametrize("page_size", [16, 32])
    def test_on_a_trained_model(self, page_size):
        model, tokenizer = load(str(tiny.PATH), "cpu")
        ids = torch.tensor([tokenizer.encode(TEXT)[:701]])
        with torch.no_grad():
            forced = Forced(model, ids, 40)
            found, _ = forced.log_probs(Choice(page_size=page_size), 64)
        expected = decoded(model, ids, 40, budget=64, page_size=page_size)
        torch.testing.assert_close(found, expected, **FLOAT32)
        losses = torch.nn.functional.cross_entropy(expected[0], ids[0, -40:])
        assert forced.losses(found).item() == pytest.approx(losses.item(), rel=1e-3)

    def test_only_a_causal_mask_lets_a_layer_choose(self):
        causal = torch.ones(1, 1, 3, 8, dtype=torch.bool).tril(5)
        assert is_causal(causal, 3, 8)
        assert is_causal(None, 3, 8)
        assert not is_causal(causal & (torch.arange(8) > 1), 3, 8)
        assert not is_causal(causal[..., 2:], 3, 8)


@pytest.fixture
def layer():
    """A query [2, 6, 5, 16], keys [2, 2, 203, 16] and the queries' true logits."""
    generator = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(2, 6, 5, 16, generator=generator)
    keys = torch.randn(2, 2, 203, 16, generator=generator) + torch.randn(2, 2, 1, 16, generator=generator)
    position = torch.arange(203)
    logits = grouped_logits(query, keys, 0.25).masked_fill(position > position[-5:, None], -math.inf)
    return query, keys, logits


def mass_of(logits, is_attended):
    return (logits.softmax(dim=-1) * is_attended[:, :, None]).sum(dim=-1).mean(dim=2)  # [B, Hkv, T]


VARIANTS = [
    *CHOICES,
    "published,group=sum",
    "published,group=share,keeps_first=1",
    "half,page_size=8",
    "half,page_size=32",
    "codes-tokens,candidates=0,bits=3",
    "codes-tokens,candidates=4,group=share,agreement=share",
    "codes-tokens,candidates=2,share=0.5,bits=1.6,value_bits=8",
    "codes-tokens,candidates=2,fold=4,stripes=0",
]


class TestChoices:
    @pytest.mark.parametrize("method", VARIANTS)
    def test_attends_its_budget_its_own_page_and_nothing_later(self, layer, method):
        query, keys, logits = layer
        choice = parse_choice(method)
        is_attended = attended_tokens(choice, 64, query, keys, logits, 0.25)
        position = torch.arange(203)
        own = (position // choice.page_size == (position[-5:] // choice.page_size)[:, None]) & (
            position <= position[-5:, None]
        )
        assert is_attended[..., own].all()
        assert not is_attended[..., position > position[-5:, None]].any()
        # Of its own page a query has what is there by then.
        num_missing = choice.page_size - own.sum(dim=-1)
        assert (is_attended.sum(dim=-1) == 64 - num_missing).all()
        assert not choice.keeps_first or choice.by == "codes" or is_attended[..., : choice.page_size].all()

    @pytest.mark.parametrize("method", VARIANTS)
    def test_nothing_keeps_more_than_the_best(self, layer, method):
        query, keys, logits = layer
        choice = parse_choice(method)
        best = parse_choice(f"best-{choice.unit},page_size={choice.page_size}")
        masses = [mass_of(logits, attended_tokens(each, 64, query, keys, logits, 0.25)) for each in (choice, best)]
        assert (masses[0] <= masses[1] + 1e-5).all()

    @pytest.mark.parametrize("method", VARIANTS)
    def test_a_budget_for_all_is_dense_attention(self, layer, method):
        query, keys, _ = layer
        found, observed = chosen_attention(parse_choice(method), 256, query, keys, keys, 0.25)
        options = {"attn_mask": torch.ones(5, 203, dtype=torch.bool).tril(198), "scale": 0.25, "enable_gqa": True}
        expected = torch.nn.functional.scaled_dot_product_attention(query, keys, keys, **options)
        # float32, other order of sums; values of 8 bits are off by half a step of their largest.
        error = keys.abs().max().item() / 254 if "value_bits=8" in method else 1e-5
        torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-4, atol=error)
        assert observed.mass.min() > 0.9999
        assert observed.top10.min() == 1

    def test_more_bits_are_closer_to_the_best_tokens(self, layer):
        query, keys, logits = layer
        masses = []
        for bits in (1, 2, 4, 8):
            choice = parse_choice(f"codes-tokens,candidates=0,stripes=0,bits={bits}")
            masses.append(mass_of(logits, attended_tokens(choice, 64, query, keys, logits, 0.25)).mean().item())
        assert masses == sorted(masses)
        best = mass_of(logits, attended_tokens(CHOICES["best-tokens"], 64, query, keys, logits, 0.25)).mean().item()
        assert masses[-1] == pytest.approx(best, abs=1e-3)
        # A like share of each stripe is not the best of all, least of a dozen random pages.
        choice = parse_choice("codes-tokens,candidates=0,bits=8")
        in_stripes = mass_of(logits, attended_tokens(choice, 64, query, keys, logits, 0.25)).mean().item()
        assert 0.95 * best < in_stripes < best

    def test_tokens_of_a_mass_are_the_fewest_that_hold_it(self, layer):
        query, keys, logits = layer
        fixed = attended_tokens(parse_choice("best-tokens"), 64, query, keys, logits, 0.25)
        position = torch.arange(203)
        own = position // 16 == position[-5:, None] // 16
        is_earlier = position // 16 < position[-5:, None] // 16
        earlier = scores.agreed(logits.masked_fill(~is_earlier, -math.inf), "sum", is_earlier)
        for mass in (0.9, 0.6, 0.3):
            found = attended_tokens(parse_choice(f"best-tokens,mass={mass}"), 64, query, keys, logits, 0.25)
            assert not (found & ~fixed).any()
            held = (earlier * found).sum(dim=-1) / earlier.sum(dim=-1)
            num = (found & ~own).sum(dim=-1)
            least = earlier.masked_fill(~found | own, math.inf).amin(dim=-1) / earlier.sum(dim=-1)
            assert (num >= 64 // LEAST).all()
            is_capped = num == 64 - 16
            assert ((held >= mass - 1e-5) | is_capped).all()
            # Without the last of them it would not be held, or they are the least that a step attends.
            assert ((held - least < mass) | (num == 64 // LEAST)).all()
        assert (found.sum(dim=-1) < fixed.sum(dim=-1)).any()

    def test_a_mass_of_all_is_the_budget(self, layer):
        for method in ("best-tokens", "codes-tokens", "codes-tokens,candidates=2"):
            fixed, found = (
                attended_tokens(parse_choice(each), 64, *layer, 0.25) for each in (method, f"{method},mass=1")
            )
            assert torch.equal(fixed, found)

    @pytest.mark.parametrize("num_pages", [8, 13, 100])
    def test_candidates_are_a_share_of_the_pages_or_so_many_times_the_budget(self, num_pages):
        choice = parse_choice("codes-tokens,candidates=2,share=0.25")
        assert choice.num_candidates(64, num_pages) == max(8, math.ceil(num_pages / 4))
        assert parse_choice("codes-tokens,candidates=0").num_candidates(64, num_pages) == num_pages

    def test_pages_of_a_fold_are_candidates_together(self, layer):
        """Those of the folds with the best bounds: of a fold all pages are chosen from, or none."""
        query, keys, logits = layer
        choice = parse_choice("codes-tokens,candidates=2,fold=3,bits=8")
        is_found = choices.found_pages(choice, 48, query, keys, scores.bounds_of(keys, 16, 8), 0.25)
        of_folds = torch.nn.functional.pad(is_found, (0, 2)).unflatten(-1, (5, 3))
        assert ((of_folds.sum(dim=-1) % 3 == 0) | (torch.arange(5) == 4)).all()
        assert (of_folds.any(dim=-1).sum(dim=-1) == 3).all()  # six pages, and the newest fold, of a single one
        large = parse_choice("half,page_size=48")
        expected = attended_tokens(dataclasses.replace(large, group="max"), 144, query, keys, logits, 0.25)
        assert torch.equal(of_folds[..., 0].repeat_interleave(48, dim=-1)[..., :203] & expected, expected)
        chosen = attended_tokens(choice, 48, query, keys, logits, 0.25)
        assert not (chosen & ~is_found.repeat_interleave(16, dim=-1)[..., :203]).any()
        assert choice.bytes_of(512, 2**17, 128) < parse_choice("codes-tokens,candidates=2").bytes_of(512, 2**17, 128)

    def test_codes_choose_as_a_quest_cache_does(self):
        method, choice = QuestCache(codes=2).method, CHOICES["codes-tokens"]
        assert choice.score == method.score
        assert choice.agreement == TOKEN_GROUP
        of_choice = choice.bits, choice.candidates, choice.page_size, bool(choice.stripes), choice.bounds_bits
        assert of_choice == (method.codes, method.candidates, method.page_size, True, 8)

    def test_codes_stay_within_half_a_step_of_their_page(self, layer):
        keys = layer[1]
        bounds = scores.bounds_of(keys, 16, 16)
        steps = (bounds[:, :, :, 1] - bounds[:, :, :, 0]).repeat_interleave(16, dim=2)[:, :, :203] / 3
        assert ((scores.rounded(keys, bounds, 2, 16) - keys).abs() <= steps / 2 + 1e-5).all()

    def test_the_whole_box_is_the_published_bound(self, layer):
        query, keys, _ = layer
        bounds = scores.bounds_of(keys, 16, 16)
        published = scores.by_bounds(query, bounds, 203, 16, 0.25, PUBLISHED)
        shares = scores.by_bounds(query, bounds, 203, 16, 0.25, Score(1.0, False, "share"))
        whole = scores.by_bounds(query[:, ::3], bounds, 203, 16, 0.25, Score(1.0, False, "share"))
        alone = scores.by_bounds(query[:, ::3], bounds, 203, 16, 0.25, PUBLISHED)
        assert torch.equal(whole[..., :12].argsort(dim=-1), alone[..., :12].argsort(dim=-1))
        assert published.shape == shares.shape
        logits = grouped_logits(query, keys, 0.25).amax(dim=2)
        assert (
            published + 1e-4 >= torch.nn.functional.pad(logits, (0, 5), value=-99).unflatten(-1, (-1, 16)).amax(-1)
        ).all()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("snapkv", "There is no method 'snapkv'. The methods are published, default, half,"),
            ("half,depth=2", "There is no setting 'depth' of a method. The settings are width,"),
            ("half,width=2", "width=2 is out of range"),
            ("half,page_size=1.5", "page_size=1.5 is out of range"),
            ("half,group=mean", "group is one of max, sum, share, not 'mean'"),
            ("half,unit=tokens", "bounds are of pages"),
            ("default,mass=0.9", "only single tokens are attended as far as"),
            ("default,fold=4", "pages are found together as candidates"),
            ("codes-tokens,mass=1.5", "mass=1.5 is out of range"),
            ("codes-tokens,bits=1.5", "bits=1.5 is out of range"),
            ("codes-tokens,group=max,agreement=max", "agreement is one of sum, share, not 'max'"),
        ],
    )
    def test_what_is_no_choice_is_said(self, text, message):
        with pytest.raises(ValueError, match=message):
            parse_choice(text)

    def test_bytes_are_those_of_the_design(self):
        """128K tokens, 8 KV heads of 128 at 16 bits: MB per layer."""

        def megabytes(method, budget):
            return 8 * parse_choice(method).bytes_of(budget, 2**17, 128) / 1e6

        assert megabytes("published", 2048) == pytest.approx(17.0 + 8.4, abs=0.1)
        assert megabytes("codes-tokens,page_size=32", 512) == pytest.approx(8.5 + 1.0 + 2.1, abs=0.1)
        assert megabytes("codes-tokens,candidates=0,page_size=32", 512) == pytest.approx(8.5 + 33.6 + 2.1, abs=0.1)
        assert megabytes("best-tokens", 512) == pytest.approx(2.1, abs=0.1)


@pytest.fixture(scope="module")
def report():
    options = {"lengths": [400, 300], "methods": ["published", "best-pages"], "budgets": [64, 128, 512]}
    loaded = load(str(tiny.PATH), "cpu")
    return evaluate_selection(*loaded, TEXT, **options, num_steps=12, num_windows=3, batch_size=2, by_layer=True)


class TestReport:
    def test_has_each_length_method_and_budget_that_leaves_something_out(self, report):
        rows = means(report)
        assert {length for length, _ in rows} == {300, 400}
        assert {way.budget for _, way in rows} == {None, 64, 128}
        assert len(rows) == 2 * (1 + 2 * 2)
        assert len(selection_table(report).rows) == len(rows)

    def test_the_best_pages_lose_less_and_read_no_bounds(self, report):
        rows = {(length, *way): values for (length, way), values in means(report).items()}
        for length in (300, 400):
            published, best = rows[length, "published", 64], rows[length, "best-pages", 64]
            assert published["kl"] > best["kl"] > 0
            assert published["mass"] < best["mass"] < 1
            assert published["read_share"] > best["read_share"] == 64 / length
            assert 48 < published["attended"] <= 64

    def test_has_every_layer_and_head(self, report):
        layers = report["records"][1]["layers"]
        assert list(layers) == ["2", "3", "4", "5"]
        assert all(len(layer["mass"]) == len(layer["top10"]) == 6 for layer in layers.values())

    def test_a_batch_is_its_rows_alone(self, report):
        loaded = load(str(tiny.PATH), "cpu")
        options = {"lengths": [400], "methods": ["published"], "budgets": [64], "num_steps": 12, "num_windows": 3}
        alone = evaluate_selection(*loaded, TEXT, **options)
        found = [value for record in alone["records"] if record["budget"] for value in record["kl"]]
        together = [
            value
            for record in report["records"]
            if record["length"] == 400 and record["method"] == "published" and record["budget"] == 64
            for value in record["kl"]
        ]
        assert found == pytest.approx(together, rel=1e-2)  # float32; a page near the threshold may differ

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lengths": [50_000]}, "50,000 tokens are more than this model's context of 40,960"),
            ({"budgets": [40]}, "needs a budget of whole pages, at least two. It is 40."),
            ({"budgets": [512]}, "The budgets cover all"),
            ({"num_steps": 500}, "Of 400 tokens 500 cannot be steps"),
            ({"lengths": [30_000]}, "The text has .* tokens, fewer than the length of"),
        ],
    )
    def test_what_cannot_be_is_said_first(self, options, message):
        options = {"lengths": [400], "methods": ["published"], "budgets": [64], "num_steps": 12, **options}
        with pytest.raises(ValueError, match=message):
            evaluate_selection(*load(str(tiny.PATH), "cpu"), TEXT, **options)


def test_command_writes_results_a_table_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "selection.json"
    options = ["--length", 300, "--method", "published", "--method", "best-pages", "--budget", 64, "--steps", 8]
    options = ["eval", "selection", *options, "--windows", 1, "--by-layer", "--device", "cpu", "--output", output]
    result = CliRunner().invoke(app, [str(option) for option in options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert json.loads(output.read_text())["is_complete"]
    assert "| 300 | 64 | published | 0." in output.with_suffix(".md").read_text()
    for suffix in ("", "_read", "_heads"):
        assert output.with_name(f"selection{suffix}.svg").read_text().count("<svg") == 1
