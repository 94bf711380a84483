"""What the methods have in common that choose tokens by what they chose before."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..reference import INT64, Choice, in_order, order_of
from .base import Attended, Method
from .weights import attention_weights


class Selection(NamedTuple):
    """What was selected for each row at an earlier step, and is remembered."""

    ids: torch.Tensor  # [B, Hkv, K] int64, tokens of the row, ascending, -1 for none
    num_tokens: torch.Tensor  # [B] int64, of the row at that step; 0: there was none
    query: torch.Tensor  # [B, Hq, 1, D] float32, of that step


@dataclass(frozen=True)
class Remembering(Method):
    """A method that remembers a Selection. Every query chooses after the one before it has.

    A row that has no more tokens than the budget attends all of them, and nothing is remembered of it.
    """

    @torch.no_grad()
    def choose(self, pages, query, logits, length):
        num_queries = query.shape[2]
        first = length - num_queries + 1
        chosen = [self.choose_next(pages, query[:, :, i : i + 1], logits, first + i) for i in range(num_queries)]
        if num_queries == 1 and chosen[0] is None:
            return None
        chosen = [everything(pages, first + i) if ids is None else ids for i, ids in enumerate(chosen)]
        most = max(ids.shape[2] for ids in chosen)
        return Choice(torch.stack([padded(ids, most) for ids in chosen], dim=2), size=1)

    def read_to_choose(self, pages, length):
        """What is remembered: ids and a query, or clusters."""
        remembered = pages.memory.recall(length + 1)
        return sum(tensor.nbytes for tensor in remembered.values()) / pages.keys[:, :, 0, 0].numel()

    def choose_next(self, pages, query, logits, length: int) -> torch.Tensor | None:
        """Ids [B, Hkv, K] of what one query per row, [B, Hq, 1, D], attends, the last of `length`; None for all."""
        raise NotImplementedError


def recall(pages, query, length, num_kept) -> Selection:
    """The Selection of `num_kept` tokens that is remembered from before the last of `length` tokens; or none."""
    selection = pages.memory.recall(length)
    if selection and selection["ids"].shape[2] == num_kept:  # and not that of another budget
        return Selection(**selection)
    ids = torch.full((*pages.keys.shape[:2], num_kept), -1, device=query.device)
    return Selection(ids, torch.zeros_like(pages.padding), torch.zeros_like(query, dtype=torch.float32))


def renew(pages, length, is_new, earlier, ids, query) -> Selection:
    """Remember for the rows [B] `is_new` other `ids`, selected by `query` at the last of `length` tokens."""
    new = Selection(ids, row_lengths(pages, length), query.float())
    selection = Selection(*(per_row(is_new, *pair) for pair in zip(new, earlier, strict=True)))
    pages.memory.remember(length, **selection._asdict())
    return selection


def row_lengths(pages, length):
    """[B] int64: the tokens of each row."""
    return length - pages.padding


def everything(pages, length):
    """Ids [B, Hkv, N] of all tokens of each row."""
    return ids_between(pages, torch.zeros_like(pages.padding), row_lengths(pages, length), length)


def ids_between(pages, start, end, most):
    """Ids [B, Hkv, most] of the tokens `start` to `end - 1` of each row, both [B], of no more than `most`."""
    ids = start[:, None] + torch.arange(most, device=start.device)
    return ids.masked_fill(ids >= end[:, None], -1)[:, None].expand(-1, pages.keys.shape[1], -1)


def or_everything(pages, length, is_all, ids):
    """Ids as they are, but all tokens for the rows [B] `is_all`; None if that is every row."""
    if bool(is_all.all()):
        return None
    if not bool(is_all.any()):
        return ids
    every = everything(pages, length)
    most = max(every.shape[2], ids.shape[2])
    return per_row(is_all, padded(every, most), padded(ids, most))


def weights_of(pages, query, logits, length):
    """[B, Hkv, G, N] float32: the attention weights of one query per row, from each row's first token on.

    What is beyond a row's last token means nothing.
    """
    is_token = torch.arange(length, device=query.device) >= pages.padding[:, None, None, None]
    (weights,) = attention_weights(pages.keys[:, :, :length], Attended(query, is_token, None, logits))
    weights = weights[:, :, :, 0]
    return pages.aligned(weights.flatten(1, 2)).view(weights.shape)


def best(scores, is_candidate, num_kept):
    """Ids [B, H, num_kept], ascending, -1 for none: the candidates [B, 1, N] of the highest scores [B, H, N], of equal
    ones the first.
    """
    token = torch.arange(scores.shape[-1], device=scores.device)
    rank = (order_of(scores) - token).masked_fill(~is_candidate, INT64.min)
    best = rank.topk(min(num_kept, len(token)), dim=-1)
    return padded(in_order(best.indices.masked_fill(best.values == INT64.min, -1)), num_kept)


def padded(ids, num_ids):
    return F.pad(ids, (0, num_ids - ids.shape[-1]), value=-1)


def similarity_of(query, other):
    """[B] float32: the cosine of the queries [B, Hq, 1, D] of all heads with others, mean over the heads."""
    return F.cosine_similarity(query.float(), other, dim=-1).mean(dim=(1, 2))


def check_similarity(similarity):
    is_number = isinstance(similarity, (int, float)) and not isinstance(similarity, bool)
    if similarity is not None and not (is_number and -1 <= similarity <= 1):
        raise ValueError(f"similarity is a cosine, from -1 to 1, or None, not {similarity!r}.")


def per_row(is_so, tensor, other):
    """`torch.where` by row: `tensor` where [B] `is_so`, else `other`."""
    return torch.where(is_so.view(-1, *(1,) * (tensor.dim() - 1)), tensor, other)
