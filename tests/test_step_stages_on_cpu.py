"""A CPU's own stages of a decode step say what the reference says; bounds that wait for their page lose nothing."""

import copy
import io

import pytest
import torch
from small_llama import BUDGET, PROMPT, generate, make_model, tokens

from hf_quest import QuestCache, reference
from hf_quest.kernels import cpu
from hf_quest.reference import DEFAULT, PUBLISHED, Score

PAGE_SIZE = 16
LENGTHS = (33, 100, 1000, 1024, 1025, 17000)
SHAPES = ((1, 2, 3, 64), (2, 3, 1, 48), (2, 1, 4, 16))  # B, Hkv, G, D


class Stored:
    """Random keys and values of `length` tokens, NaN in the slots after them, and what is beside their pages."""

    def __init__(self, length, shape):
        torch.manual_seed(length)
        batch_size, num_kv_heads, group_size, head_dim = shape
        capacity = -(-length // PAGE_SIZE) * PAGE_SIZE + 32
        slots, pages = (batch_size, num_kv_heads, capacity), (batch_size, num_kv_heads, capacity // PAGE_SIZE)
        self.keys, self.values = torch.randn(*slots, head_dim), torch.randn(*slots, head_dim)
        self.keys[:, :, length:] = self.values[:, :, length:] = torch.nan
        self.query = torch.randn(batch_size, num_kv_heads * group_size, 1, head_dim)
        self.bounds = torch.zeros(*pages, 2, head_dim, dtype=torch.int8)
        self.scales = torch.zeros(*pages, -(-head_dim // reference.SCALE_BLOCK), dtype=torch.uint8)
        self.where = (length, torch.zeros(batch_size, dtype=torch.int64), PAGE_SIZE)
        self.num_pages = -(-length // PAGE_SIZE)
        reference.refresh_bounds(self.keys, self.bounds, self.scales, length, *self.where)

    def of_pages(self):
        """Bounds and scales, and what `Widened` makes of both."""
        bounds, scales = (each[:, :, : self.num_pages] for each in (self.bounds, self.scales))
        return bounds, scales, reference.from_8_bits(bounds, scales).flatten(3).transpose(2, 3).bfloat16()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("score", [DEFAULT, PUBLISHED, Score(0.3, True, "sum"), Score(0.0, False, "share")], ids=str)
def test_estimate_is_that_of_the_reference(score, length, shape):
    stored = Stored(length, shape)
    bounds, scales, widened = stored.of_pages()
    expected = reference.estimate(stored.query, bounds, scales, 0.125, score, stored.where)
    found = cpu.estimate(stored.query, widened, 0.125, score)
    # The same sums of 32 to 128 products in float32, in another order.
    torch.testing.assert_close(found[..., :-1], expected[..., :-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keeps_first", [True, False])
@pytest.mark.parametrize("num_pages", [3, 7, 64, 1024, 1025, 3000])
def test_select_is_that_of_the_reference_where_many_scores_are_equal(num_pages, keeps_first):
    torch.manual_seed(num_pages)
    scores = torch.randn(2, 3, 1, num_pages).round()
    scores[0, 1, 0, 1] = torch.inf
    padding = torch.zeros(2, dtype=torch.int64)
    for num_selected in (2, min(num_pages, 33)):
        where = (num_pages * PAGE_SIZE - 5, padding, num_selected, PAGE_SIZE, keeps_first)
        expected = reference.select(scores, *where)
        assert torch.equal(cpu.select(scores.clone(), num_selected, keeps_first), expected)


def test_the_newest_page_is_selected_among_pages_without_bounds():
    """Keys that are not numbers have no bounds, and their pages score as high as can be."""
    scores = torch.full((1, 1, 1, 40), torch.nan)
    assert cpu.select(scores, 4, True).flatten().tolist() == [0, 1, 2, 39]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_attend_is_that_of_the_reference(length, shape, dtype):
    stored = Stored(length, shape)
    tensors = [tensor.to(dtype) for tensor in (stored.query, stored.keys, stored.values)]
    pages = torch.stack([torch.randperm(stored.num_pages - 1)[:2] for _ in range(shape[0] * shape[1])])
    pages = pages.sort(dim=-1).values.view(*shape[:2], 1, -1)
    newest = torch.full_like(pages[..., :1], stored.num_pages - 1)
    by_page = torch.cat([pages, newest], dim=-1)
    by_token = torch.cat([pages * 3, newest * 0 + length - 1], dim=-1)
    for ids, size in ((by_page, PAGE_SIZE), (by_token, 1)):
        for chosen in (ids, torch.cat([ids[..., :-1], newest * 0 - 1], dim=-1)):  # the last of them is none
            where = (length, stored.where[1], size)
            expected = reference.attend(*tensors, chosen, *where, 0.125)
            found = cpu.attend(*tensors, chosen, length, size, 0.125)
            # Float32 sums in another order; in bfloat16 both are rounded at the end, seldom to neighbours.
            torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_the_answer_is_that_of_the_reference(model, monkeypatch):
    for options in ({}, {"bounds_dtype": None}, {"codes": 2, "candidates": 2}, {"score": "published"}):
        found = generate(model, tokens(PROMPT), QuestCache(BUDGET, **options))
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "serves", lambda *arguments: False)
            expected = generate(model, tokens(PROMPT), QuestCache(BUDGET, **options))
        assert torch.equal(found, expected)


def test_bounds_that_wait_are_there_for_who_asks(model):
    """Copies and pickles have those of the newest page, too: they may go on where kernels read them."""
    cache = QuestCache(BUDGET)
    generate(model, tokens(PROMPT), cache)
    assert cache.get_seq_length() % PAGE_SIZE
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    for each in (copy.deepcopy(cache), torch.load(file, weights_only=False)):
        for layer in each.layers[2:]:
            for page_idx, keys in enumerate(layer.keys[:, :, : layer.length].split(PAGE_SIZE, dim=2)):
                bounds, scales = reference.to_8_bits(torch.stack(keys.aminmax(dim=2), dim=2))
                assert torch.equal(layer.storage.beside["bounds"][:, :, page_idx], bounds)
                assert torch.equal(layer.storage.beside["scales"][:, :, page_idx], scales)


def test_widened_bounds_follow_what_becomes_of_tokens(model):
    """Taken back, exchanged, repeated, padded otherwise: the widened bounds of full pages are those that are stored."""
    cache = QuestCache(BUDGET)
    text = generate(model, tokens(PROMPT, batch_size=2), cache)

    def check():
        for layer in cache.layers[2:]:
            num_full = layer.length // PAGE_SIZE
            stored = [layer.storage.beside[name][:, :, :num_full] for name in ("bounds", "scales")]
            widened = layer.storage.widened.of(layer.storage)[..., :num_full].float()
            assert torch.equal(widened, reference.from_8_bits(*stored).flatten(3).transpose(2, 3))

    check()
    cache.crop(-37)
    check()
    other = torch.cat([text[:, : cache.get_seq_length()], tokens(40, seed=9, batch_size=2)], dim=1)
    generate(model, other, cache)
    check()
    cache.reorder_cache(torch.tensor([1, 0]))
    check()
    cache.reorder_cache(torch.tensor([0, 0]))
    check()
    cache.batch_select_indices(torch.tensor([1]))
    check()
    cache.batch_repeat_interleave(2)
    check()
