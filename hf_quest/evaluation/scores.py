"""What pages and tokens are scored by, in plain PyTorch. Letters in shapes are those of `reference.py`.

Bounds are scored by `reference.estimate` and pages chosen by `reference.select`, so that what is measured is what a
QuestCache does. The rest is what it could do.
"""

import torch
from torch import Tensor

from .. import reference
from ..codes import grid


def is_earlier(num_queries: int, length: int, page_size: int, device: torch.device) -> Tensor:
    """[T, P] bool: the pages before each query's newest one, of which it chooses."""
    newest = torch.arange(length - num_queries, length, device=device) // page_size
    return torch.arange(-(-length // page_size), device=device) < newest[:, None]


def bounds_of(keys: Tensor, page_size: int, bits: int) -> Tensor:
    """[B, Hkv, P, 2, D] float32 bounds of [B, Hkv, N, D] keys, in their dtype or rounded outwards to 8 bits."""
    batch_size, num_kv_heads, length, head_dim = keys.shape
    bounds = keys.new_empty(batch_size, num_kv_heads, -(-length // page_size), 2, head_dim)
    reference.refresh_bounds(keys, bounds, None, length, length, no_padding(keys), page_size)
    return reference.from_8_bits(*reference.to_8_bits(bounds)) if bits == 8 else bounds.float()


def no_padding(keys: Tensor) -> Tensor:
    return torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device)


def by_bounds(
    query: Tensor, bounds: Tensor, length: int, page_size: int, scaling: float, score: reference.Score
) -> Tensor:
    """[B, Hkv, T, P] scores of pages for [B, Hq, T, D] queries, the newest of `length` tokens."""
    where = (length, no_padding(query), page_size)
    return reference.estimate(query, bounds, None, scaling, score, where)


def agreed(scores: Tensor, group: str, is_open: Tensor) -> Tensor:
    """[B, Hkv, G, T, n] scores of pages or tokens to [B, Hkv, T, n], with the softmax over what `is_open`."""
    if group == "max":
        return scores.amax(dim=2)
    shares = scores.masked_fill(~is_open, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    return shares.sum(dim=2) if group == "sum" else shares.amax(dim=2)


def select_pages(scores: Tensor, length: int, num_selected: int, page_size: int, keeps_first: bool) -> Tensor:
    """[B, Hkv, T, P] bool: the newest page and the best earlier ones, `num_selected` in all, by `reference.select`."""
    page_ids = reference.select(scores, length, no_padding(scores), num_selected, page_size, keeps_first)
    is_selected = torch.zeros(*scores.shape[:3], scores.shape[-1] + 1, dtype=torch.bool, device=scores.device)
    return is_selected.scatter(-1, page_ids.masked_fill(page_ids < 0, scores.shape[-1]), True)[..., :-1]


def in_8_bits(values: Tensor) -> Tensor:
    """[B, Hkv, N, D] float32 values, each token's in 8 bits of its own largest."""
    values = values.float()
    step = values.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (values / step).round() * step


def rounded(keys: Tensor, bounds: Tensor, bits: float, page_size: int) -> Tensor:
    """[B, Hkv, N, D] float32 keys in `bits` per channel, on the grid of their own page's minimum and maximum."""
    of_pages = grid(bounds, None, bits)
    lowest, step = (each.repeat_interleave(page_size, dim=2)[:, :, : keys.shape[2]] for each in of_pages)
    return lowest + ((keys.float() - lowest) / step).round() * step


def page_mass(logits: Tensor, page_size: int) -> Tensor:
    """[..., P]: the logarithm of the summed weight of each page's tokens, from [..., N] logits."""
    padded = torch.nn.functional.pad(logits, (0, -logits.shape[-1] % page_size), value=-torch.inf)
    return padded.unflatten(-1, (-1, page_size)).logsumexp(dim=-1)
