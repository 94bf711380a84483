"""The stages of a decode step on a CPU, in few of PyTorch's operators. What they mean is said in `reference`.

They are for one query per row, in rows without padding: every other step goes by the reference itself. Each operator
costs some microseconds, however little it does, and a layer's step has a hundred of them.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import INT64, SCALE_BLOCK, Length, Score, order_of, reduce_group


def serves(query: Tensor, length: Length, left_padding: tuple[int, ...]) -> bool:
    """Whether the stages here are for these queries, [B, Hq, T, D]."""
    is_step = query.shape[2] == 1 and isinstance(length, int) and not any(left_padding)
    return is_step and query.device.type == "cpu" and not torch.compiler.is_compiling()


def estimate(query: Tensor, bounds: Tensor, scales: Tensor | None, scaling: float, score: Score) -> Tensor:
    """`reference.estimate` where the last of `bounds` [B, Hkv, P, 2, D] is of the query's newest page.

    Scales are of pages and blocks of channels, so each block is a product of its own, which is scaled. Bounds are
    widened to float32, and not multiplied out.
    """
    batch_size, num_kv_heads, num_pages, _, head_dim = bounds.shape
    middle = query.float().reshape(batch_size * num_kv_heads, 1, -1, 1, head_dim) * (scaling / 2)
    weights = torch.addcmul(middle, middle.abs(), of_extremes(score.width))
    if scales is not None:
        weights = weights * of_blocks(head_dim)  # [B·Hkv, blocks, G, 2, D]
    bounds = bounds.flatten(0, 1).flatten(2).float()
    scores = weights.view(len(bounds), -1, 2 * head_dim) @ bounds.transpose(1, 2)
    if scales is not None:
        by_block = (scales.flatten(0, 1).transpose(1, 2).int() * (1 << 23)).view(torch.float32)  # [B·Hkv, blocks, P]
        scores = (scores.unflatten(1, (by_block.shape[1], -1)) * by_block[:, :, None]).sum(dim=1)
    scores = scores.view(batch_size, num_kv_heads, -1, 1, num_pages)
    is_newest = None if score.group == "max" else torch.arange(num_pages) == num_pages - 1
    return reduce_group(scores, score.group, is_newest)


def select(scores: Tensor, num_selected: int, keeps_first: bool) -> Tensor:
    """`reference.select` where the last of the P pages is the newest, of as many as there are, P or `num_selected`."""
    num_pages = scores.shape[-1]
    rank = order_of(scores) - torch.arange(num_pages)
    is_forced = slice(0 if keeps_first else num_pages - 1, None, max(num_pages - 1, 1))
    rank[..., is_forced] = INT64.max
    return rank.topk(min(num_selected, num_pages), dim=-1, sorted=False).indices.sort(dim=-1).values


def attend(query: Tensor, keys: Tensor, values: Tensor, ids: Tensor, length: int, size: int, scaling: float) -> Tensor:
    """`reference.attend` over the tokens of `ids` [B, Hkv, 1, K], each of which stands for `size` tokens."""
    batch_size, num_kv_heads, capacity, head_dim = keys.shape
    slot = ids.flatten(2) if size == 1 else (ids[..., None] * size + torch.arange(size)).flatten(2)
    is_visible = None
    if bool((ids[..., -1] == (length - 1) // size).all()):  # the ids before it are of full pages then
        slot = slot[..., : slot.shape[-1] - size + (length - 1) % size + 1]
    else:
        is_visible = (slot >= 0) & (slot < length)
        slot = slot.masked_fill(~is_visible, 0)
        is_visible = is_visible[:, :, None]
    first = torch.arange(0, batch_size * num_kv_heads * capacity, capacity).view(batch_size, num_kv_heads, 1)
    slot = (slot + first).flatten()
    chosen = [
        stored.flatten(0, 2).index_select(0, slot).view(batch_size, num_kv_heads, -1, stored.shape[-1]).float()
        for stored in (keys, values)
    ]
    # The query heads of a group are queries of their KV head.
    grouped = query.float().reshape(batch_size, num_kv_heads, -1, head_dim)
    output = F.scaled_dot_product_attention(grouped, *chosen, attn_mask=is_visible, scale=scaling)
    return output.reshape(batch_size, query.shape[1], 1, -1).to(query.dtype)


@lru_cache
@torch.inference_mode(False)  # or they could not be used outside of it
def of_extremes(width: float) -> Tensor:
    """[2, 1]: by how much |q| counts in a page's minimum and in its maximum, of which q itself counts as much."""
    return torch.tensor([[-width], [width]])


@lru_cache
@torch.inference_mode(False)
def of_blocks(head_dim: int) -> Tensor:
    """[blocks, 1, 1, D] float32: 1 for the channels of each block that shares a scale, 0 for the others."""
    block = torch.arange(head_dim) // SCALE_BLOCK
    return (block == torch.arange(-(-head_dim // SCALE_BLOCK))[:, None]).float()[:, None, None]
