"""QuestCache: a Transformers cache that keeps every token and lets a decode step read only the pages that it needs."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from . import ops, reference
from . import prefill as prompts
from .prefill import BlockScores, CritiPrefill

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PREPARED, TAKEN = "prepared", "taken"
# What models and `generate` call their cache. From Transformers 5.24 on the former name is deprecated.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


outside_of_graphs = torch.compiler.disable(
    reason="a graph can hold one decode step of a QuestCache, after its get_mask_sizes(1, 0) as `generate` calls it"
)


class QuestError(RuntimeError):
    """A model or a call that Quest cannot serve. The message says what, why, and what to do."""


@dataclass
class OnDevice:
    """What the kernels and captured graphs read of a cache, on one device, in tensors that stay the same.

    It is written outside of captured graphs, so that they stay right while the sequence grows and its storage moves.
    """

    length: torch.Tensor = None  # [1] int64, slots filled, those of the forward under way included
    padding: torch.Tensor = None  # [B] int64, slots at the start of each row that hold no token
    addresses: torch.Tensor = None  # [layers, 6] int64, see ops.decode


class MaskLength(int):
    """How many keys an attention mask is asked for, and by which cache: its own way to the mask function."""

    def __new__(cls, num_keys, cache):
        length = super().__new__(cls, num_keys)
        length.cache = cache
        return length


@dataclass
class Settings:
    """What a cache shares with its layers."""

    budget: int  # tokens
    page_size: int  # tokens
    dense_layers: int
    max_cache_len: int | None  # tokens
    bounds_dtype: torch.dtype | None = None  # torch.int8, or None for that of the keys
    prefill: CritiPrefill | None = None
    block_scores: BlockScores = field(default_factory=BlockScores)
    draft_start: int | None = None  # slot from which on several new tokens are drafts and select one by one
    length: int = 0  # slots filled, those of the forward under way included
    left_padding: tuple = ()  # slots at the start of each row that hold no token
    addresses: list = field(default_factory=list)  # a row for each layer, see ops.decode
    devices: dict = field(default_factory=dict)  # of every device of a layer, the OnDevice
    step: str | None = None  # of a captured decode: None, PREPARED or TAKEN
    is_recording: bool = False  # of a step in a CUDA graph, without compilation
    max_positions: float = math.inf  # tokens of context that the model is made for
    reads_everything: bool = False  # in a captured decode, as far as the model's context goes
    num_masked: int | None = None  # tokens whose attention mask is known to be the layers' left padding
    common: list = field(default_factory=list)  # [B][B] slots from the first on that two rows are known to share
    recorder: Callable | None = None  # is told which pages a layer selected, see QuestCache.recorder
    score: reference.Score = reference.DEFAULT

    @property
    def num_selected(self):
        """Pages that a decode step attends per KV head: the budget in whole pages."""
        return -(-self.budget // self.page_size)

    @property
    def is_captured(self):
        """Whether the forward under way goes into a graph, which must not depend on what is stored."""
        return self.is_recording or torch.compiler.is_compiling()

    def on(self, device):
        """The OnDevice of a device: the same one every time."""
        if device not in self.devices:
            self.devices[device] = OnDevice()
        on_device = self.devices[device]
        if on_device.length is None or cannot_be_written(on_device.length):
            with torch.inference_mode(False):
                on_device.length = torch.tensor([self.length], dtype=torch.int64, device=device)
                on_device.padding = torch.tensor(self.left_padding, dtype=torch.int64, device=device)
                on_device.addresses = None
        return on_device

    def set_length(self, length):
        if length < self.length:
            self.common = []
        if length != self.length:
            self.length = length
            for device in self.devices:
                self.on(device).length.fill_(length)

    def choose_kernel(self, num_tokens):
        """For a captured step that makes it `num_tokens`: dense attention if the budget covers these and all to come.

        Not if it covers these alone, or the graph would have to be another one in the middle of a text.
        """
        budget = self.num_selected * self.page_size
        end = min(self.max_positions, self.max_cache_len or math.inf)
        self.reads_everything = budget >= max(num_tokens, end)

    def set_left_padding(self, left_padding):
        """Take over a tuple of B ints."""
        if left_padding != self.left_padding:
            self.left_padding = left_padding
            for device in self.devices:
                on_device = self.on(device)
                on_device.padding = written_to(on_device.padding, left_padding, device)

    def take_sources(self, sources, length):
        """Know that the rows take the `length` tokens of the rows `sources`; return the first slot that one must copy.

        Beams of one prompt share all but the end, and only ends are copied.
        """
        rows = range(len(sources))
        common = self.common if len(self.common) == len(rows) else [[0] * len(rows) for _ in rows]
        self.common = [
            [length if source == other else common[source][other] for other in sources] for source in sources
        ]
        return min((common[row][sources[row]] for row in rows if row != sources[row]), default=length)

    def set_addresses(self, rows):
        """Take over a list with one row for each layer, see ops.decode."""
        if rows != self.addresses:
            self.addresses = rows
            for device in self.devices:
                on_device = self.on(device)
                on_device.addresses = written_to(on_device.addresses, rows, device)


def written_to(tensor, numbers, device):
    """`tensor` with `numbers` in it, or a new int64 tensor on `device` where it is None or of another shape."""
    numbers = torch.tensor(numbers, dtype=torch.int64)
    if tensor is None or tensor.shape != numbers.shape:
        with torch.inference_mode(False):
            return numbers.to(device)
    return tensor.copy_(numbers)


class QuestLayer(CacheLayerMixin):
    """Keys, values and page bounds of one layer, and the attention of a decode step over them.

    `keys`, `values` [B, Hkv, capacity, D] and `bounds` [B, Hkv, capacity / S, 2, D] are appended to in place; the first
    `length` slots are filled. Bounds in 8 bits have `scales` [B, Hkv, capacity / S, D / 32]. A layer that is always
    dense has no bounds.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, settings, layer_idx, is_dense):
        super().__init__()
        self.settings = settings
        self.layer_idx = layer_idx
        self.is_dense = is_dense
        self.prefill = settings.prefill  # None where every prompt is dense
        if settings.prefill is not None and layer_idx < settings.prefill.dense_layers:
            self.prefill = None
        self.num_kv_heads = 0
        self.bounds = self.scales = None
        self.length = 0
        self.on_device = None  # settings.on the device of this layer
        self.has_kernels = False  # whether the CUDA kernels serve this layer; otherwise the reference does
        self.scores = None  # [B, Hkv, 1, P] float32, which the kernels of a captured step work in
        self.counters = None  # of the kernels, see ops.new_counters
        self.not_stored = None  # the new key and value of a captured step, until its attention stores them
        self.num_new = 0  # slots filled by the last update
        self.left_padding = ()  # slots per row that the bounds leave out
        self.pending = False  # keys and values were handed to the model and have not reached its attention
        self.is_plainly_masked = True  # in the last forward: causally, with left padding at most
        self.has_foreign_mask = False  # in the last forward: one that is not from this package's mask function

    @property
    def capacity(self):
        return self.keys.shape[2] if self.is_initialized else 0

    @property
    def is_sparse(self):
        """Whether a decode step on the tokens stored now reads less than all of them."""
        # A captured step does not know the length, and serves all that the storage may come to hold.
        num_tokens = self.capacity if self.settings.is_captured else self.length
        return not self.is_dense and num_tokens > self.settings.num_selected * self.settings.page_size

    @property
    def padding(self):
        """[B] int64, slots at the start of each row that hold no token."""
        return self.on_device.padding

    @property
    def selects_pages(self):
        """Whether the next decode step does, as far as the last forward's attention mask tells."""
        return self.is_sparse and self.is_plainly_masked

    @property
    def bounds_in_tokens(self):
        """The bytes of the bounds, in those of one token's key and value."""
        of_tokens, of_pages = (
            sum(tensor[0, 0, 0].nbytes for tensor in tensors if tensor is not None)
            for tensors in ((self.keys, self.values), (self.bounds, self.scales))
        )
        return self.length / self.settings.page_size * of_pages / of_tokens

    def lazy_initialization(self, key_states, value_states):
        self._allocate(key_states, value_states, key_states.shape[0], self._with_headroom(key_states.shape[2]))
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Append [B, Hkv, T, D] keys and values; return views of everything stored, which carry this layer."""
        key_states, value_states = key_states.detach(), value_states.detach()
        self.check(key_states, value_states)
        end = self.length + key_states.shape[2]
        if self.length == 0 and not self._fits(key_states, value_states):
            self.lazy_initialization(key_states, value_states)
        if self.length == 0:  # earlier layers may have seen the padding of this prompt
            known = self.settings.left_padding
            self._set_padding(known if len(known) == key_states.shape[0] else (0,) * key_states.shape[0])
        self.make_room(end)
        self.settings.set_length(end)
        self._append(key_states, value_states, end)
        self.length = end
        self.num_new = key_states.shape[2]
        self.pending = True
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        # Fresh views: the attribute on a stored buffer would be a reference cycle, freed late.
        keys.quest_layer = values.quest_layer = self
        return keys, values

    def update_captured(self, key_states, value_states):
        """`update` of one token per row in a graph, after `make_room`.

        What is returned carries this layer and stands for the stored tokens: all slots, filled or not, or with the
        kernels the new token alone, which `attend` or `newest` stores.
        """
        keys, values = key_states.detach(), value_states.detach()
        if self.has_kernels:
            self.not_stored = (keys, values)
        else:
            self._append(keys, values, self.on_device.length)
            keys, values = self.keys, self.values
        keys, values = keys.view_as(keys), values.view_as(values)
        keys.quest_layer = values.quest_layer = self
        return keys, values

    def _store_captured(self):
        if self.not_stored is not None:
            self._append(*self.not_stored, self.on_device.length)
            self.not_stored = None

    def _append(self, key_states, value_states, end):
        stored, new = (self.keys, self.values, self.bounds, self.scales), (key_states, value_states)
        if self.has_kernels:
            where = (self.on_device.length, self.padding, self.settings.page_size)
            torch.ops.hf_quest.append(*stored, *new, *where)
        else:
            reference.append(*stored, *new, end, self.padding, self.settings.page_size)

    def make_room(self, num_tokens):
        """Have storage for `num_tokens` that can be written."""
        if num_tokens > self.capacity:
            self._reallocate(slice(None), self._with_headroom(num_tokens))
        elif cannot_be_written(self.keys):
            self._reallocate(slice(None), self.capacity)

    def check(self, key_states, value_states):
        """Raise for keys and values that cannot be appended. Nothing is changed."""
        if key_states.shape[1] == 1 and key_states.shape[-1] != value_states.shape[-1]:
            raise QuestError(
                "This model caches latents (MLA), not keys and values, so pages have no bounds to select by. Load it "
                "with another attn_implementation and without QuestCache."
            )
        if key_states.dtype not in DTYPES:
            raise ValueError(
                f"QuestCache stores float32, float16 or bfloat16 keys, and this model's are {key_states.dtype}. Load "
                "the model with one of these dtypes."
            )
        self.check_room(key_states.shape[2])
        if self.length == 0:
            return
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            if stored.shape[0] != new.shape[0]:
                raise ValueError(
                    f"The cache holds {stored.shape[0]} rows and this batch has {new.shape[0]}. Call cache.reset() or "
                    "use a new QuestCache for another batch. The content of the cache is unchanged."
                )
            if (stored.shape[1], stored.shape[3], stored.dtype) != (new.shape[1], new.shape[3], new.dtype):
                raise ValueError(
                    f"The cache holds {stored.shape[1]} heads of dim {stored.shape[3]} in {stored.dtype}, and this "
                    f"model brings {new.shape[1]} of dim {new.shape[3]} in {new.dtype}: it is another model's cache. "
                    "Use a new QuestCache. The content of this one is unchanged."
                )

    def check_room(self, num_new):
        """Raise if `num_new` more tokens are more than max_cache_len."""
        max_cache_len = self.settings.max_cache_len
        if max_cache_len is not None and self.length + num_new > max_cache_len:
            raise ValueError(
                f"max_cache_len={max_cache_len} tokens are not enough: {self.length} are stored and {num_new} more "
                "arrive. Make the cache with a larger max_cache_len, or without one to let it grow. Its content is "
                "unchanged."
            )

    def set_left_padding(self, left_padding):
        """Take over how many slots at the start of each row hold no token: a tuple of B ints."""
        if left_padding == self.left_padding:
            return
        self.settings.common = []
        self._set_padding(left_padding)
        self._refresh_bounds(self.length)

    def num_decoding(self, num_queries):
        """How many of the last `num_queries` queries are decode steps, each of which selects for itself."""
        # A prompt of several tokens may come with one query: KV-shared layers compute only what the next token needs.
        if self.num_new == 1:
            return 1
        if self.settings.draft_start is None:
            return 0
        return min(num_queries, max(0, self.length - self.settings.draft_start))

    def kernels_attend(self, query):
        """Whether the kernels do the attention of these queries, [B, Hq, T, D]."""
        # They take one query at a time, which is too slow where each of several would read everything.
        is_one_by_one = query.shape[2] == 1 or self.is_sparse
        return self.has_kernels and is_one_by_one and query.shape[1] <= ops.MAX_GROUP * self.num_kv_heads

    def attend(self, query, scaling, softcap=None, sinks=None):
        """Attention of the newest T tokens, [B, Hq, T, D], each over the pages that it selects (Quest, algorithm 1)."""
        page_size = self.settings.page_size
        is_captured = self.settings.is_captured
        if self.kernels_attend(query):
            query, sinks = query.detach(), None if sinks is None else sinks.detach().to(query.dtype)
            if is_captured:
                return self._attend_captured(query, scaling, softcap, sinks)
            outputs = [
                self._attend_by_kernels(query[:, :, idx : idx + 1], idx + 1 - query.shape[2], scaling, softcap, sinks)
                for idx in range(query.shape[2])
            ]
            return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
        self._store_captured()
        length = self.on_device.length if is_captured else self.length
        page_ids = None  # which is all of them
        if self.is_sparse:
            page_ids = self.select(query, length, scaling)
            self._record(query, page_ids, scaling, softcap, sinks)
        return reference.attend(
            query, self.keys, self.values, page_ids, length, self.padding, page_size, scaling, softcap, sinks
        )

    def select(self, query, length, scaling):
        """The pages of the newest T tokens' queries, [B, Hq, T, D]: `reference.estimate` and `reference.select`."""
        settings = self.settings
        num_pages = None if settings.is_captured else self._num_pages(length)
        bounds = [None if tensor is None else tensor[:, :, :num_pages] for tensor in (self.bounds, self.scales)]
        where = (length, self.padding)
        scores = reference.estimate(query, *bounds, *where, settings.page_size, scaling, settings.score)
        return reference.select(scores, *where, settings.num_selected, settings.page_size, settings.score.keeps_first)

    def _record(self, query, page_ids, scaling, softcap, sinks):
        if self.settings.recorder is not None:
            self.settings.recorder(self, query.detach(), page_ids, scaling, softcap, sinks)

    def reads_prompt(self, query, num_keys, needs_eager):
        """Whether `attend_prompt` is for these queries: it has sparse segments, or is a faster way to be dense.

        `needs_eager` tells that the model's own dense attention is not SDPA.
        """
        num_tokens = num_keys - min(self.left_padding)  # of the longest row
        if self.prefill is not None and self.prefill.is_sparse(query.shape[2], num_tokens):
            return True
        is_free = not needs_eager and not query.requires_grad  # to choose, and to leave no trace for gradients
        return is_free and prompts.is_faster(query, self.values, num_keys, any(self.left_padding))

    def attend_prompt(self, query, keys, values, scaling, softcap=None, sinks=None):
        """Attention [B, T, Hq, D] of the newest T of the tokens in `keys` and `values`, dense or by CritiPrefill."""
        self.settings.block_scores.enter(self.layer_idx)
        earlier = self.settings.block_scores
        return prompts.attend(query, keys, values, self.left_padding, self.prefill, earlier, scaling, softcap, sinks)

    def newest(self, num_slots):
        """Copies of the keys and values in the newest slots; where fewer are filled, what is before them repeats one.

        The one view of the stored tokens that a captured graph, which does not know the length, can have.
        """
        self._store_captured()
        slot = torch.arange(-num_slots, 0, device=self.keys.device) + self.on_device.length
        slot = slot.clamp(min=0)
        return self.keys.index_select(2, slot), self.values.index_select(2, slot)

    def padding_mask(self):
        """[B, 1, 1, N] bool, False in left padding, or None without any."""
        if not any(self.left_padding):
            return None
        slot = torch.arange(self.length, device=self.padding.device)
        return (slot >= self.padding[:, None])[:, None, None]

    def _attend_by_kernels(self, query, offset, scaling, softcap, sinks):
        """Attention of the one query, [B, Hq, 1, D], whose token stands `offset`, 0 or less, from the newest."""
        # Not by `ops`, whose checks would tell of this layer's own tensors at every step.
        by_kernel, settings = torch.ops.hf_quest, self.settings
        length = self.on_device.length
        where = (length + offset if offset else length, self.padding)
        options = (settings.page_size, scaling, softcap, sinks)
        if self.is_sparse:
            stored = (self.keys, self.values, self.bounds, self.scales)
            page_ids = None  # which nobody asks for
            if settings.recorder is not None:
                page_ids = self.padding.new_empty(*self.keys.shape[:2], 1, settings.num_selected)
            where += (settings.num_selected,)
            output = by_kernel.chain(query, *stored, *where, *options, page_ids, *settings.score)
            if page_ids is not None:
                self._record(query, page_ids, scaling, softcap, sinks)
            return output
        return by_kernel.attend(query, self.keys, self.values, None, *where, self.counters, *options)

    def _attend_captured(self, query, scaling, softcap, sinks):
        new_keys, new_values = self.not_stored or (None, None)
        self.not_stored = None
        on_device, settings = self.on_device, self.settings
        return ops.decode(
            query,
            new_keys,
            new_values,
            on_device.addresses,
            on_device.length,
            on_device.padding,
            self.layer_idx,
            self.num_kv_heads,
            0 if self.is_dense or settings.reads_everything else settings.num_selected,
            settings.page_size,
            scaling,
            softcap,
            sinks,
            settings.score,
        )

    def find_addresses(self):
        """The row of this layer in `ops.decode`'s addresses."""
        if not self.has_kernels:
            return [0] * ops.NUM_ADDRESSES
        tensors = [self.keys, self.values, self.bounds, self.scales, None if self.is_dense else self.scores]
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors] + [self.capacity]

    def get_seq_length(self):
        return self.length

    def get_max_length(self):
        return -1 if self.settings.max_cache_len is None else self.settings.max_cache_len

    def get_mask_sizes(self, query_length):
        return self.length + query_length, 0

    def reset(self):
        """Forget every token; the storage is kept."""
        self.length = 0
        self.settings.set_length(0)
        self.pending = False
        if self.is_initialized:
            self._set_padding((0,) * self.keys.shape[0])

    def crop(self, tokens_to_remove):
        """Drop the newest `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0 or -tokens_to_remove > self.length:
            raise ValueError(
                f"crop takes minus the number of tokens to remove, from 0 to -{self.length} here, not "
                f"{tokens_to_remove}. The content of the cache is unchanged."
            )
        if tokens_to_remove < 0:
            self.length += tokens_to_remove
            self.settings.set_length(self.length)
            self._refresh_bounds(min(self.length, 1))
            if self.length == 0:
                self._set_padding((0,) * self.keys.shape[0])

    def reorder_cache(self, beam_idx):
        """Rows take the tokens of the rows `beam_idx` [B], in place."""
        self.settings.common = []
        self.reorder(beam_idx.tolist())

    def reorder(self, sources, start=0):
        """`reorder_cache` of a list of rows, which hold what their sources hold before the slot `start`.

        A row that stays is not copied, and only a cycle needs a row to spare.
        """
        if not self.is_initialized:
            return
        copies = copies_in_order(sources)
        for tensor in self._filled(start):
            spare = None
            for target, source in copies:
                if target is None:
                    spare = tensor[source].clone()
                else:
                    tensor[target].copy_(spare if source is None else tensor[source])
        if any(self.left_padding):
            self._set_padding(tuple(self.left_padding[row] for row in sources))

    def batch_repeat_interleave(self, repeats):
        if self.is_initialized:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices):
        """Keep the rows `indices`, a [rows] tensor of row numbers or a [B] mask, in that order."""
        if not self.is_initialized:
            return
        rows = torch.arange(self.keys.shape[0], device=self.keys.device)[indices.to(self.keys.device)]
        self.settings.common = []
        self._reallocate(rows, self.capacity)
        self._set_padding(tuple(self.left_padding[row] for row in rows.tolist()))

    def _fits(self, key_states, value_states):
        """Whether the storage, empty now, is one for these keys and values."""
        return self.is_initialized and all(
            (stored.shape[:2], stored.shape[3], stored.dtype, stored.device)
            == (new.shape[:2], new.shape[3], new.dtype, new.device)
            for stored, new in ((self.keys, key_states), (self.values, value_states))
        )

    def _with_headroom(self, num_tokens):
        """What to allocate for `num_tokens`: an eighth more, so that a long generation copies its cache seldom."""
        max_cache_len = self.settings.max_cache_len
        return num_tokens + max(num_tokens // 8, 256) if max_cache_len is None else max_cache_len

    def _reallocate(self, rows, num_slots):
        """Move the filled slots of `rows`, a slice or row numbers, to new storage of `num_slots`."""
        filled = [tensor[rows] for tensor in self._filled()]
        keys, values = filled[:2]
        self._allocate(keys, values, keys.shape[0], num_slots)
        for tensor, content in zip(self._filled(), filled, strict=True):
            tensor.copy_(content)

    def _filled(self, start=0):
        """Views of what is stored of the slots from `start` on: keys, values, and what bounds and scales there are."""
        slots = slice(start, self.length)
        # Of the most padded row, whose pages have the lowest numbers.
        first_page = max(0, start - max(self.left_padding, default=0)) // self.settings.page_size
        pages = slice(first_page, self._num_pages(self.length))
        of_pages = [tensor[:, :, pages] for tensor in (self.bounds, self.scales) if tensor is not None]
        return [self.keys[:, :, slots], self.values[:, :, slots], *of_pages]

    def _allocate(self, like_keys, like_values, batch_size, num_slots):
        """New storage, its slots rounded up to whole pages, and what the kernels want beside it."""
        unit = self.settings.page_size if self.prefill is None else self.prefill.block_size  # pages are in whole blocks
        num_pages = self._num_pages(-(-num_slots // unit) * unit)
        num_kv_heads, head_dim = like_keys.shape[1], like_keys.shape[-1]
        # Tensors made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            slots = (batch_size, num_kv_heads, num_pages * self.settings.page_size)
            self.keys = like_keys.new_empty(*slots, head_dim)
            self.values = like_values.new_empty(*slots, like_values.shape[-1])
            if not self.is_dense:
                pages, bounds_dtype = (batch_size, num_kv_heads, num_pages), self.settings.bounds_dtype
                self.bounds = like_keys.new_empty(*pages, 2, head_dim, dtype=bounds_dtype)
                if bounds_dtype is not None:
                    num_scales = -(-head_dim // reference.SCALE_BLOCK)
                    self.scales = like_keys.new_empty(*pages, num_scales, dtype=torch.uint8)
            self.has_kernels = ops.serves(self.keys, self.values, self.settings.page_size)
            if self.has_kernels:
                self.counters = ops.new_counters(self.keys)
                self.scores = self.keys.new_empty(batch_size, num_kv_heads, 1, num_pages, dtype=torch.float32)
        self.num_kv_heads = num_kv_heads
        self.on_device = self.settings.on(self.keys.device)
        # Without the kernels: one graph for every capacity, and one more recording of it where the storage moves.
        for tensor in filter(torch.is_tensor, (self.keys, self.values, self.bounds, self.scales)):
            torch._dynamo.maybe_mark_dynamic(tensor, 2)
            torch._dynamo.mark_static_address(tensor)

    def _set_padding(self, left_padding):
        self.left_padding = left_padding
        self.settings.set_left_padding(left_padding)

    def _refresh_bounds(self, num_newest):
        if self.bounds is not None:
            where = (num_newest, self.length, self.padding, self.settings.page_size)
            reference.refresh_bounds(self.keys, self.bounds, self.scales, *where)

    def _num_pages(self, num_tokens):
        return -(-num_tokens // self.settings.page_size)


class QuestCache(Cache):
    """A key/value cache for `model.generate(past_key_values=QuestCache(budget=2048))` of a model that was loaded with
    `attn_implementation="quest"` (Quest, arXiv 2406.10774). From Transformers 5.24 on the argument is called `cache`,
    and the former name works until 6.0.

    Every token is kept. A forward with one new token per row attends, in each layer after the first `dense_layers` and
    for each KV head, the newest page, the first and those that may matter most to the query, `budget` tokens in all.
    Where no more than `budget` tokens are stored it is dense attention. Longer forwards (the prompt) follow `prefill`.
    While `generate` is in assisted decoding every drafted token selects for itself, as if fed alone; that ends with the
    next `generate` or `reset`. The cache carries no gradients.

    Args:
        budget: tokens that each KV head may attend in one decode step, rounded up to whole pages, at least two pages.
            May be changed at any time by assignment.
        page_size: tokens in a page, a power of two.
        dense_layers: how many of the first layers attend everything (Quest, section 3.4).
        max_cache_len: tokens per row to allocate at once. By default storage follows the prompt and grows.
        compile: whether `generate` may compile its decode step on a GPU, as it does for a StaticCache. Storage that
            grows costs one more recording of the CUDA graph, no compilation.
        prefill: a CritiPrefill, by which long prompts are read; by default they are dense.
        bounds_dtype: torch.int8, in which pages' minima and maxima are rounded outwards, so that scores stay upper
            bounds, and a step reads half as many bytes of them as in 16 bits; or None for the dtype of the keys, as in
            the paper.
        score: how pages are scored. "default": the middle of q·k within a page's bounds and half of its half width, the
            row's first page kept, which loses several times less on pretrained models than "published", the paper's
            upper bound. Or a `hf_quest.reference.Score`.

    Raises:
        ValueError: for arguments outside these ranges, and later for a batch, model, dtype or length that does not fit;
            the cache is then as it was before.
        QuestError: for a model that Quest cannot serve.
    """

    def __init__(
        self,
        budget=2048,
        *,
        page_size=16,
        dense_layers=2,
        max_cache_len=None,
        compile=True,
        prefill=None,
        bounds_dtype=torch.int8,
        score="default",
    ):
        if not _is_int(page_size) or page_size < 1 or page_size & (page_size - 1):
            raise ValueError(
                f"page_size is a number of tokens and a power of two (16 in the paper), not {page_size!r}."
            )
        if not _is_int(dense_layers) or dense_layers < 0:
            raise ValueError(f"dense_layers is a number of layers, 0 or more, not {dense_layers!r}.")
        if max_cache_len is not None and (not _is_int(max_cache_len) or max_cache_len < 1):
            raise ValueError(
                f"max_cache_len is a number of tokens, or None for a cache that grows, not {max_cache_len!r}."
            )
        if prefill is not None and not isinstance(prefill, CritiPrefill):
            raise ValueError(f"prefill is a CritiPrefill, or None for dense prompts, not {prefill!r}.")
        if prefill is not None and prefill.block_size % page_size:
            raise ValueError(
                f"CritiPrefill's blocks of {prefill.block_size} tokens are not made of whole pages of {page_size}. "
                "Make block_size a multiple of page_size."
            )
        if bounds_dtype not in (torch.int8, None):
            raise ValueError(f"bounds_dtype is torch.int8, or None for the dtype of the keys, not {bounds_dtype!r}.")
        budget = _checked_budget(budget, page_size)
        score = _checked_score(score)
        self.settings = Settings(budget, page_size, dense_layers, max_cache_len, bounds_dtype, prefill, score=score)
        self.compile = compile
        super().__init__(layers=[])

    def __repr__(self):
        return (
            f"QuestCache(budget={self.budget}, page_size={self.page_size}, dense_layers={self.dense_layers}, "
            f"max_cache_len={self.max_cache_len}, layers={len(self.layers)}, tokens={self.get_seq_length()})"
        )

    @property
    def budget(self):
        """Tokens that each KV head may attend in one decode step."""
        return self.settings.budget

    @budget.setter
    def budget(self, budget):
        self.settings.budget = _checked_budget(budget, self.page_size)

    @property
    def recorder(self):
        """None, or what every layer that selects pages calls with (layer, query, page_ids, scaling, softcap, sinks).

        `page_ids` [B, Hkv, T, K] int64 are those of the layer's newest T tokens, whose queries [B, Hq, T, D] are
        `query`, as `reference.select` returns them; the others are those of `reference.attend`. A layer that reads
        everything does not call it. With a recorder `generate` does not compile its decode step.
        `hf_quest.pages.PageReads` is a recorder.
        """
        return self.settings.recorder

    @recorder.setter
    def recorder(self, recorder):
        self.settings.recorder = recorder

    @property
    def page_size(self):
        return self.settings.page_size

    @property
    def dense_layers(self):
        return self.settings.dense_layers

    @property
    def max_cache_len(self):
        return self.settings.max_cache_len

    @property
    def prefill(self):
        """The CritiPrefill by which prompts are read, or None."""
        return self.settings.prefill

    def watch_prefill(self, watch):
        """Have `watch(layer_idx, position, query, keys, block_ids)` called for every slab of segments, or None.

        The slab begins at `position` of its row; query [Hq, R · L, D] of its R segments, keys [Hkv, N, D] of the row,
        block_ids [Hkv, R, K] of the blocks that the segments attend.
        """
        self.settings.block_scores.watch = watch

    @property
    def tokens_attended(self):
        """Tokens that one decode step attends per KV head with what is stored now, for each layer."""
        self._settle()
        return [
            self.settings.num_selected * self.page_size if layer.selects_pages else layer.length
            for layer in self.layers
        ]

    @property
    def read_share(self):
        """Bytes of keys, values and bounds that a decode step reads now, over the bytes of all keys and values."""
        self._settle()
        stored = sum(layer.length for layer in self.layers)
        if stored == 0:
            return 1.0
        bounds = sum(layer.bounds_in_tokens for layer in self.layers if layer.selects_pages)
        return (sum(self.tokens_attended) + bounds) / stored

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if not self.settings.is_captured:
            return self._update(key_states, value_states, layer_idx)
        if self._takes_step(layer_idx, key_states.shape[2]):
            return self.layers[layer_idx].update_captured(key_states, value_states)
        return self._update_outside_of_graph(key_states, value_states, layer_idx)

    def _update(self, key_states, value_states, layer_idx):
        self._settle()
        self.settings.step = None
        if layer_idx == 0:
            self._check_last_forward_was_whole()
        elif layer_idx <= len(self.layers) and self.layers[layer_idx - 1].pending:
            before = self.layers[layer_idx - 1]
            self._crop_to(before.length - before.num_new)
            raise QuestError(
                "The keys and values that the cache handed to the model never reached Quest's attention. Load the "
                'model with attn_implementation="quest". If you did, this model changes keys and values on the way, '
                "and Quest cannot serve it. The content of the cache is unchanged."
            )
        if layer_idx >= len(self.layers):
            self._add_layer(layer_idx, key_states.shape[2])
        return self.layers[layer_idx].update(key_states, value_states)

    _update_outside_of_graph = outside_of_graphs(_update)

    def _check_last_forward_was_whole(self):
        length = min((layer.length for layer in self.layers), default=0)
        if self.layers and self.layers[-1].pending:  # its attention never came
            length = min(length, self.layers[-1].length - self.layers[-1].num_new)
        num_ahead = sum(layer.length > length for layer in self.layers)
        if num_ahead:
            self._crop_to(length)
            raise QuestError(
                f"The last forward filled {num_ahead} of this cache's {len(self.layers)} layers and did not end: it "
                "was interrupted, its model has fewer layers than the one before, or it is not loaded with "
                f'attn_implementation="quest". The cache has been put back to the {length} tokens before; repeat the '
                "call with the same model, or use a new QuestCache."
            )

    def _add_layer(self, layer_idx, num_new):
        if layer_idx > len(self.layers):
            raise QuestError(
                f"Layer {len(self.layers)} of this model caches no keys and values: a hybrid of attention with linear "
                "attention or convolutions, which QuestCache does not serve. Use the model without QuestCache."
            )
        if self.layers and self.layers[0].length != num_new:
            num_layers = len(self.layers)
            self._crop_to(self.layers[0].length - num_new)
            raise ValueError(
                f"The cache holds tokens of {num_layers} layers and this model has more: it is another model's cache, "
                "or its first forward was interrupted. Use a new QuestCache. The content of this one is unchanged."
            )
        self.layers.append(QuestLayer(self.settings, layer_idx, is_dense=layer_idx < self.dense_layers))

    def _crop_to(self, length):
        for layer in self.layers:
            layer.crop(length - layer.length)
            layer.pending = False

    def _prepare_step(self):
        """Do outside of the graph, before a decode step that may be a captured one, what a graph cannot do."""
        num_tokens = self.get_seq_length() + 1
        self.layers[0].check_room(1)
        for layer in self.layers:
            layer.make_room(num_tokens)
        self.settings.set_length(num_tokens)
        self.settings.choose_kernel(num_tokens)
        self.settings.set_addresses([layer.find_addresses() for layer in self.layers])
        self.settings.step = PREPARED

    def _takes_step(self, layer_idx, num_new):
        """In a graph: whether this is the decode step that was prepared."""
        if layer_idx == 0 and num_new == 1 and self.settings.step == PREPARED:
            self.settings.step = TAKEN  # a mark, since a count would be compiled as a constant
            return True
        return layer_idx > 0 and self.settings.step == TAKEN

    def _settle(self):
        """Count the token of the captured step that has run since it was prepared."""
        if self.settings.step == TAKEN:
            self.settings.step = None
            for layer in self.layers:
                layer.length += 1
                layer.num_new = 1

    @property
    def is_compileable(self):
        # In a graph it is asked for whether a mask must hide unused slots, which the kernels never read.
        if not self.compile or self.recorder is not None or self.settings.is_captured:
            return False
        # `generate` would compile the chunks of a prompt too. They are dense, and have all to lose from a graph that
        # cannot know how many keys there are. A model on several devices is not one graph. Llama 4 is never compiled,
        # and the masks that Transformers 5.17 would make for that fail.
        caller = inspect.currentframe().f_back
        model = caller.f_locals.get("self")
        is_one_graph = len(set(getattr(model, "hf_device_map", {}).values())) < 2
        is_llama4 = "llama4" in getattr(getattr(model, "config", None), "model_type", "")
        return caller.f_back.f_code.co_name != "_prefill" and is_one_graph and not is_llama4

    @property
    def is_on_several_devices(self):
        return len(self.settings.devices) > 1

    def knows_mask(self, num_keys):
        """Whether a mask [B, num_keys] of one new token need not be looked at: it continues one that was."""
        known = self.settings.num_masked
        if known is None or not known <= num_keys <= known + 1:
            return False
        if any(layer.has_foreign_mask for layer in self.layers):  # made by the model, of the mask that it is given
            return False
        self.settings.num_masked = int(num_keys)
        return True

    def get_seq_length(self, layer_idx=0):
        if self.settings.is_captured and self.settings.step == PREPARED:
            return self.layers[layer_idx].on_device.length - 1
        self._settle()
        return self.layers[layer_idx].length if layer_idx < len(self.layers) else 0

    def get_mask_sizes(self, query_length, layer_idx):
        if self.settings.is_captured and self.settings.step == PREPARED and query_length == 1:
            return 0, 0  # there is no key that a mask would have to hide
        return self._mask_sizes(query_length, layer_idx)

    @outside_of_graphs
    def _mask_sizes(self, query_length, layer_idx):
        if query_length == 0:
            raise ValueError(
                f"The cache already holds {self.get_seq_length()} tokens, the whole input, so there is no new token to "
                "continue from. Pass a longer input, cache.crop(-1), or cache.reset() for a new one."
            )
        num_keys = self.get_seq_length(layer_idx) + query_length
        if query_length == 1 and self.layers:
            self._prepare_step()
        return MaskLength(num_keys, self), 0

    def get_max_length(self, layer_idx=None):
        return -1 if self.max_cache_len is None else self.max_cache_len

    def reset(self):
        """Forget every token; storage is kept for the next prompt, of whatever batch size."""
        self._settle()
        super().reset()
        self.settings.draft_start = self.settings.num_masked = None

    def crop(self, tokens_to_remove):
        """Drop the newest `-tokens_to_remove` tokens."""
        self._settle()
        super().crop(tokens_to_remove)
        self.settings.num_masked = None

    def reorder_cache(self, beam_idx):
        """Rows take the tokens of the rows `beam_idx` [B], in place."""
        self._settle()
        sources = beam_idx.tolist()
        start = self.settings.take_sources(sources, self.get_seq_length())
        for layer in self.layers:
            layer.reorder(sources, start)

    def batch_repeat_interleave(self, repeats):
        self._settle()
        super().batch_repeat_interleave(repeats)
        self.settings.num_masked = None

    def batch_select_indices(self, indices):
        self._settle()
        super().batch_select_indices(indices)
        self.settings.num_masked = None

    def activate_past_recording(self):
        """`generate` enters assisted decoding: what follows the prompt is drafts, each of which selects for itself."""
        # Its first forward feeds the prompt and the first drafts together, and nothing that a cache is given tells
        # where the prompt ends. The caller's inputs do: its ids, or the embeddings that were given instead.
        caller = inspect.currentframe().f_back.f_locals
        inputs = [caller.get("input_ids"), caller.get("inputs_tensor")]
        prompt_length = max((tensor.shape[1] for tensor in inputs if isinstance(tensor, torch.Tensor)), default=0)
        self.settings.draft_start = prompt_length or self.get_seq_length() or None

    @property
    def _is_user_defined(self):
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, value):
        # Every call of `generate` sets this first, which is the only sign that an earlier assisted one has ended.
        self.settings.draft_start = None

    def _no_state(self, *args, **kwargs):
        raise QuestError(
            "This model keeps states beside keys and values (linear attention, convolutions or an indexer), which "
            "QuestCache does not serve. Use the model without QuestCache."
        )

    has_previous_state = _no_state
    get_conv_state = update_conv_state = _no_state
    get_recurrent_state = update_recurrent_state = _no_state
    update_indexer = _no_state


def copies_in_order(sources):
    """(target, source) rows to copy one after the other, after which row i holds what row `sources[i]` held.

    None is a row to spare, by which the first row of a cycle goes.
    """
    left = {target: source for target, source in enumerate(sources) if target != source}
    copies = []
    while left:
        free = [target for target in left if target not in left.values()]
        if not free:  # cycles are all that is left
            first = next(iter(left))
            copies.append((None, first))
            left = {target: None if source == first else source for target, source in left.items()}
            continue
        for target in free:
            copies.append((target, left.pop(target)))
    return copies


def cannot_be_written(tensor):
    """Whether it was made, copied or loaded in inference mode and is used outside."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_budget(budget, page_size):
    if not _is_int(budget) or budget < 2 * page_size:
        raise ValueError(
            f"budget is a number of tokens and at least two pages, {2 * page_size} tokens with page_size={page_size}: "
            f"the newest page and one more. It is {budget!r}."
        )
    return budget


def _checked_score(score):
    """The `reference.Score` that `score` names or is."""
    found = reference.SCORES.get(score) if isinstance(score, str) else score
    if not isinstance(found, reference.Score):
        names = ", ".join(map(repr, reference.SCORES))
        raise ValueError(f"score is one of {names} or a hf_quest.reference.Score, not {score!r}.")
    if not 0 <= found.width <= 1 or found.group not in reference.GROUPS:
        raise ValueError(f"A Score has a width from 0 to 1 and a group of {reference.GROUPS}, unlike {found!r}.")
    return found
