"""Precision, inference mode, gradients, rotary factors and other caches: where Transformers' own cache goes on, so does
a QuestCache, with the same result; and where it cannot, one message says why.
"""

import copy
import pickle

import pytest
import test_families
import torch
import transformers
from packaging.version import Version
from small_llama import BUDGET, PROMPT, generate, make_model, tokens
from test_local import BEYOND, CLOSE, build
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Phi3ForCausalLM,
    PhimoeForCausalLM,
    QuantizedCache,
    StaticCache,
)

from hf_quest import CACHE_NAME, CritiPrefill, QuestCache, QuestError, StreamingLLMCache

ANSWER = 10  # tokens
PREFILL = CritiPrefill(budget=64, segment_size=32, threshold=64)
COPIES = [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]
copied_somehow = pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def dense():
    return make_model(attn_implementation="sdpa")


def read(model, cache, input_ids, **options):
    return model(input_ids, **{CACHE_NAME: cache}, **options).logits


def answer(model, cache, input_ids, **options):
    return generate(model, input_ids, cache, **{"max_new_tokens": ANSWER, **options})


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype=dtype)


# bfloat16 rounds to 8 bits: in four layers of logits up to 40 that comes to 0.6 here, where another page, or none,
# comes to more than 5.
ROUGH = {"rtol": 0, "atol": 1.5}


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
    @torch.no_grad()
    def test_a_budget_beyond_the_context_is_dense_attention_in_it(self, dtype, weights):
        quest, stock = (make_model(dtype=weights, attn_implementation=name) for name in ("quest", "sdpa"))
        caches = QuestCache(BEYOND), DynamicCache()
        for num_new in (PROMPT, 1, 1, 20, 1):
            with autocast(dtype):
                logits = [read(*each, tokens(num_new)) for each in zip((quest, stock), caches, strict=True)]
            assert logits[0].dtype == logits[1].dtype
            torch.testing.assert_close(*logits, **ROUGH)

    @pytest.mark.parametrize("options", [{}, {"prefill": PREFILL}, {"bounds_dtype": None}], ids=["", "prefill", "wide"])
    @pytest.mark.parametrize("name", ["llama", "gemma3"])
    @torch.no_grad()
    def test_sparse_steps_and_prompts_are_those_of_a_model_in_that_dtype(self, model, name, options):
        """As near as sums in it are."""
        quest = model if name == "llama" else build(name)
        exact, cast = QuestCache(BUDGET, **options), QuestCache(BUDGET, **options)
        for forwards in ([tokens(200)], tokens(9, seed=2).split(1, dim=1)):
            differences = []
            for new in forwards:
                expected = read(quest, exact, new)
                with autocast():
                    logits = read(quest, cast, new)
                assert logits.isfinite().all()
                differences.append((logits - expected).abs().amax(dim=-1))
            # Of most tokens: a choice between two pages that are as good as each other falls otherwise in 8 bits.
            assert torch.cat(differences, dim=1).median() < 1.5
        assert cast.layers[2].keys.dtype == torch.bfloat16
        with autocast():
            assert answer(quest, QuestCache(BUDGET, **options), tokens(200)).shape == (1, 200 + ANSWER)

    @pytest.mark.parametrize("name", ["llama", "gemma3"])
    @pytest.mark.parametrize("first", ["plain", "autocast"])
    @pytest.mark.parametrize("num_new", [1, 20])
    @torch.no_grad()
    def test_a_text_begun_outside_goes_on_in_it_and_the_other_way_round(self, model, dense, name, first, num_new):
        quest, stock = (model, dense) if name == "llama" else (build(name), build(name, "dense"))
        caches, is_cast = (QuestCache(BEYOND), DynamicCache()), first == "autocast"
        for input_ids in (tokens(100), tokens(num_new, seed=2), tokens(num_new, seed=3)):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_cast):
                logits = [read(*each, input_ids) for each in zip((quest, stock), caches, strict=True)]
            torch.testing.assert_close(*logits, **ROUGH)
            is_cast = not is_cast
        assert caches[0].layers[2].keys.dtype == torch.float32  # which holds either

    def test_without_it_another_dtype_is_another_models(self, model):
        cache = QuestCache(BUDGET)
        with torch.no_grad():
            read(model, cache, tokens(20))
            with pytest.raises(ValueError, match="it is another model's cache"):
                read(make_model(dtype=torch.bfloat16), cache, tokens(1))


def made_in(model, input_ids):
    cache = QuestCache(BUDGET)
    with torch.inference_mode():
        read(model, cache, input_ids)
    return cache


def copied_in(model, input_ids, copied=copy.deepcopy):
    cache = QuestCache(BUDGET)
    with torch.no_grad():
        read(model, cache, input_ids)
    with torch.inference_mode():
        return copied(cache)


ORIGINS = {
    "made": made_in,
    "deep-copied": copied_in,
    "unpickled": lambda model, input_ids: copied_in(model, input_ids, COPIES[1]),
}
CHANGES = {
    "reset": lambda cache: cache.reset(),
    "crop": lambda cache: cache.crop(-20),
    "crop-all": lambda cache: cache.crop(-PROMPT),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "go-on": lambda cache: None,
}


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_cache_of_inference_mode_is_any_other_outside(model, name, origin, change):
    quest = model if name == "llama" else build(name)
    input_ids = tokens(PROMPT, batch_size=2)
    input_ids[0, :3] = 0
    cache, usual = ORIGINS[origin](quest, input_ids), QuestCache(BUDGET)
    with torch.no_grad():
        read(quest, usual, input_ids)
    for each in (cache, usual):
        CHANGES[change](each)
    lengths = {layer.get_seq_length() for layer in cache.layers}
    assert lengths == {usual.get_seq_length()}
    num_rows = 4 if change == "repeat" else 2
    with torch.no_grad():
        for num_new in (20, 1, 1):
            more = tokens(num_new, batch_size=num_rows)
            mask = torch.ones(num_rows, usual.get_seq_length() + num_new, dtype=torch.long)
            mask[:1, : 3 if change == "go-on" else 0] = 0
            logits = (read(quest, each, more, attention_mask=mask) for each in (cache, usual))
            assert torch.equal(*logits)


class TestGradients:
    def of_one_forward(self, name, implementation, cache, **options):
        is_llama = name == "llama"
        model = make_model(attn_implementation=implementation) if is_llama else build(name, implementation)
        model(tokens(60), **{CACHE_NAME: cache}, labels=tokens(60), **options).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    @pytest.mark.parametrize("name", ["llama", "gemma3"])
    def test_of_one_forward_are_those_of_a_stock_cache(self, name):
        expected = self.of_one_forward(name, "sdpa", DynamicCache())
        found = self.of_one_forward(name, "quest", QuestCache(BUDGET))
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3 * expected[name].abs().max())

    @pytest.fixture
    def warnings_said(self, caplog):
        transformers.utils.logging.warning_once.cache_clear()
        yield lambda: [record.getMessage() for record in caplog.records if record.name.startswith("hf_quest")]
        transformers.utils.logging.warning_once.cache_clear()

    @pytest.mark.parametrize("name", ["llama", "gemma3"])
    @pytest.mark.parametrize(
        ("prompt", "num_new", "options", "message"),
        [
            (60, 20, {}, "Those that a QuestCache holds from earlier forwards are constants"),
            (60, 1, {}, "Decode steps and CritiPrefill give keys and values no gradients"),
            (0, 160, {"prefill": PREFILL}, "Decode steps and CritiPrefill give keys and values no gradients"),
        ],
        ids=["a-second-forward", "a-step", "prefill"],
    )
    def test_where_there_are_none_that_is_said(self, model, name, prompt, num_new, options, message, warnings_said):
        quest, cache = model if name == "llama" else build(name), QuestCache(BUDGET, **options)
        if prompt:
            read(quest, cache, tokens(prompt))
        assert not any("gradient" in said.lower() for said in warnings_said())
        read(quest, cache, tokens(num_new, seed=2)).sum().backward()
        assert any(message in said for said in warnings_said())
        quest.zero_grad()

    def test_nothing_is_said_without_them(self, model, warnings_said):
        with torch.no_grad():
            cache = QuestCache(BUDGET, prefill=PREFILL)
            for num_new in (PROMPT, 1, 20):
                read(model, cache, tokens(num_new))
        assert warnings_said() == []


def test_assisted_mode_ends_with_its_generate(model):
    """A question by plain forward afterwards is a prompt."""
    document, question, logits = tokens(PROMPT), tokens(30, seed=8), []
    for options in ({}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": make_model(seed=1)}):
        cache = QuestCache(BUDGET)
        with torch.no_grad():
            read(model, cache, document)
            answer(model, cache, torch.cat([document, tokens(10, seed=4)], dim=1), **options)
            cache.crop(PROMPT - cache.get_seq_length())
            logits.append(read(model, cache, question))
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], **CLOSE)


LIMIT = 128
ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": LIMIT,
    "factor": 4.0,
    "short_mscale": 1.0,
    "long_mscale": 1.2,
}


class TestRotaryFactorsThatChange:
    """Phi-3 and its like read a text with other rotary factors as soon as it has crossed a number of tokens."""

    @pytest.fixture(scope="class", params=["phi3", "phimoe"])
    def models(self, request):
        options = {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": LIMIT,
            "pad_token_id": 0,
            "rope_parameters": ROPE,
        }
        if request.param == "phimoe":
            options |= {"num_local_experts": 4, "num_experts_per_tok": 2}
        model_class = {"phi3": Phi3ForCausalLM, "phimoe": PhimoeForCausalLM}[request.param]
        return [make_model(model_class, attn_implementation=name, **options) for name in ("quest", "sdpa")]

    @pytest.mark.parametrize("num_tokens", [LIMIT - 9, LIMIT - 1, LIMIT, LIMIT + 1, 200])
    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_at_a_budget_beyond_the_context_the_tokens_are_those_without_a_cache(self, models, num_tokens, batch_size):
        """Those of a stock cache, too, from the Transformers on that do not lose it at the crossing."""
        quest, stock = models
        cache, prompt = QuestCache(BEYOND), tokens(num_tokens, batch_size=batch_size)
        output = answer(quest, cache, prompt, max_new_tokens=20)
        assert torch.equal(output, answer(stock, None, prompt, max_new_tokens=20, use_cache=False))
        assert cache.get_seq_length() == num_tokens + 19
        question = torch.cat([output, tokens(9, seed=3, batch_size=batch_size)], dim=1)
        assert torch.equal(answer(quest, cache, question), answer(stock, None, question, use_cache=False))

    def test_a_padded_batch(self, models):
        quest, stock = models
        input_ids = tokens(120, batch_size=2)
        input_ids[1, :23] = 0
        options = {"attention_mask": (input_ids > 0).long(), "max_new_tokens": 30}
        output = answer(quest, QuestCache(BEYOND), input_ids, **options)
        assert torch.equal(output, answer(stock, None, input_ids, use_cache=False, **options))

    def test_after_the_crossing_it_is_sparse_and_says_what_happened(self, models, caplog):
        transformers.utils.logging.warning_once.cache_clear()
        cache, reads = QuestCache(BUDGET), []
        cache.watcher = lambda read: read.choice is not None and reads.append(read.layer.length)
        answer(models[0], cache, tokens(120), max_new_tokens=24)
        assert max(reads) == cache.get_seq_length() == 143
        assert "grown beyond 128 tokens" in caplog.text


class TestEncoderDecoder:
    @pytest.fixture(scope="class")
    def models(self):
        models = []
        for name in ("quest", "sdpa"):
            torch.manual_seed(0)
            sizes = {"encoder_layers": 2, "decoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 96}
            sizes |= {"d_model": 64, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "init_std": 0.25}
            ids = {"bos_token_id": None, "eos_token_id": None, "decoder_start_token_id": 1}
            ids |= {"forced_eos_token_id": None, "pad_token_id": 0}
            config = BartConfig(vocab_size=256, max_position_embeddings=512, **sizes, **ids, attn_implementation=name)
            models.append(BartForConditionalGeneration(config).eval())
        return models

    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_the_self_half_is_exact(self, models, batch_size):
        quest, stock = models
        source, target = tokens(50, batch_size=batch_size), tokens(80, seed=3, batch_size=batch_size)
        outputs = []
        for model, half in ((quest, QuestCache(BEYOND)), (stock, DynamicCache())):
            cache = EncoderDecoderCache(half, DynamicCache())
            options = {CACHE_NAME: cache, "decoder_input_ids": target, "max_new_tokens": 20, "do_sample": False}
            outputs.append(model.generate(source, **options))
        assert torch.equal(*outputs)

    def test_the_self_half_selects(self, models):
        half, reads = QuestCache(BUDGET), []
        half.watcher = lambda read: read.choice is not None and reads.append(read.layer.layer_idx)
        cache = EncoderDecoderCache(half, DynamicCache())
        models[0].generate(tokens(50), **{CACHE_NAME: cache}, decoder_input_ids=tokens(80, seed=3), max_new_tokens=4)
        assert set(reads) == {2, 3}

    @pytest.mark.parametrize("num_tokens", [80, 50, 1])
    def test_as_the_cross_half_it_is_refused(self, models, num_tokens):
        cross = QuestCache(BEYOND)
        cache = EncoderDecoderCache(DynamicCache(), cross)
        with (
            torch.no_grad(),
            pytest.raises(QuestError, match=r"is cross-attention.*whose second half is for the cross"),
        ):
            models[0](tokens(50), decoder_input_ids=tokens(num_tokens), **{CACHE_NAME: cache})
        assert cross.get_seq_length() == 0

    @torch.no_grad()
    def test_alone_it_says_what_to_pass(self, models):
        with pytest.raises(QuestError, match=r"For an encoder-decoder model pass EncoderDecoderCache\(QuestCache"):
            models[0].generate(tokens(50), **{CACHE_NAME: QuestCache(BUDGET)}, max_new_tokens=8)


@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
def test_layers_of_cross_attention_between_the_others_are_named(with_image):
    text = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1, 3]}
    text |= {"max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 255, "pad_token_id": 0}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 64}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1}
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=254)
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration._from_config(config, attn_implementation="quest").eval()
    input_ids, image = tokens(120).clamp(max=250), {}
    if with_image:
        input_ids[0, 3] = 254
        image = {name: torch.ones(1, 1, dtype=torch.long) for name in ("aspect_ratio_ids", "aspect_ratio_mask")}
        image["aspect_ratio_mask"] = image["aspect_ratio_mask"][..., None]
        image["pixel_values"] = torch.randn(1, 1, 1, 3, 28, 28)
        image["cross_attention_mask"] = torch.ones(1, 120, 1, 1, dtype=torch.long)
    cache = QuestCache(BUDGET)
    with pytest.raises(QuestError, match=r"The layers \[1, 3\] of this model are cross-attention"):
        answer(model, cache, input_ids, eos_token_id=None, **image)
    assert cache.get_seq_length() == 0


def test_layers_that_keep_more_than_keys_and_values_are_named():
    sizes = {"hidden_size": 64, "head_dim": 32, "qk_rope_head_dim": 16, "q_lora_rank": 32, "o_lora_rank": 32}
    sizes |= {"vocab_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "moe_intermediate_size": 32}
    sizes |= {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 8, "n_routed_experts": 4}
    torch.manual_seed(0)
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**sizes, num_experts_per_tok=2)).eval()
    model.set_attn_implementation("quest")
    cache = QuestCache(BUDGET)
    with pytest.raises(QuestError, match=r"attention keep more than keys and values \(DeepseekV4\w+\.\w+\), which"):
        answer(model, cache, tokens(40), eos_token_id=None)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", ["llama", "gemma3"])
class TestPlaces:
    def test_offload_and_prefetch_change_nothing(self, model, name):
        quest = model if name == "llama" else build(name)
        cache, usual = QuestCache(BUDGET), QuestCache(BUDGET)
        for each in (cache, usual):
            first = answer(quest, each, tokens(PROMPT))
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        for layer in cache.layers[1:]:
            layer.offload()
        question = torch.cat([first, tokens(9, seed=3)], dim=1)
        assert torch.equal(answer(quest, cache, question), answer(quest, usual, question))

    @copied_somehow
    def test_copies_go_on_as_the_cache(self, model, name, copied):
        quest, cache = model if name == "llama" else build(name), QuestCache(BUDGET)
        input_ids = tokens(PROMPT, batch_size=2)
        input_ids[1, :23] = 0
        first = answer(quest, cache, input_ids, attention_mask=(input_ids > 0).long())
        question = torch.cat([first, tokens(9, seed=3, batch_size=2)], dim=1)
        options = {"attention_mask": (question > 0).long()}
        outputs = [answer(quest, each, question, **options) for each in (copied(cache), copied(copied(cache)), cache)]
        assert torch.equal(outputs[0], outputs[2])
        assert torch.equal(outputs[1], outputs[2])


def test_is_compileable_can_be_read_without_a_caller():
    scope = {"cache": QuestCache(BUDGET)}
    exec("found = cache.is_compileable", scope)
    assert scope["found"] is True


def quantized_cache(config):
    for backend, package in (("quanto", "optimum.quanto"), ("hqq", "hqq")):
        try:
            __import__(package)
        except ImportError:
            continue
        return QuantizedCache(backend=backend, config=config, nbits=4, residual_length=16)
    pytest.skip("neither optimum-quanto nor hqq is installed, by which a QuantizedCache quantizes")


SOURCES = {
    "dynamic": lambda config: DynamicCache(),
    "dynamic-config": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=400),
    "quest": lambda config: QuestCache(64),
    "quest-with-room": lambda config: QuestCache(64, max_cache_len=400),
}


class TestFromCache:
    @pytest.mark.parametrize("source", SOURCES)
    @pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gpt_oss"])
    @pytest.mark.parametrize("num_tokens", [20, 31, 32, 33, PROMPT, 350])
    def test_goes_on_as_the_cache_it_came_from(self, model, dense, source, name, num_tokens):
        is_llama = name == "llama"
        quest, stock = (model, dense) if is_llama else (build(name), build(name, "dense"))
        reader, taken, expected = (quest if "quest" in source else stock), SOURCES[source](stock.config), DynamicCache()
        with torch.no_grad():
            read(reader, taken, tokens(num_tokens, batch_size=2))
            read(stock, expected, tokens(num_tokens, batch_size=2))
            cache = QuestCache.from_cache(taken, BEYOND)
            assert cache.get_seq_length() == num_tokens
            for num_new in (1, 5, 1, 40, 1):
                more = tokens(num_new, seed=num_new, batch_size=2)
                torch.testing.assert_close(read(quest, cache, more), read(stock, expected, more), **CLOSE)

    @pytest.mark.parametrize("source", SOURCES)
    def test_selects_as_if_it_had_read_the_prompt_and_leaves_the_other_alone(self, model, dense, source):
        taken, usual = SOURCES[source](dense.config), QuestCache(BUDGET)
        first = answer(model, usual, tokens(PROMPT), max_new_tokens=1)
        with torch.no_grad():
            read(model if "quest" in source else dense, taken, tokens(PROMPT))
        cache = QuestCache.from_cache(taken, BUDGET)
        expected = answer(model, usual, first, max_new_tokens=24)
        assert torch.equal(answer(model, cache, first, max_new_tokens=24), expected)
        assert int(taken.get_seq_length()) == PROMPT
        assert torch.equal(answer(model, QuestCache.from_cache(taken, BUDGET), first, max_new_tokens=24), expected)

    def test_left_padding_comes_with_the_next_mask(self, model, dense):
        input_ids = tokens(PROMPT, batch_size=2)
        input_ids[1, :23] = 0
        mask = (input_ids > 0).long()
        with torch.no_grad():
            read(dense, taken := DynamicCache(), input_ids, attention_mask=mask)
        prompt = torch.cat([input_ids, tokens(1, seed=3, batch_size=2)], dim=1)
        output = answer(model, QuestCache.from_cache(taken, BUDGET), prompt, attention_mask=(prompt > 0).long())
        with torch.no_grad():
            read(model, usual := QuestCache(BUDGET), input_ids, attention_mask=mask)
        assert torch.equal(output, answer(model, usual, prompt, attention_mask=(prompt > 0).long()))

    def test_a_window_that_reaches_everything_is_none(self):
        """Transformers' own cache knows it for a window, the model's masks and a QuestCache do not."""
        options = {"sliding_window": 4096, "pad_token_id": 0}
        quest, stock = (make_model(Phi3ForCausalLM, attn_implementation=name, **options) for name in ("quest", "sdpa"))
        input_ids = tokens(PROMPT, batch_size=2)
        input_ids[1, :23] = 0
        mask = (input_ids > 0).long()
        outputs, prompt = [], torch.cat([input_ids, tokens(1, seed=3, batch_size=2)], dim=1)
        for budget in (BEYOND, BUDGET):
            with torch.no_grad():
                read(stock, taken := DynamicCache(config=stock.config), input_ids, attention_mask=mask)
                read(quest, usual := QuestCache(budget), input_ids, attention_mask=mask)
            for cache in (QuestCache.from_cache(taken, budget), usual):
                outputs.append(answer(quest, cache, prompt, attention_mask=(prompt > 0).long()))
            assert torch.equal(*outputs[-2:])
        assert not torch.equal(outputs[0], outputs[2])

    @pytest.mark.parametrize("has_config", [False, True])
    @pytest.mark.parametrize("family", ["gemma3n", "gemma4-shared-kv", "llama4", "doge-masks-of-its-own"])
    def test_families_that_share_keys_or_make_masks_of_their_own(self, family, has_config):
        quest, stock = (test_families.build(family, name) for name in ("quest", "sdpa"))
        input_ids = test_families.left_padded()
        with torch.no_grad():
            taken = DynamicCache(config=stock.config) if has_config else DynamicCache()
            mask = (input_ids > 0).long()
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, :-1]
            read(stock, taken, input_ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions)
            cache = QuestCache.from_cache(taken, BEYOND)
        outputs = [test_families.generate(each, input_ids, given) for each, given in ((quest, cache), (stock, taken))]
        test_families.assert_same(*outputs)

    def test_a_quantized_cache(self, model, dense):
        taken = quantized_cache(dense.config)
        with torch.no_grad():
            read(dense, taken, tokens(PROMPT))
            cache = QuestCache.from_cache(taken, BEYOND)
            logits = read(model, cache, tokens(1))
            expected = read(dense, taken, tokens(1))
        torch.testing.assert_close(logits, expected, rtol=0, atol=0.5)  # the last is kept in 4 bits in one of them

    def test_keys_and_values_by_hand(self, model, dense):
        with torch.no_grad():
            read(dense, source := DynamicCache(), tokens(PROMPT))
            cache = QuestCache(BEYOND)
            for layer_idx, layer in enumerate(source.layers):
                cache.update(layer.keys, layer.values, layer_idx)
            torch.testing.assert_close(read(model, cache, tokens(1)), read(dense, source, tokens(1)), **CLOSE)

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: "a cache", TypeError, "takes a cache of Transformers, not a str"),
            (lambda: [torch.zeros(1)], TypeError, "takes a cache of Transformers, not a list"),
            (
                lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
                QuestError,
                "pass cache.self_attention_cache",
            ),
        ],
        ids=["str", "list", "encoder-decoder"],
    )
    def test_what_it_cannot_take_over(self, make, error, message):
        with pytest.raises(error, match=message):
            QuestCache.from_cache(make())

    def test_a_cache_that_has_evicted(self, model):
        with torch.no_grad():
            read(model, cache := StreamingLLMCache(BUDGET), tokens(PROMPT))
        with pytest.raises(QuestError, match=rf"Layer 2 of this cache has kept {BUDGET} of {PROMPT} tokens: it evicts"):
            QuestCache.from_cache(cache)

    def test_a_cache_whose_last_forward_did_not_end(self, dense):
        with torch.no_grad():
            read(dense, cache := DynamicCache(), tokens(20))
        cache.layers[0].crop(-3)
        with pytest.raises(QuestError, match=r"hold \[17, 20\] tokens"):
            QuestCache.from_cache(cache)

    def test_a_cache_of_a_window_for_a_model_that_attends_everything(self, model):
        windowed = build("mistral", "dense")
        with torch.no_grad():
            read(windowed, taken := DynamicCache(config=windowed.config), tokens(PROMPT))
            with pytest.raises(QuestError, match="keeps the newest tokens only, and this model attends all"):
                read(model, QuestCache.from_cache(taken), tokens(1))

    def test_an_empty_cache(self, model):
        assert torch.equal(
            answer(model, QuestCache.from_cache(DynamicCache(), BUDGET), tokens(PROMPT)),
            answer(model, QuestCache(BUDGET), tokens(PROMPT)),
        )


def test_reset_makes_a_cache_whose_masks_were_changed_a_new_one(model):
    """A mask that was changed on its way makes steps dense: those of that text."""

    def change(module, args, kwargs):
        mask = torch.ones(1, 1, PROMPT, PROMPT, dtype=torch.bool).tril()
        mask[..., -1, 3] = False
        return args, {**kwargs, "attention_mask": mask}

    cache, reads = QuestCache(BUDGET), []
    cache.watcher = lambda read: read.choice is not None and reads.append(read)
    hooks = [layer.self_attn.register_forward_pre_hook(change, with_kwargs=True) for layer in model.model.layers]
    with torch.no_grad():
        read(model, cache, tokens(PROMPT))
        for hook in hooks:
            hook.remove()
        cache.reset()
        input_ids = tokens(PROMPT, batch_size=2)
        input_ids[1, :23] = 0  # or there would be no mask of a step in any case
        answer(model, cache, input_ids, attention_mask=(input_ids > 0).long())
    assert len(reads) == 2 * (ANSWER - 1)


NEWEST = Version(transformers.__version__) >= Version("5.24")


@pytest.mark.skipif(not NEWEST, reason="the former name is deprecated from 5.24 on")
def test_the_names_of_the_cache_both_work(model):
    with torch.no_grad():
        outputs = [model(tokens(PROMPT), **{name: QuestCache(BUDGET)}).logits for name in ("cache", "past_key_values")]
    assert torch.equal(*outputs)
