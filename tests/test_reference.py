"""The laws of the four stages (hf_quest/reference.py), each against its definition in loops or in dense attention."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quest import reference

LENGTHS = [1, 15, 16, 17, 31, 33, 100]


@dataclass
class Stored:
    """Random tokens as a layer stores them, poisoned with NaN wherever there is no token."""

    keys: torch.Tensor  # [B, Hkv, capacity, D]
    values: torch.Tensor
    bounds: torch.Tensor  # [B, Hkv, capacity / S, 2, D]
    padding: torch.Tensor  # [B]
    query: torch.Tensor  # [B, Hq, T, D]
    length: int
    page_size: int

    @property
    def num_pages(self):
        return -(-self.length // self.page_size)

    def row_keys(self, row):
        """[Hkv, n, D]: the keys of one row, without its padding."""
        return self.keys[row, :, self.padding[row] : self.length]

    def row_values(self, row):
        return self.values[row, :, self.padding[row] : self.length]

    def estimate(self, scaling=1.0):
        return reference.estimate(self.query, self.bounds[:, :, : self.num_pages], scaling)

    def select(self, num_selected, scores=None):
        scores = self.estimate() if scores is None else scores
        return reference.select(scores, self.length, self.padding, num_selected, self.page_size)

    def attend(self, page_ids, **options):
        scaling = options.pop("scaling", self.query.shape[-1] ** -0.5)
        return reference.attend(
            self.query, self.keys, self.values, page_ids, self.length, self.padding, self.page_size, scaling, **options
        )


def store(padding, length, *, heads=(2, 3), dim=8, page_size=16, num_queries=1, dtype=torch.float32, seed=0, chunks=()):
    """Append `length` slots to an empty layer, at once or in `chunks`."""
    generator = torch.Generator().manual_seed(seed)
    num_kv_heads, group = heads
    batch_size = len(padding)
    capacity = (length // page_size + 2) * page_size
    padding = torch.tensor(padding)
    new_keys = torch.randn(batch_size, num_kv_heads, length, dim, generator=generator).to(dtype)
    new_values = torch.randn(batch_size, num_kv_heads, length, dim, generator=generator).to(dtype)
    for row, start in enumerate(padding.tolist()):
        new_keys[row, :, :start] = new_values[row, :, :start] = torch.nan
    nan = torch.full((batch_size, num_kv_heads, capacity, dim), torch.nan, dtype=dtype)
    bounds = torch.full((batch_size, num_kv_heads, capacity // page_size, 2, dim), torch.nan, dtype=dtype)
    stored = Stored(nan, nan.clone(), bounds, padding, None, length, page_size)
    start = 0
    for end in (*chunks, length):
        chunk = slice(start, end)
        reference.append(
            stored.keys,
            stored.values,
            bounds,
            new_keys[:, :, chunk],
            new_values[:, :, chunk],
            end,
            padding,
            page_size,
        )
        start = end
    stored.query = torch.randn(batch_size, num_kv_heads * group, num_queries, dim, generator=generator).to(dtype)
    return stored


@st.composite
def any_stored(draw):
    """A layer of any shape, left padding and number of new queries."""
    length = draw(st.integers(1, 70))
    num_queries = draw(st.integers(1, min(4, length)))
    padding = draw(st.lists(st.integers(0, length - num_queries), min_size=1, max_size=3))
    chunks = sorted(draw(st.sets(st.integers(1, length), max_size=3)))
    return store(
        padding,
        length,
        heads=(draw(st.integers(1, 3)), draw(st.integers(1, 4))),
        dim=draw(st.sampled_from([1, 4, 8])),
        page_size=draw(st.sampled_from([1, 2, 8, 16])),
        num_queries=num_queries,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        seed=draw(st.integers(0, 2**16)),
        chunks=chunks,
    )


def dense(stored, row, head, query_idx, tokens=slice(None), scaling=None, softcap=None, sink=None):
    """Softmax attention of one query over `tokens` of its row, in float64: [D]."""
    kv_head = head // (stored.query.shape[1] // stored.keys.shape[1])
    query = stored.query[row, head, query_idx].double()
    logits = stored.row_keys(row)[kv_head, tokens].double() @ query
    logits = logits * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if sink is not None:
        logits = torch.cat([logits, sink.double()[None]])
    weights = logits.softmax(dim=-1)[: -1 if sink is not None else None]
    return weights @ stored.row_values(row)[kv_head, tokens].double()


def num_visible(stored, row, query_idx):
    return stored.length - int(stored.padding[row]) - stored.query.shape[2] + query_idx + 1


def all_queries(stored):
    """Every (row, KV head, query index)."""
    for row in range(stored.query.shape[0]):
        for kv_head in range(stored.keys.shape[1]):
            for query_idx in range(stored.query.shape[2]):
                yield row, kv_head, query_idx


def tolerance(stored):
    """Float32 arithmetic on numbers near 1 against float64, and one rounding to the dtype of the output."""
    return {"rtol": 0, "atol": 1e-5 if stored.query.dtype == torch.float32 else 4 * torch.finfo(stored.query.dtype).eps}


class TestAppend:
    @settings(max_examples=60, deadline=None)
    @given(any_stored())
    def test_bounds_are_the_minimum_and_maximum_of_the_tokens_in_each_page(self, stored):
        for row in range(len(stored.padding)):
            for page, keys in enumerate(stored.row_keys(row).split(stored.page_size, dim=1)):
                assert torch.equal(stored.bounds[row, :, page, 0], keys.amin(dim=1))
                assert torch.equal(stored.bounds[row, :, page, 1], keys.amax(dim=1))

    @settings(max_examples=30, deadline=None)
    @given(any_stored())
    def test_pages_without_a_token_get_no_bounds(self, stored):
        for row, padding in enumerate(stored.padding.tolist()):
            first_unused = -(-(stored.length - padding) // stored.page_size)
            assert stored.bounds[row, :, first_unused:].isnan().all()

    @pytest.mark.parametrize("length", LENGTHS)
    def test_one_by_one_is_at_once(self, length):
        at_once = store([0, length // 2], length)
        one_by_one = store([0, length // 2], length, chunks=range(1, length))
        for name in ("keys", "values", "bounds"):
            torch.testing.assert_close(
                getattr(one_by_one, name), getattr(at_once, name), rtol=0, atol=0, equal_nan=True
            )

    def test_slots_beyond_the_new_tokens_are_not_written(self):
        stored = store([0], 20)
        assert stored.keys[:, :, 20:].isnan().all()
        assert stored.values[:, :, 20:].isnan().all()

    @pytest.mark.parametrize("end", [1, 15, 16, 17, 32])
    def test_bounds_of_a_cut_page_come_from_the_tokens_that_are_left(self, end):
        stored = store([0, 3], 40)
        reference.refresh_bounds(stored.keys, stored.bounds, 1, end, stored.padding.clamp(max=end - 1), 16)
        page = (end - 1) // 16
        left = stored.keys[0, :, page * 16 : end]
        assert torch.equal(stored.bounds[0, :, page, 0], left.amin(dim=1))
        assert torch.equal(stored.bounds[0, :, page, 1], left.amax(dim=1))


class TestEstimate:
    @settings(max_examples=60, deadline=None)
    @given(any_stored())
    def test_score_is_an_upper_bound_of_every_logit_in_its_page_up_to_rounding(self, stored):
        scores = stored.estimate(scaling=0.5)
        group = stored.query.shape[1] // stored.keys.shape[1]
        for row, kv_head, query_idx in all_queries(stored):
            queries = stored.query[row, kv_head * group : (kv_head + 1) * group, query_idx].double()
            logits = 0.5 * stored.row_keys(row)[kv_head].double() @ queries.T  # [n, G]
            # Float32 sums of D products: the error is relative to the sum of their sizes.
            slack = 1e-6 * stored.row_keys(row)[kv_head].double().abs() @ queries.T.abs()
            for page, in_page in enumerate((logits - slack).split(stored.page_size)):
                assert scores[row, kv_head, query_idx, page] >= in_page.max()

    @settings(max_examples=30, deadline=None)
    @given(any_stored())
    def test_score_is_the_sum_over_channels_of_the_larger_product_and_the_largest_in_the_group(self, stored):
        scores = stored.estimate(scaling=0.25)
        group = stored.query.shape[1] // stored.keys.shape[1]
        for row, kv_head, query_idx in all_queries(stored):
            num_pages = -(-(stored.length - int(stored.padding[row])) // stored.page_size)
            low, high = stored.bounds[row, kv_head, :num_pages].double().unbind(dim=1)  # [P, D] each
            queries = stored.query[row, kv_head * group : (kv_head + 1) * group, query_idx].double()[:, None]
            expected = 0.25 * torch.maximum(queries * low, queries * high).sum(dim=-1).amax(dim=0)
            actual = scores[row, kv_head, query_idx, :num_pages].double()
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # float32 against float64

    def test_scores_are_float32(self):
        assert store([0], 40, dtype=torch.bfloat16).estimate().dtype == torch.float32

    def test_a_page_with_one_token_scores_that_token_exactly(self):
        stored = store([0], 33, heads=(2, 1))
        logit = (stored.query[0, :, 0] * stored.keys[0, :, 32]).sum(dim=-1)
        torch.testing.assert_close(stored.estimate()[0, :, 0, 2], logit)


class TestSelect:
    @settings(max_examples=100, deadline=None)
    @given(any_stored(), st.integers(2, 6), st.booleans())
    def test_newest_page_and_the_highest_scores_before_it_ties_to_the_lower_index(self, stored, num_selected, tied):
        scores = stored.estimate()
        if tied:  # few distinct scores, both zeros among them
            scores = scores.nan_to_num().sign() * torch.tensor(0.0) if stored.length % 2 else scores.nan_to_num().sign()
        page_ids = stored.select(num_selected, scores)
        assert page_ids.shape == (*scores.shape[:3], num_selected)
        for row, kv_head, query_idx in all_queries(stored):
            newest = (num_visible(stored, row, query_idx) - 1) // stored.page_size
            earlier = scores[row, kv_head, query_idx, :newest].tolist()
            best = sorted(range(newest), key=lambda page: (-earlier[page], page))[: num_selected - 1]
            expected = [*sorted(best), newest]
            expected += [-1] * (num_selected - len(expected))
            assert page_ids[row, kv_head, query_idx].tolist() == expected

    @pytest.mark.parametrize("newest_score", [-math.inf, -1e30, 0.0, math.nan])
    def test_newest_page_is_selected_whatever_its_score(self, newest_score):
        stored = store([0], 33)
        scores = torch.full((1, 2, 1, 3), 7.0)
        scores[..., 2] = newest_score
        assert stored.select(2, scores).tolist() == [[[[0, 2]], [[0, 2]]]]

    def test_selection_differs_between_kv_heads(self):
        stored = store([0], 48)
        scores = torch.tensor([[[[1.0, 2.0, 0.0]], [[2.0, 1.0, 0.0]]]])
        assert stored.select(2, scores).tolist() == [[[[1, 2]], [[0, 2]]]]

    @pytest.mark.parametrize("scale", [1e-38, 1e-3, 1e3, 1e37])
    def test_order_holds_for_huge_and_tiny_scores_of_both_signs(self, scale):
        scores = torch.tensor([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0]) * scale
        order = reference.order_of(scores)
        assert (order[1:] - order[:-1] >= 2**32).tolist() == [True, True, False, True, True]
        assert order[2] == order[3]


class TestAttend:
    @settings(max_examples=60, deadline=None)
    @given(any_stored(), st.integers(2, 4))
    def test_output_is_softmax_attention_over_the_selected_tokens_only(self, stored, num_selected):
        page_ids = stored.select(num_selected)
        output = stored.attend(page_ids)
        group = stored.query.shape[1] // stored.keys.shape[1]
        for row, kv_head, query_idx in all_queries(stored):
            pages = [page for page in page_ids[row, kv_head, query_idx].tolist() if page >= 0]
            tokens = [
                token
                for page in pages
                for token in range(page * stored.page_size, (page + 1) * stored.page_size)
                if token < num_visible(stored, row, query_idx)
            ]
            for head in range(kv_head * group, (kv_head + 1) * group):
                expected = dense(stored, row, head, query_idx, tokens)
                torch.testing.assert_close(output[row, head, query_idx].double(), expected, **tolerance(stored))

    @pytest.mark.parametrize("length", LENGTHS)
    def test_all_pages_are_dense_attention(self, length):
        stored = store([0, length // 3], length)
        output = stored.attend(stored.select(stored.num_pages))
        for row, kv_head, query_idx in all_queries(stored):
            for head in range(3 * kv_head, 3 * kv_head + 3):
                expected = dense(stored, row, head, query_idx)
                torch.testing.assert_close(output[row, head, query_idx].double(), expected, **tolerance(stored))

    def test_slots_that_are_not_selected_are_not_read(self):
        stored = store([0, 5], 100, num_queries=2)
        page_ids = stored.select(3)
        expected = stored.attend(page_ids)
        selected = torch.zeros(stored.keys.shape[:3], dtype=torch.bool)
        for row, kv_head, query_idx in all_queries(stored):
            for page in page_ids[row, kv_head, query_idx].tolist():
                start = int(stored.padding[row]) + page * 16
                selected[row, kv_head, start : start + 16] = True
        # An unselected row's first token stands in for slots beyond its end; it has no weight but must be a number.
        for row, padding in enumerate(stored.padding.tolist()):
            selected[row, :, padding] = True
        stored.keys[~selected] = torch.nan
        stored.values[~selected] = torch.nan
        assert torch.equal(stored.attend(page_ids), expected)

    def test_left_padded_row_is_the_row_alone(self):
        padded = store([0, 21], 100)
        alone = store([0], 79)
        alone.keys[:, :, :79], alone.values[:, :, :79] = padded.row_keys(1), padded.row_values(1)
        alone.query = padded.query[1:]
        reference.refresh_bounds(alone.keys, alone.bounds, 79, 79, alone.padding, 16)
        page_ids = padded.select(3)
        assert torch.equal(page_ids[1:], alone.select(3))
        assert torch.equal(padded.attend(page_ids)[1:], alone.attend(page_ids[1:]))

    def test_several_queries_are_each_query_alone(self):
        together = store([0, 21], 100, num_queries=5)
        page_ids = together.select(3)
        output = together.attend(page_ids)
        for query_idx in range(5):
            alone = store([0, 21], 100)
            alone.query = together.query[:, :, query_idx : query_idx + 1]
            alone.length = 96 + query_idx
            reference.refresh_bounds(alone.keys, alone.bounds, 1, alone.length, alone.padding, 16)
            assert torch.equal(alone.select(3), page_ids[:, :, query_idx : query_idx + 1])
            # The same products in a matrix of another shape: float32 sums in another order.
            torch.testing.assert_close(alone.attend(alone.select(3))[:, :, 0], output[:, :, query_idx])

    @pytest.mark.parametrize("options", [{"softcap": 2.0}, {"sinks": True}, {"softcap": 2.0, "sinks": True}], ids=str)
    def test_softcap_and_sinks(self, options):
        stored = store([0, 7], 50)
        sinks = torch.linspace(-1, 3, 6) if options.get("sinks") else None
        softcap = options.get("softcap")
        output = stored.attend(stored.select(stored.num_pages), softcap=softcap, sinks=sinks)
        for row in range(2):
            for head in range(6):
                sink = None if sinks is None else sinks[head]
                expected = dense(stored, row, head, 0, softcap=softcap, sink=sink)
                torch.testing.assert_close(output[row, head, 0].double(), expected, **tolerance(stored))

    @pytest.mark.parametrize("scale", [1e-20, 1e18])
    def test_huge_and_tiny_keys_give_finite_output(self, scale):
        stored = store([0], 50)
        stored.keys *= scale
        reference.refresh_bounds(stored.keys, stored.bounds, 50, 50, stored.padding, 16)
        assert stored.attend(stored.select(2)).isfinite().all()
