"""What a plan says a cache, weights and a prompt will take is what they take, and it says whether that fits."""

import copy
import json
import math

import kernels_on_cpu
import pytest
import torch
from exact_top_k import ExactTopK
from small_llama import generate, make_model, tokens
from test_families import FAMILIES, SERVED_SINCE, config_of, is_served, skip_what_transformers_does_otherwise
from test_local import build
from test_methods import EVICTING, METHODS
from transformers import AutoModelForCausalLM, DeepseekV2Config, DynamicCache, LlamaConfig, MptConfig
from typer.testing import CliRunner

import hf_quest.tiny
from hf_quest import CACHE_NAME, CritiPrefill, MethodCache, QuestCache, QuestError, plan_memory
from hf_quest.cli import app
from hf_quest.planning import STEP, longest_context
from hf_quest.sketch import Asked
from hf_quest.storage import Ring, host

LENGTHS = (1, 2, 45, 300, 700)
OPTIONS = {
    "default": {},
    "bounds of the keys' dtype": {"bounds_dtype": None},
    "codes": {"codes": 2},
    "large pages": {"page_size": 64},
    "all layers sparse": {"dense_layers": 0},
    "allocated at once": {"max_cache_len": 900},
    "CritiPrefill": {"prefill": CritiPrefill(block_size=64)},
    "offloaded": {"offloading": True, "codes": 2},
}


def size_of(tensors):
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def held(cache, on_host=False):
    """Bytes of all tensors of a cache's layers, on the device or in host memory."""
    tensors = [tensor for layer in cache.layers for tensor in layer.storage.tensors().values()]
    pools = [layer.storage.pool for layer in cache.layers if layer.storage.pool is not None]
    tensors += [tensor for pool in pools for tensor in pool.tensors()]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if host.holds(tensor) == on_host)


def held_by_stock(cache):
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(
        {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for x in layers for t in (x.keys, x.values)
        }.values()
    )


def weights_of(model):
    return size_of([*model.parameters(), *model.buffers()])


@torch.no_grad()
def read(model, cache, ids, chunk_size=None):
    """A cache that a model has read a prompt with, in chunks, as `generate` does."""
    for chunk in ids.split(chunk_size or ids.shape[1], dim=1):
        model(chunk, **{CACHE_NAME: cache})
    return cache


class TestHolds:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_what_a_cache_and_weights_of_every_family_hold(self, family):
        skip_what_transformers_does_otherwise(family)
        config = config_of(FAMILIES[family].model_type, FAMILIES[family].config)
        if config.model_type in SERVED_SINCE and not is_served(config.model_type):
            pytest.skip("not served with this version of Transformers")
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="quest").eval()
        cache, stock = QuestCache(16, page_size=4), DynamicCache(config=copy.deepcopy(config))
        ids = torch.randint(2, 96, (2, 130))
        for each in (cache, stock):
            read(model, each, ids[:, :-1])
            read(model, each, ids[:, -1:])
        plan = plan_memory(config, 130, QuestCache(16, page_size=4), batch_size=2)
        assert plan.weights == weights_of(model)
        assert sum(plan.cache.values()) == held(cache)
        assert sum(plan.stock.values()) == held_by_stock(stock)
        is_local = [isinstance(layer.storage, Ring) for layer in cache.layers]
        assert ("local layers" in plan.cache) == any(is_local)
        assert ("bounds" in plan.cache) == (not all(is_local[2:]))

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    @pytest.mark.parametrize("length", LENGTHS)
    def test_with_every_setting(self, options, length):
        model = make_model(dtype=torch.bfloat16)
        cache = read(model, QuestCache(256, **options), tokens(length, batch_size=3))
        plan = plan_memory(model, length, QuestCache(256, **options), batch_size=3)
        assert sum(plan.cache.values()) == held(cache)
        assert sum(plan.host.values()) == held(cache, on_host=True)
        assert plan.cache["keys and values"] + plan.host.get("keys and values", 0) == sum(
            layer.keys[:, :, :length].nbytes + layer.values[:, :, :length].nbytes for layer in cache.layers
        )
        assert ("codes" in plan.cache) == ("codes" in options)

    @pytest.mark.parametrize("pool", [None, 0, 700])
    def test_with_a_pool_where_there_are_kernels(self, monkeypatch, pool):
        model, options = make_model(hidden_size=256, dtype=torch.bfloat16), {"offloading": True, "codes": 2}
        plan = plan_memory(model, 300, QuestCache(64, **options, pool=pool), batch_size=3)
        kernels_on_cpu.emulate(monkeypatch)
        cache = read(model, QuestCache(64, **options, pool=pool), tokens(300, batch_size=3))
        assert sum(plan.cache.values()) == held(cache)
        slots = {None: 256, 0: 0, 700: 768}[pool]
        of_layer = 3 * 2 * (slots * (2 * 64 * 2 + 8) + 16)
        assert plan.cache.get("pool", 0) == (2 * of_layer if slots else 0)
        assert sum(plan.host.values()) == held(cache, on_host=True)

    @pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
    def test_of_every_method(self, method):
        model = make_model()
        cache = read(model, method(budget=100), tokens(300))
        plan = plan_memory(model, 300, method(budget=100))
        assert sum(plan.cache.values()) == held(cache)
        if method in EVICTING:
            assert plan.cache["keys and values"] < sum(plan.stock.values())

    @pytest.mark.parametrize("length", [299, 300, 301, 900, 1800, 1801])
    @pytest.mark.parametrize("chunk_size", [1, 7, 300, 299])
    @pytest.mark.parametrize("is_alternating", [False, True], ids=["", "with a window"])
    def test_of_a_prompt_in_chunks(self, length, chunk_size, is_alternating):
        if chunk_size == 1 and length > 301:
            pytest.skip("many forwards, of which the others say as much")
        model = build("gemma3") if is_alternating else make_model()
        cache = read(model, QuestCache(64), tokens(length), chunk_size)
        assert sum(plan_memory(model, length, QuestCache(64), chunk_size=chunk_size).cache.values()) == held(cache)

    def test_weights_that_are_tied_and_loaded(self):
        model, _ = hf_quest.tiny.load(attn_implementation="quest")
        by_name, by_model = (plan_memory(each, 100) for each in (hf_quest.tiny.PATH, model))
        assert by_name.weights == by_model.weights == weights_of(model)
        assert by_name.dtype == "bfloat16"
        assert plan_memory(hf_quest.tiny.PATH, 100, dtype="float32").weights == pytest.approx(2 * by_name.weights, 1e-3)

    def test_weights_that_are_quantised(self):
        torchao = pytest.importorskip("torchao.quantization")
        model = make_model(dtype=torch.bfloat16)
        before = plan_memory(model, 100).weights
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        assert plan_memory(model, 100).weights < 0.7 * before
        config = copy.deepcopy(model.config)
        config.quantization_config = {"quant_method": "fp8"}
        (note,) = plan_memory(config, 100).notes
        assert "quantised" in note

    def test_a_model_of_a_million_tokens_is_planned_without_memory(self):
        config = LlamaConfig(
            num_hidden_layers=28, hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
            num_key_value_heads=4, vocab_size=152064, max_position_embeddings=1 << 20, dtype="bfloat16",
        )  # fmt: skip
        plan = plan_memory(config, 1 << 20, chunk_size=8192)
        assert plan.cache["keys and values"] == plan.stock["keys and values"] == 2 * 28 * 4 * 128 * 2 << 20
        assert plan.weights > 7e9 * 2
        assert plan.prompt < 1 << 33


class TestPrompt:
    @pytest.mark.parametrize("chunk_size", [None, 256])
    @pytest.mark.parametrize(
        "options", [{}, {"max_cache_len": 1500}, None], ids=["grows", "allocated at once", "stock"]
    )
    def test_takes_what_is_said_at_most_and_not_much_less(self, chunk_size, options):
        model, length = make_model(hidden_size=256, intermediate_size=1024, dtype=torch.bfloat16), 1024
        cache = DynamicCache() if options is None else QuestCache(64, **options)
        plan = plan_memory(model, length, None if options is None else QuestCache(64, **options), chunk_size=chunk_size)
        asked = Asked([*model.parameters(), *model.buffers()])
        with asked, torch.no_grad():
            for chunk in tokens(length).split(chunk_size or length, dim=1):
                model(chunk, **{CACHE_NAME: cache}, logits_to_keep=1)
        peak, total = asked.most + plan.weights, plan.stock_total if options is None else plan.total
        layer = plan.cache["keys and values"] // 4
        # Of a chunk SDPA on a CPU wants masks of bool and of float, and keys and values for every query head.
        attention = 0 if chunk_size is None else 5 * length * chunk_size + 2 * layer
        copies = 2 * layer if options is None else 0  # of a layer, to which stock appends what is new
        grown = layer if options == {} and chunk_size else 0  # which it may have done before the peak
        assert 0.9 * (total - grown) < peak < 1.02 * total + attention + copies

    def test_with_offloading_it_has_one_layer_at_hand(self):
        model, length, chunk_size = make_model(hidden_size=256, intermediate_size=1024), 1024, 256
        cache = QuestCache(64, offloading=True)
        plan = plan_memory(model, length, QuestCache(64, offloading=True), chunk_size=chunk_size)
        asked = Asked([*model.parameters(), *model.buffers()])
        with asked:
            generate(model, tokens(length), cache, prefill_chunk_size=chunk_size, max_new_tokens=1)
        assert (held(cache), held(cache, on_host=True)) == (sum(plan.cache.values()), sum(plan.host.values()))
        peak = asked.most + plan.weights - sum(plan.host.values())
        attention = 5 * length * chunk_size + 2 * plan.host["keys and values"] // 2  # as in the test above
        assert 0.9 * plan.total < peak < 1.02 * plan.total + attention
        assert plan.total < plan_memory(model, length, QuestCache(64), chunk_size=chunk_size).total

    def test_falls_with_chunks(self):
        whole, parts = (plan_memory(hf_quest.tiny.PATH, 16384, chunk_size=size) for size in (None, 1024))
        assert parts.prompt < whole.prompt / 4
        assert parts.chunk_size == 1024
        assert whole.chunk_size is None


class TestRefuses:
    @pytest.mark.parametrize("name", ["num_tokens", "batch_size", "chunk_size"])
    @pytest.mark.parametrize("value", [-1, 2.5, True, "3"])
    def test_numbers_that_are_none(self, name, value):
        with pytest.raises(ValueError, match=rf"{name} is a number, 1 or more, not"):
            plan_memory(hf_quest.tiny.PATH, **{"num_tokens": 10, name: value})

    def test_a_cache_that_holds_tokens(self):
        model = make_model()
        with pytest.raises(ValueError, match="takes an empty cache, for its settings"):
            plan_memory(model, 10, read(model, QuestCache(64), tokens(5)))

    @pytest.mark.parametrize("dtype", ["int8", "nothing", torch.int32])
    def test_a_dtype_that_is_none_of_weights(self, dtype):
        with pytest.raises(ValueError, match="dtype is that of weights, such as bfloat16"):
            plan_memory(hf_quest.tiny.PATH, 10, dtype=dtype)

    def test_a_cache_that_is_too_short(self):
        with pytest.raises(ValueError, match=r"max_cache_len=9 tokens are not enough"):
            plan_memory(hf_quest.tiny.PATH, 10, QuestCache(max_cache_len=9))

    def test_what_is_no_model(self, tmp_path):
        with pytest.raises(ValueError, match=r"cannot be planned"):
            plan_memory(tmp_path, 10)

    def test_models_that_cannot_be_served(self):
        with pytest.raises(QuestError, match="has an attention of its own"):
            plan_memory(MptConfig(d_model=64, n_heads=4, n_layers=2), 10)
        latent = DeepseekV2Config(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
        cached = AutoModelForCausalLM.from_config(latent, attn_implementation="quest")
        error = None
        try:
            read(cached, QuestCache(64), tokens(5))
        except QuestError as refused:
            error = refused
        if error is None:  # Transformers' own DeepSeek caches whole keys
            assert plan_memory(latent, 10).weights
        else:
            with pytest.raises(QuestError, match="caches latents"):
                plan_memory(latent, 10)


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "200"}, catch_exceptions=False)


class TestCommand:
    def test_json_is_what_python_says(self):
        options = ("--budget", 512, "--codes", 2, "--bounds", "keys", "--dense-layers", 1, "--page-size", 32)
        result = run("--tokens", 3000, "--batch-size", 2, "--chunk", 1000, *options, "--json", "--dtype", "float32")
        said = json.loads(result.output)
        cache = QuestCache(512, codes=2, bounds_dtype=None, dense_layers=1, page_size=32)
        plan = plan_memory(hf_quest.tiny.PATH, 3000, cache, batch_size=2, chunk_size=1000, dtype="float32")
        assert {name: said[name] for name in vars(plan)} == vars(plan)
        assert (said["total"], said["stock_total"]) == (plan.total, plan.stock_total)
        is_here = torch.cuda.is_available()
        assert (said["memory"] is not None) == (said["fits"] is not None) == is_here

    def test_the_table_has_every_kind_and_says_that_it_fits(self):
        result = run("--tokens", 3000, "--memory", 1)
        plan = plan_memory(hf_quest.tiny.PATH, 3000)
        for kind in ("weights", "keys and values", "room to grow", "bounds", "while the prompt is read", "at most"):
            assert kind in result.output
        assert f"{plan.total / 2**20:,.2f}" in result.output
        left = (2**30 - plan.total) / 2**20
        assert f"It fits the 1,024.00 MiB of --memory: {left:,.2f} are left." in result.output

    def test_what_lies_on_the_host_is_said_by_itself(self):
        result = run("--tokens", 3000, "--memory", 1, "--offloading")
        plan = plan_memory(hf_quest.tiny.PATH, 3000, QuestCache(offloading=True))
        assert f"{plan.total / 2**20:,.2f}" in result.output
        assert "on the host: keys and values" in result.output
        assert f"Of the host {sum(plan.host.values()) / 2**20:,.2f} MiB; here" in result.output
        assert json.loads(run("--tokens", 3000, "--offloading", "--json").output)["host"] == plan.host

    def test_a_pool_is_as_large_as_one_says(self):
        options = ("--tokens", 3000, "--budget", 256, "--offloading", "--codes", 2, "--json")
        sizes = [json.loads(run(*options, *pool).output)["cache"].get("pool") for pool in ([], ["--pool", 512])]
        assert sizes[0] == pytest.approx(2 * sizes[1], rel=1e-3)

    def test_what_does_not_fit_is_said_with_the_context_that_would(self):
        result = run("--tokens", 200_000, "--memory", 1)
        assert "It does not fit the 1.00 GiB of --memory" in result.output
        assert "The model is made for 40,960 tokens." in result.output
        assert "Read the prompt in parts" in result.output
        said = json.loads(run("--tokens", 200_000, "--memory", 1, "--json").output)
        assert not said["fits"]
        assert f"About {said['longest']:,} tokens would fit." in result.output
        assert plan_memory(hf_quest.tiny.PATH, said["longest"]).fits(2**30)
        assert not plan_memory(hf_quest.tiny.PATH, said["longest"] + STEP).fits(2**30)

    def test_weights_that_are_too_many(self):
        assert "The weights alone are more." in run("--tokens", 3000, "--memory", 0.01).output

    def test_a_batch_is_told_of_its_mask(self):
        output = run("--tokens", 3000, "--batch-size", 4, "--chunk", 700).output
        assert f"attention mask while it is read, of {4 * 200 * 3000:,} bytes or more" in output

    def test_without_a_gpu_it_asks_for_the_memory(self):
        if torch.cuda.is_available():
            pytest.skip("there is one")
        assert "There is no GPU here to compare with" in run("--tokens", 3000).output

    def test_mistakes_are_one_line(self):
        result = run("--tokens", 3000, "--model", "no/such-model")
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: no/such-model cannot be planned: ")
        assert len(result.stderr.splitlines()) == 1


def test_the_longest_context_is_none_where_not_even_a_short_one_fits():
    assert longest_context(lambda count: plan_memory(hf_quest.tiny.PATH, count), 0, 9 * STEP) == 0


def test_a_method_of_ones_own_is_planned_as_any():
    plan = plan_memory(hf_quest.tiny.PATH, 100, MethodCache(ExactTopK(budget=20)))
    assert set(plan.cache) == {"keys and values", "room to grow"}
    assert math.isclose(plan.cache["keys and values"], 100 * 6 * 2 * 2 * 64 * 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("chunk_size", [None, 4096])
def test_on_a_gpu_it_takes_as_much(chunk_size):
    options = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_hidden_layers": 8}
    options |= {"max_position_embeddings": 65536, "dtype": torch.bfloat16}
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = make_model(**options).to("cuda")
    plan = plan_memory(model, 32768, chunk_size=chunk_size)
    assert torch.cuda.memory_allocated() - before == pytest.approx(plan.weights, rel=0.01)
    torch.cuda.reset_peak_memory_stats()
    cache, ids = QuestCache(), tokens(32768).to("cuda")
    with torch.no_grad():
        for chunk in ids.split(chunk_size or ids.shape[1], dim=1):
            model(chunk, **{CACHE_NAME: cache}, logits_to_keep=1)
    assert held(cache) == sum(plan.cache.values())
    peak = torch.cuda.max_memory_allocated() - before
    assert 0.7 * plan.total < peak < 1.3 * plan.total  # attention's own memory is not in the plan
