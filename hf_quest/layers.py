"""The layers of a QuestCache: what each stores, and the attention of a decode step over it."""

import torch
from transformers.cache_utils import CacheLayerMixin

from . import generation, ops, reference
from . import prefill as prompts
from .errors import QuestError, say_once
from .settings import cannot_be_written

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Layer(CacheLayerMixin):
    """What every layer of a QuestCache does: check what arrives, count it, and hand it to the attention.

    A subclass has `keys` and `values`, [B, Hkv, slots, D], and says in `_store` and `_reallocate` what is where.
    """

    is_croppable = True
    is_dense = True  # attends everything that it stores
    is_sparse = selects_pages = has_kernels = False
    prefill = None  # a CritiPrefill, or None where every prompt is dense
    stored = ("keys", "values")  # names of the tensors that move and are copied together

    def __init__(self, settings, layer_idx):
        super().__init__()
        self.settings = settings
        self.layer_idx = layer_idx
        self.length = 0  # slots filled
        self.num_new = 0  # slots filled by the last update
        self.left_padding = ()  # slots at the start of each row that hold no token
        self.on_device = None  # settings.on the device of this layer
        self.is_away = False  # what is stored, on the CPU, see `offload`
        self.pending = False  # keys and values were handed to the model and have not reached its attention
        self.is_plainly_masked = True  # in the last forward: causally, with left padding at most

    @property
    def capacity(self):
        return self.keys.shape[2] if self.is_initialized else 0

    @property
    def room(self):
        """Tokens that the storage has room for."""
        return self.capacity

    @property
    def padding(self):
        """[B] int64, slots at the start of each row that hold no token."""
        return self.on_device.padding

    def update(self, key_states, value_states, *args, **kwargs):
        """Append [B, Hkv, T, D] keys and values; return those that the new tokens may attend, which carry this layer.

        What is stored is constant: gradients flow to keys and values of several new tokens, in their own forward.
        """
        keys, values = self._as_stored(key_states, value_states)
        if self.length == 0 and not self._fits(keys, values):
            self.lazy_initialization(keys, values)
        decided = self.settings.masks.left_padding
        if decided is not None and len(decided) != keys.shape[0]:
            decided = None
        if self.length == 0:
            self._set_padding(decided or (0,) * keys.shape[0])
        elif decided is not None:
            self.set_left_padding(decided)
        keys, values = self._store(keys, values)
        self.num_new = key_states.shape[2]
        self.pending = generation.called_by_module()
        return self._handed_over(keys, values)

    def take(self, tokens):
        """Begin with what another cache's layer holds, a `stock.Tokens`."""
        keys, values = self._as_stored(tokens.keys.detach(), tokens.values.detach())
        self.lazy_initialization(keys, values)
        self._set_padding((0,) * keys.shape[0])
        self._begin_with(keys, values, tokens.length)

    def _begin_with(self, keys, values, length):
        self._store(keys, values)

    def _handed_over(self, keys, values):
        # Fresh views: the attribute on a stored buffer would be a reference cycle, freed late.
        keys, values = keys.view_as(keys), values.view_as(values)
        keys.quest_layer = values.quest_layer = self
        return keys, values

    def took_step(self):
        """Count the token that a captured step has stored."""
        self.length += 1
        self.num_new = 1

    def _as_stored(self, keys, values):
        """`keys` and `values` in the dtype of what is stored, which is widened where it cannot hold them."""
        self.check(keys, values)
        keys, values = self.autocast(keys), self.autocast(values)
        if self.length == 0:
            return keys, values
        self.make_room(self.length)
        dtype = torch.promote_types(torch.promote_types(keys.dtype, values.dtype), self.keys.dtype)
        if dtype != self.keys.dtype:
            self._reallocate(slice(None), self.capacity, dtype)
        return keys.to(dtype), values.to(dtype)

    def autocast(self, tensor):
        """`tensor` in the dtype to which autocast, where it is on, casts what attention gets."""
        if not torch.is_autocast_enabled(tensor.device.type):
            return tensor
        return tensor.to(torch.get_autocast_dtype(tensor.device.type))

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
        if torch.is_autocast_enabled(key_states.device.type):
            self.settings.saw_autocast = True
        if self.length == 0:
            return
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            if stored.shape[0] != new.shape[0]:
                raise ValueError(
                    f"The cache holds {stored.shape[0]} rows and this batch has {new.shape[0]}. Call cache.reset() or "
                    "use a new QuestCache for another batch. The content of the cache is unchanged."
                )
            is_alike = stored.dtype == new.dtype or self.settings.saw_autocast
            if (stored.shape[1], stored.shape[3]) != (new.shape[1], new.shape[3]) or not is_alike:
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

    def check_crop(self, num_removed):
        """Raise if the newest `num_removed` tokens cannot be taken back."""
        if not 0 <= num_removed <= self.length:
            raise ValueError(
                f"crop takes minus the number of tokens to remove, from 0 to -{self.length} here, not {-num_removed}. "
                "The content of the cache is unchanged."
            )

    def _fits(self, keys, values):
        """Whether the storage, empty now, is one for these keys and values."""
        return self.is_initialized and all(
            (stored.shape[:2], stored.shape[3], stored.dtype, stored.device)
            == (new.shape[:2], new.shape[3], new.dtype, new.device)
            for stored, new in ((self.keys, keys), (self.values, values))
        )

    def has_moved(self):
        """Tell the cache and graphs of new storage.

        Without the kernels: one graph for every capacity, and one more recording of it where the storage moves.
        """
        self.device, self.is_away = self.keys.device, False
        self.settings.room = 0
        for tensor in self.storage().values():
            torch._dynamo.maybe_mark_dynamic(tensor, 2)
            torch._dynamo.mark_static_address(tensor)

    def storage(self):
        """What is stored, by name."""
        return {name: getattr(self, name) for name in self.stored if torch.is_tensor(getattr(self, name))}

    def offload(self):
        """Move what is stored to the CPU, until `prefetch` or the next token."""
        self.is_away, self.settings.room = self.is_initialized, 0
        for name, tensor in self.storage().items():
            setattr(self, name, tensor.to("cpu", non_blocking=True))

    def prefetch(self):
        """Move what is stored back to where the model computes."""
        if self.is_away:
            for name, tensor in self.storage().items():
                setattr(self, name, tensor.to(self.device, non_blocking=True))
            self.has_moved()

    def get_seq_length(self):
        return self.length

    def get_max_length(self):
        return -1 if self.settings.max_cache_len is None else self.settings.max_cache_len

    def reorder_cache(self, beam_idx):
        """Rows take the tokens of the rows `beam_idx` [B], in place."""
        self.settings.common = []
        self.reorder(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats):
        if self.length:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices):
        """Keep the rows `indices`, a [rows] tensor of row numbers or a [B] mask, in that order."""
        if not self.length:
            return
        self.make_room(self.length)
        rows = torch.arange(self.keys.shape[0], device=self.keys.device)[indices.to(self.keys.device)]
        self.settings.common = []
        self._reallocate(rows, self.capacity)
        self._set_padding(tuple(self.left_padding[row] for row in rows.tolist()))

    def _set_padding(self, left_padding):
        self.left_padding = left_padding
        self.settings.set_left_padding(left_padding)


class QuestLayer(Layer):
    """Keys, values and page bounds of one layer, and the attention of a decode step over them.

    `keys`, `values` [B, Hkv, capacity, D] and `bounds` [B, Hkv, capacity / S, 2, D] are appended to in place; the first
    `length` slots are filled. Bounds in 8 bits have `scales` [B, Hkv, capacity / S, D / 32]. A layer that is always
    dense has no bounds.
    """

    is_sliding = False
    stored = ("keys", "values", "bounds", "scales")

    def __init__(self, settings, layer_idx, is_dense):
        super().__init__(settings, layer_idx)
        self.is_dense = is_dense
        self.prefill = settings.prefill
        if settings.prefill is not None and layer_idx < settings.prefill.dense_layers:
            self.prefill = None
        self.num_kv_heads = 0
        self.bounds = self.scales = None
        self.has_kernels = False  # whether the CUDA kernels serve this layer; otherwise the reference does
        self.scores = None  # [B, Hkv, 1, P] float32, which the kernels of a captured step work in
        self.counters = None  # of the kernels, see ops.new_counters
        self.not_stored = None  # the new key and value of a captured step, until its attention stores them

    @property
    def num_attended(self):
        """Tokens that the next decode step attends per KV head."""
        return self.settings.num_selected * self.settings.page_size if self.selects_pages else self.length

    @property
    def num_stored(self):
        """Tokens that a dense step would attend."""
        return self.length

    @property
    def is_sparse(self):
        """Whether a decode step on the tokens stored now reads less than all of them."""
        # A captured step does not know the length, and serves all that the storage may come to hold.
        num_tokens = self.capacity if self.settings.is_captured else self.length
        return not self.is_dense and num_tokens > self.settings.num_selected * self.settings.page_size

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
        num_slots = self.settings.with_headroom(key_states.shape[2])
        self._allocate(key_states, value_states, key_states.shape[0], num_slots, key_states.dtype)
        self.is_initialized = True

    def update_captured(self, key_states, value_states):
        """`update` of one token per row in a graph, after `make_room`.

        What is returned carries this layer and stands for the stored tokens: all slots, filled or not, or with the
        kernels the new token alone, which `attend` or `newest` stores.
        """
        keys, values = (new.detach().to(self.keys.dtype) for new in (key_states, value_states))
        if self.has_kernels:
            self.not_stored = (keys, values)
        else:
            self._append(keys, values, self.on_device.length)
            keys, values = self.keys, self.values
        return self._handed_over(keys, values)

    def _store(self, keys, values):
        """Append; return all keys and values, the new ones with their gradients where several tokens have some."""
        start, end = self.length, self.length + keys.shape[2]
        self.make_room(end)
        self.settings.set_length(end)
        self._append(keys.detach(), values.detach(), end)
        self.length = end
        stored = self.keys[:, :, :end], self.values[:, :, :end]
        if keys.shape[2] == 1:
            say_if_constant(keys)
        if keys.shape[2] == 1 or not (torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)):
            return stored
        if start == 0:
            return keys, values
        say_once(
            "Gradients flow to the keys and values of the forward under way alone. Those that a QuestCache holds from "
            "earlier forwards are constants."
        )
        return [torch.cat([old[:, :, :start], new], dim=2) for old, new in zip(stored, (keys, values), strict=True)]

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
        self.prefetch()
        if num_tokens > self.capacity:
            self._reallocate(slice(None), self.settings.with_headroom(num_tokens))
        elif cannot_be_written(self.keys):
            self._reallocate(slice(None), self.capacity)

    def set_left_padding(self, left_padding):
        """Take over how many slots at the start of each row hold no token: a tuple of B ints."""
        if left_padding == self.left_padding:
            return
        self.settings.common = []
        self.make_room(self.length)
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
        say_if_constant(query)
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
        where = (length, self.padding, settings.page_size)
        scores = reference.estimate(query, *bounds, scaling, settings.score, where)
        keeps_first = settings.score.keeps_first
        return reference.select(scores, *where[:2], settings.num_selected, settings.page_size, keeps_first)

    def _record(self, query, page_ids, scaling, softcap, sinks):
        if self.settings.recorder is not None:
            self.settings.recorder(self, query.detach(), page_ids, scaling, softcap, sinks)

    def reads_prompt(self, query, num_keys, num_drafts, needs_eager):
        """Whether `attend_prompt` is for these queries: it has sparse segments, or is a faster way to be dense.

        `needs_eager` tells that the model's own dense attention is not SDPA.
        """
        if self.prefill is not None:
            ends = {num_keys - num_drafts - padding for padding in self.left_padding}
            if any(self.prefill.is_sparse(query.shape[2] - num_drafts, end) for end in ends):
                return True
        is_free = not needs_eager and not query.requires_grad  # to choose, and to leave no trace for gradients
        return is_free and prompts.is_faster(query, self.values, num_keys, any(self.left_padding))

    def attend_prompt(self, query, num_keys, num_drafts, scaling, softcap=None, sinks=None):
        """Attention [B, T, Hq, D] of the newest T of the first `num_keys` tokens, dense or by CritiPrefill.

        The last `num_drafts` are no part of the prompt, which ends before them.
        """
        say_if_constant(query)
        self.settings.block_scores.enter(self.layer_idx)
        options = {"scaling": scaling, "softcap": softcap, "sinks": sinks, "num_drafts": num_drafts}
        earlier, keys, values = self.settings.block_scores, self.keys[:, :, :num_keys], self.values[:, :, :num_keys]
        return prompts.attend(query, keys, values, self.left_padding, self.prefill, earlier, **options)

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
        self.check_crop(-tokens_to_remove)
        if tokens_to_remove < 0:
            self.make_room(self.length)
            self.length += tokens_to_remove
            self.settings.set_length(self.length)
            self._refresh_bounds(min(self.length, 1))
            if self.length == 0:
                self._set_padding((0,) * self.keys.shape[0])

    def reorder(self, sources, start=0):
        """`reorder_cache` of a list of rows, which hold what their sources hold before the slot `start`.

        A row that stays is not copied, and only a cycle needs a row to spare.
        """
        if not self.length:
            return
        self.make_room(self.length)
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

    def _reallocate(self, rows, num_slots, dtype=None):
        """Move the filled slots of `rows`, a slice or row numbers, to new storage of `num_slots`."""
        filled = [tensor[rows] for tensor in self._filled()]
        keys, values = filled[:2]
        self._allocate(keys, values, keys.shape[0], num_slots, dtype or keys.dtype)
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

    def _allocate(self, like_keys, like_values, batch_size, num_slots, dtype):
        """New storage, its slots rounded up to whole pages, and what the kernels want beside it."""
        unit = self.settings.page_size if self.prefill is None else self.prefill.block_size  # pages are in whole blocks
        num_pages = self._num_pages(-(-num_slots // unit) * unit)
        num_kv_heads, head_dim = like_keys.shape[1], like_keys.shape[-1]
        # Tensors made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            slots = (batch_size, num_kv_heads, num_pages * self.settings.page_size)
            self.keys = like_keys.new_empty(*slots, head_dim, dtype=dtype)
            self.values = like_values.new_empty(*slots, like_values.shape[-1], dtype=dtype)
            if not self.is_dense:
                pages, bounds_dtype = (batch_size, num_kv_heads, num_pages), self.settings.bounds_dtype
                self.bounds = like_keys.new_empty(*pages, 2, head_dim, dtype=bounds_dtype or dtype)
                if bounds_dtype is not None:
                    num_scales = -(-head_dim // reference.SCALE_BLOCK)
                    self.scales = like_keys.new_empty(*pages, num_scales, dtype=torch.uint8)
            self.has_kernels = ops.serves(self.keys, self.values, self.settings.page_size)
            if self.has_kernels:
                self.counters = ops.new_counters(self.keys)
                self.scores = self.keys.new_empty(batch_size, num_kv_heads, 1, num_pages, dtype=torch.float32)
        self.num_kv_heads = num_kv_heads
        self.on_device = self.settings.on(self.keys.device)
        self.has_moved()

    def _refresh_bounds(self, num_newest):
        if self.bounds is not None:
            where = (num_newest, self.length, self.padding, self.settings.page_size)
            reference.refresh_bounds(self.keys, self.bounds, self.scales, *where)

    def _num_pages(self, num_tokens):
        return -(-num_tokens // self.settings.page_size)


def say_if_constant(tensor):
    """Say that `tensor` is taken for a constant, where gradients are asked for."""
    if tensor.requires_grad and torch.is_grad_enabled():
        say_once(
            "Decode steps and CritiPrefill give keys and values no gradients. For inference use torch.no_grad(); for "
            "training forwards of several tokens, without CritiPrefill."
        )


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
