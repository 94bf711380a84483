"""csrc's decode step by pages in one kernel of a cluster, against the specification without a GPU.

Fibers do what the threads of a GPU would, in an order that a seed decides, watched for races and bounds. What lies
beside the tensors cannot be read, and what is not stored yet, or not chosen, is NaN.
"""

import struct
import subprocess
from dataclasses import dataclass, fields, replace

import pytest
import torch
from on_cpu import build_program, needs_nvcc

from hf_quest import reference

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
    num_selected: int = 7
    capacity: int = 640
    is_wide: int = 0  # bounds in the dtype of the keys
    keeps_first: int = 1
    cluster_size: int = 3
    at_end: int = 1  # of memory tensors end, or begin
    is_found: int = 0  # storage, on the device
    seed: int = 1
    has_new: int = 0  # whether the newest token comes beside the storage

    @property
    def dtype(self):
        return torch.float16 if self.is_half else torch.bfloat16

    @property
    def scaling(self):
        return struct.unpack("f", struct.pack("f", self.head_dim**-0.5))[0]

    @property
    def score(self):
        return reference.Score(width=0.5, keeps_first=bool(self.keeps_first), group="max")


class Step:
    """Random tokens of rows with left padding, which fill the storage but for `num_spare` slots, and a query."""

    def __init__(self, case, left_padding=(0,), num_spare=0):
        torch.manual_seed(case.seed)
        self.case, self.length, self.padding = case, case.capacity - num_spare, torch.tensor(left_padding)
        self.shape = (case.num_rows, case.num_kv_heads)
        self.keys, self.values = (
            torch.randn(*self.shape, case.capacity, case.head_dim).to(case.dtype) for _ in range(2)
        )
        query = torch.randn(case.num_rows, case.num_kv_heads * case.group_size, 1, case.head_dim)
        self.query = (2 * query).to(case.dtype)
        self.slot = torch.arange(case.capacity)

    def bounds(self, length):
        """Bounds and scales of the first `length` slots; what stands for nothing is of anything."""
        case = self.case
        shape = (*self.shape, -(-case.capacity // case.page_size))
        kind = {"dtype": case.dtype} if case.is_wide else {"dtype": torch.int8}
        bounds = torch.full((*shape, 2, case.head_dim), 77, **kind)
        scales = None if case.is_wide else torch.full((*shape, case.head_dim // 32), 255, dtype=torch.uint8)
        reference.refresh_bounds(self.keys, bounds, scales, length, length, self.padding, case.page_size)
        return [each for each in (bounds, scales) if each is not None]

    def tokens(self, length, is_kept=True):
        """Keys and values of those of the first `length` slots that `is_kept` names."""
        is_stored = (self.slot >= self.padding[:, None]) & (self.slot < length)
        is_stored = is_stored[:, None, :] & is_kept
        return [each.masked_fill(~is_stored[..., None], torch.nan) for each in (self.keys, self.values)]

    def by_kernel(self, program, is_kept=True):
        """(page ids, output, what is stored then: keys, values, bounds and scales)."""
        case, end = self.case, self.length - self.case.has_new
        names = [field.name for field in fields(case)]
        parts = [struct.pack(f"{len(names)}i2f", *(getattr(case, name) for name in names), case.scaling, 0.5)]
        parts.append(struct.pack("q", self.length))
        stored = [*self.tokens(end, is_kept), *self.bounds(end)]
        new = [each[:, :, self.length - 1] for each in (self.keys, self.values)] if case.has_new else []
        sent = (self.padding, *stored, self.query, *new)
        parts += [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in sent]
        result = subprocess.run([program], input=b"".join(parts), capture_output=True)
        assert result.returncode == 0, result.stderr.decode()
        told = torch.empty(*self.shape, 1, case.num_selected, dtype=torch.int64)
        written = [told, self.query, *stored]
        parts = torch.frombuffer(bytearray(result.stdout), dtype=torch.uint8).split([each.nbytes for each in written])
        pairs = zip(parts, written, strict=True)
        told, output, *stored = (part.clone().view(like.dtype).view(like.shape) for part, like in pairs)
        return told, output, stored

    def is_of(self, page_ids):
        """[B, Hkv, N]: slots of these pages."""
        page = (self.slot - self.padding[:, None]).div(self.case.page_size, rounding_mode="floor")
        return (page[:, None, :, None] == page_ids).any(dim=-1)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build_program("chain_on_cpu", tmp_path_factory)


def bits(tensor):
    return tensor.view(torch.uint8)


def check(step, program):
    case, length, size = step.case, step.length, step.case.page_size
    told, output, stored = step.by_kernel(program)
    after = [*step.tokens(length), *step.bounds(length)]
    num_pages = -(-length // size)
    scores = reference.estimate(
        step.query,
        *(after[2:] if not case.is_wide else (after[2], None)),
        case.scaling,
        case.score,
        (length, step.padding, size),
    )
    how = (length, step.padding, case.num_selected, size, bool(case.keeps_first))
    assert torch.equal(told, reference.select(scores[..., :num_pages], *how))
    has_tokens = (step.length > step.padding).nonzero().flatten()
    padded = (torch.nn.functional.pad(each.float(), (0, 0, 0, size)) for each in (step.keys, step.values))
    attended = reference.attend(step.query.float(), *padded, told, length, step.padding, size, case.scaling)
    # Weights are rounded to the dtype of the values, and the sum as well.
    rounding = torch.finfo(case.dtype).eps
    expected = attended[has_tokens]
    torch.testing.assert_close(output[has_tokens].float(), expected, rtol=2 * rounding, atol=2 * rounding)
    for written, kept in zip(stored[:2], after, strict=False):
        is_new = (step.slot == length - 1)[:, None]  # which a row of padding alone stores as well
        assert torch.equal(bits(torch.where(is_new, 0, written)), bits(torch.where(is_new, 0, kept)))
        rows = has_tokens if case.has_new else []
        assert torch.equal(bits(written[rows, :, length - 1]), bits(kept[rows, :, length - 1]))
    for written, kept in zip(stored[2:], after[2:], strict=True):
        assert torch.equal(bits(written[has_tokens]), bits(kept[has_tokens]))
    again = step.by_kernel(program, is_kept=step.is_of(told))[1]
    assert torch.equal(bits(again[has_tokens]), bits(output[has_tokens])), "other tokens than those chosen are read"
    return told


CASES = {
    "as it is by default": Case(),
    "pages of 8, the newest of one token": Case(page_size=8, capacity=646, num_selected=9),
    "pages of 8, a head alone, no first page": Case(
        page_size=8, group_size=1, num_selected=3, capacity=400, keeps_first=0, at_end=0
    ),
    "pages of 8 in two blocks, two of them chosen": Case(page_size=8, num_selected=2, capacity=406, cluster_size=2),
    "pages of 32, head dim 128, five heads": Case(page_size=32, head_dim=128, group_size=5, is_found=1),
    "pages of 64, head dim 96": Case(page_size=64, head_dim=96, num_selected=4),
    "head dim 256, eight heads": Case(head_dim=256, group_size=8, capacity=330),
    "float16, two rows and heads, a cluster of 8": Case(
        is_half=1, num_rows=2, num_kv_heads=2, cluster_size=8, num_selected=20, is_found=1
    ),
    "wide bounds": Case(is_wide=1, capacity=633),
    "wide bounds, head dim 128, two rows, pages of 8": Case(is_wide=1, head_dim=128, num_rows=2, page_size=8),
    "more blocks than chosen pages": Case(num_selected=3, cluster_size=8),
}


@pytest.mark.parametrize("has_new", [0, 1])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_is_that_of_the_specification(program, case, has_new):
    check(Step(replace(case, has_new=has_new), (0, 5)[-case.num_rows :]), program)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 48, 49, 96])
@pytest.mark.parametrize("page_size", [8, 16])
def test_short_rows_are_taken_whole(program, page_size, length):
    case = Case(page_size=page_size, num_selected=6, capacity=112, seed=length, has_new=1)
    told = check(Step(case, num_spare=112 - length), program)
    num_pages = -(-length // page_size)
    if num_pages <= 6:
        assert told.flatten().tolist() == [*range(num_pages), *[-1] * (6 - num_pages)]


@pytest.mark.parametrize("has_new", [0, 1])
def test_a_row_of_padding_alone_has_no_tokens(program, has_new):
    case = Case(num_rows=3, capacity=320, has_new=has_new)
    told = check(Step(case, (0, 304, 303), num_spare=16), program)
    assert (told[1] == -1).all()
    assert told[2].flatten().tolist() == [0] + [-1] * 6


def test_scores_that_shared_memory_does_not_hold(program):
    case = Case(page_size=8, capacity=8 * 15_400 + 1, group_size=1, num_selected=30, cluster_size=2, has_new=1)
    check(Step(case, (3,), num_spare=0), program)


@pytest.mark.parametrize("seed", range(3, 6))
def test_the_order_of_threads_does_not_matter(program, seed):
    """Of more pages than two rounds of warps score."""
    check(Step(Case(capacity=4000, num_selected=40, seed=seed, has_new=1), num_spare=5), program)
