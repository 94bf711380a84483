"""The stages of a decode step on a CPU, in few of PyTorch's operators. What they mean is said in `reference`.

They are for one query per row, in rows without padding: every other step goes by the reference itself. Each operator
costs some microseconds, however little it does, and a layer's step has a hundred of them.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import LARGEST_SCORE, Length, Score, order_of, reduce_group

SORTED_AT_ONCE = 1024  # scores up to which a whole stable sort is faster than the operators that make it unnecessary


def serves(query: Tensor, length: Length, left_padding: tuple[int, ...]) -> bool:
    """Whether the stages here are for these queries, [B, Hq, T, D]."""
    is_step = query.shape[2] == 1 and isinstance(length, int) and not any(left_padding)
    return is_step and query.device.type == "cpu" and not torch.compiler.is_dynamo_compiling()


def estimate(query: Tensor, bounds: Tensor, scaling: float, score: Score) -> Tensor:
    """`reference.estimate` by bounds [B, Hkv, 2·D, P], the last of which are of the query's newest page."""
    *rows, num_extremes, num_pages = bounds.shape
    bounds = bounds.flatten(0, 1).float()
    middle = query.float().reshape(len(bounds), -1, 1, num_extremes // 2) * (scaling / 2)
    weights = torch.addcmul(middle, middle.abs(), of_extremes(score.width)).view(len(bounds), -1, num_extremes)
    scores = torch.bmm(weights, bounds).view(*rows, -1, 1, num_pages)
    is_newest = None if score.group == "max" else torch.arange(num_pages, device=scores.device) == num_pages - 1
    return reduce_group(scores, score.group, is_newest)


def select(scores: Tensor, num_selected: int, keeps_first: bool) -> Tensor:
    """`reference.select` where the last of the P pages is the newest, of P ids at most; `scores` is mutated."""
    num_pages = scores.shape[-1]
    scores.nan_to_num_(LARGEST_SCORE, LARGEST_SCORE)
    scores[..., 0 if keeps_first else num_pages - 1 :: max(num_pages - 1, 1)].fill_(torch.inf)
    return highest(scores, min(num_selected, num_pages)).sort(dim=-1).values


def highest(scores: Tensor, number: int) -> Tensor:
    """Indices of the highest scores in no order, of equal ones the lower."""
    if scores.shape[-1] <= SORTED_AT_ONCE:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :number]
    rank = order_of(scores) - torch.arange(scores.shape[-1], device=scores.device)
    return rank.topk(number, dim=-1, sorted=False).indices


def attend(query: Tensor, keys: Tensor, values: Tensor, ids: Tensor, length: int, size: int, scaling: float) -> Tensor:
    """`reference.attend` over the tokens of `ids` [B, Hkv, 1, K], each of which stands for `size` tokens."""
    batch_size, num_kv_heads, capacity, head_dim = keys.shape
    rows = (batch_size, num_kv_heads)
    slots = torch.add(first_slots(*rows, capacity, size), ids[..., 0, :, None], alpha=size).flatten(2)
    is_visible = None
    if ids[..., -1].amin() == (length - 1) // size:  # no id is higher, and all before it are of full pages
        slots = slots[..., : slots.shape[-1] - size + (length - 1) % size + 1]
    else:
        first = first_slots(*rows, capacity, 1)
        is_visible = (slots >= first[..., 0]) & (slots < first[..., 0] + length)
        slots = torch.where(is_visible, slots, first[..., 0])
        is_visible = is_visible[:, :, None]
    slots = slots.flatten()
    keys, values = (
        stored.flatten(0, 2).index_select(0, slots).view(*rows, -1, stored.shape[-1]).float()
        for stored in (keys, values)
    )
    # The query heads of a group are queries of their KV head.
    grouped = query.float().reshape(*rows, -1, head_dim)
    output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=is_visible, scale=scaling)
    return output.reshape(batch_size, query.shape[1], 1, -1).to(query.dtype)


@lru_cache
@torch.inference_mode(False)
def first_slots(batch_size: int, num_kv_heads: int, capacity: int, size: int) -> Tensor:
    """[B, Hkv, 1, size]: where the first `size` tokens of every row's head are in [B · Hkv · capacity] slots."""
    first = torch.arange(batch_size * num_kv_heads, device="cpu").view(batch_size, num_kv_heads, 1, 1) * capacity
    return first + torch.arange(size, device="cpu")


@lru_cache
@torch.inference_mode(False)  # or they could not be used outside of it
def of_extremes(width: float) -> Tensor:
    """[2, 1]: by how much |q| counts in a page's minimum and in its maximum, of which q itself counts as much."""
    return torch.tensor([[-width], [width]], dtype=torch.float32, device="cpu")
