"""Codes of keys: each channel in a few bits, on the grid of its own page's bounds. A part of the specification.

Letters in shapes are those of `reference.py`; bits b are 1, 2, 4 or 8, and channel c of a key is in byte c·b / 8 of its
code, the first channel of a byte in the lowest bits.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, stripes
from .reference import Length, in_order, newest_page, order_of, reduce_group, visible_tokens

BITS = (1, 2, 4, 8)
LEAST = 8  # the part of a budget that a query attends however little of it holds the mass


def grid(bounds: Tensor, scales: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """The lowest value that a code can name, a page's minimum, and the step to the next: the highest is its maximum.

    Two [..., D] float32, of [..., 2, D] bounds as in `reference.append`.
    """
    bounds = bounds.float() if scales is None else reference.from_8_bits(bounds, scales)
    lowest, highest = bounds.unbind(dim=-2)
    # By a product, which is the same float wherever it is made: some devices divide by a constant so, some do not.
    return lowest, ((highest - lowest) * (1 / (2**bits - 1))).clamp(min=torch.finfo(torch.float32).tiny)


def encode(keys: Tensor, lowest: Tensor, step: Tensor, bits: int) -> Tensor:
    """[..., D·b / 8] uint8, rounded up, of [..., D] keys, each channel the nearest value of its grid."""
    levels = ((keys.float() - lowest) * step.reciprocal()).nan_to_num(0.0).round().clamp(0, 2**bits - 1).to(torch.uint8)
    levels = F.pad(levels, (0, -levels.shape[-1] % (8 // bits))).unflatten(-1, (-1, 8 // bits))
    place = torch.arange(0, 8, bits, dtype=torch.uint8, device=keys.device)
    return (levels << place).sum(dim=-1, dtype=torch.uint8)


def decode(codes: Tensor, lowest: Tensor, step: Tensor, bits: int) -> Tensor:
    """[..., D] float32: the keys that [..., D·b / 8] codes stand for."""
    place = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    levels = (codes[..., None] >> place) & (2**bits - 1)
    return lowest + levels.flatten(-2)[..., : lowest.shape[-1]].float() * step


def refresh_codes(
    keys: Tensor,
    bounds: Tensor,
    scales: Tensor | None,
    codes: Tensor,
    num_new: int,
    length: Length,
    padding: Tensor,
    page_size: int,
    bits: int,
) -> None:
    """Write the codes of all tokens in the pages of the newest `num_new`, by the bounds that these pages have now.

    Those of the newest page mean nothing until it is full: its bounds widen, and it is attended whole.

    Args:
        codes: [B, Hkv, capacity, D·b / 8] uint8, mutated. The others are those of `reference.append`.
    """
    batch = torch.arange(keys.shape[0], device=keys.device)[:, None]
    num_touched = (num_new + page_size - 2) // page_size + 1
    last = ((length - 1 - padding) // page_size).clamp(min=0)[:, None]
    first = (length - num_new - padding).clamp(min=0)[:, None] // page_size
    page_idx = torch.minimum(first + torch.arange(num_touched, device=keys.device), last)
    slot = (padding[:, None] + page_idx * page_size)[..., None] + torch.arange(page_size, device=keys.device)
    slot = slot.clamp(max=length - 1)  # [B, pages, S]
    page_scales = None if scales is None else scales[batch, :, page_idx]
    lowest, step = (each[:, :, None] for each in grid(bounds[batch, :, page_idx], page_scales, bits))
    codes[batch[..., None], :, slot] = encode(keys[batch[..., None], :, slot], lowest, step, bits)


def find_candidates(
    scores: Tensor,
    length: Length,
    padding: Tensor,
    num_candidates: float,
    page_size: int,
    keeps_first: bool,
    num_stripes: int,
) -> Tensor:
    """Choose, for every query, the pages whose tokens are looked at by their codes: the best of each stripe.

    Args:
        scores: [B, Hkv, T, P] float32.
        length, padding, keeps_first: as in `reference.select`.
        num_candidates: pages, the newest among them; infinite for all.
        num_stripes: X, `stripes.count` of the tokens that are to be chosen.

    Returns:
        [B, Hkv, T, X, W] int64, of each stripe W page ids, ascending, without the newest page; -1 fills up.
    """
    num_pages = scores.shape[-1]
    num_earlier = num_pages if num_candidates == math.inf else int(num_candidates) - 1  # of which not all may be there
    page_idx = torch.arange(num_pages, device=scores.device)
    newest = newest_page(scores.shape[2], length, padding, page_size)[:, None, :, None]  # as many pages are before it
    rank = order_of(scores) - page_idx
    if keeps_first:
        rank = rank.masked_fill(page_idx == 0, reference.INT64.max)
    rank = rank.masked_fill(page_idx >= newest, reference.INT64.min)
    rank = stripes.by_stripe(rank, num_stripes, reference.INT64.min)
    shares = stripes.shares_of_pages(newest[..., 0].clamp(max=num_earlier), newest[..., 0], num_stripes)
    best = stripes.best(rank, shares, stripes.most_pages(num_earlier, num_stripes))
    stripe = torch.arange(num_stripes, device=scores.device)[:, None]
    return torch.where(best < 0, -1, best * num_stripes + stripe)


def refine(
    query: Tensor,
    bounds: Tensor,
    scales: Tensor | None,
    codes: Tensor,
    candidates: Tensor,
    length: Length,
    padding: Tensor,
    page_size: int,
    bits: int,
    scaling: float,
    num_tokens: int,
    group: str,
    mass: float | None = None,
) -> Tensor:
    """Choose, for every query, the tokens of its newest page and of each stripe the highest-scoring of its candidates.

    A token's score is its logit by its code. The query heads that share a KV head agree as in `reference.reduce_group`,
    by shares of all candidates' tokens.

    Args:
        query: [B, Hq, T, D].
        bounds: [B, Hkv, P, 2, D]. scales: [B, Hkv, P, D / 32] or None, as in `reference.append`.
        codes: [B, Hkv, capacity, D·b / 8] uint8; of the newest page none is read.
        candidates: [B, Hkv, T, X, W] int64, as `find_candidates` gives them.
        length, padding: as in `reference.select`.
        num_tokens: tokens to choose, those of the newest page included. Equal scores resolve to the earlier token.
        group: of `reference.GROUPS`.
        mass: of the tokens before the newest page choose no more, best first, than hold this share of the estimated
            attention of all candidates, and at least `num_tokens` / LEAST. None for all that are chosen.

    Returns:
        [B, Hkv, T, num_tokens] int64, ascending, counted from each row's first token; -1 fills up.
    """
    batch_size, num_kv_heads, num_queries, num_stripes, _ = candidates.shape
    newest = newest_page(num_queries, length, padding, page_size)[:, None, :]
    page_ids = candidates.flatten(3)
    page = page_ids.clamp(min=0)
    position = page[..., None] * page_size + torch.arange(page_size, device=page_ids.device)
    is_open = (page_ids >= 0)[..., None].expand_as(position)
    row = torch.arange(batch_size, device=page.device).view(-1, 1, 1, 1)
    head = torch.arange(num_kv_heads, device=page.device).view(1, -1, 1, 1)
    lowest, step = grid(bounds[row, head, page], None if scales is None else scales[row, head, page], bits)
    slot = position.masked_fill(~is_open, 0) + padding.view(-1, 1, 1, 1, 1)
    of_token = codes[row[..., None], head[..., None], slot]  # [B, Hkv, T, X·W, S, D·b / 8]
    keys = decode(of_token, lowest[..., None, :], step[..., None, :], bits).flatten(3, 4)
    grouped = query.float().unflatten(1, (num_kv_heads, -1)).transpose(2, 3)  # [B, Hkv, T, G, D]
    scores = (grouped @ keys.transpose(-1, -2)).transpose(2, 3) * scaling  # [B, Hkv, G, T, X·W·S]
    is_open, position = is_open.flatten(3), position.flatten(3)
    scores = reduce_group(scores, group, ~is_open[:, :, None])
    rank = (order_of(scores) - position).masked_fill(~is_open, reference.INT64.min).unflatten(-1, (num_stripes, -1))
    num_best = max(num_tokens - page_size, 0)
    shares = stripes.shares_of_tokens((newest * page_size).clamp(max=num_best), newest, num_stripes)
    visible = visible_tokens(num_queries, length, padding)[:, None, :, None]
    # No stripe has more pages than its share of all, and one.
    best = stripes.best(rank, shares, min(rank.shape[-1], -(-num_best // num_stripes) + page_size))
    if mass is not None:
        is_logit = group == "max" or grouped.shape[3] == 1
        weights = scores.masked_fill(~is_open, -torch.inf).softmax(dim=-1).nan_to_num(0.0) if is_logit else scores
        weights = weights.masked_fill(~is_open, 0.0).unflatten(-1, (num_stripes, -1))
        # Where no more is stored than the budget, all is attended, whatever other rows do.
        least = torch.where(visible <= num_tokens, num_tokens, num_tokens // LEAST)
        best = best.masked_fill(~holding(weights, rank, best, mass, least), -1)
    chosen = position.unflatten(-1, (num_stripes, -1)).gather(-1, best.clamp(min=0)).masked_fill(best < 0, -1)
    own = newest[..., None] * page_size + torch.arange(page_size, device=page.device)  # all that are there
    own = own.masked_fill(own >= visible, -1).expand(*candidates.shape[:3], -1)
    ids = in_order(torch.cat([chosen.flatten(3), own], dim=-1))[..., :num_tokens]
    return F.pad(ids, (0, num_tokens - ids.shape[-1]), value=-1)


def holding(weights: Tensor, rank: Tensor, best: Tensor, mass: float, least: Tensor) -> Tensor:
    """[..., X, K] bool: which of the `best`, indices [..., X, K] of which -1 is none, hold the mass: see `refine`.

    Args:
        weights, rank: [..., X, M], of tokens in their stripes.
        least: [..., 1], how many do in any case.
    """
    total = weights.double().sum(dim=(-2, -1))[..., None]
    of_best, order = (each.gather(-1, best.clamp(min=0)) for each in (weights, rank))
    is_one = best >= 0
    of_best = of_best.masked_fill(~is_one, 0.0).flatten(-2).double()
    order = order.masked_fill(~is_one, reference.INT64.min).flatten(-2).argsort(dim=-1, descending=True)
    is_needed = is_held(of_best.gather(-1, order), total, mass, least)
    return torch.zeros_like(is_needed).scatter(-1, order, is_needed).view_as(best)


def is_held(best_first: Tensor, total: Tensor, mass: float, least: int | Tensor) -> Tensor:
    """[..., K] bool: of float64 weights, the largest first, the first `least` and the others up to the mass."""
    before = best_first.cumsum(dim=-1) - best_first
    return (torch.arange(best_first.shape[-1], device=total.device) < least) | (before < mass * total)
