"""Bad input gets a clear error before anything is computed, and leaves the cache as it was."""

import pytest
import torch
from small_llama import PROMPT, feed, generate, make_model, tokens

from hf_quest import QuestCache, QuestError, reference
from hf_quest.storage import Pages


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def prefilled(model):
    cache = QuestCache(budget=48)
    with torch.no_grad():
        model(tokens(PROMPT), past_key_values=cache)
    return cache


def assert_usable(model, cache):
    """The cache answers as one that never saw the error."""
    undisturbed = QuestCache(budget=cache.budget)
    answer = torch.cat([tokens(1, seed=2), tokens(3, seed=3)], dim=1)
    with torch.no_grad():
        model(tokens(PROMPT), past_key_values=undisturbed)
    assert cache.get_seq_length() == PROMPT
    continued = feed(model, cache, tokens(20, seed=4), answer)
    assert torch.equal(continued, feed(model, undisturbed, tokens(20, seed=4), answer))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 31}, "budget is a number of tokens and at least two pages, 32 tokens with page_size=16.* It is 31"),
        ({"budget": 32, "page_size": 32}, "at least two pages, 64 tokens with page_size=32"),
        ({"budget": 0.5}, "budget is a number of tokens.* It is 0.5"),
        ({"budget": True}, "budget is a number of tokens.* It is True"),
        ({"page_size": 24}, "page_size is a number of tokens and a power of two.*, not 24"),
        ({"page_size": 0}, "page_size is a number of tokens and a power of two.*, not 0"),
        ({"page_size": "16"}, "page_size is a number of tokens and a power of two.*, not '16'"),
        ({"dense_layers": -1}, "dense_layers is a number of layers, 0 or more, not -1"),
        ({"max_cache_len": 0}, "max_cache_len is a number of tokens, or None for a cache that grows, not 0"),
        ({"bounds_dtype": torch.bfloat16}, "bounds_dtype is torch.int8, or None for the dtype of the keys, not torch"),
        ({"bounds_dtype": "int8"}, "bounds_dtype is torch.int8, or None for the dtype of the keys, not 'int8'"),
        ({"score": "best"}, "score is one of 'default', 'published' or a hf_quest.reference.Score, not 'best'"),
        ({"score": 0.5}, "score is one of 'default', 'published' or a hf_quest.reference.Score, not 0.5"),
        (
            {"score": reference.Score(1.5, True, "max")},
            "A Score has a width from 0 to 1 and a group of .*, unlike Score.width=1.5",
        ),
        (
            {"score": reference.Score(0.5, True, "mean")},
            "A Score has .* a group of .'max', 'sum', 'share'., unlike .*'mean'",
        ),
        ({"bounds_dtype": 8}, "bounds_dtype is torch.int8, or None for the dtype of the keys, not 8"),
    ],
    ids=str,
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuestCache(**arguments)


def test_budget_is_checked_on_assignment_and_kept(model, prefilled):
    with pytest.raises(ValueError, match="at least two pages"):
        prefilled.budget = 16
    assert prefilled.budget == 48
    assert_usable(model, prefilled)


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_batch_that_changed_size(model, prefilled, num_tokens):
    with pytest.raises(ValueError, match=r"The cache holds 1 rows and this batch has 2\. Call cache\.reset\(\)"):
        model(tokens(num_tokens, batch_size=2), past_key_values=prefilled)
    assert_usable(model, prefilled)


@pytest.mark.parametrize("options", [{"num_key_value_heads": 4}, {"head_dim": 32}, {"dtype": torch.bfloat16}], ids=str)
def test_cache_of_a_model_of_another_shape(model, prefilled, options):
    other = make_model(**options)
    with pytest.raises(ValueError, match=r"it is another model's cache\. Use a new one"):
        other(tokens(20), past_key_values=prefilled)
    assert_usable(model, prefilled)
    prefilled.reset()
    other(tokens(20), past_key_values=prefilled)
    assert prefilled.get_seq_length() == 20


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_cache_of_a_model_on_another_device(model, prefilled, num_tokens):
    first = prefilled.layers[0].storage
    keys, first.keys = first.keys, first.keys.to("meta")  # as if it had been filled there
    with pytest.raises(ValueError, match="tokens for a model on meta, and this one's keys are on cpu"):
        model(tokens(num_tokens), past_key_values=prefilled)
    first.keys = keys
    assert_usable(model, prefilled)


def test_cache_of_a_model_with_fewer_layers(model, prefilled):
    with pytest.raises(ValueError, match="The cache holds tokens of 4 layers and this model has more"):
        make_model(num_hidden_layers=5)(tokens(20), past_key_values=prefilled)
    assert_usable(model, prefilled)


def test_cache_of_a_model_with_more_layers(model, prefilled):
    other = make_model(num_hidden_layers=3)
    with torch.no_grad():
        other(tokens(20), past_key_values=prefilled)
        with pytest.raises(QuestError, match="The last forward filled 3 of this cache's 4 layers"):
            other(tokens(20), past_key_values=prefilled)
    assert_usable(model, prefilled)


def test_forward_that_was_interrupted(model, prefilled):
    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[2].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            model(tokens(20), past_key_values=prefilled)
    finally:
        hook.remove()
    with pytest.raises(QuestError, match="put back to the 150 tokens before; repeat the call"):
        model(tokens(20), past_key_values=prefilled)
    assert_usable(model, prefilled)


def test_capacity_that_runs_out(model):
    cache = QuestCache(budget=48, max_cache_len=PROMPT + 40)
    with torch.no_grad():
        model(tokens(PROMPT), past_key_values=cache)
    with pytest.raises(ValueError, match=r"max_cache_len=190 tokens are not enough: 150 are stored and 41 more arrive"):
        model(tokens(41), past_key_values=cache)
    assert_usable(model, cache)


def test_prompt_beyond_max_cache_len_allocates_nothing(model):
    cache = QuestCache(max_cache_len=100)
    with pytest.raises(ValueError, match="max_cache_len=100 tokens are not enough: 0 are stored and 150 more arrive"):
        generate(model, tokens(PROMPT), cache)
    assert not any(layer.is_initialized for layer in cache.layers)
    assert generate(model, tokens(50), cache).shape[1] == 74


def test_unsupported_dtype():
    with pytest.raises(
        ValueError, match=r"stores float32, float16 or bfloat16 keys, and this model's are torch.float64"
    ):
        make_model(dtype=torch.float64)(tokens(20), past_key_values=QuestCache())


def test_forward_without_a_new_token(model, prefilled):
    with pytest.raises(ValueError, match="The cache already holds 150 tokens, the whole input"):
        model(tokens(0), past_key_values=prefilled)
    assert_usable(model, prefilled)


@pytest.mark.parametrize("removed", [1, -151])
def test_crop_beyond_what_is_stored(model, prefilled, removed):
    with pytest.raises(
        ValueError, match=f"crop takes minus the number of tokens to remove, from 0 to -150 here, not {removed}"
    ):
        prefilled.crop(removed)
    assert_usable(model, prefilled)


def test_model_loaded_with_another_attention(model):
    cache = QuestCache()
    other = make_model()
    other.set_attn_implementation("sdpa")
    for _ in range(2):
        with pytest.raises(QuestError, match=r'Load the model with attn_implementation="quest"'):
            other(tokens(20), past_key_values=cache)
    assert torch.equal(generate(model, tokens(PROMPT), cache), generate(model, tokens(PROMPT), QuestCache()))


def test_document_survives_a_model_loaded_with_another_attention(model, prefilled):
    other = make_model()
    other.set_attn_implementation("sdpa")
    with pytest.raises(QuestError, match="The cache has been put back to the 150 tokens before"):
        other(tokens(20), past_key_values=prefilled)
    assert_usable(model, prefilled)


def test_model_of_one_layer_loaded_with_another_attention():
    cache, other = QuestCache(), make_model(num_hidden_layers=1)
    other.set_attn_implementation("sdpa")
    other(tokens(20), past_key_values=cache)
    with pytest.raises(QuestError, match=r"filled 1 of this cache's 1 layers.*put back to the 0 tokens"):
        other(tokens(20), past_key_values=cache)


@pytest.mark.parametrize("layer_idx", [0, 1, 3])
def test_append_that_fails(model, prefilled, monkeypatch, layer_idx):
    write = Pages.write
    calls = []

    def run_out_of_memory(*arguments):
        calls.append(arguments)
        if len(calls) == layer_idx + 1:
            raise MemoryError
        write(*arguments)

    monkeypatch.setattr(Pages, "write", run_out_of_memory)
    with pytest.raises(MemoryError):
        model(tokens(20), past_key_values=prefilled)
    monkeypatch.undo()
    if layer_idx:
        with pytest.raises(QuestError, match="repeat the call"):
            model(tokens(20), past_key_values=prefilled)
    assert_usable(model, prefilled)
