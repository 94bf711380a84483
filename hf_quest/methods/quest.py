"""Quest: the pages whose bounds say that they may matter most to the query (arXiv 2406.10774)."""

import math
from dataclasses import dataclass

import torch

from .. import reference, stripes
from ..codes import BITS, find_candidates, refine, refresh_codes
from ..kernels import cpu, native, ops
from ..reference import Choice, Score
from .base import Method, is_int

# How the query heads of a KV head agree on tokens, whatever the pages are found by: by the attention that a token would
# get from all of them.
TOKEN_GROUP = "sum"
POOL = 4  # times as many tokens as a step attends, see docs/offloading.md for how many of them are then there


class Chain:
    """Quest's stages in one operator, where the CUDA kernels serve a layer."""

    @staticmethod
    def attend(method, pages, query, length, logits, ids):
        """Attention [B, Hq, 1, D] of one query per row in the slots before `length`, [1] int64.

        Args:
            ids: [B, Hkv, 1, K] int64, mutated to what was chosen, of `method.choice_shape`, or None.
        """
        # Not by `ops`, whose checks would tell of the storage's own tensors at every step.
        stored = (pages.keys, pages.values, pages.beside["bounds"], pages.beside.get("scales"))
        where = (length, pages.padding, method.num_found, pages.page_size)
        pool = () if pages.pool is None else pages.pool.tensors()
        by_codes = (pages.beside["codes"], method.num_attended, TOKEN_GROUP, *pool) if method.codes else ()
        return torch.ops.hf_quest.chain(query, *stored, *where, *logits, ids, *method.score, *by_codes)

    @staticmethod
    def step(method, pages, layer_idx, logits, reads_all, query, new, length):
        """A whole decode step of a layer in a graph: store the key and value `new`, or none, as the last in the slots
        before `length`, [1] int64, and attend.

        With `reads_all` everything, as a dense layer does.
        """
        on_device = pages.on_device
        where = (on_device.addresses, length, on_device.padding, layer_idx, pages.num_kv_heads)
        num_found = 0 if reads_all else method.num_found
        # A dense layer has none.
        has_pool = pages.pool is not None
        by_codes = (method.codes, method.num_attended, TOKEN_GROUP, has_pool) if "codes" in pages.beside else ()
        new = new or (None, None)
        return ops.decode(query, *new, *where, num_found, pages.page_size, *logits, method.score, *by_codes)


@dataclass(frozen=True)
class Quest(Method):
    """The newest page, the first, and those of the highest scores by the bounds of their keys; whole pages are read.

    Args:
        budget: tokens, rounded up to whole pages, at least two pages.
        page_size, score, bounds_dtype, codes, candidates, mass: see `QuestCache`.
    """

    page_size: int = 16
    score: Score = reference.DEFAULT
    bounds_dtype: torch.dtype | None = torch.int8
    codes: int | None = None
    candidates: int | None = 8
    mass: float | None = None

    @property
    def fused(self):
        """The kernels, which have no code of a whole cache, nor of any number of bits, nor on bounds in 16, nor stop at
        a share of the mass.
        """
        is_served = self.codes in ops.CODE_BITS and self.candidates is not None and self.bounds_dtype is torch.int8
        is_served = is_served and self.mass is None
        return Chain if self.codes is None or is_served else None

    def __post_init__(self):
        if not is_int(self.page_size) or self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise ValueError(
                f"page_size is a number of tokens and a power of two (16 in the paper), not {self.page_size!r}."
            )
        if self.bounds_dtype not in (torch.int8, None):
            raise ValueError(
                f"bounds_dtype is torch.int8, or None for the dtype of the keys, not {self.bounds_dtype!r}."
            )
        if not is_int(self.budget) or self.budget < 2 * self.page_size:
            raise ValueError(
                f"budget is a number of tokens and at least two pages, {2 * self.page_size} tokens with "
                f"page_size={self.page_size}: the newest page and one more. It is {self.budget!r}."
            )
        if not 0 <= self.score.width <= 1 or self.score.group not in reference.GROUPS:
            raise ValueError(
                f"A Score has a width from 0 to 1 and a group of {reference.GROUPS}, unlike {self.score!r}."
            )
        self.check_codes()

    def check_codes(self):
        if self.codes is not None and (not is_int(self.codes) or self.codes not in BITS):
            raise ValueError(f"codes is a number of bits per channel, one of {BITS}, or None, not {self.codes!r}.")
        if self.candidates is not None and (not is_int(self.candidates) or self.candidates < 1):
            raise ValueError(
                "candidates says how many times the budget's pages are looked at by their codes, 1 or more, or None "
                f"for all pages, not {self.candidates!r}."
            )
        if self.mass is None:
            return
        if self.codes is None:
            raise ValueError("mass is a share of what tokens get by their codes: QuestCache(codes=2, mass=0.95).")
        if not isinstance(self.mass, float) or not 0 < self.mass < 1:
            raise ValueError(
                "mass is the share of the estimated attention for which a step attends tokens, above 0 and below 1, "
                f"or None for all of the budget, not {self.mass!r}."
            )

    @property
    def num_selected(self) -> int:
        """K: pages that a decode step attends per KV head, the budget in whole pages."""
        return -(-self.budget // self.page_size)

    @property
    def num_candidates(self) -> float:
        """Pages whose tokens are looked at by their codes."""
        return math.inf if self.candidates is None else self.candidates * self.num_selected

    @property
    def num_found(self) -> float:
        """Pages that a decode step finds by their bounds."""
        return self.num_candidates if self.codes else self.num_selected

    @property
    def num_attended(self):
        return self.num_selected * self.page_size

    @property
    def num_stripes(self):
        return stripes.count(self.num_attended, self.page_size)

    @property
    def num_pooled(self):
        return POOL * self.num_attended if self.codes and self.fused else 0

    @property
    def choice_shape(self) -> tuple[int, int]:
        """How many ids a step chooses per KV head, and how many tokens are of one."""
        return (self.num_attended, 1) if self.codes else (self.num_selected, self.page_size)

    def beside_tokens(self, head_dim, dtype):
        return {} if self.codes is None else {"codes": ((-(-head_dim * self.codes // 8),), torch.uint8)}

    def beside_pages(self, head_dim, dtype):
        if self.bounds_dtype is None:
            return {"bounds": ((2, head_dim), dtype)}
        num_scales = -(-head_dim // reference.SCALE_BLOCK)
        return {"bounds": ((2, head_dim), self.bounds_dtype), "scales": ((num_scales,), torch.uint8)}

    def stored(self, pages, num_new, length):
        # The newest page is chosen whatever its bounds: on a CPU those of a page wait until it is full.
        may_wait = num_new == 1 and isinstance(length, int) and is_on_cpu(pages)
        if not may_wait or any((length - padding) % self.page_size == 0 for padding in pages.left_padding):
            self.refresh(pages, num_new, length)

    def catch_up(self, pages):
        if is_on_cpu(pages):
            with torch.inference_mode():  # in which a copy may have been made
                self.refresh(pages, 1, pages.length)

    def refresh(self, pages, num_new, length):
        """Bring bounds and codes of the newest tokens' pages up to date."""
        bounds = (pages.beside["bounds"], pages.beside.get("scales"))
        where = (num_new, length, pages.padding, self.page_size)
        is_full = (
            num_new == 1 and isinstance(length, int) and not length % self.page_size and not any(pages.left_padding)
        )
        if is_full and bounds[1] is not None and native.serves(pages.keys, pages.keys, pages.keys):
            native.bound(pages.keys, *bounds, length // self.page_size - 1, self.page_size)
        else:
            reference.refresh_bounds(pages.keys, *bounds, *where)
        if self.codes is not None:
            refresh_codes(pages.keys, *bounds, pages.beside["codes"], *where, self.codes)

    def choose(self, pages, query, logits, length):
        if self.codes is None and cpu.serves(query, length, pages.left_padding):
            return Choice(self.choose_on_cpu(pages, query.detach(), logits.scaling, length), self.page_size)
        num_pages = pages.num_pages(length) if isinstance(length, int) else None  # a graph looks at all
        bounds = [pages.beside["bounds"][:, :, :num_pages], pages.beside.get("scales")]
        bounds[1] = None if bounds[1] is None else bounds[1][:, :, :num_pages]
        where = (length, pages.padding, self.page_size)
        scores = reference.estimate(query, *bounds, logits.scaling, self.score, where)
        where_found = (*where[:2], self.num_found, self.page_size, self.score.keeps_first)
        if self.codes is None:
            return Choice(reference.select(scores, *where_found), self.page_size)
        how = (self.codes, logits.scaling, self.num_attended, TOKEN_GROUP, self.mass)
        candidates = find_candidates(scores, *where_found, self.num_stripes)
        return Choice(refine(query, *bounds, pages.beside["codes"], candidates, *where, *how), 1)

    def choose_on_cpu(self, pages, query, scaling, length):
        """Page ids [B, Hkv, 1, K] for one query per row, in rows without padding."""
        num_pages, how = pages.num_pages(length), (self.num_selected, self.score.keeps_first)
        is_largest = self.score.group == "max" or query.shape[1] == pages.num_kv_heads
        if is_largest and native.serves(query, pages.keys, pages.values):
            bounds = (pages.beside["bounds"], pages.beside.get("scales"))
            return native.select(native.estimate(query, *bounds, num_pages, scaling, self.score.width), *how)
        bounds = pages.widened.of(pages)[..., :num_pages]
        return cpu.select(cpu.estimate(query, bounds, scaling, self.score), *how)

    def read_beside(self, pages):
        if self.codes is None:
            return super().read_beside(pages)
        of_pages = sum(pages.beside[name][0, 0, 0].nbytes for name in ("bounds", "scales") if name in pages.beside)
        num_earlier = torch.tensor(pages.num_pages(pages.length) - 1, device="cpu")
        num_found = num_earlier.clamp(max=self.num_candidates - 1)
        num_candidates = stripes.shares_of_pages(num_found, num_earlier, self.num_stripes).sum()
        of_codes = int(num_candidates) * self.page_size * pages.beside["codes"][0, 0, 0].nbytes
        return pages.num_pages(pages.length) * of_pages + of_codes


def is_on_cpu(pages):
    """Whether the stages run on a CPU, wherever the tokens are for the time being."""
    return pages.device.type == "cpu" and not pages.has_kernels


def score_named(score) -> Score:
    """The `reference.Score` that `score` names or is."""
    found = reference.SCORES.get(score) if isinstance(score, str) else score
    if not isinstance(found, Score):
        names = ", ".join(map(repr, reference.SCORES))
        raise ValueError(f"score is one of {names} or a hf_quest.reference.Score, not {score!r}.")
    return found
