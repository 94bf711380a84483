"""A decode step by codes, csrc's append, refine and attend, against the specification without a GPU.

Fibers do what the threads of a GPU would, watched for races and bounds.
"""

import struct
import subprocess
from dataclasses import dataclass, fields

import pytest
import torch
from on_cpu import build_program, needs_nvcc

from hf_quest import codes, reference, stripes

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
    num_candidates: int = 6
    num_tokens: int = 48
    capacity: int = 192
    has_scales: int = 1
    agreement: int = reference.GROUPS.index("sum")
    num_sms: int = 1
    num_stored: int = 184

    @property
    def group(self):
        return reference.GROUPS[self.agreement]

    @property
    def dtype(self):
        return torch.float16 if self.is_half else torch.bfloat16

    @property
    def scaling(self):
        return struct.unpack("f", struct.pack("f", self.head_dim**-0.5))[0]


CASES = {
    "as it is by default": Case(),
    "a head alone": Case(group_size=1, head_dim=128),
    "by the largest": Case(agreement=reference.GROUPS.index("max"), head_dim=128),
    "by the largest share, 4 bits": Case(agreement=reference.GROUPS.index("share"), code_bits=4),
    "bounds like keys, float16": Case(has_scales=0, is_half=1, group_size=3),
    "bounds like keys, bfloat16": Case(has_scales=0, head_dim=96),
    "head dim 96, 4 bits": Case(head_dim=96, code_bits=4),
    "head dim 256": Case(head_dim=256, num_candidates=4),
    "two rows and heads": Case(num_rows=2, num_kv_heads=2),
    "two tiles of heads": Case(group_size=11),
    "small pages": Case(page_size=8, num_candidates=12, num_tokens=40),
    "large pages": Case(page_size=32, num_candidates=3, num_tokens=64, head_dim=128),
    "fewer candidates than tokens": Case(num_candidates=3, num_tokens=80),
    "eight stripes": Case(num_tokens=112, num_candidates=8),
    "sixteen stripes": Case(num_tokens=208, num_candidates=14, capacity=640, num_stored=630),
    "parts of several blocks": Case(num_tokens=160, num_candidates=11, num_sms=4),
}


@dataclass
class Told:
    """What the program or the specification came to."""

    bounds: torch.Tensor
    scales: torch.Tensor | None
    codes: torch.Tensor
    token_ids: torch.Tensor
    output: torch.Tensor
    logits: torch.Tensor | None = None  # [B, Hkv, G, C, S]


class Step:
    """Random tokens of rows with left padding, which come in `steps`, a query, and some pages as candidates."""

    def __init__(self, case, left_padding=(0,), steps=None):
        torch.manual_seed(0)
        self.case, self.length = case, case.num_stored
        self.steps = [case.num_stored - 3, 1, 1, 1] if steps is None else steps
        self.shape = (case.num_rows, case.num_kv_heads)
        self.padding = torch.tensor(left_padding)
        self.keys = torch.randn(*self.shape, case.num_stored, case.head_dim).to(case.dtype)
        self.values = torch.randn(*self.shape, case.num_stored, case.head_dim).to(case.dtype)
        query = torch.randn(case.num_rows, case.num_kv_heads * case.group_size, 1, case.head_dim)
        self.query = (2 * query).to(case.dtype)
        self.num_pages = case.capacity // case.page_size
        self.scores = torch.randn(*self.shape, 1, self.num_pages)
        where = (self.length, self.padding, case.num_candidates, case.page_size, True)
        self.page_ids = codes.find_candidates(self.scores, *where, stripes.count(case.num_tokens, case.page_size))

    def tensors(self):
        """Bounds, scales and codes before anything is stored."""
        case = self.case
        dtype = torch.int8 if case.has_scales else case.dtype
        bounds = torch.zeros(*self.shape, self.num_pages, 2, case.head_dim, dtype=dtype)
        num_scales = case.head_dim // reference.SCALE_BLOCK
        scales = torch.zeros(*self.shape, self.num_pages, num_scales, dtype=torch.uint8) if case.has_scales else None
        num_bytes = case.head_dim * case.code_bits // 8
        return bounds, scales, torch.zeros(*self.shape, case.capacity, num_bytes, dtype=torch.uint8)

    def by_specification(self):
        case, (bounds, scales, of_tokens) = self.case, self.tensors()
        where = (self.length, self.length, self.padding, case.page_size)
        reference.refresh_bounds(self.keys, bounds, scales, *where)
        codes.refresh_codes(self.keys, bounds, scales, of_tokens, *where, case.code_bits)
        how = (case.code_bits, case.scaling, case.num_tokens, case.group)
        token_ids = codes.refine(self.query, bounds, scales, of_tokens, self.page_ids, *where[1:], *how)
        return Told(bounds, scales, of_tokens, token_ids, self.attend(token_ids))

    def attend(self, token_ids):
        """Over these tokens, in float32, of rows that have some."""
        # And a slot behind them, which is read where a row has no token.
        stored = (torch.nn.functional.pad(each.float(), (0, 0, 0, 1)) for each in (self.keys, self.values))
        return reference.attend(self.query.float(), *stored, token_ids, self.length, self.padding, 1, self.case.scaling)

    def by_kernels(self, program):
        case = self.case
        parts = [struct.pack("14i", *(getattr(case, field.name) for field in fields(case)))]
        parts.append(struct.pack(f"f{1 + len(self.steps)}i", case.scaling, len(self.steps), *self.steps))
        for tensor in (self.padding, self.keys, self.values, self.query, self.scores):
            parts.append(tensor.view(torch.uint8).numpy().tobytes())
        result = subprocess.run([program], input=b"".join(parts), capture_output=True)
        assert result.returncode == 0, result.stderr.decode()
        rest = torch.frombuffer(bytearray(result.stdout), dtype=torch.uint8)

        def take(like):
            nonlocal rest
            taken, rest = rest[: like.nbytes], rest[like.nbytes :]
            return taken.clone().view(like.dtype).view(like.shape)

        bounds, scales, of_tokens = self.tensors()
        told = [take(bounds), None if scales is None else take(scales), take(of_tokens)]
        assert torch.equal(take(self.page_ids), self.page_ids)
        token_ids = take(torch.empty(*self.shape, 1, case.num_tokens, dtype=torch.int64))
        shape = (*self.shape, case.group_size, self.page_ids[0, 0].numel(), case.page_size)
        logits = take(torch.empty(*shape, dtype=torch.float32))
        output = take(torch.empty_like(self.query))
        assert len(rest) == 0
        return Told(*told, token_ids, output, logits)

    def full_pages(self):
        """Of every row and head its own, and which pages are full."""
        for row in range(self.case.num_rows):
            for head in range(self.case.num_kv_heads):
                yield row, head, (self.length - int(self.padding[row])) // self.case.page_size

    def logits(self, told):
        """[B, Hkv, G, C, S] float64, of what the codes of the candidates stand for, NaN where there are none."""
        case = self.case
        shape = (*self.shape, case.group_size, self.page_ids[0, 0].numel(), case.page_size)
        logits = torch.full(shape, torch.nan, dtype=torch.float64)
        for row, head, _ in self.full_pages():
            query = self.query[row, head * case.group_size :][: case.group_size, 0].double()
            for place, page in enumerate(self.page_ids[row, head].flatten().tolist()):
                if page < 0:
                    continue
                scales = None if told.scales is None else told.scales[row, head, page]
                grid = codes.grid(told.bounds[row, head, page], scales, case.code_bits)
                start = int(self.padding[row]) + page * case.page_size
                keys = codes.decode(told.codes[row, head, start : start + case.page_size], *grid, case.code_bits)
                logits[row, head, :, place] = query @ keys.double().T * case.scaling
        return logits


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build_program("step_on_cpu", tmp_path_factory, ["append.cu", "refine.cu", "attend.cu"])


def check(step, program):
    told, expected = step.by_kernels(program), step.by_specification()
    case = step.case
    for row, head, num_full in step.full_pages():
        padding = int(step.padding[row])
        assert torch.equal(told.bounds[row, head, :num_full], expected.bounds[row, head, :num_full])
        if case.has_scales:
            assert torch.equal(told.scales[row, head, :num_full], expected.scales[row, head, :num_full])
        slots = slice(padding, padding + num_full * case.page_size)
        assert torch.equal(told.codes[row, head, slots], expected.codes[row, head, slots])
    of_codes = step.logits(told)
    there = ~of_codes.isnan()
    # Weights lose 2^-21 of the largest, which is no more than a few times the largest logit; float32 loses less.
    torch.testing.assert_close(told.logits[there].double(), of_codes[there], rtol=0, atol=2e-5)
    assert torch.equal(reference.in_order(told.token_ids), expected.token_ids)
    has_tokens = (step.length > step.padding).nonzero().flatten()
    # Weights are rounded to the dtype of the values, and the sum as well.
    rounding = torch.finfo(case.dtype).eps
    torch.testing.assert_close(
        told.output[has_tokens].float(), expected.output[has_tokens], rtol=2 * rounding, atol=2 * rounding
    )
    return told


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_is_that_of_the_specification(program, case):
    check(Step(case, (0, 5)[: case.num_rows]), program)


@pytest.mark.parametrize("length", [1, 16, 17, 47, 48, 49, 97])
def test_short_rows_are_taken_whole(program, length):
    told = check(Step(Case(num_stored=length), steps=[length]), program)
    if length <= 48:
        assert told.token_ids.flatten().tolist() == [*range(length), *[-1] * (48 - length)]


def test_a_row_of_padding_alone_has_no_tokens(program):
    told = check(Step(Case(num_rows=2, num_stored=120), (0, 120)), program)
    assert (told.token_ids[1] == -1).all()


def test_tokens_that_come_one_by_one_have_the_codes_of_those_that_come_together(program):
    check(Step(Case(num_stored=37), steps=[5, *[1] * 27, 4, 1]), program)


def test_equal_keys_are_taken_from_the_first_on(program):
    step = Step(Case())
    step.keys[:] = step.keys[:, :, :1]
    told = check(step, program)
    chosen = told.token_ids[0, 0, 0, :32].tolist()
    for stripe, candidates in enumerate(step.page_ids[0, 0, 0].tolist()):
        own = [token for token in chosen if token // 16 % 4 == stripe]
        of_candidates = [16 * page + idx for page in candidates if page >= 0 for idx in range(16)]
        assert own == of_candidates[: len(own)]
        assert len(own) in (6, 8, 9)  # of two pages or three
