"""What a layer whose method evicts sees of masks, and what it keeps."""

import torch

from ..errors import QuestError
from ..methods import Attended


def at_positions(by_token, positions, query, num_seen):
    """A mask or bias of all tokens seen, [B, 1 or Hq, T, N], as [B, Hq, T, n] of `positions`, [B, Hkv, n], or as it is
    where these are None.
    """
    if by_token is None:
        return None
    if by_token.shape[3] != num_seen:
        raise QuestError(
            f"This model made a mask or a bias of {by_token.shape[3]} positions, and {num_seen} were seen: "
            "it counts the keys that a layer kept, and would hide others than it means. Where layer 0 makes it for "
            "all layers, dense_layers=1 or more helps; otherwise use QuestCache."
        )
    if positions is None:
        return by_token
    num_heads, num_queries = query.shape[1:3]
    slot = positions.repeat_interleave(num_heads // positions.shape[1], dim=1)
    by_token = by_token.expand(slot.shape[0], num_heads, num_queries, -1)
    return by_token.gather(3, slot[:, :, None].expand(-1, -1, num_queries, -1))


def see(method, storage, query, mask, logits, position_bias, empty_rows):
    """Note in the storage what the newest queries could attend, and have the method note what they did.

    In `empty_rows` the one new slot holds no token, whatever it sees: it has to see something.
    """
    is_visible = is_token = None
    if mask is not None:
        newest = as_bool(mask[:, :, -1])
        group = max(1, newest.shape[1] // storage.keys.shape[1])
        is_visible = newest[:, ::group].expand_as(storage.is_visible).contiguous()
        is_token = is_of_token(mask).expand(query.shape[0], -1)
    if empty_rows:
        if is_token is None:
            is_token = query.new_ones(query.shape[0], 1, dtype=torch.bool)
        is_token = is_token.index_fill(0, torch.tensor(empty_rows, device=query.device), False)
    storage.see(is_visible, is_token)
    method.attended(storage, Attended(query, mask, is_token, logits, position_bias))


def as_bool(mask):
    """A mask, bool or added, as bool: True for what is visible."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def is_of_token(mask):
    """[B or 1, T] bool: which of the newest T queries stand for a token, by a mask [B or 1, Hq or 1, T, n].

    Padding, and a row of a batch that pauses, do not see themselves.
    """
    num_queries, num_keys = mask.shape[2:]
    return as_bool(mask.diagonal(num_keys - num_queries, dim1=2, dim2=3)).any(dim=1)
