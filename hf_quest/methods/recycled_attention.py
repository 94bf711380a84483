"""Recycled Attention: full attention now and then, in between the tokens that it weighed most (arXiv 2411.05787)."""

from dataclasses import dataclass

import torch

from ..reference import in_order
from .base import is_int
from .remembering import (
    Remembering,
    best,
    check_similarity,
    ids_between,
    or_everything,
    recall,
    renew,
    row_lengths,
    similarity_of,
    weights_of,
)


@dataclass(frozen=True)
class RecycledAttention(Remembering):
    """Recycled Attention, later RefreshKV (arXiv 2411.05787), written from the description of its authors, who
    published no code.

    A full step attends every token. It selects, for each KV head, the tokens with the largest attention weight of any
    of its query heads. The steps after it attend these and all tokens since. A step is full when `stride` tokens have
    come since the last full step, when the query has moved too far from that of the last full step, and when nothing is
    selected yet: so the first step beyond the budget is full. The paper selects for it by the prompt's last query.

    The budget includes the tokens since the full step: `budget - stride + 1` are selected. The paper counts those
    tokens in addition. Which defaults it uses could not be found. Those here are ours: on the model inside `stride`
    alone loses answers of a few tokens, since their steps fall between two full ones.

    Args:
        budget: tokens that each KV head attends in a step that is not full; `stride` or more.
        stride: tokens from one full step to the next.
        similarity: the least cosine of a query with that of the last full step, after the rotary embedding and on
            average over the query heads of a layer; a step with less is full. None: only `stride` counts.
    """

    stride: int = 16
    similarity: float | None = 0.7

    def __post_init__(self):
        if not is_int(self.stride) or self.stride < 1:
            raise ValueError(f"stride is a number of tokens, 1 or more, not {self.stride!r}.")
        check_similarity(self.similarity)
        super().__post_init__()
        if self.budget < self.stride:
            raise ValueError(
                f"budget of RecycledAttentionCache includes the tokens since the last full step, up to stride="
                f"{self.stride}, so it cannot be {self.budget!r}. Give a larger budget or a smaller stride."
            )

    @property
    def num_kept(self) -> int:
        """Tokens that a full step selects."""
        return self.budget - self.stride + 1

    def choose_next(self, pages, query, logits, length):
        num_tokens, last = row_lengths(pages, length), recall(pages, query, length, self.num_kept)
        is_full = (last.num_tokens == 0) | (num_tokens - last.num_tokens >= self.stride)
        if self.similarity is not None:
            is_full = is_full | (similarity_of(query, last.query) < self.similarity)
        is_small = num_tokens <= self.budget
        is_new = is_full & ~is_small
        if bool(is_new.any()):
            is_token = torch.arange(length, device=query.device) < num_tokens[:, None, None]
            ids = best(weights_of(pages, query, logits, length).amax(dim=2), is_token, self.num_kept)
            last = renew(pages, length, is_new, last, ids, query)
        since = ids_between(pages, last.num_tokens, num_tokens, self.stride - 1)
        return or_everything(pages, length, is_full | is_small, in_order(torch.cat([last.ids, since], dim=2)))
