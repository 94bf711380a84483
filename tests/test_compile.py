"""`generate` compiles its decode step with a QuestCache: one graph, whatever follows, and the same answers.

It is made to compile on a CPU, where everything but the recording of CUDA graphs is then as on a GPU.
"""

import copy
import math
import pickle
import sys
from random import Random

import pytest
import torch
from small_llama import ANSWER, BUDGET, PROMPT, generate, greedy, make_model, on_any_device, tokens
from torch._dynamo.utils import counters
from transformers import Gemma3ForCausalLM, GptOssForCausalLM, LlamaForCausalLM, MistralForCausalLM

from hf_quest import QuestCache, capture, tiny
from hf_quest.evaluation.documents import Library, documents, heldout_text
from hf_quest.seam.capture import recording

LAYERS = {"num_hidden_layers": 2}
BOTH_KINDS = ["sliding_attention", "full_attention"]


def new_cache(**options):
    return QuestCache(BUDGET, dense_layers=1, **options)


def num_graphs():
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def forget_graphs():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture(scope="class")
def model():
    torch._dynamo.reset()
    counters.clear()
    return make_model(**LAYERS)


@pytest.mark.parametrize(
    ("budget", "max_cache_len", "reads_everything"),
    [
        (2048, None, True),  # as many positions as the model has
        (2032, None, False),  # which covers this text, but not every one
        (2032, 1000, True),
        (BUDGET, None, False),
        (BUDGET, 1000, False),
    ],
)
def test_a_captured_step_is_dense_where_the_budget_covers_all_to_come(budget, max_cache_len, reads_everything):
    cache = QuestCache(budget, max_cache_len=max_cache_len)
    greedy(make_model(**LAYERS), cache, tokens(PROMPT))
    assert cache.shared.step.reads_everything == reads_everything


def test_a_budget_beyond_all_storage_reads_everything_of_a_text_whose_end_is_not_known():
    """As the first step is of a cache that was filled without a model. No kernel counts so many pages."""
    cache = QuestCache(sys.maxsize)
    cache.update(*torch.randn(2, 1, 2, 4, 16), 0)[0].quest_layer.handed.end()
    cache._prepare_step()
    assert cache.shared.max_positions == math.inf
    assert cache.shared.step.reads_everything


def test_a_captured_model_is_given_the_cache_and_takes_steps_that_it_cannot_record(monkeypatch):
    seen, can_be_recorded = [], recording.can_be_recorded
    monkeypatch.setattr(
        recording, "can_be_recorded", lambda cache, inputs: seen.append(cache) or can_be_recorded(cache, inputs)
    )
    model, config, cache = capture(make_model(**LAYERS)), on_any_device(), new_cache()
    model._last_compile_config = config  # or `generate` would compile the step by itself
    output = generate(model, tokens(PROMPT), cache, compile_config=config)
    assert len(seen) == ANSWER - 1
    assert all(given is cache for given in seen)
    assert torch.equal(output, greedy(make_model(**LAYERS), new_cache(), tokens(PROMPT)))


class TestOneGraph:
    """Inductor compiles once, at the first prompt of the first test, for all of them."""

    @pytest.fixture
    def compiled(self, model):
        config = on_any_device(mode="default")

        def generate_compiled(input_ids, cache, **options):
            output = generate(model, input_ids, cache, compile_config=config, **options)
            assert num_graphs() == 1
            return output

        return generate_compiled

    @pytest.mark.parametrize("num_tokens", [20, PROMPT, PROMPT + 400])
    @pytest.mark.parametrize("max_cache_len", [None, 1000])
    def test_every_prompt_on_a_fresh_cache(self, model, compiled, num_tokens, max_cache_len):
        prompt = tokens(num_tokens)
        expected = greedy(model, new_cache(), prompt)
        assert torch.equal(compiled(prompt, new_cache(max_cache_len=max_cache_len)), expected)

    def test_storage_that_grows(self, model, compiled):
        cache, prompt = new_cache(), tokens(PROMPT)
        output = compiled(prompt, cache, max_new_tokens=300)
        assert torch.equal(output, greedy(model, new_cache(), prompt, 300))
        assert cache.get_seq_length() == PROMPT + 299

    def test_reset(self, model, compiled):
        cache = new_cache()
        for seed in (1, 2):
            prompt = tokens(PROMPT, seed=seed)
            assert torch.equal(compiled(prompt, cache), greedy(model, new_cache(), prompt))
            cache.reset()

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
    def test_copies_of_a_conversation(self, model, compiled, copied):
        cache = new_cache()
        first = compiled(tokens(PROMPT), cache)
        prompt = torch.cat([first, tokens(9, seed=2)], dim=1)
        expected = greedy(model, greedy_cache := new_cache(), tokens(PROMPT))
        assert torch.equal(first, expected)
        expected = torch.cat([first, greedy(model, greedy_cache, prompt[:, PROMPT + 23 :])[:, 1:]], dim=1)
        for _ in range(2):
            assert torch.equal(compiled(prompt, copied(cache)), expected)
        assert torch.equal(compiled(prompt, cache), expected)

    def test_prefill_chunks(self, model, compiled):
        output = compiled(tokens(PROMPT), new_cache(), prefill_chunk_size=37)
        assert torch.equal(output, greedy(model, new_cache(), tokens(PROMPT)))

    def test_sampling(self, model, compiled):
        outputs = []
        for run in (compiled, lambda *inputs, **options: generate(model, *inputs, **options)):
            torch.manual_seed(0)
            outputs.append(run(tokens(PROMPT), new_cache(), do_sample=True))
        assert torch.equal(*outputs)

    def test_what_the_cache_says_of_itself_afterwards(self, compiled):
        cache, eager_cache = new_cache(), new_cache()
        compiled(tokens(PROMPT), cache)
        generate(make_model(**LAYERS), tokens(PROMPT), eager_cache)
        assert repr(cache) == repr(eager_cache)
        assert (cache.tokens_attended, cache.read_share) == (eager_cache.tokens_attended, eager_cache.read_share)

    def test_max_cache_len_that_runs_out(self, model, compiled):
        cache = new_cache(max_cache_len=PROMPT + 5)
        with pytest.raises(ValueError, match="max_cache_len=155 tokens are not enough: 155 are stored and 1 more"):
            compiled(tokens(PROMPT), cache)
        assert cache.get_seq_length() == PROMPT + 5
        cache.crop(-10)
        output = compiled(tokens(PROMPT), cache, max_new_tokens=5)
        assert torch.equal(output, greedy(model, new_cache(), tokens(PROMPT), 5))


def test_codes_are_one_graph(forget_graphs):
    model, cache = make_model(**LAYERS), new_cache(codes=2, candidates=2)
    expected = generate(model, tokens(PROMPT), cache)
    cache.reset()
    assert torch.equal(generate(model, tokens(PROMPT), cache, compile_config=on_any_device()), expected)
    assert num_graphs() == 1


@pytest.mark.parametrize("bounds_dtype", [None, torch.int8], ids=["wide", "8 bits"])
def test_left_padded_rows_are_one_graph_and_the_rows_alone(forget_graphs, bounds_dtype):
    options = {"bounds_dtype": bounds_dtype}
    model, config = make_model(**LAYERS), on_any_device(backend="aot_eager", mode=None)
    for seed, padding in ((1, 37), (2, 101)):
        input_ids = tokens(PROMPT, seed=seed, batch_size=2)
        input_ids[1, :padding] = 0
        mask = (input_ids > 0).long()
        output = generate(model, input_ids, new_cache(**options), attention_mask=mask, compile_config=config)
        assert torch.equal(output[:1], greedy(model, new_cache(**options), input_ids[:1]))
        assert torch.equal(output[1:, padding:], greedy(model, new_cache(**options), input_ids[1:, padding:]))
    assert num_graphs() == 1


@pytest.mark.parametrize(
    ("model_class", "options"),
    [
        (MistralForCausalLM, {"sliding_window": 64}),
        (Gemma3ForCausalLM, {"sliding_window": 64, "layer_types": ["full_attention", *BOTH_KINDS]}),
        (GptOssForCausalLM, {"sliding_window": 64, "layer_types": ["full_attention", *BOTH_KINDS]}),
        (LlamaForCausalLM, {"num_key_value_heads": 1}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_families_are_one_graph_for_every_prompt(forget_graphs, model_class, options):
    """Of a layer that is dense, and one of each kind behind it."""
    model = make_model(model_class, **{"num_hidden_layers": len(options.get("layer_types", BOTH_KINDS)), **options})
    config = on_any_device(backend="aot_eager", mode=None)
    for num_tokens in (30, PROMPT):  # in the window and within the budget, and beyond both
        prompt = tokens(num_tokens)
        expected = generate(model, prompt, new_cache(compile=False))
        assert torch.equal(generate(model, prompt, new_cache(), compile_config=config), expected)
        assert num_graphs() == 1


def test_a_switch_turns_it_off(forget_graphs):
    model, config = make_model(**LAYERS), on_any_device(backend="aot_eager", mode=None)
    generate(model, tokens(PROMPT), new_cache(compile=False), compile_config=config)
    generate(model, tokens(PROMPT), new_cache(), compile_config=config, disable_compile=True)
    assert num_graphs() == 0


def test_a_thread_that_compiles_changes_nothing_for_others(monkeypatch):
    """PyTorch 2.13 says to all threads that it compiles while one of them does, in the middle of their forwards too."""
    model, random = make_model(**LAYERS), Random(1)
    expected = generate(model, tokens(PROMPT), new_cache())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: random.random() < 0.5)
    assert torch.equal(generate(model, tokens(PROMPT), new_cache(), disable_compile=True), expected)


def test_drafts_are_not_compiled_by_generate(forget_graphs):
    """As Transformers 5.24 would: each layer in several graphs, or with `fullgraph` an error."""
    model, text = make_model(**LAYERS), tokens(40).repeat(1, 4)
    expected = generate(model, text, new_cache(), prompt_lookup_num_tokens=4)
    output = generate(model, text, new_cache(), prompt_lookup_num_tokens=4, compile_config=on_any_device())
    assert torch.equal(output, expected)
    assert num_graphs() == 0


def test_a_forward_that_generate_did_not_prepare_is_right_outside_of_the_graph(forget_graphs):
    model = make_model(**LAYERS)
    expected = greedy(model, new_cache(), tokens(PROMPT), 6)
    assert torch.equal(greedy(torch.compile(model, backend="eager"), new_cache(), tokens(PROMPT), 6), expected)


def test_generate_with_a_forward_that_the_user_compiled_for_any_size(forget_graphs):
    local = {"layer_types": BOTH_KINDS, "sliding_window": 32, "head_dim": 16, "pad_token_id": 0}
    model = make_model(Gemma3ForCausalLM, **LAYERS, **local)
    expected = generate(model, tokens(PROMPT), new_cache(), max_new_tokens=3)
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    assert torch.equal(generate(model, tokens(PROMPT), new_cache(), max_new_tokens=3), expected)


@torch.no_grad()
def test_the_tiny_model_writes_the_same_256_tokens_after_4k(forget_graphs):
    model, tokenizer = tiny.load(attn_implementation="quest", dtype=torch.float32)
    document = next(documents(Library(tokenizer, heldout_text()[:300_000]), "digest", 8192, 1, seed=3))
    ids = torch.tensor([document.ids])
    cache = QuestCache(budget=512)
    model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    options = {"max_new_tokens": 256, "min_new_tokens": 256}
    expected = generate(model, ids, copy.deepcopy(cache), disable_compile=True, **options)
    compiled = generate(model, ids, cache, compile_config=on_any_device(mode="default"), **options)
    assert num_graphs() == 1
    assert torch.equal(compiled, expected)
