"""The CUDA kernels against hf_quest/reference.py: copies, bounds and page ids bitwise, the rest by a yardstick.

The yardstick is the error of the same computation in PyTorch at the same precision: a kernel may have twice as much.
Its products are of 16-bit numbers, summed in float32 and rounded once, as tensor cores give them, but by kernels of
float32: compute-sanitizer's racecheck fails on those of 16 bits. Every slot and page that must not be read holds NaN.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from test_select_on_cpu import LOWEST, scores_of_every_size

from hf_quest import reference
from hf_quest.kernels import ops
from hf_quest.reference import DEFAULT, PUBLISHED, Score

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DEVICE = "cuda"
LENGTHS = [1, 15, 16, 17, 31, 33, 1000, 4096, 4097, 131072]
GUARD = 1024  # elements around a buffer
POISON = {torch.int8: 127, torch.uint8: 255}  # elsewhere NaN; as a scale of bounds that is infinity
BOUNDS_DTYPES = [None, torch.int8]
SHAPES = {  # Hkv, G, D, S
    "gqa4-128-page16": (2, 4, 128, 16),
    "mha-128-page16": (3, 1, 128, 16),
    "gqa7-128-page32": (2, 7, 128, 32),
    "gqa5-64-page16": (2, 5, 64, 16),
    "gqa12-64-page8": (1, 12, 64, 8),
    "gqa8-96-page64": (2, 8, 96, 64),
    "gqa32-96-page16": (1, 32, 96, 16),
    "gqa2-256-page32": (2, 2, 256, 32),
    "gqa16-256-page16": (1, 16, 256, 16),
}

OTHER_SCORES = {
    "default": DEFAULT,
    "middle": Score(0.0, False, "max"),
    "sum": Score(0.5, True, "sum"),
    "share": Score(0.25, False, "share"),
}


@dataclass
class Stored:
    """Random tokens as a layer stores them, and a query that is no contiguous tensor."""

    keys: torch.Tensor  # [B, Hkv, capacity, D]
    values: torch.Tensor
    bounds: torch.Tensor  # [B, Hkv, capacity / S, 2, D]
    scales: torch.Tensor | None  # [B, Hkv, capacity / S, D / 32]
    new_keys: torch.Tensor  # [B, Hkv, N, D]
    new_values: torch.Tensor
    query: torch.Tensor  # [B, Hq, 1, D]
    length: torch.Tensor  # [1]
    padding: torch.Tensor  # [B]
    page_size: int
    scaling: float

    @property
    def num_tokens(self):
        return self.new_keys.shape[2]

    @property
    def where(self):
        return self.length, self.padding

    @property
    def buffers(self):
        return self.keys, self.values, self.bounds, self.scales

    def estimate(self, score=PUBLISHED):
        return ops.estimate(self.query, self.bounds, self.scales, *self.where, self.page_size, self.scaling, score)

    def reference_estimate(self, score=PUBLISHED):
        where = (self.num_tokens, self.padding, self.page_size)
        return reference.estimate(self.query, self.bounds, self.scales, self.scaling, score, where)

    def select(self, scores, num_selected, keeps_first=False):
        return ops.select(scores, *self.where, num_selected, self.page_size, keeps_first)

    def attend(self, page_ids, **options):
        where = (*self.where, self.page_size, self.scaling)
        return ops.attend(self.query, self.keys, self.values, page_ids, *where, **options)

    def reference_attend(self, page_ids, softcap=None, sinks=None):
        """In float32 whatever the dtype of what is stored: the output is not rounded."""
        if page_ids is None:
            shape = (*self.keys.shape[:2], 1, -(-self.num_tokens // self.page_size))
            page_ids = torch.arange(shape[-1], device=DEVICE).expand(shape)
        return reference.attend(
            self.query.float(),
            self.keys,
            self.values,
            page_ids,
            self.num_tokens,
            self.padding,
            self.page_size,
            self.scaling,
            softcap,
            sinks,
        )


@pytest.fixture(autouse=True, scope="module")
def kernels():
    keys = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16, device=DEVICE)
    assert ops.serves(keys, keys, page_size=16)


def poisoned(*shape, dtype):
    """A tensor of NaN, or what stands for it, with a guard of the same before and behind it."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + 2 * GUARD,), POISON.get(dtype, torch.nan), dtype=dtype, device=DEVICE)
    return whole[GUARD : GUARD + size].view(shape)


def poisoned_like(tensors):
    return [None if tensor is None else poisoned(*tensor.shape, dtype=tensor.dtype) for tensor in tensors]


def copies_of(tensors):
    return [None if tensor is None else tensor.clone() for tensor in tensors]


def is_poison(tensor):
    return tensor == POISON[tensor.dtype] if tensor.dtype in POISON else tensor.isnan()


def guards_are_intact(tensor):
    whole = tensor.new_empty(0).set_(tensor.untyped_storage())
    return bool(is_poison(whole[:GUARD]).all() and is_poison(whole[-GUARD:]).all())


def bits(tensor):
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_equal_buffers(buffers, expected):
    """Bit for bit, in the slots that both have, and nothing is written around `buffers`."""
    for buffer, tensor in zip(buffers, expected, strict=True):
        if tensor is not None:
            size = min(buffer.shape[2], tensor.shape[2])
            assert torch.equal(bits(buffer[:, :, :size]), bits(tensor[:, :, :size]))
            assert guards_are_intact(buffer)


def store(
    shape, num_tokens, padding=(0,), dtype=torch.bfloat16, scale=1.0, spare_pages=3, seed=0, bounds_dtype=torch.int8
):
    """`num_tokens` slots that the reference has stored, `padding` of them no tokens, in a buffer with room for more."""
    num_kv_heads, group_size, head_dim, page_size = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)
    batch_size, capacity = len(padding), (-(-num_tokens // page_size) + spare_pages) * page_size

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE).mul(scale).to(dtype)

    # Tokens before heads, as a model's projections give them.
    new_keys = normal(batch_size, num_tokens, num_kv_heads, head_dim).transpose(1, 2)
    new_values = normal(batch_size, num_tokens, num_kv_heads, head_dim).transpose(1, 2)
    for row, start in enumerate(padding):
        new_keys[row, :, :start] = new_values[row, :, :start] = torch.nan
    query = normal(batch_size, 1, (group_size + 2) * num_kv_heads, head_dim).div(scale)[
        :, :, : group_size * num_kv_heads
    ]
    pages = (batch_size, num_kv_heads, capacity // page_size)
    stored = Stored(
        keys=poisoned(batch_size, num_kv_heads, capacity, head_dim, dtype=dtype),
        values=poisoned(batch_size, num_kv_heads, capacity, head_dim, dtype=dtype),
        bounds=poisoned(*pages, 2, head_dim, dtype=bounds_dtype or dtype),
        scales=None if bounds_dtype is None else poisoned(*pages, head_dim // 32, dtype=torch.uint8),
        new_keys=new_keys,
        new_values=new_values,
        query=query.transpose(1, 2),
        length=torch.tensor([num_tokens], device=DEVICE),
        padding=torch.tensor(padding, device=DEVICE),
        page_size=page_size,
        scaling=head_dim**-0.5,
    )
    reference.append(*stored.buffers, new_keys, new_values, num_tokens, stored.padding, page_size)
    return stored


def paddings(num_tokens):
    """Rows of different padding, from none to all but one token."""
    return tuple(sorted({0, min(5, num_tokens - 1), num_tokens // 2, num_tokens - 1}))


def assert_within_twice(output, truth, same_precision):
    """`output` errs at most twice as much as `same_precision`, or by one rounding to its dtype."""
    assert not output.isnan().any()
    error = (output.float() - truth).abs().max()
    yardstick = (same_precision.float() - truth).abs().max()
    assert error <= max(2 * yardstick, torch.finfo(same_precision.dtype).eps * truth.abs().max())


def multiply(left, right):
    return (left.float() @ right.float()).to(left.dtype)


def random_pages(stored, num_selected, seed=0):
    """[B, Hkv, 1, K] page ids, the newest and random earlier ones, as the reference selects them."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    num_pages = stored.bounds.shape[2]
    scores = torch.randn(*stored.keys.shape[:2], 1, num_pages, generator=generator, device=DEVICE)
    return reference.select(scores, stored.num_tokens, stored.padding, num_selected, stored.page_size)


def poison_unselected(stored, page_ids):
    """Copies of keys and values with NaN in every page that is not among `page_ids`."""
    slot = torch.arange(stored.keys.shape[2], device=DEVICE)
    page_of_slot = (slot - stored.padding[:, None]).div(stored.page_size, rounding_mode="floor")
    is_selected = (page_of_slot[:, None, :, None] == page_ids[:, :, 0, None, :]).any(dim=-1)
    is_selected &= (slot >= stored.padding[:, None])[:, None]
    return [tensor.masked_fill(~is_selected[..., None], torch.nan) for tensor in (stored.keys, stored.values)]


def attend_at_same_precision(stored, page_ids, softcap=None, sinks=None):
    """What PyTorch gives in the dtype of what is stored, row by row: [B, Hq, 1, D]."""
    group_size = stored.query.shape[1] // stored.keys.shape[1]
    outputs = []
    for row, padding in enumerate(stored.padding.tolist()):
        for head in range(stored.query.shape[1]):
            slots = torch.arange(padding, stored.num_tokens, device=DEVICE)
            if page_ids is not None:
                chosen = page_ids[row, head // group_size, 0]
                slots = slots[torch.isin((slots - padding) // stored.page_size, chosen)]
            keys, values = (tensor[row, head // group_size, slots] for tensor in (stored.keys, stored.values))
            logits = multiply(keys, stored.query[row, head, 0]) * stored.scaling
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if sinks is not None:
                logits = torch.cat([logits, sinks[head, None]])
            outputs.append(multiply(logits.softmax(dim=-1)[: len(slots)], values))
    return torch.stack(outputs).view(stored.query.shape)


@pytest.mark.parametrize("bounds_dtype", BOUNDS_DTYPES)
class TestAppend:
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    @pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 31, 33, 300])
    def test_a_prompt_is_what_the_reference_stores(self, shape, num_tokens, bounds_dtype):
        self.check(store(shape, num_tokens, paddings(num_tokens), bounds_dtype=bounds_dtype), [num_tokens])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("chunks", [[1] * 40, [7, 1, 1, 30, 1, 16, 33, 2, 1], [64, 1, 1]], ids=str)
    @pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
    def test_chunks_and_single_tokens_are_what_the_reference_stores(self, chunks, dtype, head_dim, bounds_dtype):
        shape, padding = (2, 1, head_dim, 16), paddings(sum(chunks))
        self.check(store(shape, sum(chunks), padding, dtype, bounds_dtype=bounds_dtype), chunks)

    def test_a_long_prompt_and_a_token_are_what_the_reference_stores(self, bounds_dtype):
        self.check(store((2, 1, 128, 16), 131073, (0, 77), bounds_dtype=bounds_dtype), [131072, 1])

    @pytest.mark.parametrize(
        ("dtype", "scale"),
        [(torch.float16, 2e4), (torch.float16, 1e-6), (torch.bfloat16, 1e38), (torch.bfloat16, 1e-38)],
    )
    def test_huge_and_tiny_keys(self, dtype, scale, bounds_dtype):
        """Some overflow to infinity, some are subnormal, and neighbouring tokens are of very different size."""
        chunks = [1] * 20 + [50]
        stored = store((2, 1, 128, 16), sum(chunks), (0, 3), dtype, scale, bounds_dtype=bounds_dtype)
        shrinking = torch.logspace(0, -12, sum(chunks), device=DEVICE)[torch.randperm(sum(chunks), device=DEVICE)]
        # Zeros are all positive: of zeros of both signs either is a minimum.
        stored.new_keys = (stored.new_keys.float() * shrinking[:, None]).to(dtype) + 0.0
        reference.append(
            *stored.buffers, stored.new_keys, stored.new_values, stored.num_tokens, stored.padding, stored.page_size
        )
        self.check(stored, chunks)

    @staticmethod
    def check(stored, chunks):
        buffers = poisoned_like(stored.buffers)
        end = 0
        for num_new in chunks:
            new = slice(end, end := end + num_new)
            length = torch.tensor([end], device=DEVICE)
            new_tokens = (stored.new_keys[:, :, new], stored.new_values[:, :, new])
            ops.append(*buffers, *new_tokens, length, stored.padding, stored.page_size)
        assert_equal_buffers(buffers, stored.buffers)

    def test_a_layer_without_bounds_needs_none(self, bounds_dtype):
        stored = store((2, 1, 64, 16), 50, bounds_dtype=bounds_dtype)
        keys, values = torch.zeros_like(stored.keys), torch.zeros_like(stored.values)
        ops.append(keys, values, None, None, stored.new_keys, stored.new_values, *stored.where, stored.page_size)
        assert torch.equal(keys[:, :, :50], stored.new_keys)
        assert torch.equal(values[:, :, :50], stored.new_values)


@pytest.mark.parametrize("bounds_dtype", BOUNDS_DTYPES)
class TestEstimate:
    @pytest.mark.parametrize("num_tokens", LENGTHS)
    def test_scores_are_those_of_the_reference_at_every_length(self, num_tokens, bounds_dtype):
        self.check(store((2, 4, 128, 16), num_tokens, paddings(num_tokens)[:2], bounds_dtype=bounds_dtype))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_scores_are_those_of_the_reference_for_every_shape(self, shape, dtype, bounds_dtype):
        self.check(store(shape, 700, paddings(700), dtype, bounds_dtype=bounds_dtype))

    @pytest.mark.parametrize(
        ("dtype", "scale"),
        [(torch.float16, 1e3), (torch.float16, 1e-5), (torch.bfloat16, 1e30), (torch.bfloat16, 1e-30)],
    )
    def test_huge_and_tiny_keys(self, dtype, scale, bounds_dtype):
        self.check(store((2, 4, 128, 16), 300, (0, 3), dtype, scale, bounds_dtype=bounds_dtype))

    def test_heads_of_different_sizes(self, bounds_dtype):
        stored = store((2, 4, 128, 16), 300, bounds_dtype=bounds_dtype)
        stored.query.mul_(torch.tensor([1e3, 1, 1e-3, -1] * 2, device=DEVICE)[:, None, None])
        self.check(stored)

    def test_a_row_of_padding_alone_has_no_scores(self, bounds_dtype):
        stored = store((2, 4, 128, 16), 300, (299, 0), bounds_dtype=bounds_dtype)
        stored.padding[0] = 300
        self.check(stored, rows=[1])

    @staticmethod
    def check(stored, rows=None):
        scores = stored.estimate()
        expected = stored.reference_estimate()
        bounds = stored.bounds
        if stored.scales is not None:
            bounds = reference.from_8_bits(bounds, stored.scales).to(stored.query.dtype)
        signed = torch.cat([stored.query.clamp(max=0), stored.query.clamp(min=0)], dim=-1)
        signed = signed.unflatten(1, (stored.keys.shape[1], -1))[..., 0, :]
        products = multiply(signed, bounds.flatten(3).transpose(-1, -2))
        same_precision = products.amax(2, keepdim=True) * stored.scaling
        for row in rows or range(len(stored.padding)):
            pages = slice(-(-(stored.num_tokens - int(stored.padding[row])) // stored.page_size))
            row_of = (tensor[row, ..., pages] for tensor in (scores, expected, same_precision))
            assert_within_twice(*row_of)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("score", OTHER_SCORES.values(), ids=OTHER_SCORES)
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_other_scores_are_those_of_their_definition(self, shape, score, dtype, bounds_dtype):
        self.check_definition(store(shape, 700, paddings(700), dtype, bounds_dtype=bounds_dtype), score)

    @pytest.mark.parametrize("score", OTHER_SCORES.values(), ids=OTHER_SCORES)
    @pytest.mark.parametrize("num_tokens", LENGTHS)
    def test_other_scores_at_every_length(self, num_tokens, score, bounds_dtype):
        stored = store((2, 4, 128, 16), num_tokens, paddings(num_tokens)[:2], bounds_dtype=bounds_dtype)
        self.check_definition(stored, score)

    @staticmethod
    def check_definition(stored, score):
        """Against float64, for the pages before the newest."""
        low, high = stored.bounds.double().unbind(dim=3)
        if stored.scales is not None:
            low, high = reference.from_8_bits(stored.bounds, stored.scales).double().unbind(dim=3)
        query = stored.query.double().unflatten(1, (stored.keys.shape[1], -1))[..., 0, :]  # [B, Hkv, G, D]
        middles = query @ ((high + low) / 2).mT
        logits = stored.scaling * (middles + score.width * query.abs() @ ((high - low) / 2).mT)  # [B, Hkv, G, P]
        # Weights in 8 bits are rounded by 2^-21 of a group's largest channel at most, and up to 32 sums are float32.
        largest = query.abs().amax(dim=(2, 3))[..., None]
        slack = 2**-20 * stored.scaling * largest * (low.abs() + high.abs()).sum(dim=-1)  # [B, Hkv, P]
        actual = stored.estimate(score)[:, :, 0].double()
        for row, padding in enumerate(stored.padding.tolist()):
            earlier = (row, ..., slice((stored.num_tokens - padding - 1) // stored.page_size))
            of_heads = logits[earlier]
            if score.group == "max" or of_heads.shape[1] == 1:
                assert ((actual[earlier] - of_heads.amax(dim=1)).abs() <= slack[earlier]).all()
                continue
            shares = of_heads.softmax(dim=-1)
            shares = shares.sum(dim=1) if score.group == "sum" else shares.amax(dim=1)
            # A softmax's logit and its normaliser may both be off, and 2^x by some units in the last place.
            rtol = 2 * slack[earlier].max().item() + 1e-5 if shares.numel() else 0
            torch.testing.assert_close(actual[earlier], shares, rtol=rtol, atol=1e-36)

    @pytest.mark.parametrize("scale", [1e-3, 1e3, 1e30])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_the_shares_of_a_head_add_up_to_one(self, shape, scale, bounds_dtype):
        stored = store(shape, 1000, scale=scale, bounds_dtype=bounds_dtype)
        shares = stored.estimate(OTHER_SCORES["sum"])[..., : 999 // stored.page_size]
        if shape[1] > 1:  # one head's are scores
            # Float32 sums of up to 124 pages, and 2^x by some units in the last place.
            torch.testing.assert_close(shares.sum(dim=-1), torch.full_like(shares[..., 0], shape[1]), rtol=1e-4, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_score_is_an_upper_bound_of_every_logit_in_its_page(self, dtype, bounds_dtype):
        stored = store((2, 4, 128, 16), 1600, dtype=dtype, bounds_dtype=bounds_dtype)
        keys = stored.new_keys.float().unflatten(2, (-1, 16))
        query = stored.query.float().view(1, 2, 4, 1, 1, 128)
        products = query * keys[:, :, None]
        logits = products.sum(dim=-1).amax(dim=(2, -1)) * stored.scaling
        rounding = 256 * torch.finfo(torch.float32).eps * products.abs().sum(dim=-1).amax(dim=(2, -1)) * stored.scaling
        assert (stored.estimate()[:, :, 0, :100] >= logits - rounding).all()


class TestSelect:
    SCORES = {  # noqa: RUF012
        "normal": lambda shape, generator: torch.randn(shape, generator=generator, device=DEVICE),
        "shifted": lambda shape, generator: 100 + torch.randn(shape, generator=generator, device=DEVICE),
        "ties": lambda shape, generator: torch.randint(-2, 2, shape, generator=generator, device=DEVICE) * 0.5,
        "equal": lambda shape, generator: torch.full(shape, -7.5, device=DEVICE),
        "zeros of both signs": lambda shape, generator: (
            torch.zeros(shape, device=DEVICE) * torch.randint(-1, 1, shape, generator=generator, device=DEVICE).sub(0.5)
        ),
        "infinite": lambda shape, generator: torch.tensor([-torch.inf, 0.0, 3e38, torch.inf, -1e-42], device=DEVICE)[
            torch.randint(0, 5, shape, generator=generator, device=DEVICE)
        ],
    }

    @pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)
    @pytest.mark.parametrize("num_tokens", LENGTHS)
    @pytest.mark.parametrize("num_selected", [1, 2, 7, 64, 65, 128])
    def test_pages_are_those_of_the_reference(self, num_tokens, num_selected, make):
        self.check(num_tokens, num_selected, make)

    @pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)
    @pytest.mark.parametrize("num_selected", [2, 300, 8193, 20000])
    def test_more_pages_than_shared_memory_holds(self, num_selected, make):
        self.check(300_007, num_selected, make)

    @pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)
    @pytest.mark.parametrize("num_tokens", [17, 1000, 4097, 131072])
    @pytest.mark.parametrize("num_selected", [2, 3, 64])
    def test_the_first_page_kept(self, num_tokens, num_selected, make):
        self.check(num_tokens, num_selected, make, keeps_first=True)

    @pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)
    @pytest.mark.parametrize("num_selected", [2, 300, 8193])
    def test_the_first_page_kept_of_more_than_shared_memory_holds(self, num_selected, make):
        self.check(300_007, num_selected, make, keeps_first=True)

    @pytest.mark.parametrize("lowest", [LOWEST, -2.5])
    @pytest.mark.parametrize("highest", [torch.inf, torch.nan])
    def test_scores_of_every_size(self, lowest, highest):
        def make(shape, generator):
            return scores_of_every_size(shape[-1], lowest, highest).to(DEVICE).expand(shape)

        self.check(8193 * 16, 250, make)

    def test_a_million_tokens(self):
        self.check(2**20, 128, self.SCORES["normal"])
        self.check(2**20, 128, self.SCORES["ties"])

    def test_random_lengths_and_budgets(self):
        generator = torch.Generator().manual_seed(0)
        for seed in range(50):
            num_tokens, num_selected = torch.randint(1, 5000, (2,), generator=generator).tolist()
            self.check(num_tokens, num_selected % 300 + 1, self.SCORES["normal" if seed % 2 else "ties"], seed)

    @staticmethod
    def check(num_tokens, num_selected, make, seed=0, keeps_first=False):
        page_size = 16
        padding = torch.tensor(paddings(num_tokens), device=DEVICE)
        num_pages = -(-num_tokens // page_size) + 3
        scores = make((len(padding), 2, 1, num_pages), torch.Generator(DEVICE).manual_seed(seed))
        newest = (num_tokens - padding - 1).div(page_size, rounding_mode="floor")
        is_read = torch.arange(num_pages, device=DEVICE) < newest[:, None, None, None]
        scores = scores.masked_fill(~is_read, torch.nan).contiguous()
        settings = (padding, num_selected, page_size, keeps_first)
        page_ids = ops.select(scores, torch.tensor([num_tokens], device=DEVICE), *settings)
        assert torch.equal(page_ids, reference.select(scores, num_tokens, *settings))


class TestAttend:
    @pytest.mark.parametrize("is_sparse", [True, False], ids=["pages", "dense"])
    @pytest.mark.parametrize("num_tokens", LENGTHS)
    def test_every_length(self, num_tokens, is_sparse):
        self.check(store((2, 4, 128, 16), num_tokens, paddings(num_tokens)), 20 if is_sparse else None)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("num_selected", [2, 9, 100, None], ids=["2", "9", "100", "dense"])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_every_shape(self, shape, num_selected, dtype):
        self.check(store(shape, 700, paddings(700), dtype), num_selected)

    @pytest.mark.parametrize("shape", [(8, 4, 128, 16), (32, 1, 128, 16)], ids=["gqa", "mha"])
    def test_a_full_budget_of_a_real_layer(self, shape):
        self.check(store(shape, 8192), 128)

    @pytest.mark.parametrize("options", [{"softcap": 3.0}, {"sinks": True}, {"softcap": 3.0, "sinks": True}], ids=str)
    @pytest.mark.parametrize("num_selected", [2, 50, None])
    def test_softcap_and_sinks(self, num_selected, options):
        stored = store((2, 4, 64, 16), 900, (0, 7))
        if "sinks" in options:
            options = {**options, "sinks": torch.linspace(-2, 8, 8, device=DEVICE).to(stored.query.dtype)}
        self.check(stored, num_selected, **options)

    @pytest.mark.parametrize(
        ("dtype", "scale"),
        [(torch.float16, 300), (torch.float16, 1e-5), (torch.bfloat16, 1e18), (torch.bfloat16, 1e-30)],
    )
    def test_huge_and_tiny_keys_and_values(self, dtype, scale):
        self.check(store((2, 4, 128, 16), 500, (0, 3), dtype, scale), 10)

    @pytest.mark.parametrize("seed", range(8))
    def test_pages_in_any_order_with_gaps(self, seed):
        stored = store((2, 4, 128, 16), 500)
        page_ids = random_pages(stored, 20)
        order = torch.randperm(40, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)
        shuffled = torch.cat([page_ids, torch.full_like(page_ids, -1)], dim=-1)[..., order]
        output, expected = stored.attend(shuffled), stored.attend(page_ids)
        torch.testing.assert_close(output, expected, rtol=2**-7, atol=2**-7)

    def test_the_same_call_gives_the_same_bits(self):
        stored = store((2, 4, 128, 16), 5000)
        page_ids, counters = random_pages(stored, 128), ops.new_counters(stored.query)
        outputs = [stored.attend(page_ids, counters=counters) for _ in range(10)]
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        assert not counters.any()

    @staticmethod
    def check(stored, num_selected, **options):
        page_ids = None if num_selected is None else random_pages(stored, num_selected)
        # Before the poison: the reference reads a row's first token, with no weight, in place of those it must not see.
        truth = stored.reference_attend(page_ids, **options)
        same_precision = attend_at_same_precision(stored, page_ids, **options)
        if page_ids is not None:
            stored.keys, stored.values = poison_unselected(stored, page_ids)
        assert_within_twice(stored.attend(page_ids, **options), truth, same_precision)


class TestChain:
    @pytest.mark.parametrize("num_selected", [2, 16, 64, 128])
    @pytest.mark.parametrize("num_tokens", [17, 1000, 1024, 1025, 4097, 131072])
    @pytest.mark.parametrize("bounds_dtype", BOUNDS_DTYPES)
    def test_the_stages_together_do_what_the_reference_does(self, num_tokens, num_selected, bounds_dtype):
        stored = store((2, 4, 128, 16), num_tokens, (0, num_tokens // 3), bounds_dtype=bounds_dtype)
        scores = stored.estimate()
        page_ids = stored.select(scores, num_selected)
        where = (num_tokens, stored.padding, num_selected, stored.page_size)
        assert torch.equal(page_ids, reference.select(scores, *where))
        # Where the reference's own choice is another, the scores differ by no more than their rounding.
        exact = stored.reference_estimate()
        expected_ids = reference.select(exact, *where)
        chosen, expected = (
            exact.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0).sort(dim=-1).values
            for ids in (page_ids, expected_ids)
        )
        torch.testing.assert_close(chosen, expected, rtol=1e-5, atol=1e-5)
        output = stored.attend(page_ids)
        assert_within_twice(output, stored.reference_attend(page_ids), attend_at_same_precision(stored, page_ids))

    def test_a_budget_that_covers_the_context_is_dense_attention(self):
        stored = store((2, 4, 128, 16), 1000, (0, 100))
        page_ids = stored.select(stored.estimate(), 64)
        expected = stored.attend(None)
        assert_within_twice(stored.attend(page_ids), stored.reference_attend(None), expected)

    @pytest.mark.parametrize("bounds_dtype", BOUNDS_DTYPES)
    def test_a_captured_graph_is_right_while_the_sequence_grows(self, bounds_dtype):
        """Over page boundaries, and over 128, 256 and 512 tokens, where sparse attention begins."""
        num_prompt, num_steps, num_selected = 100, 450, 8
        stored = store((2, 4, 128, 16), num_prompt + num_steps, (0, 9), bounds_dtype=bounds_dtype)
        buffers = poisoned_like(stored.buffers)
        prompt = (stored.new_keys[:, :, :num_prompt], stored.new_values[:, :, :num_prompt])
        stored.length.fill_(num_prompt)
        ops.append(*buffers, *prompt, *stored.where, 16)
        queries = torch.randn(num_steps, 2, 8, 1, 128, device=DEVICE, dtype=torch.bfloat16)
        query, key, value = queries[0].clone(), prompt[0][:, :, :1].clone(), prompt[1][:, :, :1].clone()
        counters = ops.new_counters(query)

        def step(buffers, length):
            length.add_(1)
            keys, values, *bounds = buffers
            ops.append(*buffers, key, value, length, stored.padding, 16)
            scores = ops.estimate(query, *bounds, length, stored.padding, 16, stored.scaling)
            page_ids = ops.select(scores, length, stored.padding, num_selected, 16)
            where = (length, stored.padding, 16, stored.scaling)
            sparse = ops.attend(query, keys, values, page_ids, *where, counters=counters)
            return page_ids, sparse, ops.attend(query, keys, values, None, *where, counters=counters)

        eager_buffers, eager_length = copies_of(buffers), stored.length.clone()
        warm_up_stream = torch.cuda.Stream()
        with torch.cuda.stream(warm_up_stream):
            step(copies_of(buffers), stored.length.clone())
        torch.cuda.current_stream().wait_stream(warm_up_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = step(buffers, stored.length)
        for step_idx in range(num_steps):
            new = slice(num_prompt + step_idx, num_prompt + step_idx + 1)
            query.copy_(queries[step_idx])
            key.copy_(stored.new_keys[:, :, new])
            value.copy_(stored.new_values[:, :, new])
            graph.replay()
            for result, eager in zip(replayed, step(eager_buffers, eager_length), strict=True):
                assert torch.equal(result, eager)
        assert_equal_buffers(buffers, stored.buffers)

    def test_more_than_2_to_the_31_elements(self):
        num_tokens = 2**20 + 40
        if torch.cuda.mem_get_info()[0] < 40 * 2**30:
            pytest.skip("needs 40 GiB of free GPU memory")
        stored = store((18, 1, 128, 16), 16)
        shape = (1, 18, num_tokens, 128)
        assert torch.Size(shape).numel() > 2**31
        stored.keys, stored.values = (torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        pages = (1, 18, -(-num_tokens // 16))
        stored.bounds = torch.zeros(*pages, 2, 128, dtype=torch.int8, device=DEVICE)
        stored.scales = torch.ones(*pages, 4, dtype=torch.uint8, device=DEVICE)
        stored.length.fill_(num_tokens)
        ops.append(*stored.buffers, stored.new_keys, stored.new_values, *stored.where, 16)
        assert torch.equal(stored.keys[:, :, -16:], stored.new_keys)
        page_ids = stored.select(stored.estimate(), 4)
        assert (page_ids[..., -1] == (num_tokens - 1) // 16).all()
        slots = (page_ids[..., None] * 16 + torch.arange(16, device=DEVICE)).flatten(2)[..., None]
        slots = slots.clamp(max=num_tokens - 1).expand(-1, -1, -1, 128)
        is_token = (page_ids[..., None] * 16 + torch.arange(16, device=DEVICE)).flatten(2)[:, :, None] < num_tokens
        gathered = (stored.keys.gather(2, slots).float(), stored.values.gather(2, slots).float())
        expected = F.scaled_dot_product_attention(stored.query.float(), *gathered, attn_mask=is_token)
        torch.testing.assert_close(stored.attend(page_ids).float(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("bounds_dtype", BOUNDS_DTYPES)
class TestFusedChain:
    """`ops.chain` selects the pages that `estimate` and `select` select, bit for bit, and attends them."""

    def check(self, stored, num_selected, softcap=None, sinks=None, score=PUBLISHED):
        page_ids = torch.full((*stored.keys.shape[:2], 1, num_selected), -7, device=DEVICE)

        def chain(keys, values, **options):
            where = (*stored.where, num_selected, stored.page_size, stored.scaling, softcap, sinks)
            return ops.chain(stored.query, keys, values, stored.bounds, stored.scales, *where, **options, score=score)

        output = chain(stored.keys, stored.values, page_ids=page_ids)
        assert torch.equal(page_ids, stored.select(stored.estimate(score), num_selected, score.keeps_first))
        truth = stored.reference_attend(page_ids, softcap, sinks)
        assert_within_twice(output, truth, stored.attend(page_ids, softcap=softcap, sinks=sinks))
        assert torch.equal(chain(*poison_unselected(stored, page_ids)), output)

    @pytest.mark.parametrize("num_selected", [1, 2, 7, 64, 128])
    @pytest.mark.parametrize("num_tokens", LENGTHS)
    def test_every_length(self, num_tokens, num_selected, bounds_dtype):
        self.check(store((2, 4, 128, 16), num_tokens, paddings(num_tokens), bounds_dtype=bounds_dtype), num_selected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("num_selected", [2, 9, 100])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_every_shape(self, shape, num_selected, dtype, bounds_dtype):
        self.check(store(shape, 1000, paddings(1000), dtype, bounds_dtype=bounds_dtype), num_selected)

    @pytest.mark.parametrize("shape", [(8, 4, 128, 16), (32, 1, 128, 16), (64, 2, 128, 16), (100, 1, 64, 16)], ids=str)
    @pytest.mark.parametrize("num_tokens", [2000, 20000])
    def test_clusters_of_every_size_and_none(self, shape, num_tokens, bounds_dtype):
        self.check(store(shape, num_tokens, bounds_dtype=bounds_dtype), 128)

    @pytest.mark.parametrize("score", OTHER_SCORES.values(), ids=OTHER_SCORES)
    @pytest.mark.parametrize("num_selected", [3, 20])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_other_scores(self, shape, num_selected, score, bounds_dtype):
        self.check(store(shape, 1000, paddings(1000), bounds_dtype=bounds_dtype), num_selected, score=score)

    @pytest.mark.parametrize("num_selected", [1, 2, 64])
    @pytest.mark.parametrize("num_tokens", LENGTHS)
    def test_the_first_page_kept_at_every_length(self, num_tokens, num_selected, bounds_dtype):
        stored = store((2, 4, 128, 16), num_tokens, paddings(num_tokens), bounds_dtype=bounds_dtype)
        self.check(stored, num_selected, score=DEFAULT)

    @pytest.mark.parametrize("options", [{"softcap": 3.0}, {"sinks": True}], ids=str)
    def test_softcap_and_sinks(self, options, bounds_dtype):
        stored = store((2, 4, 128, 16), 1000, (0, 100), bounds_dtype=bounds_dtype)
        sinks = torch.randn(8, device=DEVICE, dtype=torch.bfloat16) if "sinks" in options else None
        self.check(stored, 9, options.get("softcap"), sinks)

    @pytest.mark.parametrize("num_values", [1, 2, 3, 100])
    @pytest.mark.parametrize("num_selected", [2, 30, 200, 400])
    @pytest.mark.parametrize(("page_size", "num_tokens"), [(16, 10_000), (8, 130_001)], ids=["shared", "global"])
    @pytest.mark.parametrize("score", [PUBLISHED, DEFAULT], ids=["paper", "default"])
    def test_equal_scores(self, page_size, num_tokens, num_selected, num_values, score, bounds_dtype):
        """As many as shared memory holds, and more."""
        stored = store((2, 4, 128, page_size), num_tokens, (0, 333), bounds_dtype=bounds_dtype)
        value = torch.randint(num_values, stored.bounds.shape[:3], device=DEVICE) - num_values // 2
        stored.bounds[:] = value[..., None, None]
        if stored.scales is not None:
            stored.scales[:] = 127
        self.check(stored, num_selected, score=score)

    @pytest.mark.parametrize("scale", [1e-6, 1e4])
    def test_huge_and_tiny_keys(self, scale, bounds_dtype):
        self.check(store((2, 4, 128, 16), 5000, (0, 333), scale=scale, bounds_dtype=bounds_dtype), 40)

    @pytest.mark.parametrize("score", [PUBLISHED, DEFAULT], ids=["paper", "default"])
    def test_more_scores_than_shared_memory_holds(self, score, bounds_dtype):
        stored = store((64, 1, 64, 8), 8 * 2 * 25_000, bounds_dtype=bounds_dtype)
        self.check(stored, 64, score=score)


class TestDecode:
    """All four stages of a captured step, whose graph finds the storage on the device."""

    LAYER_IDX = 1

    @staticmethod
    def place(buffers, capacity, page_size):
        """Storage of `capacity` slots with the tokens of `buffers`, scores to work in, and their row of addresses."""
        moved = []
        for source, num_each in zip(buffers, (1, 1, page_size, page_size), strict=True):
            if source is None:
                moved.append(None)
                continue
            size = capacity // num_each
            moved.append(poisoned(*source.shape[:2], size, *source.shape[3:], dtype=source.dtype))
            size = min(size, source.shape[2])
            moved[-1][:, :, :size] = source[:, :, :size]
        scores = poisoned(*buffers[0].shape[:2], 1, capacity // page_size, dtype=torch.float32)
        row = [0 if tensor is None else tensor.data_ptr() for tensor in (*moved, scores)]
        row += [capacity, *[0] * (ops.NUM_ADDRESSES - len(row) - 1)]  # no codes, no pool
        return moved, scores, torch.tensor(row, device=DEVICE)

    @pytest.mark.parametrize("bounds_dtype", BOUNDS_DTYPES)
    @pytest.mark.parametrize(
        ("is_dense", "score"),
        [(False, PUBLISHED), (False, DEFAULT), (False, OTHER_SCORES["sum"]), (True, PUBLISHED)],
        ids=["paper", "default", "sum", "dense"],
    )
    @pytest.mark.parametrize(
        ("page_size", "num_chosen"), [(16, 8), (8, 8), (8, 30)], ids=["pages of 16", "pages of 8", "all, pages of 8"]
    )
    def test_a_captured_graph_follows_the_storage(self, page_size, num_chosen, is_dense, score, bounds_dtype):
        """What is not stored yet is NaN: a weight of 0 would not hide it."""
        num_prompt, num_steps = 100, 60
        stored = store((2, 4, 128, page_size), num_prompt + num_steps, (0, 9), bounds_dtype=bounds_dtype)
        buffers = poisoned_like(stored.buffers)
        prompt = (stored.new_keys[:, :, :num_prompt], stored.new_values[:, :, :num_prompt])
        stored.length.fill_(num_prompt)
        ops.append(*buffers, *prompt, *stored.where, page_size)
        eager_buffers = copies_of(buffers)
        addresses = torch.zeros(3, ops.NUM_ADDRESSES, dtype=torch.int64, device=DEVICE)
        placed, scores, addresses[self.LAYER_IDX] = self.place(buffers, 112, page_size)
        queries = torch.randn(num_steps, 2, 8, 1, 128, device=DEVICE, dtype=torch.bfloat16)
        query, key, value = queries[0].clone(), prompt[0][:, :, :1].clone(), prompt[1][:, :, :1].clone()

        def decode(key, value):
            num_selected = 0 if is_dense else num_chosen
            layer = (self.LAYER_IDX, 2, num_selected, page_size, stored.scaling)
            return ops.decode(query, key, value, addresses, *stored.where, *layer, score=score)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = decode(key, value)
        for step_idx in range(num_steps):
            stored.length.add_(1)
            if stored.length.item() > placed[0].shape[2]:
                more = (placed[0].shape[2] + 16, page_size)
                placed, scores, addresses[self.LAYER_IDX] = self.place(placed, *more)
            new = slice(num_prompt + step_idx, num_prompt + step_idx + 1)
            query.copy_(queries[step_idx])
            key.copy_(stored.new_keys[:, :, new])
            value.copy_(stored.new_values[:, :, new])
            graph.replay()

            keys, values, *bounds = eager_buffers
            ops.append(*eager_buffers, key, value, *stored.where, page_size)
            page_ids = None
            if not is_dense:
                expected_scores = ops.estimate(query, *bounds, *stored.where, page_size, stored.scaling, score)
                page_ids = ops.select(expected_scores, *stored.where, num_chosen, page_size, score.keeps_first)
            expected = ops.attend(query, keys, values, page_ids, *stored.where, page_size, stored.scaling)
            assert (output - expected).norm() <= 2**-8 * expected.norm()  # sums in another order, rounded to bfloat16
            assert torch.equal(decode(None, None), output)
        assert_equal_buffers(placed, stored.buffers)
        assert guards_are_intact(scores)


@pytest.mark.parametrize("bounds_dtype", BOUNDS_DTYPES)
@pytest.mark.parametrize("op", ["append", "estimate", "select", "attend", "chain"])
def test_the_operators_are_what_their_schemas_say(op, bounds_dtype):
    # No spare pages, so that every score is defined.
    stored = store((2, 4, 128, 16), 500, (0, 3), spare_pages=0, bounds_dtype=bounds_dtype)
    tokens = (stored.new_keys, stored.new_values)
    scores, counters = stored.estimate(), ops.new_counters(stored.query)
    arguments = {
        "append": (*stored.buffers, *tokens, *stored.where, 16),
        "estimate": (stored.query, stored.bounds, stored.scales, *stored.where, 16, 0.1),
        "select": (scores.nan_to_num(), *stored.where, 4, 16),
        "attend": (
            *(stored.query, stored.keys, stored.values, random_pages(stored, 4)),
            *(*stored.where, counters, 16, 0.1, None, None),
        ),
        "chain": (stored.query, *stored.buffers, *stored.where, 4, 16, 0.1),
    }
    torch.library.opcheck(getattr(torch.ops.hf_quest, op).default, arguments[op])
    if op == "estimate":
        arguments[op] += (0.5, "sum")
    elif op == "select":
        arguments[op] += (True,)
    elif op == "chain":
        arguments[op] += (None, None, None, *DEFAULT)
    torch.library.opcheck(getattr(torch.ops.hf_quest, op).default, arguments[op])


def test_compile_goes_through_the_operators_in_one_graph():
    stored = store((2, 4, 128, 16), 500, (0, 3))
    token = (stored.new_keys[:, :, -1:], stored.new_values[:, :, -1:])

    def step(keys, values, *bounds):
        ops.append(keys, values, *bounds, *token, *stored.where, 16)
        scores = ops.estimate(stored.query, *bounds, *stored.where, 16, stored.scaling)
        page_ids = ops.select(scores, *stored.where, 8, 16)
        return ops.attend(stored.query, keys, values, page_ids, *stored.where, 16, stored.scaling)

    expected = step(*stored.buffers)
    compiled = torch.compile(step, fullgraph=True)
    assert torch.equal(compiled(*stored.buffers), expected)
