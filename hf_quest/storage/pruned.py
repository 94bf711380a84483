"""Pruned: every token, of whose keys the older ones have lost channels."""

from typing import ClassVar

import torch

from .kept import Kept


class Pruned(Kept):
    """Kept, where nothing is evicted: `values` [B, Hkv, N, D] of every token and `keys` [B, Hkv, n, D] of the last n.

    Those before them are `pruned` [B, Hkv, N - n, C], which has the `channels` [B, Hkv, C] int64, ascending. `squares`
    [B, Hkv, W, D] float32 is what a method notes of the newest queries. What is no token comes first among the n.
    """

    names: ClassVar[tuple[str, ...]] = (*Kept.names, "pruned", "channels", "squares")

    def __init__(self, rows, beside_tokens):
        super().__init__(rows, beside_tokens)
        self.pruned = self.channels = self.squares = None

    @property
    def num_pruned(self):
        return 0 if self.pruned is None else self.pruned.shape[2]

    @property
    def num_held(self):
        return self.num_pruned + self.capacity

    @property
    def places(self):
        return self.positions if self.num_pruned else None

    @property
    def num_unread(self):
        """What a step reads less of a KV head than dense attention, in tokens."""
        if not self.num_pruned:
            return 0.0
        num_channels = self.keys.shape[3]
        return self.num_pruned * (1 - self.pruned.shape[3] / num_channels) / (1 + self.values.shape[3] / num_channels)

    def read_by_step(self):
        return [*super().read_by_step(), self.pruned, self.channels] if self.num_pruned else super().read_by_step()

    def allocate(self, like_keys, like_values):
        super().allocate(like_keys, like_values)
        self.pruned, self.channels = self.keys.new_empty(*self.keys.shape[:3], 0), self.positions
        self.squares = self.keys.new_empty(self.keys.shape, dtype=torch.float32)

    def append(self, keys, values):
        whole, values = super().append(keys, values)
        return torch.cat([self.restored(), whole], dim=2), values

    def restored(self):
        """[B, Hkv, N - n, D]: the pruned keys, with zeros for the channels that they have lost."""
        keys = self.keys.new_zeros(*self.pruned.shape[:3], self.keys.shape[3])
        return keys.scatter(3, self.channels[:, :, None].expand(self.pruned.shape), self.pruned)

    def newest_keys(self):
        return torch.cat([self.restored(), self.keys], dim=2)

    def whole_is_token(self):
        """[B, Hkv, n] bool: which of the whole keys are of tokens."""
        return self.is_token[:, :, self.num_pruned :]

    def note(self, squares, num_kept):
        """Append to what is noted, and hold the last `num_kept` that are not zero."""
        squares = torch.cat([self.squares, squares], dim=2)
        order = squares.any(dim=-1).long().argsort(dim=-1, stable=True)[..., -num_kept:]
        self.squares = squares.gather(2, order[..., None].expand(*order.shape, squares.shape[3]))

    def prune(self, channels, num_whole):
        """Leave the last `num_whole` keys whole and of those before them these channels, [B, Hkv, C] ascending, or in
        rows that have pruned tokens the ones from before.
        """
        if self.num_pruned:
            has_pruned = self.is_token[:, :, : self.num_pruned].any(dim=-1, keepdim=True)
            channels = torch.where(has_pruned, self.channels, channels)
        order = self.whole_is_token().long().argsort(dim=-1, stable=True)
        leaving, staying = order.split([order.shape[2] - num_whole, num_whole], dim=2)
        pruned = taken(self.keys, leaving).gather(3, channels[:, :, None].expand(*leaving.shape, -1))
        self.pruned = torch.cat([self.pruned, pruned], dim=2) if self.num_pruned else pruned
        self.keys, self.channels = taken(self.keys, staying), channels
        for name in ("values", "positions", "is_visible", "is_token"):
            before, whole = getattr(self, name).split([self.pruned.shape[2] - leaving.shape[2], order.shape[2]], dim=2)
            setattr(self, name, torch.cat([before, taken(whole, order)], dim=2))

    def move(self, batch_rows, num_slots, dtype=None):
        super().move(batch_rows, num_slots, dtype)
        self.pruned = self.pruned.to(self.keys.dtype)

    def emptied(self, tensors):
        return {**super().emptied(tensors), "pruned": tensors["pruned"][:, :, :0, :0]}

    def discard(self):
        super().discard()
        self.pruned = self.channels = self.squares = None


def taken(tensor, slots):
    """[B, Hkv, n, ...]: what is in `slots`, [B, Hkv, n], of a tensor [B, Hkv, N, ...]."""
    index = slots.view(*slots.shape, *(1,) * (tensor.dim() - 3))
    return tensor.gather(2, index.expand(*slots.shape, *tensor.shape[3:]))
