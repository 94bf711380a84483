"""What a watcher is told is what the layers read: the pages of the reference, and the attention that each got."""

import copy

import pytest
import torch
from small_llama import make_model

from hf_quest import QuestCache, reference
from hf_quest.seam import attention
from hf_quest.watch import PageReads

BUDGET, PAGE_SIZE, NUM_PROMPT, NUM_NEW = 32, 8, 90, 12
NUM_PAGES = -(-(NUM_PROMPT + NUM_NEW) // PAGE_SIZE)


@pytest.fixture(scope="module")
def model():
    return make_model()


SUMS_OF_SHARES = reference.Score(width=0.25, keeps_first=True, group="sum")
KINDS = {
    "8 bits": (torch.int8, "published", reference.PUBLISHED),
    "wide": (None, "published", reference.PUBLISHED),
    "default score": (torch.int8, "default", reference.DEFAULT),
    "score of one's own": (torch.int8, SUMS_OF_SHARES, SUMS_OF_SHARES),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def read(request, model, monkeypatch):
    """(reads, cache, the selections that the reference makes from the same queries and cache)."""
    bounds_dtype, named, score = request.param
    cache = QuestCache(BUDGET, page_size=PAGE_SIZE, dense_layers=1, bounds_dtype=bounds_dtype, score=named)
    cache.watcher = reads = PageReads()
    expected = []
    attend = attention.attend

    def watched(layer, query, logits):
        if layer.is_sparse:
            num_pages = -(-layer.length // PAGE_SIZE)
            bounds = [None if each is None else each[:, :, :num_pages] for each in (layer.bounds, layer.scales)]
            where = (layer.length, layer.padding)
            scores = reference.estimate(query, *bounds, logits.scaling, score, (*where, PAGE_SIZE))
            page_ids = reference.select(scores, *where, BUDGET // PAGE_SIZE, PAGE_SIZE, score.keeps_first)
            expected.append((layer.layer_idx, layer.length, page_ids))
        return attend(layer, query, logits)

    monkeypatch.setattr(attention, "attend", watched)
    prompt = torch.arange(2 * NUM_PROMPT).view(2, -1) % 50 + 3
    mask = torch.ones_like(prompt)
    mask[1, :5] = 0
    model.generate(
        prompt,
        attention_mask=mask,
        past_key_values=cache,
        min_new_tokens=NUM_NEW,
        max_new_tokens=NUM_NEW,
        do_sample=False,
    )
    return reads, cache, expected


def test_recorded_pages_are_the_reference_selection(read):
    reads, _, expected = read
    recorded = [(layer, each.length, each.page_ids) for layer in reads.layers for each in reads.selections[layer]]
    expected.sort(key=lambda selection: selection[:2])
    assert [selection[:2] for selection in recorded] == [selection[:2] for selection in expected]
    assert len(recorded) == len(reads.layers) * (NUM_NEW - 1) > 0
    assert all(torch.equal(a[2], b[2]) for a, b in zip(recorded, expected, strict=True))


def test_share_counts_reads(read):
    reads, _, expected = read
    for row in range(2):
        slots = range(NUM_PROMPT + 2, NUM_PROMPT + 5)
        chosen = [ids[row] for layer, length, ids in expected if layer == 1 and length - 1 in slots]
        counts = torch.bincount(torch.cat(chosen).flatten(), minlength=NUM_PAGES)
        share = reads.share(NUM_PAGES, layer_idx=1, slots=slots, row=row)
        assert torch.equal(share, counts / (len(slots) * chosen[0].shape[0]))
    # Every read is of a full selection.
    assert reads.share(NUM_PAGES).sum() == pytest.approx(BUDGET // PAGE_SIZE)


def test_weights_are_those_of_attention(read):
    """Values that say which page a token is of turn the reference's output into attention mass per page."""
    reads, cache, _ = read
    reads.weigh(cache)
    for layer_idx in reads.layers:
        layer = cache.layers[layer_idx]
        for each in reads.selections[layer_idx]:
            page_of_slot = torch.zeros(2, 1, layer.capacity, NUM_PAGES)
            for row, padding in enumerate(layer.left_padding):
                slot = torch.arange(padding, layer.length)
                page_of_slot[row, 0, slot, (slot - padding) // PAGE_SIZE] = 1
            mass = reference.attend(
                each.query,
                layer.keys,
                page_of_slot.expand(-1, layer.keys.shape[1], -1, -1),
                each.page_ids,
                each.length,
                layer.padding,
                PAGE_SIZE,
                *each.logits,
            )
            mass = mass.view(2, layer.keys.shape[1], -1, 1, NUM_PAGES).mean(dim=2)
            torch.testing.assert_close(each.weights, mass.gather(-1, each.page_ids))
    assert reads.attention(NUM_PAGES).sum() == pytest.approx(1)


def test_recording_changes_nothing(model):
    prompt = torch.arange(NUM_PROMPT)[None] % 50 + 3
    caches = [QuestCache(BUDGET, page_size=PAGE_SIZE, dense_layers=1) for _ in range(2)]
    caches[0].watcher = PageReads()
    outputs = [
        model.generate(prompt, past_key_values=cache, max_new_tokens=NUM_NEW, do_sample=False) for cache in caches
    ]
    assert torch.equal(*outputs)


def test_a_watcher_keeps_generate_from_compiling():
    cache = QuestCache(BUDGET)

    def is_compileable():
        return (lambda: cache.is_compileable)()

    assert is_compileable()
    cache.watcher = PageReads()
    assert not is_compileable()
    cache.watcher = None
    assert is_compileable()


def test_within_the_budget_nothing_is_selected(model):
    cache = QuestCache(1024)
    cache.watcher = reads = PageReads()
    model.generate(torch.arange(40)[None] + 3, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert reads.layers == []
    assert reads.share(3).tolist() == reads.attention(3).tolist() == [0, 0, 0]


def test_a_copied_cache_records_for_itself(read, model):
    reads, cache, _ = read
    other = copy.deepcopy(cache)
    num_selections = len(reads.selections[1])
    model(torch.tensor([[5], [6]]), past_key_values=other)
    assert len(other.watcher.selections[1]) == num_selections + 1
    assert len(reads.selections[1]) == num_selections
