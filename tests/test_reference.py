"""The laws of the four stages (hf_quest/reference.py), each against its definition in loops or in dense attention."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quest import reference

FLOAT32 = torch.finfo(torch.float32)
LENGTHS = [1, 15, 16, 17, 31, 33, 100]
BOUNDS = pytest.mark.parametrize("bounds_dtype", [None, torch.int8], ids=["wide", "8 bits"])
UNWRITTEN = 255  # no scale: it stands for an infinite one
UNDERFLOW = 2.0**-150  # of a step: what is not larger is zero in float32, and rounded like it
LAST_SCALE = 249  # 2^122, of a block with a bound above 127 * 2^121


@dataclass
class Stored:
    """Random tokens as a layer stores them, poisoned with NaN, or UNWRITTEN, wherever there is no token."""

    keys: torch.Tensor  # [B, Hkv, capacity, D]
    values: torch.Tensor
    bounds: torch.Tensor  # [B, Hkv, capacity / S, 2, D]
    scales: torch.Tensor | None  # [B, Hkv, capacity / S, D / 32], of bounds in 8 bits
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

    def read_bounds(self):
        """[B, Hkv, P, 2, D]: what the bounds stand for."""
        bounds = self.bounds if self.scales is None else reference.from_8_bits(self.bounds, self.scales)
        return bounds[:, :, : self.num_pages]

    def refresh_bounds(self, num_new):
        where = (self.length, self.padding, self.page_size)
        reference.refresh_bounds(self.keys, self.bounds, self.scales, num_new, *where)

    def estimate(self, scaling=1.0, score=reference.PUBLISHED):
        bounds = [None if tensor is None else tensor[:, :, : self.num_pages] for tensor in (self.bounds, self.scales)]
        where = (self.length, self.padding, self.page_size)
        return reference.estimate(self.query, *bounds, scaling, score, where)

    def select(self, num_selected, scores=None, keeps_first=False):
        scores = self.estimate() if scores is None else scores
        return reference.select(scores, self.length, self.padding, num_selected, self.page_size, keeps_first)

    def attend(self, page_ids, **options):
        scaling = options.pop("scaling", self.query.shape[-1] ** -0.5)
        return reference.attend(
            self.query, self.keys, self.values, page_ids, self.length, self.padding, self.page_size, scaling, **options
        )


def store(
    padding,
    length,
    *,
    heads=(2, 3),
    dim=8,
    page_size=16,
    num_queries=1,
    dtype=torch.float32,
    bounds_dtype=None,
    seed=0,
    chunks=(),
):
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
    pages, scales = (batch_size, num_kv_heads, capacity // page_size), None
    if bounds_dtype is None:
        bounds = torch.full((*pages, 2, dim), torch.nan, dtype=dtype)
    else:
        bounds = torch.ones(*pages, 2, dim, dtype=bounds_dtype)
        scales = torch.full((*pages, -(-dim // 32)), UNWRITTEN, dtype=torch.uint8)
    stored = Stored(nan, nan.clone(), bounds, scales, padding, None, length, page_size)
    start = 0
    for end in (*chunks, length):
        chunk = slice(start, end)
        reference.append(
            stored.keys,
            stored.values,
            bounds,
            scales,
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
    """A layer of any shape, kind of bounds, left padding and number of new queries."""
    length = draw(st.integers(1, 70))
    num_queries = draw(st.integers(1, min(4, length)))
    padding = draw(st.lists(st.integers(0, length - num_queries), min_size=1, max_size=3))
    chunks = sorted(draw(st.sets(st.integers(1, length), max_size=3)))
    return store(
        padding,
        length,
        heads=(draw(st.integers(1, 3)), draw(st.integers(1, 4))),
        dim=draw(st.sampled_from([1, 4, 8, 32, 40])),
        page_size=draw(st.sampled_from([1, 2, 8, 16])),
        num_queries=num_queries,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        bounds_dtype=draw(st.sampled_from([None, torch.int8])),
        seed=draw(st.integers(0, 2**16)),
        chunks=chunks,
    )


@st.composite
def any_keys(draw, largest=math.inf):
    """[n, D] float32 keys of a page, of any size up to `largest`, among them those at which scales change."""
    exponent = draw(st.integers(-149, 103))
    floats = st.one_of(
        st.floats(-min(largest, FLOAT32.max), min(largest, FLOAT32.max), width=32),
        st.integers(-(2**24), 2**24).map(lambda mantissa: mantissa * 2.0**exponent),  # of about the same size
        st.builds(at_a_scale, st.integers(-149, 121), st.sampled_from([-1, 1]), st.sampled_from([-1, 0, 1])),
    )
    if largest == math.inf:
        floats = st.one_of(floats, st.sampled_from([math.inf, -math.inf, math.nan]))
    values = torch.tensor(draw(st.lists(floats, min_size=1, max_size=12)), dtype=torch.float32)
    values = values.clamp(-largest, largest)
    shape = (draw(st.integers(1, 4)), draw(st.sampled_from([1, 8, 31, 32, 33, 40, 64])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return values[torch.randint(len(values), shape, generator=generator)]


def at_a_scale(exponent, sign, step):
    """127 * 2^exponent or the float32 next to it, towards zero (-1) or away from it (1)."""
    value = torch.tensor(127 * 2.0**exponent)
    return sign * (value.view(torch.int32) + step).view(torch.float32).item()


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


def assert_bounds(stored, row, page, keys):
    """The bounds of a page are minimum and maximum of `keys` [Hkv, n, D], or these in 8 bits."""
    expected = torch.stack(keys.aminmax(dim=1), dim=1)
    if stored.scales is not None:
        expected, scales = reference.to_8_bits(expected)
        assert torch.equal(stored.scales[row, :, page], scales)
    assert torch.equal(stored.bounds[row, :, page], expected)


class TestAppend:
    @settings(max_examples=60, deadline=None)
    @given(any_stored())
    def test_bounds_are_the_minimum_and_maximum_of_the_tokens_in_each_page(self, stored):
        """Exactly, or in 8 bits."""
        for row in range(len(stored.padding)):
            for page, keys in enumerate(stored.row_keys(row).split(stored.page_size, dim=1)):
                assert_bounds(stored, row, page, keys)

    @settings(max_examples=30, deadline=None)
    @given(any_stored())
    def test_pages_without_a_token_get_no_bounds(self, stored):
        for row, padding in enumerate(stored.padding.tolist()):
            first_unused = -(-(stored.length - padding) // stored.page_size)
            if stored.scales is None:
                assert stored.bounds[row, :, first_unused:].isnan().all()
            else:
                assert (stored.bounds[row, :, first_unused:] == 1).all()
                assert (stored.scales[row, :, first_unused:] == UNWRITTEN).all()

    @BOUNDS
    @pytest.mark.parametrize("length", LENGTHS)
    def test_one_by_one_is_at_once(self, length, bounds_dtype):
        at_once = store([0, length // 2], length, bounds_dtype=bounds_dtype)
        one_by_one = store([0, length // 2], length, bounds_dtype=bounds_dtype, chunks=range(1, length))
        for name in ("keys", "values", "bounds", "scales"):
            torch.testing.assert_close(
                getattr(one_by_one, name), getattr(at_once, name), rtol=0, atol=0, equal_nan=True
            )

    def test_slots_beyond_the_new_tokens_are_not_written(self):
        stored = store([0], 20)
        assert stored.keys[:, :, 20:].isnan().all()
        assert stored.values[:, :, 20:].isnan().all()

    @BOUNDS
    @pytest.mark.parametrize("end", [1, 15, 16, 17, 32])
    def test_bounds_of_a_cut_page_come_from_the_tokens_that_are_left(self, end, bounds_dtype):
        stored = store([0, 3], 40, bounds_dtype=bounds_dtype)
        stored.length, stored.padding = end, stored.padding.clamp(max=end - 1)
        stored.refresh_bounds(1)
        page = (end - 1) // 16
        assert_bounds(stored, 0, page, stored.keys[0, :, page * 16 : end])


class TestEightBits:
    """Bounds [2, D] of the keys of one page."""

    @settings(max_examples=300, deadline=None)
    @given(any_keys(largest=FLOAT32.max))
    def test_minimum_and_maximum_are_in_the_step_within_their_bound(self, keys):
        exact = torch.stack(keys.aminmax(dim=0)).double()
        bounds, scales = reference.to_8_bits(exact.float())
        step = steps(scales, keys.shape[1])
        exact[exact.abs() <= step * UNDERFLOW] = 0
        (lowest, highest), (low, high) = exact, bounds.double() * step
        assert ((low <= lowest) & (lowest < low + step)).all()
        assert ((high - step < highest) & (highest <= high)).all()

    @settings(max_examples=300, deadline=None)
    @given(any_keys())
    def test_no_key_is_outside_of_the_bounds_that_are_read(self, keys):
        bounds, scales = reference.to_8_bits(torch.stack(keys.aminmax(dim=0)))
        low, high = reference.from_8_bits(bounds, scales)
        keys[keys.abs() <= steps(scales, keys.shape[1]) * UNDERFLOW] = 0
        assert ((low <= keys) & (keys <= high) | keys.isnan()).all()
        is_nan = keys.isnan().any(dim=0)
        assert (low[is_nan] == -torch.inf).all()
        assert (high[is_nan] == torch.inf).all()

    @settings(max_examples=300, deadline=None)
    @given(any_keys())
    def test_scale_is_the_smallest_power_of_two_with_which_no_bound_exceeds_127(self, keys):
        _, scales = reference.to_8_bits(torch.stack(keys.aminmax(dim=0)))
        for scale, block in zip(scales.tolist(), keys.double().abs().split(32, dim=1), strict=True):
            if not block.isfinite().all():
                assert scale == LAST_SCALE
                continue
            assert block.max() <= 127 * 2.0 ** (scale - 127)
            assert scale == 1 or block.max() > 127 * 2.0 ** (scale - 128)

    @settings(max_examples=100, deadline=None)
    @given(any_keys())
    def test_what_is_read_is_the_product_of_bound_and_scale(self, keys):
        bounds, scales = reference.to_8_bits(torch.stack(keys.aminmax(dim=0)))
        assert (bounds.dtype, scales.dtype) == (torch.int8, torch.uint8)
        assert (bounds.shape, scales.shape) == ((2, keys.shape[1]), (-(-keys.shape[1] // 32),))
        expected = (bounds.double() * steps(scales, keys.shape[1])).float()
        assert torch.equal(reference.from_8_bits(bounds, scales), expected)

    @settings(max_examples=300, deadline=None)
    @given(any_keys(largest=127 * 2.0**121))  # a larger one is read as infinite
    def test_widening_token_by_token_is_rounding_at_once(self, keys):
        _, scales = reference.to_8_bits(torch.stack(keys.aminmax(dim=0)))
        keys[keys.abs() <= steps(scales, keys.shape[1]) * UNDERFLOW] = 0
        at_once = reference.to_8_bits(torch.stack(keys.aminmax(dim=0)))
        widened = reference.to_8_bits(keys[:1].expand(2, -1))
        for key in keys[1:]:
            low, high = reference.from_8_bits(*widened)
            widened = reference.to_8_bits(torch.stack([low.minimum(key), high.maximum(key)]))
        assert torch.equal(widened[0], at_once[0])
        assert torch.equal(widened[1], at_once[1])

    @settings(max_examples=50, deadline=None)
    @given(any_keys(), st.sampled_from([torch.float16, torch.bfloat16]))
    def test_half_precision_is_rounded_like_the_same_numbers_in_float32(self, keys, dtype):
        bounds = torch.stack(keys.to(dtype).aminmax(dim=0))
        for half, single in zip(reference.to_8_bits(bounds), reference.to_8_bits(bounds.float()), strict=True):
            assert torch.equal(half, single)

    @settings(max_examples=50, deadline=None)
    @given(st.lists(any_keys(), min_size=1, max_size=3))
    def test_blocks_are_each_block_alone(self, pages):
        head_dim = min(keys.shape[1] for keys in pages)
        bounds = torch.stack([torch.stack(keys[:, :head_dim].aminmax(dim=0)) for keys in pages])
        rounded, scales = reference.to_8_bits(bounds)
        for idx in range(0, head_dim, 32):
            for page in range(len(pages)):
                alone = reference.to_8_bits(bounds[page, :, idx : idx + 32])
                assert torch.equal(rounded[page, :, idx : idx + 32], alone[0])
                assert scales[page, idx // 32] == alone[1]

    @pytest.mark.parametrize(
        ("bound", "expected"),
        [
            ((0.0, 0.0), (0, 0, 1)),
            ((-0.0, 2.0**-149), (0, 1, 1)),
            ((-(2.0**-126), 127 * 2.0**-126), (-1, 127, 1)),
            ((-1.0, 1.0), (-64, 64, 121)),
            ((1.0, 127.0), (1, 127, 127)),
            ((-1.0, 127.00001), (-1, 64, 128)),
            ((-FLOAT32.max, FLOAT32.max), (-64, 64, LAST_SCALE)),
            ((-math.inf, 1.0), (-128, 1, LAST_SCALE)),
            ((math.inf, math.inf), (127, 127, LAST_SCALE)),
            ((-math.inf, -math.inf), (-128, -128, LAST_SCALE)),
            ((math.nan, math.nan), (-128, 127, LAST_SCALE)),
        ],
        ids=str,
    )
    def test_by_hand(self, bound, expected):
        bounds, scales = reference.to_8_bits(torch.tensor(bound)[:, None])
        assert (*bounds.flatten().tolist(), *scales.tolist()) == expected

    def test_not_a_number_is_unbounded_in_any_layout(self):
        """What a reduction makes of it may have any sign, by which way through memory it goes."""
        for order in itertools.permutations(range(3)):
            bounds = torch.zeros([(64, 2, 32)[dim] for dim in order]).permute(*map(order.index, range(3)))
            bounds[:, :, 5] = torch.nan
            rounded, scales = reference.to_8_bits(bounds)
            assert rounded[:, :, 5].unique(dim=0).tolist() == [[-128, 127]]
            assert scales.unique().tolist() == [LAST_SCALE]


def steps(scales, head_dim):
    """[D] float64, the scale of every channel."""
    return (2.0 ** (scales.double() - 127)).repeat_interleave(32)[:head_dim]


WIDTHS = [0.0, 0.25, 0.5, 1.0]


def scores_of_heads(stored, row, kv_head, query_idx, width, scaling):
    """[G, n] float64: q·middle + width · Σ|q|·half width, of each head, for the pages before the query's newest one."""
    group = stored.query.shape[1] // stored.keys.shape[1]
    newest = (num_visible(stored, row, query_idx) - 1) // stored.page_size
    low, high = stored.read_bounds()[row, kv_head, :newest].double().unbind(dim=1)  # [n, D] each
    queries = stored.query[row, kv_head * group : (kv_head + 1) * group, query_idx].double()
    middles = queries @ ((high + low) / 2).T
    return scaling * (middles + width * (queries.abs() @ ((high - low) / 2).T))


class TestScore:
    """Scores other than the published one, and the first page kept."""

    @settings(max_examples=60, deadline=None)
    @given(any_stored(), st.sampled_from(WIDTHS))
    def test_largest_score_is_the_middle_and_a_share_of_the_half_width(self, stored, width):
        scores = stored.estimate(0.25, reference.Score(width, False, "max"))
        for row, kv_head, query_idx in all_queries(stored):
            expected = scores_of_heads(stored, row, kv_head, query_idx, width, 0.25).amax(dim=0)
            actual = scores[row, kv_head, query_idx, : len(expected)].double()
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # float32 against float64

    @settings(max_examples=60, deadline=None)
    @given(any_stored(), st.sampled_from(WIDTHS), st.sampled_from(["sum", "share"]))
    def test_shares_are_each_head_s_softmax_over_the_pages_before_the_newest(self, stored, width, group):
        scores = stored.estimate(0.25, reference.Score(width, False, group))
        for row, kv_head, query_idx in all_queries(stored):
            of_heads = scores_of_heads(stored, row, kv_head, query_idx, width, 0.25)
            if len(of_heads) > 1:  # one head's scores have the order of its shares, and are left
                of_heads = of_heads.softmax(dim=-1)
            expected = of_heads.sum(dim=0) if group == "sum" else of_heads.amax(dim=0)
            actual = scores[row, kv_head, query_idx, : len(expected)].double()
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)  # float32 against float64

    @settings(max_examples=60, deadline=None)
    @given(any_stored(), st.integers(1, 6))
    def test_published_score_is_bit_for_bit_the_product_with_the_signed_query(self, stored, num_selected):
        query = stored.query.float()
        signed = torch.cat([query.clamp(max=0), query.clamp(min=0)], dim=-1)
        signed = signed.view(len(stored.padding), stored.keys.shape[1], -1, signed.shape[-1])
        bounds = stored.read_bounds().float()
        products = (signed @ bounds.flatten(3).transpose(-1, -2)).unflatten(2, (-1, query.shape[2]))
        expected = products.amax(dim=2) * 0.25
        scores = stored.estimate(0.25, reference.PUBLISHED)
        assert torch.equal(scores.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(stored.select(num_selected, scores), stored.select(num_selected, expected))

    @pytest.mark.parametrize("group", ["sum", "share"])
    def test_one_head_s_scores_are_left_as_they_are(self, group):
        stored = store([0, 7], 100, heads=(2, 1))
        largest, shares = (stored.estimate(score=reference.Score(0.5, True, name))[..., :6] for name in ("max", group))
        assert torch.equal(largest, shares)

    @pytest.mark.parametrize("group", ["sum", "share"])
    def test_later_pages_have_no_part_in_shares(self, group):
        stored = store([0, 5], 100, num_queries=4)
        score = reference.Score(0.5, True, group)
        expected = stored.estimate(score=score)
        for row, padding in enumerate(stored.padding.tolist()):
            stored.bounds[row, :, (100 - padding - 1) // 16 :] = 1e3
        assert torch.equal(stored.estimate(score=score)[..., :5], expected[..., :5])

    @pytest.mark.parametrize("group", ["sum", "share"])
    @pytest.mark.parametrize("bad", [math.inf, math.nan])
    def test_a_page_whose_score_is_not_finite_is_selected(self, group, bad):
        """So that attention is no less wrong than without pages, and as loudly."""
        stored = store([0], 100)
        stored.bounds[:, :, 3] = bad
        scores = stored.estimate(score=reference.Score(0.5, False, group))
        assert scores[..., :6].isfinite().all()
        assert (stored.select(2, scores) == torch.tensor([3, 6])).all()

    @pytest.mark.parametrize("scale", [1e-20, 1e30])
    @pytest.mark.parametrize("group", ["sum", "share"])
    def test_shares_of_huge_and_tiny_scores_are_numbers(self, group, scale):
        stored = store([0], 100)
        stored.bounds *= scale
        scores = stored.estimate(score=reference.Score(0.5, True, group))[..., :6]
        assert ((scores >= 0) & (scores <= 3)).all()

    @settings(max_examples=100, deadline=None)
    @given(any_stored(), st.integers(1, 6))
    def test_the_first_page_is_kept_beside_the_newest_and_the_highest_scores(self, stored, num_selected):
        scores = stored.estimate()
        page_ids = stored.select(num_selected, scores, keeps_first=True)
        assert page_ids.shape == (*scores.shape[:3], num_selected)
        for row, kv_head, query_idx in all_queries(stored):
            newest = (num_visible(stored, row, query_idx) - 1) // stored.page_size
            earlier = scores[row, kv_head, query_idx, :newest].tolist()
            kept = {newest, 0} if num_selected > 1 else {newest}
            others = sorted(set(range(newest)) - kept, key=lambda page: (-earlier[page], page))
            expected = sorted([*kept, *others[: num_selected - len(kept)]])
            expected += [-1] * (num_selected - len(expected))
            assert page_ids[row, kv_head, query_idx].tolist() == expected

    @pytest.mark.parametrize("score", [math.inf, -math.inf, math.nan])
    def test_the_first_page_is_kept_whatever_its_score_and_others_have(self, score):
        stored = store([0], 65)
        for first, others in ((score, 7.0), (7.0, score)):
            scores = torch.full((1, 2, 1, 5), others)
            scores[..., 0] = first
            assert (stored.select(3, scores, keeps_first=True) == torch.tensor([0, 1, 4])).all()
            assert (stored.select(2, scores, keeps_first=True) == torch.tensor([0, 4])).all()
            assert (stored.select(1, scores, keeps_first=True) == torch.tensor([4])).all()


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
            low, high = stored.read_bounds()[row, kv_head, :num_pages].double().unbind(dim=1)  # [P, D] each
            queries = stored.query[row, kv_head * group : (kv_head + 1) * group, query_idx].double()[:, None]
            expected = 0.25 * torch.maximum(queries * low, queries * high).sum(dim=-1).amax(dim=0)
            actual = scores[row, kv_head, query_idx, :num_pages].double()
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # float32 against float64

    @pytest.mark.parametrize("dim", [1, 8, 40, 64])
    def test_8_bits_add_to_a_score_less_than_a_step_in_every_channel(self, dim):
        wide, rounded = (
            store([0, 3], 100, dim=dim, num_queries=3, bounds_dtype=bounds_dtype) for bounds_dtype in (None, torch.int8)
        )
        added = rounded.estimate() - wide.estimate()  # [B, Hkv, T, P]
        step = 2.0 ** (rounded.scales[:, :, :7].float() - 127).repeat_interleave(32, dim=-1)[..., :dim]
        most = (rounded.query.abs().unflatten(1, (2, 3)) @ step[:, :, None].transpose(-1, -2)).amax(dim=2)
        assert (added > -1e-5).all()  # float32 sums in another order
        assert (added < most).all()
        assert added.mean() > 0.1 * most.mean()

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

    @BOUNDS
    def test_left_padded_row_is_the_row_alone(self, bounds_dtype):
        padded = store([0, 21], 100, bounds_dtype=bounds_dtype)
        alone = store([0], 79, bounds_dtype=bounds_dtype)
        alone.keys[:, :, :79], alone.values[:, :, :79] = padded.row_keys(1), padded.row_values(1)
        alone.query = padded.query[1:]
        alone.refresh_bounds(79)
        page_ids = padded.select(3)
        assert torch.equal(page_ids[1:], alone.select(3))
        assert torch.equal(padded.attend(page_ids)[1:], alone.attend(page_ids[1:]))

    @BOUNDS
    def test_several_queries_are_each_query_alone(self, bounds_dtype):
        together = store([0, 21], 100, num_queries=5, bounds_dtype=bounds_dtype)
        page_ids = together.select(3)
        output = together.attend(page_ids)
        for query_idx in range(5):
            alone = store([0, 21], 100, bounds_dtype=bounds_dtype)
            alone.query = together.query[:, :, query_idx : query_idx + 1]
            alone.length = 96 + query_idx
            alone.refresh_bounds(1)
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

    @BOUNDS
    @pytest.mark.parametrize("scale", [1e-20, 1e18])
    def test_huge_and_tiny_keys_give_finite_output(self, scale, bounds_dtype):
        stored = store([0], 50, bounds_dtype=bounds_dtype)
        stored.keys *= scale
        stored.refresh_bounds(50)
        assert stored.attend(stored.select(2)).isfinite().all()
