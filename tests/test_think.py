"""ThinK: what its paper says, by an implementation of its own, and memory that falls."""

import math

import pytest
import torch
from small_llama import PROMPT, make_model, tokens
from test_methods import EVERYTHING, Stream, forward, read

from hf_quest import ThinKCache
from hf_quest.seam.attention import quest_attention


@pytest.fixture(scope="module")
def model():
    return make_model()


def channels_by_its_paper(stream, kv_head, num_tokens, num_queries, share):
    """Channels that the keys of a head keep: those of the largest mean of squares of the last queries, times that of
    all keys, in Python's 64 bits.
    """
    group = stream.module.num_key_value_groups
    queries = stream.query[0, kv_head * group : (kv_head + 1) * group, :num_tokens][:, -num_queries:].double().tolist()
    keys, scores = stream.key[0, kv_head, :num_tokens].double().tolist(), []
    for channel in range(len(keys[0])):
        squares = [query[channel] ** 2 for head in queries for query in head]
        energy = sum(key[channel] ** 2 for key in keys) / num_tokens
        scores.append(sum(squares) / len(squares) * energy)
    order = sorted(range(len(scores)), key=lambda channel: scores[channel])
    return sorted(order[math.floor(share * len(scores)) :])


def output_by_its_paper(stream, token, head, budget, channels):
    """What a step gives whose older keys have these channels alone; None: all are whole."""
    kv_head = head // stream.module.num_key_value_groups
    query, keys = stream.query[0, head, token].double().tolist(), stream.key[0, kv_head].double().tolist()
    logits = []
    for other in range(token + 1):
        is_whole = other >= token - budget or channels is None
        kept = range(len(query)) if is_whole else channels[kv_head]
        logits.append(sum(query[channel] * keys[other][channel] for channel in kept) / math.sqrt(len(query)))
    weights = [math.exp(logit) for logit in logits]
    values = stream.value[0, kv_head, : token + 1].double()
    return torch.tensor(weights, dtype=torch.float64) @ values / sum(weights)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("budget", "share", "num_queries"), [(8, 0.4, 32), (5, 0.75, 4), (24, 0.5, 3), (1, 0.9, 1), (10, 0.0, 2)]
)
def test_attends_as_its_paper_says(budget, share, num_queries, num_kv_heads):
    num_prompt, num_tokens = 20, 40
    stream = Stream(num_tokens, num_kv_heads=num_kv_heads, seed=budget)
    cache, channels = ThinKCache(budget, share=share, num_queries=num_queries, dense_layers=0), None
    stream.feed(cache, 0, num_prompt)
    for end in range(num_prompt, num_tokens):
        storage = cache.layers[0].storage
        if channels is None and end > budget:
            channels = [
                channels_by_its_paper(stream, kv_head, end, num_queries, share) for kv_head in range(num_kv_heads)
            ]
        assert storage.num_pruned == max(0, end - budget)
        if channels is not None:
            assert storage.channels[0].tolist() == channels
        output = stream.feed(cache, end, end + 1)
        for head in range(4):
            expected = output_by_its_paper(stream, end, head, budget, channels)
            torch.testing.assert_close(output[0, 0, head].double(), expected, rtol=1e-5, atol=1e-6)  # float32 sums
    assert torch.equal(cache.layers[0].values, stream.value)


def test_in_64_bits_it_is_its_paper_to_the_last_digits():
    stream = Stream(40, seed=5)
    stream.query, stream.key, stream.value = (each.double() for each in (stream.query, stream.key, stream.value))
    cache = ThinKCache(8, share=0.5, dense_layers=0)
    stream.feed(cache, 0, 30)
    channels = [channels_by_its_paper(stream, kv_head, 30, 32, 0.5) for kv_head in range(2)]
    for token in range(30, 40):
        output = stream.feed(cache, token, token + 1)
        for head in range(4):
            expected = output_by_its_paper(stream, token, head, 8, channels)
            torch.testing.assert_close(output[0, 0, head], expected, rtol=1e-12, atol=1e-12)


def num_bytes(cache):
    """Of all that is stored, by the memory that its tensors hold."""
    held = {}
    for layer in cache.layers:
        for tensor in layer.storage.tensors().values():
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(held.values())


@pytest.mark.parametrize("share", [0.4, 0.75])
def test_memory_falls(model, share):
    """By the bytes that the layers really hold."""
    pruned, whole = ThinKCache(32, share=share, dense_layers=0), ThinKCache(EVERYTHING, dense_layers=0)
    for cache in (pruned, whole):
        read(model, cache, 20)
    num_older, head_dim, num_layers, num_kv_heads = PROMPT + 20 - 32, 16, 4, 2
    assert len(pruned.layers) == num_layers
    lost = num_layers * num_kv_heads * num_older * math.floor(share * head_dim) * 4  # float32
    channels = num_layers * num_kv_heads * (head_dim - math.floor(share * head_dim)) * 8
    assert num_bytes(whole) - num_bytes(pruned) == lost - channels
    assert pruned.read_share == pytest.approx(1 - num_older * math.floor(share * head_dim) / (170 * 2 * head_dim))
    assert whole.read_share == 1.0
    assert pruned.tokens_attended == whole.tokens_attended == [PROMPT + 20] * num_layers


def test_channels_are_chosen_once_and_every_row_has_its_own(model):
    cache, ids = ThinKCache(16, dense_layers=0), tokens(PROMPT, batch_size=2)
    mask = (torch.arange(PROMPT) >= torch.tensor([[0], [PROMPT - 10]])).long()  # a row of ten tokens
    forward(model, cache, ids, mask)
    storage = cache.layers[0].storage
    chosen = storage.channels.clone()
    for step in range(10):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        forward(model, cache, tokens(1, seed=step, batch_size=2), mask)
        has_more = step + 11 > 16
        assert torch.equal(storage.channels[0], chosen[0])
        if has_more and step + 11 == 17:
            chosen = storage.channels.clone()
        assert not has_more or torch.equal(storage.channels, chosen)


def test_a_larger_budget_leaves_what_is_pruned_and_a_smaller_one_prunes(model):
    cache = read(model, ThinKCache(20))
    storage = cache.layers[3].storage
    cache.budget = 30
    read_more = [forward(model, cache, tokens(1, seed=step)) for step in range(4)]
    assert all(logits.isfinite().all() for logits in read_more)
    assert (storage.num_pruned, storage.capacity) == (PROMPT + 4 - 20, 24)
    cache.budget = 5
    assert (storage.num_pruned, storage.capacity) == (PROMPT + 8 - 5, 5)


def test_layers_that_share_keys_attend_the_same(model):
    """Gemma 3n's last layers attend by the keys of others."""
    stream, other = Stream(40, seed=3), Stream(40, seed=4)
    shared, alone = ThinKCache(8, dense_layers=0), ThinKCache(8, dense_layers=0)
    for first, end in [(0, 30), (30, 31), (31, 32)]:
        key, value = shared.update(stream.key[:, :, first:end], stream.value[:, :, first:end], 0)
        output, _ = quest_attention(stream.module, stream.query[:, :, first:end], key, value, None)
        again, _ = quest_attention(stream.module, stream.query[:, :, first:end], key, value, None)
        assert torch.equal(output, stream.feed(alone, first, end))
        assert torch.equal(output, again)
        quest_attention(other.module, other.query[:, :, first:end], key, value, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ThinKCache(0), "budget of ThinKCache is a number of tokens, 1 or more, not 0"),
        (lambda: ThinKCache(share=1), "share is a share of channels, 0 or more and below 1, not 1"),
        (lambda: ThinKCache(share=True), "share is a share of channels, 0 or more and below 1, not True"),
        (lambda: ThinKCache(num_queries=0), "num_queries is a number of tokens, 1 or more, not 0"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
