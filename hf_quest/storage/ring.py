"""Ring: the newest keys and values of a layer whose attention does not reach further."""

import math

import torch

from ..errors import QuestError
from .base import Storage
from .rows import cannot_be_written

ROOM = 256  # tokens that are kept beyond a layer's reach at least, for drafts that are rejected and for `crop`


class Ring(Storage):
    """Keys and values of a layer with a window or chunks: what its next token may reach and ROOM tokens before that, or
    as many as there were drafts in one forward.

    `keys`, `values` [B, Hkv, C, D]: the token in slot s of the sequence is at s modulo C, if s is `first` or later. C
    grows to `most`. Attention over it is dense, by the mask that the model has for such layers.
    """

    is_local = True

    def __init__(self, rows, max_cache_len, reach):
        super().__init__(rows, max_cache_len)
        self.reach = reach
        self.first = 0  # slot of the earliest token that is stored
        self.num_drafts = 0  # the most that came in one forward, and may all be rejected
        self.before = None  # (keys, values, first, length) until a long forward that took their place has ended

    @property
    def num_spare(self):
        """Tokens that are kept beyond the reach."""
        return max(ROOM, self.num_drafts)

    @property
    def most(self):
        """Slots that are enough for a sequence of any length."""
        return self.reach + self.num_spare

    @property
    def room(self):
        return math.inf if self.capacity == self.most else self.capacity

    def begin_with(self, keys, values, length):
        self.allocate(keys, values, keys.shape[2], keys.dtype)
        self.length, self.first = length, length - keys.shape[2]
        self.write([keys, values])
        self.rows.set_length(length)

    def expect_drafts(self, num_drafts):
        """Keep as many tokens beyond the reach as drafts come in one forward, which may all be rejected."""
        self.num_drafts = max(self.num_drafts, num_drafts)

    def append(self, keys, values):
        start, num_new = self.length, keys.shape[2]
        if self.keys is None:
            self.allocate(keys, values, num_new, keys.dtype)
        before = self.kept(min(start, self.reach - 1)) if start else (keys[:, :, :0], values[:, :, :0])
        reached = [torch.cat(pair, dim=2) for pair in zip(before, (keys, values), strict=True)]
        self.before = (self.keys, self.values, self.first, start) if start and num_new > self.num_spare else None
        if self.before is not None:  # or in its place would be what an interrupted forward has to give back
            self.allocate(keys, values, self.length + num_new, keys.dtype)
        else:
            self.make_room(start + num_new)
        self.length += num_new
        self.write([tensor.detach() for tensor in (reached if self.before is not None else (keys, values))])
        self.rows.set_length(self.length)
        return reached

    def write(self, newest):
        """Write the keys and values of the newest tokens, or of as many of them as there is room for."""
        num_kept = min(newest[0].shape[2], self.capacity)
        slot = torch.arange(self.length - num_kept, self.length, device=self.keys.device) % self.capacity
        for stored, tokens in zip((self.keys, self.values), newest, strict=True):
            stored.index_copy_(2, slot, tokens[:, :, tokens.shape[2] - num_kept :].to(stored.dtype))
        is_all = newest[0].shape[2] > num_kept or self.before is not None
        self.first = self.length - num_kept if is_all else max(self.first, self.length - self.capacity)

    def kept(self, num_slots):
        """The keys and values of the newest `num_slots` slots, in order."""
        return [in_order(stored, self.length - num_slots, self.length) for stored in (self.keys, self.values)]

    def saved(self):
        tensors = dict(zip(self.names, self.kept(self.length - self.first), strict=True))
        facts = {**super().saved()[1], "num_drafts": self.num_drafts, "before": None}
        if self.before is not None:
            *stored, first, length = self.before
            tensors |= {
                f"before.{name}": in_order(old, first, length) for name, old in zip(self.names, stored, strict=True)
            }
            facts["before"] = length
        return tensors, facts

    def restore_tensors(self, tensors, facts, device):
        self.num_drafts, before = facts["num_drafts"], None
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        if facts["before"] is not None:
            self.begin_with(*(tensors[f"before.{name}"] for name in self.names), facts["before"])
            before = (self.keys, self.values, self.first, self.length)
        self.begin_with(*(tensors[name] for name in self.names), facts["length"])
        self.before = before

    def newest_keys(self):
        return self.kept(self.length - self.first)[0]

    def write_in_graph(self, keys, values):
        """Write the keys and values of one token per row, after `make_room`."""
        slot = (self.on_device.length - 1) % self.capacity
        self.keys.index_copy_(2, slot, keys.detach().to(self.keys.dtype))
        self.values.index_copy_(2, slot, values.detach().to(self.values.dtype))

    def newest(self, num_slots):
        """Copies of the keys and values in the newest slots, in a graph; where fewer are filled, what is before them
        repeats one.
        """
        slot = torch.arange(-num_slots, 0, device=self.keys.device) + self.on_device.length
        slot = slot.clamp(min=0) % self.capacity
        return self.keys.index_select(2, slot), self.values.index_select(2, slot)

    def took_step(self, num_new):
        super().took_step(num_new)
        self.before = None
        self.first = max(self.first, self.length - self.capacity)

    def make_room(self, num_tokens):
        """Have storage for the newest of `num_tokens` that can be written."""
        self.prefetch()
        if self.capacity < min(num_tokens, self.most) or cannot_be_written(self.keys):
            self.move(slice(None), max(num_tokens, self.capacity))

    def move(self, batch_rows, num_slots, dtype=None):
        newest = [tensor[batch_rows] for tensor in self.kept(self.length - self.first)]
        self.allocate(*newest, num_slots, dtype or self.keys.dtype)
        self.before = None
        if self.length:
            self.write(newest)

    def allocate(self, like_keys, like_values, num_slots, dtype):
        num_slots = min(self.with_headroom(num_slots), self.most)
        with torch.inference_mode(False):  # tensors made in inference mode could not be written outside it
            self.keys, self.values = (
                like.new_zeros(*like.shape[:2], num_slots, like.shape[3], dtype=dtype)
                for like in (like_keys, like_values)
            )
        self.has_moved()

    def mask_sizes(self, num_new):
        num_reached = min(self.length, self.reach - 1)
        return num_reached + num_new, self.length - num_reached

    def reset(self):
        self.set_length(0)
        self.first = self.num_drafts = 0
        self.before = None

    def check_crop(self, num_removed, layer_idx):
        super().check_crop(num_removed, layer_idx)
        length = self.length - num_removed
        is_stored = self.first <= max(0, length - self.reach + 1) or length == 0  # of which nothing is needed
        if not is_stored and not self.is_before(length):
            most = self.length - max(self.first + self.reach - 1, 0)
            raise QuestError(
                f"crop cannot take back {num_removed} tokens: layer {layer_idx} attends its newest {self.reach} "
                f"tokens and keeps no more than {self.num_spare} before them, so what it would need is gone. Take back "
                f"{max(0, most)} at most, or continue from a copy.deepcopy of the cache that was made earlier. The "
                "content of the cache is unchanged."
            )

    def is_before(self, length):
        return self.before is not None and self.before[3] == length

    def crop(self, length):
        if length == self.length:
            return
        if self.is_before(length):
            self.keys, self.values, self.first, _ = self.before
            self.has_moved()
        self.before = None
        self.first = min(self.first, length)
        self.set_length(length)

    def reorder(self, sources, start=0):
        self.make_room(self.length)
        self.before = None
        self.write([tokens[sources] for tokens in self.kept(self.length - max(start, self.first))])
        self.left_padding = tuple(self.left_padding[row] for row in sources)


def in_order(stored, start, end):
    """The tokens in slots `start` to `end - 1` of a sequence, of [B, Hkv, C, D] in which slot s is at s modulo C."""
    capacity = stored.shape[2]
    first = start % capacity if end > start else 0
    beyond = max(0, first + end - start - capacity)
    newest = stored[:, :, first : first + end - start]
    return torch.cat([newest, stored[:, :, :beyond]], dim=2) if beyond else newest
