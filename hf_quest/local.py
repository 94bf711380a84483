"""LocalLayer: the newest keys and values of a layer whose attention does not reach further."""

import math

import torch
from transformers import DynamicCache

from .errors import QuestError
from .layers import Layer
from .settings import cannot_be_written

ROOM = 256  # tokens that are kept beyond a layer's reach at least, for drafts that are rejected and for `crop`


def reaches_of(config, max_positions):
    """How many tokens the local layers of a model attend, the newest included, by their index.

    By Transformers' own cache, which keeps as many. A layer that reaches all positions of the model is not local.
    """
    if not any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")):
        return {}
    reaches = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    return {idx: reach for idx, reach in enumerate(reaches) if reach is not None and reach < max_positions}


class LocalLayer(Layer):
    """Keys and values of a layer with a window or chunks: what its next token may reach and ROOM tokens before that, or
    as many as there were drafts in one forward.

    `keys`, `values` [B, Hkv, C, D]: the token in slot s of the sequence is at s modulo C, if s is `first` or later. C
    grows to `most`. Attention over it is dense, by the mask that the model has for such layers.
    """

    is_sliding = True
    num_kv_heads = 0

    def __init__(self, settings, layer_idx, reach):
        super().__init__(settings, layer_idx)
        self.reach = reach  # tokens, the query's own included
        self.first = 0  # slot of the earliest token that is stored
        self.num_drafts = 0  # the most that came in one forward, and may all be rejected
        self.before = None  # (keys, values, first, length) until a long forward that took their place has ended

    @property
    def num_attended(self):
        """Tokens that the next decode step attends per KV head."""
        return min(self.length, self.reach)

    num_stored = num_attended

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

    def lazy_initialization(self, key_states, value_states):
        self._allocate(key_states, value_states, key_states.shape[2], key_states.dtype)
        self.is_initialized = True

    def _begin_with(self, keys, values, length):
        self.length, self.first = length, length - keys.shape[2]
        self._write([keys, values])
        self.settings.set_length(length)

    def _store(self, keys, values):
        """Append; return the keys and values that the new tokens may reach."""
        start, num_new = self.length, keys.shape[2]
        if self.settings.draft_start is not None:
            self.num_drafts = max(self.num_drafts, min(num_new, start + num_new - self.settings.draft_start))
        before = self._newest(min(start, self.reach - 1)) if start else (keys[:, :, :0], values[:, :, :0])
        reached = [torch.cat(pair, dim=2) for pair in zip(before, (keys, values), strict=True)]
        self.before = (self.keys, self.values, self.first, start) if start and num_new > self.num_spare else None
        if self.before is not None:  # or in its place would be what an interrupted forward has to give back
            self._allocate(keys, values, self.length + num_new, keys.dtype)
        else:
            self.make_room(start + num_new)
        self.length += num_new
        self._write([tensor.detach() for tensor in (reached if self.before is not None else (keys, values))])
        self.settings.set_length(self.length)
        return reached

    def _write(self, newest):
        """Write the keys and values of the newest tokens, or of as many of them as there is room for."""
        num_kept = min(newest[0].shape[2], self.capacity)
        slot = torch.arange(self.length - num_kept, self.length, device=self.keys.device) % self.capacity
        for stored, tokens in zip((self.keys, self.values), newest, strict=True):
            stored.index_copy_(2, slot, tokens[:, :, tokens.shape[2] - num_kept :].to(stored.dtype))
        is_all = newest[0].shape[2] > num_kept or self.before is not None
        self.first = self.length - num_kept if is_all else max(self.first, self.length - self.capacity)

    def _newest(self, num_slots):
        """The keys and values of the newest `num_slots` slots, in order."""
        if not num_slots:
            return [stored[:, :, :0] for stored in (self.keys, self.values)]
        first = (self.length - num_slots) % self.capacity
        beyond = max(0, first + num_slots - self.capacity)
        newest = []
        for stored in (self.keys, self.values):
            end = stored[:, :, first : first + num_slots]
            newest.append(torch.cat([end, stored[:, :, :beyond]], dim=2) if beyond else end)
        return newest

    def update_captured(self, key_states, value_states):
        """`update` of one token per row in a graph, after `make_room`; what is returned stands for what is stored."""
        slot = (self.on_device.length - 1) % self.capacity
        self.keys.index_copy_(2, slot, key_states.detach().to(self.keys.dtype))
        self.values.index_copy_(2, slot, value_states.detach().to(self.values.dtype))
        return self._handed_over(self.keys, self.values)

    def newest(self, num_slots):
        """Copies of the keys and values in the newest slots, in a graph; where fewer are filled, what is before them
        repeats one.
        """
        slot = torch.arange(-num_slots, 0, device=self.keys.device) + self.on_device.length
        slot = slot.clamp(min=0) % self.capacity
        return self.keys.index_select(2, slot), self.values.index_select(2, slot)

    def took_step(self):
        super().took_step()
        self.before = None
        self.first = max(self.first, self.length - self.capacity)

    def make_room(self, num_tokens):
        """Have storage for the newest of `num_tokens` that can be written."""
        self.prefetch()
        if self.capacity < min(num_tokens, self.most) or cannot_be_written(self.keys):
            self._reallocate(slice(None), max(num_tokens, self.capacity))

    def _reallocate(self, rows, num_slots, dtype=None):
        """Move what is stored of `rows`, a slice or row numbers, to new storage."""
        newest = [tensor[rows] for tensor in self._newest(self.length - self.first)]
        self._allocate(*newest, num_slots, dtype or self.keys.dtype)
        self.before = None
        if self.length:
            self._write(newest)

    def _allocate(self, like_keys, like_values, num_slots, dtype):
        num_slots = min(self.settings.with_headroom(num_slots), self.most)
        with torch.inference_mode(False):  # tensors made in inference mode could not be written outside it
            self.keys, self.values = (
                like.new_zeros(*like.shape[:2], num_slots, like.shape[3], dtype=dtype)
                for like in (like_keys, like_values)
            )
        self.on_device = self.settings.on(self.keys.device)
        self.has_moved()

    def set_left_padding(self, left_padding):
        """Take over how many slots at the start of each row hold no token, which this layer's masks say too."""
        if left_padding != self.left_padding:
            self._set_padding(left_padding)

    def padding_mask(self):
        return None

    def num_decoding(self, num_queries):
        return 0

    def reads_prompt(self, *args):
        return False

    def get_mask_sizes(self, query_length):
        num_reached = min(self.length, self.reach - 1)
        return num_reached + query_length, self.length - num_reached

    def reset(self):
        """Forget every token; the storage is kept."""
        self.length = self.first = self.num_drafts = 0
        self.settings.set_length(0)
        self.pending, self.before = False, None

    def check_crop(self, num_removed):
        super().check_crop(num_removed)
        length = self.length - num_removed
        is_stored = self.first <= max(0, length - self.reach + 1) or length == 0  # of which nothing is needed
        if not is_stored and not self._is_before(length):
            most = self.length - max(self.first + self.reach - 1, 0)
            raise QuestError(
                f"crop cannot take back {num_removed} tokens: layer {self.layer_idx} attends its newest {self.reach} "
                f"tokens and keeps no more than {self.num_spare} before them, so what it would need is gone. Take back "
                f"{max(0, most)} at most, or continue from a copy.deepcopy of the cache that was made earlier. The "
                "content of the cache is unchanged."
            )

    def _is_before(self, length):
        return self.before is not None and self.before[3] == length

    def crop(self, tokens_to_remove):
        """Drop the newest `-tokens_to_remove` tokens."""
        self.check_crop(-tokens_to_remove)
        length = self.length + tokens_to_remove
        if tokens_to_remove == 0:
            return
        if self._is_before(length):
            self.keys, self.values, self.first, _ = self.before
            self.has_moved()
        self.before = None
        self.length = length
        self.first = min(self.first, length)
        self.settings.set_length(length)

    def reorder(self, sources, start=0):
        """Rows take the tokens of the rows `sources`, a list; before slot `start` they hold the same."""
        if self.length:
            self.make_room(self.length)
            self.before = None
            self._write([tokens[sources] for tokens in self._newest(self.length - max(start, self.first))])
            self.left_padding = tuple(self.left_padding[row] for row in sources)

    def find_addresses(self):
        return [0] * 6
