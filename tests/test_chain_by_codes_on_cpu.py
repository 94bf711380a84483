"""csrc's decode step by codes in one kernel of a cluster, against the specification without a GPU.

Fibers do what the threads of a GPU would, in an order that a seed decides, watched for races and bounds. What lies
beside the tensors cannot be read, and what is not stored yet, or not chosen, is NaN.
"""

import struct
import subprocess
from dataclasses import dataclass, fields, replace

import pytest
import torch
from on_cpu import build_program, needs_nvcc

from hf_quest import codes, reference, stripes
from hf_quest.evaluation.hits import SetPool

pytestmark = [needs_nvcc, pytest.mark.csrc]


@dataclass
class Case:
    """What the program reads first; each field is a number."""

    is_half: int = 0
    num_rows: int = 1
    num_kv_heads: int = 1
    group_size: int = 2
    head_dim: int = 64
    page_size: int = 16
    code_bits: int = 2
    num_candidates: int = 20
    num_tokens: int = 208
    capacity: int = 640
    agreement: int = reference.GROUPS.index("sum")
    keeps_first: int = 1
    cluster_size: int = 2
    is_told: int = 1
    at_end: int = 1  # of memory tensors end, or begin
    is_found: int = 0  # storage, on the device
    seed: int = 1
    pool_size: int = 0  # slots; 0 for the kernel without one
    has_new: int = 0  # whether the newest token comes beside the storage

    @property
    def group(self):
        return reference.GROUPS[self.agreement]

    @property
    def dtype(self):
        return torch.float16 if self.is_half else torch.bfloat16

    @property
    def scaling(self):
        return struct.unpack("f", struct.pack("f", self.head_dim**-0.5))[0]

    @property
    def score(self):
        return reference.Score(width=0.5, keeps_first=bool(self.keeps_first), group="max")


BY_LARGEST, BY_SHARE = reference.GROUPS.index("max"), reference.GROUPS.index("share")
CASES = {
    "as it is by default": Case(),
    "a head alone, 4 bits, pages of 8, a cluster of 3": Case(
        group_size=1, code_bits=4, page_size=8, num_candidates=30, cluster_size=3, at_end=0
    ),
    "five heads by the largest, head dim 128, pages of 32": Case(
        group_size=5, head_dim=128, page_size=32, num_candidates=7, num_tokens=100, agreement=BY_LARGEST
    ),
    "by the largest share, 4 bits, float16, two rows and heads": Case(
        num_rows=2, num_kv_heads=2, code_bits=4, is_half=1, agreement=BY_SHARE, keeps_first=0, capacity=400, is_found=1
    ),
    "pages of 8 up to the storage's end": Case(page_size=8, num_candidates=40, num_rows=2, capacity=400, seed=2),
    "the newest page of one token": Case(capacity=646, cluster_size=3),
    "head dim 96, pages of 8": Case(head_dim=96, page_size=8, num_candidates=40, capacity=400, cluster_size=3),
    "head dim 96, 4 bits": Case(head_dim=96, group_size=3, code_bits=4),
    "head dim 256": Case(head_dim=256, group_size=5, agreement=BY_SHARE),
    "four stripes, a cluster of 3": Case(num_tokens=64, cluster_size=3),
    "eight stripes, a cluster of 5, two rows": Case(num_tokens=128, cluster_size=5, num_rows=2),
    "more of a stripe than are compared": Case(num_candidates=48, num_tokens=1152, page_size=32, capacity=1568),
}


class Step:
    """Random tokens of rows with left padding, which fill the storage but for `num_spare` slots, and a query."""

    def __init__(self, case, left_padding=(0,), num_spare=0):
        torch.manual_seed(case.seed)
        self.case, self.length = case, case.capacity - num_spare
        self.padding = torch.tensor(left_padding)
        self.shape = (case.num_rows, case.num_kv_heads)
        self.keys = torch.randn(*self.shape, case.capacity, case.head_dim).to(case.dtype)
        self.values = torch.randn(*self.shape, case.capacity, case.head_dim).to(case.dtype)
        query = torch.randn(case.num_rows, case.num_kv_heads * case.group_size, 1, case.head_dim)
        self.query = (2 * query).to(case.dtype)
        self.store()
        self.empty_pool()

    def store(self):
        """Bounds, scales and codes of the keys as they are; what stands for nothing is of anything."""
        case = self.case
        num_pages = -(-case.capacity // case.page_size)
        self.bounds = torch.full((*self.shape, num_pages, 2, case.head_dim), 77, dtype=torch.int8)
        self.scales = torch.full((*self.shape, num_pages, case.head_dim // 32), 255, dtype=torch.uint8)
        self.codes = torch.full((*self.shape, case.capacity, case.head_dim * case.code_bits // 8), 255).byte()
        where = (self.length, self.length, self.padding, case.page_size)
        reference.refresh_bounds(self.keys, self.bounds, self.scales, *where)
        codes.refresh_codes(self.keys, self.bounds, self.scales, self.codes, *where, case.code_bits)
        slot = torch.arange(case.capacity)
        is_stored = (slot >= self.padding[:, None]) & (slot < self.length)
        for tokens in (self.keys, self.values):
            tokens.masked_fill_(~is_stored[:, None, :, None], torch.nan)

    def empty_pool(self):
        pooled = (*self.shape, self.case.pool_size)
        tokens = [torch.zeros(*pooled, self.case.head_dim, dtype=self.case.dtype) for _ in range(2)]
        counts = torch.zeros(*self.shape, 2 if self.case.pool_size else 0, dtype=torch.int64)
        self.pool = [*tokens, torch.zeros(pooled, dtype=torch.int64), counts]

    def stored(self):
        return [self.keys, self.values, self.bounds, self.scales, self.codes]

    def before_the_newest(self):
        """What is stored without the newest token, and its key and value."""
        after = [tensor.clone() for tensor in self.stored()]
        new = [tensor[:, :, self.length - 1].clone() for tensor in after[:2]]
        self.length -= 1
        self.store()
        before = [tensor.clone() for tensor in self.stored()]
        self.length += 1
        self.keys, self.values, self.bounds, self.scales, self.codes = after
        return before, new

    def grow(self):
        """Store a token more, if there is room."""
        if self.length < self.case.capacity:
            for tokens in (self.keys, self.values):
                tokens[:, :, self.length] = torch.randn(*self.shape, self.case.head_dim).to(tokens.dtype)
            self.length += 1
            self.store()

    def token_ids(self):
        """By the specification."""
        case, bounds = self.case, (self.bounds, self.scales)
        where = (self.length, self.padding, case.page_size)
        scores = reference.estimate(self.query, *bounds, case.scaling, case.score)
        chosen = (*where[:2], case.num_candidates, case.page_size, bool(case.keeps_first))
        candidates = codes.find_candidates(scores, *chosen, stripes.count(case.num_tokens, case.page_size))
        how = (case.code_bits, case.scaling, case.num_tokens, case.group)
        return codes.refine(self.query, *bounds, self.codes, candidates, *where, *how)

    def attend(self, token_ids):
        """Over these tokens, in float32."""
        stored = (torch.nn.functional.pad(each.float(), (0, 0, 0, 1)) for each in (self.keys, self.values))
        return reference.attend(self.query.float(), *stored, token_ids, self.length, self.padding, 1, self.case.scaling)

    def by_kernel(self, program, token_ids=None):
        """(token ids, output). Of what is stored `token_ids` are there, or all tokens."""
        case = self.case
        names = [field.name for field in fields(case)]
        parts = [struct.pack(f"{len(names)}i2f", *(getattr(case, name) for name in names), case.scaling, 0.5)]
        parts.append(struct.pack("q", self.length))
        stored, new = self.before_the_newest() if case.has_new else (self.stored(), [])
        if token_ids is not None:
            token = torch.arange(case.capacity) - self.padding[:, None]
            is_there = (token[:, None, :, None] == token_ids).any(dim=-1, keepdim=True)
            stored = [*(each.masked_fill(~is_there, torch.nan) for each in stored[:2]), *stored[2:]]
        stored = (self.padding, *stored, self.query, *self.pool, *new)
        parts += [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in stored]
        result = subprocess.run([program], input=b"".join(parts), capture_output=True)
        assert result.returncode == 0, result.stderr.decode()
        told = torch.empty(*self.shape, 1, case.num_tokens, dtype=torch.int64)
        written = [told, self.query, *self.pool, *(self.stored() if case.has_new else [])]
        sizes = [tensor.nbytes for tensor in written]
        assert len(result.stdout) == sum(sizes)
        parts = torch.frombuffer(bytearray(result.stdout), dtype=torch.uint8).split(sizes)
        pairs = zip(parts, written, strict=True)
        told, output, *rest = (part.clone().view(like.dtype).view(like.shape) for part, like in pairs)
        self.pool, self.written = rest[:4], rest[4:]
        return told, output


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build_program("chain_by_codes_on_cpu", tmp_path_factory)


def check(step, program):
    told, output = step.by_kernel(program)
    expected = step.token_ids()
    if step.case.is_told:
        assert (told >= -1).all(), "some ids have not been told"
        assert torch.equal(reference.in_order(told), expected)
    else:
        assert (told == -7).all()
    has_tokens = (step.length > step.padding).nonzero().flatten()
    # Weights are rounded to the dtype of the values, and the sum as well.
    rounding = torch.finfo(step.case.dtype).eps
    attended = step.attend(expected)[has_tokens]
    torch.testing.assert_close(output[has_tokens].float(), attended, rtol=2 * rounding, atol=2 * rounding)
    if not step.case.pool_size:  # which has changed
        written = step.written
        again = step.by_kernel(program, expected)[1]
        assert torch.equal(again[has_tokens], output[has_tokens]), "other tokens than those chosen are read"
        step.written = written
    return told


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_is_that_of_the_specification(program, case):
    check(Step(case, (0, 5)[-case.num_rows :]), program)


@pytest.mark.parametrize(("length", "cluster_size"), [(1, 2), (16, 3), (17, 2), (64, 3), (65, 3), (81, 2)])
def test_short_rows_are_taken_whole(program, length, cluster_size):
    case = Case(cluster_size=cluster_size, capacity=96, num_tokens=64, num_candidates=5, seed=length)
    told = check(Step(case, num_spare=96 - length), program)
    if length <= 64:
        assert told.flatten().tolist() == [*range(length), *[-1] * (64 - length)]


def test_a_row_of_padding_alone_has_no_tokens(program):
    told = check(Step(Case(num_rows=3, capacity=320), (0, 304, 303), num_spare=16), program)
    assert (told[1] == -1).all()
    assert told[2].flatten().tolist() == [0] + [-1] * 207


EQUAL = {
    "few": Case(capacity=600),
    "more tokens than a list holds": Case(
        page_size=64, capacity=4160, num_candidates=64, num_tokens=576, agreement=BY_SHARE
    ),
    "more pages than a list holds": Case(
        page_size=8, capacity=26400, group_size=1, num_candidates=40, agreement=BY_LARGEST, keeps_first=0
    ),
}


@pytest.mark.parametrize("case", EQUAL.values(), ids=EQUAL)
def test_equal_keys_are_taken_from_the_first_on(program, case):
    """Of each stripe."""
    step = Step(case)
    step.keys[:] = step.keys[:, :, :1]
    step.store()
    told, size = check(step, program), case.page_size
    num_earlier = (case.capacity - 1) // size
    num_stripes = stripes.count(case.num_tokens, size)
    for stripe in range(num_stripes):
        chosen = told[(told >= 0) & (told < num_earlier * size) & (told // size % num_stripes == stripe)]
        of_stripe = torch.cat([torch.arange(size) + size * page for page in range(stripe, num_earlier, num_stripes)])
        assert chosen.tolist() == of_stripe[: len(chosen)].tolist()


NEW = {
    "amid a page": Case(),
    "the first of a page, two rows and heads": Case(num_rows=2, num_kv_heads=2, cluster_size=3, capacity=401),
    "the last of a page": Case(is_found=1),
    "the last of a page of 32, head dim 128, a pool": Case(head_dim=128, page_size=32, num_candidates=7, pool_size=256),
    "the last of a page of 8, 4 bits, float16": Case(page_size=8, num_candidates=40, code_bits=4, is_half=1),
    "the last of a page of 64, head dim 96": Case(page_size=64, num_candidates=7, num_tokens=256, head_dim=96),
    "the last of a page, head dim 256, all attended": Case(head_dim=256, capacity=160, cluster_size=3),
    "amid a page, blocks that wait for no shares": Case(group_size=1, cluster_size=3),
    "amid a page, heads that agree by the largest": Case(agreement=BY_LARGEST, cluster_size=3, pool_size=256),
    "the first of all": Case(capacity=16),
}


@pytest.mark.parametrize("name", NEW)
def test_a_new_token_is_stored_on_the_way(program, name):
    """As append does: with its page's bounds, and the codes of a page that it fills."""
    case = replace(NEW[name], has_new=1)
    num_spare = 15 if name == "the first of all" else 3 if name.startswith("amid") else 0
    step = Step(case, (0, 16)[: case.num_rows], num_spare)
    check(step, program)
    keys, values, bounds, scales, made = step.written
    before = step.before_the_newest()[0][-1]
    for written, expected in zip((keys, values, bounds, scales), step.stored(), strict=False):
        assert torch.equal(written.view(torch.uint8), expected.view(torch.uint8))
    for row, padding in enumerate(step.padding.tolist()):
        end = padding + (step.length - padding) // case.page_size * case.page_size
        assert torch.equal(made[row, :, padding:end], step.codes[row, :, padding:end])
        is_full = end == step.length
        untouched = slice(end, None) if is_full else slice(end, step.length)
        assert torch.equal(made[row, :, untouched], before[row, :, untouched])


def test_what_is_chosen_need_not_be_told(program):
    check(Step(Case(is_told=0, capacity=400)), program)


@pytest.mark.parametrize("seed", range(3, 6))
def test_the_order_of_threads_does_not_matter(program, seed):
    """Of more pages than two rounds of warps score, and blocks of which the last has a stripe less."""
    check(Step(Case(capacity=4000, num_candidates=60, num_tokens=320, cluster_size=3, seed=seed), num_spare=5), program)


def test_scores_that_shared_memory_does_not_hold(program):
    case = Case(page_size=8, capacity=250_000, group_size=1, num_candidates=200, num_tokens=512)
    check(Step(case, (3,), num_spare=5), program)


def test_lists_are_as_large_as_stripes_may_want(program):
    """Of every number of pages, cluster and page size."""
    result = subprocess.run([program, "sizes"], capture_output=True)
    assert result.returncode == 0, result.stderr.decode()


POOLED = {
    "as it is by default": Case(pool_size=256),
    "four stripes, a cluster of 3": Case(num_tokens=64, cluster_size=3, pool_size=256),
    "two rows and heads, a cluster of 3": Case(num_rows=2, num_kv_heads=2, cluster_size=3, capacity=400, pool_size=512),
    "pages of 32, head dim 128": Case(
        head_dim=128, page_size=32, num_candidates=7, num_tokens=100, group_size=5, pool_size=256, is_found=1
    ),
    "pages of 8, head dim 96, float16": Case(page_size=8, num_candidates=40, cluster_size=3, pool_size=256, is_half=1),
    "more than it has room for": Case(num_candidates=48, num_tokens=1152, page_size=32, capacity=1568, pool_size=256),
}


def slots_of(step, row, head):
    """By token, the slots in the pool of a row's head."""
    tags = step.pool[2][row, head]
    slots = {int(tag) % 2**24: slot for slot, tag in enumerate(tags) if tag}
    assert len(slots) == int((tags != 0).sum()), "a token is there twice"
    return slots


def each_head(step):
    return ((row, head) for row in range(step.case.num_rows) for head in range(step.case.num_kv_heads))


@pytest.mark.parametrize("case", POOLED.values(), ids=POOLED)
class TestPool:
    def step(self, case):
        return Step(case, (0, 5)[-case.num_rows :], num_spare=3)

    def without(self, step, program):
        """What the kernel without a pool gives."""
        plain = Step(replace(step.case, pool_size=0), tuple(step.padding.tolist()), num_spare=3)
        return plain.by_kernel(program)

    def test_the_output_is_the_same_to_the_bit(self, program, case):
        step = self.step(case)
        expected = self.without(step, program)
        for _ in range(2):  # the second time by what the first has put there
            told, output = step.by_kernel(program)
            assert torch.equal(told, expected[0])
            assert torch.equal(output, expected[1])

    def test_what_is_there_is_what_was_attended(self, program, case):
        step = self.step(case)
        told, _ = step.by_kernel(program)
        keys, values, _, counts = step.pool
        assert step.pool[2].any(dim=-1).all()
        for row, head in each_head(step):
            newest = step.length - int(step.padding[row]) - 1
            attended = set(told[row, head, 0].tolist()) - {-1, newest}
            assert counts[row, head].tolist() == [len(attended), 0]
            slots = slots_of(step, row, head)
            assert slots.keys() <= attended
            if case.num_tokens <= case.pool_size // 4:
                assert slots.keys() == attended
            for token, slot in slots.items():
                place = (row, head, token + int(step.padding[row]))
                assert torch.equal(keys[row, head, slot], step.keys[place])
                assert torch.equal(values[row, head, slot], step.values[place])

    def test_what_is_there_is_not_read_from_the_host(self, program, case):
        step = self.step(case)
        told, output = step.by_kernel(program)
        before = step.pool
        for row, head in each_head(step):
            slots = [token + int(step.padding[row]) for token in slots_of(step, row, head)]
            step.keys[row, head, slots], step.values[row, head, slots] = torch.nan, torch.nan
        told_again, output_again = step.by_kernel(program)
        assert torch.equal(told, told_again)
        assert torch.equal(output, output_again)
        num_there = (before[2] != 0).sum(dim=-1)
        assert torch.equal(step.pool[3][..., 1], num_there)
        assert torch.equal(step.pool[3][..., 0], 2 * before[3][..., 0])

    def test_a_pool_that_is_emptied_has_no_token_of_before(self, program, case):
        step = self.step(case)
        step.by_kernel(program)
        step.pool[2].zero_()
        step.keys *= 2
        step.values *= 2
        plain = Step(replace(case, pool_size=0), tuple(step.padding.tolist()), num_spare=3)
        plain.keys, plain.values = step.keys, step.values
        assert torch.equal(step.by_kernel(program)[1], plain.by_kernel(program)[1])

    def test_what_was_not_attended_for_longest_goes_first(self, program, case):
        """As in evaluation/hits.py, which tells how many are found, step after step while the text grows."""
        step, size = self.step(case), case.pool_size
        num_stripes = stripes.count(case.num_tokens, case.page_size)
        expected = [SetPool(case.num_kv_heads, size, case.page_size, num_stripes) for _ in range(case.num_rows)]
        num_found = torch.zeros(step.shape, dtype=torch.int64)
        torch.manual_seed(1)
        for _ in range(4):
            told, _ = step.by_kernel(program)
            for row, pool in enumerate(expected):
                found = pool.look_up(told[row, :, 0], step.length - int(step.padding[row]))
                num_found[row] += found.sum(dim=-1)
                tags = ((pool.time << 4 | pool.num_uses) << 24 | pool.tokens).masked_fill(pool.tokens < 0, 0)
                assert torch.equal(step.pool[2][row], tags.flatten(1))
            assert torch.equal(step.pool[3][..., 1], num_found)
            for row, head in each_head(step):
                for token, slot in slots_of(step, row, head).items():
                    place = (row, head, token + int(step.padding[row]))
                    assert torch.equal(step.pool[0][row, head, slot], step.keys[place])
                    assert torch.equal(step.pool[1][row, head, slot], step.values[place])
            step.query = torch.lerp(step.query.float(), 2 * torch.randn(step.query.shape), 0.3).to(case.dtype)
            step.grow()
        assert num_found.min() > 0
