"""Quest: the pages whose bounds say that they may matter most to the query (arXiv 2406.10774)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .. import reference
from ..kernels import ops
from ..reference import Choice, Score
from .base import Method, is_int


class Chain:
    """Quest's stages in one operator, where the CUDA kernels serve a layer."""

    @staticmethod
    def attend(method, pages, query, length, logits, page_ids):
        """Attention [B, Hq, 1, D] of one query per row in the slots before `length`, [1] int64.

        Args:
            page_ids: [B, Hkv, 1, K] int64, mutated to what was selected, or None.
        """
        # Not by `ops`, whose checks would tell of the storage's own tensors at every step.
        stored = (pages.keys, pages.values, pages.beside["bounds"], pages.beside.get("scales"))
        where = (length, pages.padding, method.num_selected, pages.page_size)
        return torch.ops.hf_quest.chain(query, *stored, *where, *logits, page_ids, *method.score)

    @staticmethod
    def step(method, pages, layer_idx, query, new, logits, reads_all):
        """A whole decode step of a layer in a graph: store the key and value `new`, or none, and attend.

        With `reads_all` everything, as a dense layer does.
        """
        on_device = pages.on_device
        where = (on_device.addresses, on_device.length, on_device.padding, layer_idx, pages.num_kv_heads)
        num_selected = 0 if reads_all else method.num_selected
        return ops.decode(query, *(new or (None, None)), *where, num_selected, pages.page_size, *logits, method.score)


@dataclass(frozen=True)
class Quest(Method):
    """The newest page, the first, and those of the highest scores by the bounds of their keys; whole pages are read.

    Args:
        budget: tokens, rounded up to whole pages, at least two pages.
        page_size, score, bounds_dtype: see `QuestCache`.
    """

    page_size: int = 16
    score: Score = reference.DEFAULT
    bounds_dtype: torch.dtype | None = torch.int8

    fused: ClassVar[Any] = Chain

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

    @property
    def num_selected(self) -> int:
        """K: pages that a decode step attends per KV head, the budget in whole pages."""
        return -(-self.budget // self.page_size)

    @property
    def num_attended(self):
        return self.num_selected * self.page_size

    def beside_pages(self, head_dim, dtype):
        if self.bounds_dtype is None:
            return {"bounds": ((2, head_dim), dtype)}
        num_scales = -(-head_dim // reference.SCALE_BLOCK)
        return {"bounds": ((2, head_dim), self.bounds_dtype), "scales": ((num_scales,), torch.uint8)}

    def stored(self, pages, num_new, length):
        bounds = (pages.beside["bounds"], pages.beside.get("scales"))
        reference.refresh_bounds(pages.keys, *bounds, num_new, length, pages.padding, self.page_size)

    def choose(self, pages, query, logits, length):
        num_pages = pages.num_pages(length) if isinstance(length, int) else None  # a graph looks at all
        bounds = [pages.beside["bounds"][:, :, :num_pages], pages.beside.get("scales")]
        bounds[1] = None if bounds[1] is None else bounds[1][:, :, :num_pages]
        where = (length, pages.padding, self.page_size)
        scores = reference.estimate(query, *bounds, logits.scaling, self.score, where)
        ids = reference.select(scores, *where[:2], self.num_selected, self.page_size, self.score.keeps_first)
        return Choice(ids, self.page_size)


def score_named(score) -> Score:
    """The `reference.Score` that `score` names or is."""
    found = reference.SCORES.get(score) if isinstance(score, str) else score
    if not isinstance(found, Score):
        names = ", ".join(map(repr, reference.SCORES))
        raise ValueError(f"score is one of {names} or a hf_quest.reference.Score, not {score!r}.")
    return found
