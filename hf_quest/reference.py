"""The four stages of Quest in plain PyTorch: their specification, and the path for every device without kernels.

Letters in shapes, here and everywhere in this package:

    B    rows of the batch            N    tokens stored per row, padding included
    Hq   query heads                  S    tokens in a page (page_size)
    Hkv  key/value heads              P    pages that hold the N tokens
    G    Hq / Hkv, heads in a group   K    pages that a query attends
    T    new tokens, one query each   D    head dim

A row's tokens are contiguous in its `capacity` slots, and page `p` of row `b` starts at slot `padding[b] + p * S`, so a
left-padded row has the pages that it would have alone. Query `t` of `T` is the token in slot `length - T + t`, where
`length` counts the filled slots; it sees itself and what is before it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .rounding import SCALE_BLOCK, from_8_bits, to_8_bits

__all__ = ["SCALE_BLOCK", "from_8_bits", "to_8_bits"]  # of `rounding`, which belongs to the specification

INT64 = torch.iinfo(torch.int64)
Length = int | Tensor  # slots filled: in a captured graph, which outlives it, [1] int64 on the device
LARGEST_SCORE = 1e30  # what infinite scores, and those that are not numbers, count as in a softmax


class Score(NamedTuple):
    """How pages are scored, and whether a row's first page is one of those that need no score."""

    width: float  # share of the half width of a page's bounds that counts, 0 to 1: with 1 the score is an upper bound
    keeps_first: bool  # the first page, where attention sinks are, is selected as the newest is
    group: str  # how the query heads of a KV head agree, see reduce_group: "max", "sum" or "share"


class Logits(NamedTuple):
    """What a model makes of q·k before the softmax; the last arguments of `attend`."""

    scaling: float
    softcap: float | None = None  # logits become softcap·tanh(logit / softcap) (Gemma 2)
    sinks: Tensor | None = None  # [Hq], a logit per head that takes part and has no value (GPT-OSS)


class Choice(NamedTuple):
    """What queries attend: the third argument of `attend` and its `page_size`."""

    ids: Tensor  # [B, Hkv, T, K] int64, ascending, -1 for none
    size: int  # tokens that an id stands for: those of a page, or 1


PUBLISHED = Score(width=1.0, keeps_first=False, group="max")  # Quest, section 3.3
GROUPS = ("max", "sum", "share")
# What loses least on pretrained models of what costs a step nothing more.
DEFAULT = Score(width=0.5, keeps_first=True, group="max")
SCORES = {"default": DEFAULT, "published": PUBLISHED}  # by the names that a QuestCache knows


def append(
    keys: Tensor,
    values: Tensor,
    bounds: Tensor | None,
    scales: Tensor | None,
    new_keys: Tensor,
    new_values: Tensor,
    length: Length,
    padding: Tensor,
    page_size: int,
) -> None:
    """Store the keys and values of the newest tokens and bring the bounds of their pages up to date.

    Args:
        keys, values: [B, Hkv, capacity, D], mutated in the slots `length - T` to `length - 1`.
        bounds: [B, Hkv, capacity / S, 2, D], minimum and maximum over the page's tokens of every channel of the keys
            (Quest, section 3.3); mutated in the pages that the new tokens fall in. None in a layer that needs none.
        scales: [B, Hkv, capacity / S, D / 32] uint8, D / 32 rounded up, mutated with `bounds`, which are int8 then; see
            `to_8_bits`. None for bounds in the dtype of the keys.
        new_keys, new_values: [B, Hkv, T, D], keys after the rotary embedding.
        length: slots filled, the new tokens' included: an int, or in a captured graph, which outlives it, [1] int64.
        padding: [B] int64, slots at the start of each row that hold no token.
    """
    num_new = new_keys.shape[2]
    slot = torch.arange(num_new, device=keys.device) + (length - num_new)
    keys.index_copy_(2, slot, new_keys)
    values.index_copy_(2, slot, new_values)
    if bounds is not None:
        refresh_bounds(keys, bounds, scales, num_new, length, padding, page_size)


def refresh_bounds(
    keys: Tensor,
    bounds: Tensor,
    scales: Tensor | None,
    num_new: int,
    length: Length,
    padding: Tensor,
    page_size: int,
) -> None:
    """Compute again, from the keys stored in the first `length` slots, the bounds of the pages of the newest `num_new`.

    A minimum cannot be un-merged, so what shortens a page (a crop, a rejected draft) calls this too. A page without a
    token gets no bounds. `bounds` and `scales` are mutated; shapes as in `append`.
    """
    if num_new <= 0:
        return
    device = keys.device
    batch = torch.arange(keys.shape[0], device=device)[:, None]
    num_touched = (num_new + page_size - 2) // page_size + 1
    first, newest = length - num_new, length - 1
    newest_page = ((newest - padding) // page_size).clamp(min=0)[:, None]
    # Rows are cut into pages at different slots. A row with fewer pages to do does its newest one several times.
    first_page = (first - padding).clamp(min=0)[:, None] // page_size
    page_idx = torch.minimum(first_page + torch.arange(num_touched, device=device), newest_page)
    slot = (padding[:, None] + page_idx * page_size)[..., None] + torch.arange(page_size, device=device)
    is_token = slot <= newest
    page_keys = keys[batch[..., None], :, slot.clamp(max=newest)]  # [B, pages, S, Hkv, D]
    is_empty = ~is_token[..., None, None]
    lowest = page_keys.masked_fill(is_empty, torch.inf).amin(dim=2)
    highest = page_keys.masked_fill(is_empty, -torch.inf).amax(dim=2)
    extremes = torch.stack([lowest, highest], dim=3)
    if scales is None:
        bounds[batch, :, page_idx] = extremes
    else:
        bounds[batch, :, page_idx], scales[batch, :, page_idx] = to_8_bits(extremes)


def estimate(
    query: Tensor,
    bounds: Tensor,
    scales: Tensor | None,
    scaling: float,
    score: Score = PUBLISHED,
    where: tuple[Length, Tensor, int] | None = None,
) -> Tensor:
    """Score every page by its bounds: an upper bound of the attention logit of any key in it (Quest, section 3.3,
    algorithm 1), or something below that, which says more about the keys.

    The bound of q·k over a page is Σ_d max(q_d·min_d, q_d·max_d): the minimum counts where q_d is negative, the
    maximum where it is positive, which makes it one product of [min(q, 0), max(q, 0)] with [min, max]. That is
    q·middle + Σ_d |q_d|·half width, of which `score.width` says how much of the second term counts. A part w of it
    makes (1 + w) / 2 of what was the whole weight of an extreme, and gives the other extreme (1 - w) / 2 of it.

    Args:
        query: [B, Hq, T, D].
        bounds: [B, Hkv, P, 2, D]. scales: [B, Hkv, P, D / 32] or None, as in `append`.
        scaling: float, what the model multiplies q·k with.
        where: (length, padding, page_size), as in `select`, by which shares know a query's newest page.

    Returns:
        [B, Hkv, T, P] float32, one score per KV head, on which the query heads that share it agree. Those of a query's
        newest page and later ones mean nothing.
    """
    batch_size, _, num_queries, head_dim = query.shape
    num_kv_heads, num_pages = bounds.shape[1:3]
    query = query.float()
    negative, positive = query.clamp(max=0), query.clamp(min=0)
    if score.width != 1:
        outer, inner = (1 + score.width) / 2, (1 - score.width) / 2
        negative, positive = outer * negative + inner * positive, outer * positive + inner * negative
    weights = torch.cat([negative, positive], dim=-1).view(batch_size, num_kv_heads, -1, 2 * head_dim)
    bounds = bounds.float() if scales is None else from_8_bits(bounds, scales)
    scores = weights @ bounds.flatten(3).transpose(-1, -2)
    scores = scores.view(batch_size, num_kv_heads, -1, num_queries, num_pages)
    if score.group == "max" or scores.shape[2] == 1:
        return reduce_group(scores, score.group) * scaling
    assert where is not None, "by shares a query's newest page has to be known"
    page_idx = torch.arange(num_pages, device=scores.device)
    is_later = page_idx >= newest_page(num_queries, *where)[:, None, None, :, None]
    return reduce_group(scores * scaling, score.group, is_later)


def reduce_group(scores: Tensor, group: str, is_later: Tensor | None = None) -> Tensor:
    """[B, Hkv, G, T, P] to [B, Hkv, T, P]: how the query heads that share a KV head agree on its pages.

    By their largest score (`max`), so that a page that one head needs is read for all; or by shares, each head's
    softmax over the pages that are not `is_later`, of which a page gets the sum (`sum`), about the attention that it
    would be paid by all, or the largest (`share`). A single head's softmax has the order of its scores, which are left
    as they are.
    """
    if group == "max" or scores.shape[2] == 1:
        return scores.amax(dim=2)
    # What is not finite is chosen first, and takes nothing from the others' order among themselves but the weight.
    scores = scores.nan_to_num(torch.inf).clamp(-LARGEST_SCORE, LARGEST_SCORE)
    if is_later is not None:
        scores = scores.masked_fill(is_later, -torch.inf)
    shares = scores.softmax(dim=-1)
    return shares.sum(dim=2) if group == "sum" else shares.amax(dim=2)


def select(
    scores: Tensor,
    length: Length,
    padding: Tensor,
    num_selected: int,
    page_size: int,
    keeps_first: bool = False,
) -> Tensor:
    """Choose, for every query, its newest page and the highest-scoring earlier ones (Quest, section 3.3).

    Args:
        scores: [B, Hkv, T, P] float32.
        length: slots filled, the queries' own included, as in `append`.
        padding: [B] int64.
        num_selected: K, pages to choose, the newest one included. Equal scores resolve to the lower page index.
        keeps_first: whether the row's first page is chosen whatever its score, if K is 2 or more.

    Returns:
        [B, Hkv, T, K] int64 page ids, ascending; -1 fills up where a query has fewer than K pages.
    """
    page_idx = torch.arange(scores.shape[-1], device=scores.device)
    newest = newest_page(scores.shape[2], length, padding, page_size)[:, None, :, None]
    rank = order_of(scores) - page_idx
    if keeps_first:
        rank = rank.masked_fill(page_idx == 0, INT64.max - 1)
    rank = rank.masked_fill(page_idx == newest, INT64.max).masked_fill(page_idx > newest, INT64.min)
    page_ids = rank.topk(min(num_selected, len(page_idx)), dim=-1).indices
    page_ids = in_order(page_ids.masked_fill(page_ids > newest, -1))
    return F.pad(page_ids, (0, num_selected - page_ids.shape[-1]), value=-1)


def in_order(ids: Tensor) -> Tensor:
    """Ids [..., K] ascending, -1 last."""
    ids = ids.masked_fill(ids < 0, INT64.max).sort(dim=-1).values
    return ids.masked_fill(ids == INT64.max, -1)


def order_of(scores: Tensor) -> Tensor:
    """int64 numbers in the order of the float32 `scores`, at least 2^32 apart where those differ."""
    bits = (scores + 0.0).view(torch.int32).long()  # -0.0 + 0.0 is 0.0, and they are equal scores
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    page_ids: Tensor | None,
    length: Length,
    padding: Tensor,
    page_size: int,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Exact softmax attention of every query over the tokens of its pages; no other slot is read.

    Args:
        query: [B, Hq, T, D].
        keys, values: [B, Hkv, capacity, D].
        page_ids: [B, Hkv, T, K] int64, -1 for none; None for every page, which is dense attention.
        length, padding: as in `select`.
        scaling: float, multiplies q·k.
        softcap: float, logits become softcap·tanh(logit / softcap) (Gemma 2).
        sinks: [Hq], a logit per head that takes part in the softmax and has no value (GPT-OSS).

    Returns:
        [B, Hq, T, D] in the dtype of `query`; logits and softmax are float32.
    """
    batch_size, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, capacity = keys.shape[1:3]
    if page_ids is None:
        page_ids = torch.arange(capacity // page_size, device=keys.device).expand(
            batch_size, num_kv_heads, num_queries, -1
        )
    position = page_ids[..., None] * page_size + torch.arange(page_size, device=query.device)
    position = position.flatten(3)  # [B, Hkv, T, K * S]
    is_visible = (position >= 0) & (position < visible_tokens(num_queries, length, padding)[:, None, :, None])
    # What is not visible is read from the row's first token, which is, and gets no weight.
    slot = position.masked_fill(~is_visible, 0) + padding[:, None, None, None]
    row = torch.arange(batch_size * num_kv_heads, device=query.device).view(batch_size, num_kv_heads, 1, 1)
    slot = (row * capacity + slot).flatten()

    def gather(stored: Tensor) -> Tensor:
        tokens = stored.flatten(0, 2).index_select(0, slot).float()
        return tokens.view(batch_size, num_kv_heads, num_queries, -1, stored.shape[-1])

    grouped = query.float().view(batch_size, num_kv_heads, -1, num_queries, head_dim).transpose(2, 3)
    logits = (grouped @ gather(keys).transpose(-1, -2)) * scaling  # [B, Hkv, T, G, K * S]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~is_visible[:, :, :, None], -torch.inf)
    if sinks is not None:
        sinks = sinks.float().view(1, num_kv_heads, 1, -1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    weights = logits.softmax(dim=-1)[..., : slot.shape[0] // (row.numel() * num_queries)]
    output = weights @ gather(values)  # [B, Hkv, T, G, D]
    return output.transpose(2, 3).reshape(batch_size, num_heads, num_queries, -1).to(query.dtype)


def visible_tokens(num_queries: int, length: Length, padding: Tensor) -> Tensor:
    """[B, T]: how many tokens of its row each query sees, itself included and padding left out."""
    return torch.arange(1 - num_queries, 1, device=padding.device) + length - padding[:, None]


def newest_page(num_queries: int, length: Length, padding: Tensor, page_size: int) -> Tensor:
    """[B, T]: the page of each query's own token."""
    return (visible_tokens(num_queries, length, padding) - 1) // page_size
