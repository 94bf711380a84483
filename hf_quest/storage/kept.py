"""Kept: the tokens of a layer that a method that evicts has kept."""

from typing import ClassVar

import torch

from ..reference import order_of
from .base import Storage
from .copies import check_restored


class Kept(Storage):
    """The n tokens that were kept of the `length` seen.

    `keys`, `values` [B, Hkv, n, D], keys after the rotary embedding; `positions` [B, Hkv, n] int64, the slot of each
    among all that were seen, ascending; `is_visible` [B, Hkv, n] bool, what the newest query could attend; `is_token`
    [B, Hkv, n] bool, what could attend to itself, as padding cannot and a row that pauses. In `beside` are, by name,
    the tensors [B, Hkv, n, ...] that a method declared, zeros for what is new.

    Args:
        beside_tokens: as of `Pages`.
    """

    evicts = True
    weights = None  # (numerator, denominator), where tokens count otherwise than once, see `Weighted`
    names: ClassVar[tuple[str, ...]] = ("keys", "values", "positions", "is_visible", "is_token")

    def __init__(self, rows, beside_tokens):
        super().__init__(rows)
        self.beside_tokens = beside_tokens
        self.positions = self.is_visible = self.is_token = None
        self.before = None  # (tensors, length) until the forward that changed them has ended

    @property
    def num_held(self):
        """Tokens that are held of a KV head."""
        return self.capacity

    @property
    def places(self):
        """The positions, or None where these are all that were seen, in order."""
        return None if self.capacity == self.length else self.positions

    def read_by_step(self):
        """The tensors that a step reads."""
        return [self.keys, self.values, *self.beside.values()]

    def append(self, keys, values):
        batch_size, num_kv_heads, num_new, _ = keys.shape
        if self.keys is None:
            self.allocate(keys, values)
        self.prefetch()
        positions = torch.arange(self.length, self.length + num_new, device=keys.device)
        positions = positions.expand(batch_size, num_kv_heads, num_new)
        yes = torch.ones_like(positions, dtype=torch.bool)
        new = {"keys": keys, "values": values, "positions": positions, "is_visible": yes, "is_token": yes}
        for name, tensor in self.beside.items():
            new[name] = tensor.new_zeros(*keys.shape[:3], *tensor.shape[3:])
        old = self.tensors()
        joined = old | {name: torch.cat([old[name], tokens], dim=2) for name, tokens in new.items()}
        stored = {name: tensor.detach() for name, tensor in joined.items()}
        self.before = (old, self.length)
        self.put(stored)
        self.set_length(self.length + num_new)
        return joined["keys"], joined["values"]

    def put(self, tensors):
        for name, tensor in tensors.items():
            if name in self.beside:
                self.beside[name] = tensor
            else:
                setattr(self, name, tensor)

    def allocate(self, like_keys, like_values):
        self.keys, self.values = like_keys[:, :, :0].detach(), like_values[:, :, :0].detach()
        self.positions = self.keys.new_empty(self.keys.shape[:3], dtype=torch.int64)
        self.is_visible = self.is_token = self.positions.bool()
        declared = self.beside_tokens(like_keys.shape[-1], like_keys.dtype)
        shape = self.keys.shape[:3]
        self.beside = {name: self.keys.new_empty(*shape, *more, dtype=kind) for name, (more, kind) in declared.items()}
        self.device, self.is_away = self.keys.device, False
        self.on_device = self.rows.on(self.device)

    def see(self, is_visible, is_token):
        """Take note of what the newest query could attend, [B, Hkv, n] bool or None for all, and of which of the newest
        tokens are some, [B, T] bool or None for all.
        """
        self.is_visible = torch.ones_like(self.is_visible) if is_visible is None else is_visible
        if is_token is not None:
            new = is_token[:, None].expand(-1, self.keys.shape[1], -1)
            self.is_token = torch.cat([self.is_token[:, :, : -new.shape[2]], new], dim=2)

    def keep(self, slots):
        """Keep the tokens in `slots`, [B, Hkv, n] int64 ascending. The others are gone, and their memory too."""

        def kept(tensor):
            index = slots.view(*slots.shape, *(1,) * (tensor.dim() - 3))
            return tensor.gather(2, index.expand(*slots.shape, *tensor.shape[3:]))

        self.put({name: kept(tensor) for name, tensor in self.tensors().items()})

    def best(self, priority, num_kept):
        """[B, Hkv, num_kept] int64, ascending: the slots of visible tokens, then of those that are not, then of what is
        no token, each by priority [B, Hkv, n] float32, the older one of two alike first.
        """
        rank = order_of(priority) >> 32  # to 2^31
        slot = torch.arange(rank.shape[2], device=rank.device)
        place = self.is_token.long() + (self.is_token & self.is_visible)
        rank = (place << 58) + (rank << 25) - slot  # no two alike in a head
        return rank.topk(num_kept, dim=-1).indices.sort(dim=-1).values

    def padding_mask(self):
        if not any(self.left_padding):
            return None
        slot = torch.arange(self.length, device=self.padding.device)
        return (slot >= self.padding[:, None])[:, None, None]

    def move(self, batch_rows, num_slots, dtype=None):
        self.put({name: tensor[batch_rows] for name, tensor in self.tensors().items()})
        if dtype is not None:
            self.keys, self.values = self.keys.to(dtype), self.values.to(dtype)
        self.before = None

    def has_moved(self):
        self.is_away = False

    def reorder(self, sources, start=0):
        self.prefetch()
        self.move(torch.tensor(sources, device=self.keys.device), self.capacity)
        self.begin_rows(tuple(self.left_padding[row] for row in sources))

    def crop(self, length):
        """To nothing or not at all: what was evicted does not come back."""
        if length == 0:
            self.reset()

    def restore_tensors(self, tensors, facts, device):
        with torch.inference_mode(False):
            copies = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
            self.allocate(copies["keys"], copies["values"])
        check_restored(self.emptied(copies), self.tensors())
        self.put(copies)

    def emptied(self, tensors):
        """What would be stored, by name, if these had no token."""
        return {name: tensor[:, :, :0] for name, tensor in tensors.items()}

    def put_back(self, length):
        if self.length != length and self.before is not None and self.before[1] == length:
            self.put(self.before[0])
            self.set_length(length)
        self.before = None
        return self.length == length

    def settle(self):
        self.before = None

    def reset(self):
        super().reset()
        self.before = None
        self.discard()
