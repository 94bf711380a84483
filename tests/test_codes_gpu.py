"""The kernels of codes against hf_quest/codes.py: codes bitwise, tokens but for near ties, the rest by a yardstick."""

import pytest
import torch
from test_kernels import (
    BOUNDS_DTYPES,
    DEVICE,
    LENGTHS,
    SHAPES,
    assert_within_twice,
    attend_at_same_precision,
    copies_of,
    guards_are_intact,
    paddings,
    poison_unselected,
    poisoned,
    poisoned_like,
    store,
)

from hf_quest import codes, reference, stripes
from hf_quest.kernels import ops
from hf_quest.reference import DEFAULT, GROUPS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(autouse=True, scope="module")
def kernels():
    keys = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16, device=DEVICE)
    assert ops.serves(keys, keys, page_size=16)


def codes_of(stored, bits):
    """[B, Hkv, capacity, D * bits / 8], by the specification; those of unfilled slots are of anything."""
    batch_size, num_kv_heads, capacity, head_dim = stored.keys.shape
    made = torch.full((batch_size, num_kv_heads, capacity, head_dim * bits // 8), 255, dtype=torch.uint8, device=DEVICE)
    where = (stored.num_tokens, stored.num_tokens, stored.padding, stored.page_size, bits)
    codes.refresh_codes(stored.keys, stored.bounds, stored.scales, made, *where)
    return made


def full_pages(stored):
    """[B, capacity] bool: slots of pages that are full."""
    slot = torch.arange(stored.keys.shape[2], device=DEVICE)
    end = stored.padding + (stored.num_tokens - stored.padding) // stored.page_size * stored.page_size
    return (slot >= stored.padding[:, None]) & (slot < end[:, None])


def random_candidates(stored, num_candidates, num_chosen):
    generator = torch.Generator(DEVICE).manual_seed(2)
    scores = torch.rand(*stored.bounds.shape[:2], 1, stored.bounds.shape[2], generator=generator, device=DEVICE)
    where = (stored.num_tokens, stored.padding, num_candidates, stored.page_size, True)
    return codes.find_candidates(scores, *where, stripes.count(num_chosen, stored.page_size))


def agreed_scores(stored, of_tokens, bits, candidates, group):
    """[B, Hkv, 1, tokens] float64: what the tokens of the candidates before the newest page are chosen by, -inf
    elsewhere, counted from each row's first token.
    """
    page_size, head_dim = stored.page_size, stored.keys.shape[-1]
    num_kv_heads, num_pages = stored.bounds.shape[1:3]
    lowest, step = codes.grid(stored.bounds, stored.scales, bits)
    slot = torch.arange(num_pages * page_size, device=DEVICE) + stored.padding[:, None]
    slot = slot.clamp(max=stored.keys.shape[2] - 1)[:, None, :, None]
    aligned = of_tokens.gather(2, slot.expand(-1, num_kv_heads, -1, of_tokens.shape[-1]))
    grid = (each.repeat_interleave(page_size, dim=2) for each in (lowest, step))
    keys = codes.decode(aligned, *grid, bits).double()
    query = stored.query.double().view(len(keys), num_kv_heads, -1, head_dim)
    scores = (query @ keys.transpose(-1, -2) * stored.scaling)[:, :, :, None]
    page = torch.arange(num_pages * page_size, device=DEVICE) // page_size
    newest = (stored.num_tokens - stored.padding - 1).div(page_size, rounding_mode="floor")[:, None, None]
    is_open = (candidates[:, :, 0].flatten(2)[..., None] == page).any(dim=2) & (page < newest)
    agreed = reference.reduce_group(scores, group, ~is_open[:, :, None, None])
    return agreed.masked_fill(~is_open[:, :, None], -torch.inf)


def refine(stored, of_tokens, candidates, num_tokens, group="sum"):
    where = (*stored.where, stored.page_size, stored.scaling)
    return ops.refine(stored.query, stored.bounds, stored.scales, of_tokens, candidates, *where, num_tokens, group)


def assert_chosen_as_specified(stored, of_tokens, bits, candidates, ids, group="sum"):
    """As `codes.refine` chooses, but for near ties: the scores differ by no more than their rounding."""
    where = (stored.num_tokens, stored.padding, stored.page_size, bits, stored.scaling)
    num_chosen = ids.shape[-1]
    expected = codes.refine(
        stored.query, stored.bounds, stored.scales, of_tokens, candidates, *where, num_chosen, group
    )
    ids = reference.in_order(ids)
    assert torch.equal((ids >= 0).sum(-1), (expected >= 0).sum(-1))
    assert ((ids[..., 1:] > ids[..., :-1]) | (ids[..., 1:] < 0)).all()  # each once
    there = ids[ids >= 0]
    assert len(there) == 0 or there.max() < stored.num_tokens
    # 2^-21 of the largest weight in a logit, which shares multiply by e.
    agreed = agreed_scores(stored, of_tokens, bits, candidates, group)
    page = torch.arange(agreed.shape[-1], device=DEVICE) // stored.page_size
    num_stripes = candidates.shape[3]
    for stripe in range(num_stripes):  # each has its own share
        of_stripe = agreed.masked_fill(page % num_stripes != stripe, -torch.inf)
        chosen, best = (
            of_stripe.gather(-1, each.clamp(0, agreed.shape[-1] - 1)).masked_fill(each < 0, -torch.inf).sort(-1).values
            for each in (ids, expected)
        )
        is_finite = best.isfinite()
        assert torch.equal(is_finite, chosen.isfinite())
        if is_finite.any():
            best = best[is_finite]
            # Shares below the smallest normal float are none.
            atol = max(1e-5 * float(best.abs().max()), 1e-36)
            torch.testing.assert_close(chosen[is_finite], best, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("bounds_dtype", BOUNDS_DTYPES)
@pytest.mark.parametrize("bits", ops.CODE_BITS)
class TestAppend:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("chunks", [[1] * 40, [7, 1, 1, 30, 1, 16, 33, 2, 1], [300]], ids=str)
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_codes_of_full_pages_are_those_of_the_reference(self, shape, chunks, dtype, bits, bounds_dtype):
        num_tokens = sum(chunks)
        stored = store(shape, num_tokens, paddings(num_tokens), dtype, bounds_dtype=bounds_dtype)
        self.check(stored, chunks, bits)

    def test_a_long_prompt_and_a_token(self, bits, bounds_dtype):
        self.check(store((2, 1, 128, 16), 131073, (0, 77), bounds_dtype=bounds_dtype), [131072, 1], bits)

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_huge_and_tiny_keys(self, scale, bits, bounds_dtype):
        self.check(store((2, 1, 128, 16), 90, (0, 3), scale=scale, bounds_dtype=bounds_dtype), [70, *[1] * 20], bits)

    @staticmethod
    def check(stored, chunks, bits):
        buffers, expected = poisoned_like(stored.buffers), codes_of(stored, bits)
        made, end = poisoned(*expected.shape, dtype=torch.uint8), 0
        for num_new in chunks:
            new = slice(end, end := end + num_new)
            length = torch.tensor([end], device=DEVICE)
            new_tokens = (stored.new_keys[:, :, new], stored.new_values[:, :, new])
            ops.append(*buffers, *new_tokens, length, stored.padding, stored.page_size, made)
        is_full = full_pages(stored)[:, None, :, None].expand_as(made)
        assert torch.equal(made[is_full], expected[is_full])
        assert guards_are_intact(made)


@pytest.mark.parametrize("bounds_dtype", BOUNDS_DTYPES)
class TestRefine:
    @pytest.mark.parametrize("num_tokens", LENGTHS)
    @pytest.mark.parametrize("num_chosen", [16, 64, 500])
    def test_every_length(self, num_tokens, num_chosen, bounds_dtype):
        stored = store((2, 4, 128, 16), num_tokens, paddings(num_tokens), bounds_dtype=bounds_dtype)
        self.check(stored, 2, 40, num_chosen)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("bits", ops.CODE_BITS)
    @pytest.mark.parametrize("group", GROUPS)
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_every_shape(self, shape, group, bits, dtype, bounds_dtype):
        self.check(store(shape, 1000, paddings(1000), dtype, bounds_dtype=bounds_dtype), bits, 10, 100, group)

    @pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e30])
    def test_huge_and_tiny_keys(self, scale, bounds_dtype):
        self.check(store((2, 4, 128, 16), 2000, (0, 9), scale=scale, bounds_dtype=bounds_dtype), 2, 40, 128)

    def test_more_candidates_than_shared_memory_holds(self, bounds_dtype):
        self.check(store((2, 4, 128, 16), 40_000, (0, 333), bounds_dtype=bounds_dtype), 2, 1500, 2048)

    def test_a_budget_of_a_real_layer(self, bounds_dtype):
        self.check(store((8, 4, 128, 16), 131072, bounds_dtype=bounds_dtype), 2, 256, 512)

    def test_equal_scores_resolve_to_the_earlier_token(self, bounds_dtype):
        stored = store((2, 4, 128, 16), 3000, (0, 100), bounds_dtype=bounds_dtype)
        stored.bounds[:] = 1
        if stored.scales is not None:
            stored.scales[:] = 127
        candidates = random_candidates(stored, 30, 100)
        of_tokens = torch.zeros_like(codes_of(stored, 2))
        where = (3000, stored.padding, 16, 2, stored.scaling)
        expected = codes.refine(stored.query, stored.bounds, stored.scales, of_tokens, candidates, *where, 100, "sum")
        assert torch.equal(reference.in_order(refine(stored, of_tokens, candidates, 100)), expected)

    @staticmethod
    def check(stored, bits, num_candidates, num_chosen, group="sum"):
        num_chosen = max(num_chosen, stored.page_size)
        candidates, of_tokens = random_candidates(stored, num_candidates, num_chosen), codes_of(stored, bits)
        ids = refine(stored, of_tokens, candidates, num_chosen, group)
        assert_chosen_as_specified(stored, of_tokens, bits, candidates, ids, group)
        # What is not of a candidate is not read.
        slot = torch.arange(of_tokens.shape[2], device=DEVICE)
        page = (slot - stored.padding[:, None]).div(stored.page_size, rounding_mode="floor")
        is_candidate = (page[:, None, :, None] == candidates[:, :, 0].flatten(2)[:, :, None]).any(-1)
        noise = torch.randint_like(of_tokens, 256)
        changed = torch.where(is_candidate[..., None], of_tokens, noise)
        assert torch.equal(refine(stored, changed, candidates, num_chosen, group), ids)


@pytest.mark.parametrize("num_tokens", [*LENGTHS, 300_000])
@pytest.mark.parametrize("num_candidates", [2, 40, 256, 1500])
@pytest.mark.parametrize(("keeps_first", "num_stripes"), [(True, 16), (False, 16), (True, 8), (True, 4)])
def test_candidates_are_those_of_the_reference(num_tokens, num_candidates, keeps_first, num_stripes):
    """Also where many scores are equal."""
    left_padding = paddings(num_tokens)
    padding = torch.tensor(left_padding, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(num_tokens)
    scores = torch.randn(len(left_padding), 3, 1, -(-num_tokens // 16) + 2, generator=generator, device=DEVICE)
    length = torch.tensor([num_tokens], device=DEVICE)
    for some_equal in (scores, scores.round(), torch.zeros_like(scores)):
        how = (padding, num_candidates, 16, keeps_first, num_stripes)
        expected = codes.find_candidates(some_equal, num_tokens, *how)
        found = ops.find_candidates(some_equal, length, *how)
        assert torch.equal(found, expected)


class TestAttendTokens:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("num_chosen", [1, 17, 100, 2048])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_every_shape(self, shape, num_chosen, dtype):
        stored = store((*shape[:3], 16), 1000, paddings(1000), dtype)
        stored.page_size = 1
        generator = torch.Generator(DEVICE).manual_seed(0)
        scores = torch.rand(*stored.keys.shape[:2], 1, 1000, generator=generator, device=DEVICE)
        token_ids = reference.select(scores, 1000, stored.padding, num_chosen, 1)
        truth, same_precision = stored.reference_attend(token_ids), attend_at_same_precision(stored, token_ids)
        stored.keys, stored.values = poison_unselected(stored, token_ids)
        assert_within_twice(stored.attend(token_ids), truth, same_precision)

    def test_the_order_of_tokens_does_not_matter_but_for_rounding(self):
        stored = store((2, 4, 128, 16), 1000)
        stored.page_size = 1
        token_ids = torch.arange(0, 1000, 3, device=DEVICE).expand(1, 2, 1, -1).contiguous()
        shuffled = token_ids[..., torch.randperm(token_ids.shape[-1], device=DEVICE)].contiguous()
        truth = stored.reference_attend(token_ids)
        assert_within_twice(stored.attend(shuffled), truth, stored.attend(token_ids))


def poison_tokens(stored, token_ids):
    page_size, stored.page_size = stored.page_size, 1
    poison = poison_unselected(stored, token_ids)
    stored.page_size = page_size
    return poison


@pytest.mark.parametrize("bounds_dtype", BOUNDS_DTYPES)
class TestChain:
    @pytest.mark.parametrize("num_tokens", LENGTHS)
    @pytest.mark.parametrize("num_chosen", [64, 128, 320])
    def test_it_is_its_stages(self, num_tokens, num_chosen, bounds_dtype):
        """In four, eight and sixteen stripes."""
        stored = store((2, 4, 128, 16), num_tokens, paddings(num_tokens), bounds_dtype=bounds_dtype)
        self.check(stored, num_chosen=num_chosen)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("bits", ops.CODE_BITS)
    @pytest.mark.parametrize("group", GROUPS)
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_every_shape(self, shape, group, bits, dtype, bounds_dtype):
        self.check(store(shape, 1000, paddings(1000), dtype, bounds_dtype=bounds_dtype), bits, group=group)

    @pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e30])
    def test_huge_and_tiny_keys(self, scale, bounds_dtype):
        self.check(store((2, 4, 128, 16), 2000, (0, 9), scale=scale, bounds_dtype=bounds_dtype))

    @pytest.mark.parametrize("page_size", [8, 16, 32, 64])
    @pytest.mark.parametrize("num_rows", [1, 4, 8])
    def test_a_budget_of_a_real_layer(self, page_size, num_rows, bounds_dtype):
        """By clusters of eight, four and two blocks."""
        stored = store(
            (8, 4, 128, page_size), 40_000, (0, 9, 100, 7, 0, 0, 33, 1)[:num_rows], bounds_dtype=bounds_dtype
        )
        self.check(stored, num_candidates=4096 // page_size, num_chosen=512)

    def test_scores_that_shared_memory_does_not_hold(self, bounds_dtype):
        stored = store((2, 4, 64, 8), 1_200_000, (0, 5), bounds_dtype=bounds_dtype)
        self.check(stored, num_candidates=512, num_chosen=512)

    def test_equal_scores_resolve_to_the_earlier_token(self, bounds_dtype):
        stored = store((2, 4, 128, 16), 3000, (0, 100), bounds_dtype=bounds_dtype)
        stored.bounds[:] = 1
        if stored.scales is not None:
            stored.scales[:] = 127
        of_tokens = torch.zeros_like(codes_of(stored, 2))
        told = torch.zeros(*stored.keys.shape[:2], 1, 128, dtype=torch.int64, device=DEVICE)
        self.chain(stored, of_tokens, told, (stored.keys, stored.values), 32)
        scores = torch.zeros(*stored.bounds.shape[:2], 1, stored.bounds.shape[2], device=DEVICE)
        candidates = codes.find_candidates(scores, 3000, stored.padding, 32, 16, DEFAULT.keeps_first, 8)
        where = (3000, stored.padding, 16, 2, stored.scaling)
        expected = codes.refine(stored.query, stored.bounds, stored.scales, of_tokens, candidates, *where, 128, "sum")
        assert torch.equal(reference.in_order(told), expected)

    def check(self, stored, bits=2, num_candidates=32, num_chosen=128, group="sum"):
        num_chosen = max(num_chosen, 2 * stored.page_size)
        of_tokens, tokens = codes_of(stored, bits), (stored.keys, stored.values)
        told = torch.full((*stored.keys.shape[:2], 1, num_chosen), -7, device=DEVICE)
        output = self.chain(stored, of_tokens, told, tokens, num_candidates, group)
        where = (*stored.where, num_candidates, stored.page_size, DEFAULT.keeps_first)
        candidates = ops.find_candidates(stored.estimate(DEFAULT), *where, stripes.count(num_chosen, stored.page_size))
        assert_chosen_as_specified(stored, of_tokens, bits, candidates, told, group)
        poison, page_size = poison_tokens(stored, told), stored.page_size
        stored.page_size = 1
        truth, same_precision = stored.reference_attend(told), attend_at_same_precision(stored, told)
        assert_within_twice(output, truth, same_precision)
        stored.page_size = page_size
        assert torch.equal(self.chain(stored, of_tokens, None, poison, num_candidates, group, num_chosen), output)

    @staticmethod
    def chain(stored, of_tokens, told, tokens, num_candidates, group="sum", num_chosen=None):
        where = (*stored.where, num_candidates, stored.page_size, stored.scaling)
        num_tokens = told.shape[-1] if num_chosen is None else num_chosen
        by_codes = {"codes": of_tokens, "num_tokens": num_tokens, "token_group": group}
        bounds = (stored.bounds, stored.scales)
        return ops.chain(stored.query, *tokens, *bounds, *where, page_ids=told, score=DEFAULT, **by_codes)

    def test_a_captured_step_follows_the_storage(self, bounds_dtype):
        """While the sequence grows past the budget, and storage moves."""
        if bounds_dtype is None:
            pytest.skip("beside codes, storage that the device finds has bounds in 8 bits")
        num_prompt, num_steps, num_found, num_chosen = 100, 200, 12, 64
        stored = store((2, 4, 128, 16), num_prompt + num_steps, (0, 9), bounds_dtype=bounds_dtype)
        of_tokens = codes_of(stored, 2)
        prompt = (stored.new_keys[:, :, :num_prompt], stored.new_values[:, :, :num_prompt])
        buffers, made = poisoned_like(stored.buffers), poisoned(*of_tokens.shape, dtype=torch.uint8)
        stored.length.fill_(num_prompt)
        ops.append(*buffers, *prompt, *stored.where, 16, made)
        eager = [*copies_of(buffers), made.clone()]
        addresses = torch.zeros(3, ops.NUM_ADDRESSES, dtype=torch.int64, device=DEVICE)
        query, key, value = (
            torch.zeros(2, 8, 1, 128, dtype=torch.bfloat16, device=DEVICE),
            *(each[:, :, :1].clone() for each in prompt),
        )

        def place(tensors, capacity):
            moved = []
            for tensor, num_each in zip(tensors, (1, 1, 16, 16, 1), strict=True):
                if tensor is None:
                    moved.append(None)
                    continue
                moved.append(poisoned(*tensor.shape[:2], capacity // num_each, *tensor.shape[3:], dtype=tensor.dtype))
                size = min(moved[-1].shape[2], tensor.shape[2])
                moved[-1][:, :, :size] = tensor[:, :, :size]
            work = poisoned(*moved[0].shape[:2], 1, capacity // 16, dtype=torch.float32)
            row = [0 if each is None else each.data_ptr() for each in (*moved[:4], work)]
            addresses[1, :7] = torch.tensor([*row, capacity, moved[4].data_ptr()], device=DEVICE)  # no pool
            return [*moved, work]

        placed = place([*buffers, made], 112)

        def decode(key, value):
            layer = (1, 2, num_found, 16, stored.scaling)
            by_codes = {"code_bits": 2, "num_tokens": num_chosen}
            return ops.decode(query, key, value, addresses, *stored.where, *layer, score=DEFAULT, **by_codes)

        stored.length.add_(1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            decode(None, None)  # kernels are loaded before a graph is captured
        torch.cuda.current_stream().wait_stream(stream)
        stored.length.sub_(1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = decode(key, value)
        generator = torch.Generator(DEVICE).manual_seed(1)
        for step_idx in range(num_steps):
            stored.length.add_(1)
            if stored.length.item() > placed[0].shape[2]:
                placed = place(placed[:5], placed[0].shape[2] + 48)
            new = slice(num_prompt + step_idx, num_prompt + step_idx + 1)
            query.copy_(torch.randn(query.shape, generator=generator, device=DEVICE))
            key.copy_(stored.new_keys[:, :, new])
            value.copy_(stored.new_values[:, :, new])
            graph.replay()
            keys, values, bounds, scales, eager_codes = eager
            ops.append(*eager[:4], key, value, *stored.where, 16, eager_codes)
            where = (*stored.where, num_found, 16, stored.scaling)
            by_codes = {"codes": eager_codes, "num_tokens": num_chosen}
            expected = ops.chain(query, keys, values, bounds, scales, *where, score=DEFAULT, **by_codes)
            assert torch.equal(output, expected)
        is_full = full_pages(stored)[:, None, :, None]
        size = min(placed[4].shape[2], of_tokens.shape[2])
        same = (placed[4][:, :, :size] == of_tokens[:, :, :size]) | ~is_full[:, :, :size]
        assert same.all()


@pytest.mark.parametrize("bounds_dtype", BOUNDS_DTYPES)
@pytest.mark.parametrize("op", ["append", "refine", "chain"])
def test_the_operators_are_what_their_schemas_say(op, bounds_dtype):
    stored = store((2, 4, 128, 16), 500, (0, 3), spare_pages=0, bounds_dtype=bounds_dtype)
    of_tokens = codes_of(stored, 2)
    bounds = (stored.bounds, stored.scales)
    chain = (*stored.where, 12, 16, 0.1, None, None, None, *DEFAULT, of_tokens, 64, "sum")
    candidates = random_candidates(stored, 12, 64)
    arguments = {
        "append": (*stored.buffers, stored.new_keys, stored.new_values, *stored.where, 16, of_tokens),
        "refine": (stored.query, *bounds, of_tokens, candidates, *stored.where, 16, 0.1, 64, "sum"),
        "chain": (stored.query, *stored.buffers, *chain),
    }
    torch.library.opcheck(getattr(torch.ops.hf_quest, op).default, arguments[op])
