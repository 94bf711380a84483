"""Layer: one layer of a cache between its model and its storage."""

import torch
from transformers.cache_utils import CacheLayerMixin

from . import generate
from .checks import check_arrival, check_crop
from .evicting import see
from .handed import Handed


def of_storage(name, doc=None):
    return property(lambda layer: getattr(layer.storage, name), doc=doc)


def beside(name):
    return property(lambda layer: layer.up_to_date().beside.get(name))


class Layer(CacheLayerMixin):
    """Checks what arrives, has it stored, hands it to the attention, and chooses what that reads by the cache's method.

    Its storage is a `Ring` where the model's attention is local, `Kept` where the method evicts, or else `Pages`.
    """

    def __init__(self, shared, layer_idx):
        # Not that of CacheLayerMixin, which sets what is in the storage here.
        self.shared = shared
        self.layer_idx = layer_idx
        self.handed = Handed()
        self.prefill = None if shared.prefill is None or layer_idx < shared.prefill.dense_layers else shared.prefill
        self.is_dense = shared.is_dense(layer_idx)
        self.storage = shared.new_storage(layer_idx)
        self.evicts, self.is_sliding = self.storage.evicts, self.storage.is_local
        self.is_croppable = not self.evicts

    keys, values = of_storage("keys"), of_storage("values")
    bounds, scales = beside("bounds"), beside("scales")
    length, capacity, room = of_storage("length"), of_storage("capacity"), of_storage("room")
    left_padding, padding = of_storage("left_padding"), of_storage("padding")

    @property
    def method(self):
        return self.shared.method

    @property
    def is_initialized(self):
        return self.storage.keys is not None

    @property
    def has_kernels(self):
        return self.storage.has_kernels

    @property
    def num_attended(self):
        """Tokens that the next decode step attends per KV head."""
        return self.method.num_attended if self.selects else self.num_read

    @property
    def num_read(self):
        """Tokens that a step which does not choose reads."""
        return self.storage.num_held if self.evicts else self.num_dense

    @property
    def num_dense(self):
        """Tokens that dense attention would read."""
        return self.length if self.storage.reach is None else min(self.length, self.storage.reach)

    @property
    def is_sparse(self):
        """Whether a decode step on the tokens stored now reads less than all of them."""
        if self.is_dense or self.evicts:
            return False
        # A captured step does not know the length, and serves all that the storage may come to hold.
        num_tokens = self.capacity if self.shared.step.is_captured else self.length
        return num_tokens > self.method.num_attended

    @property
    def selects(self):
        """Whether the next decode step does, as far as the last forward's attention mask tells."""
        return self.is_sparse and self.handed.is_plain

    def lazy_initialization(self, key_states, value_states):
        pass  # the storage does, when it knows the rows

    def update(self, key_states, value_states, *args, **kwargs):
        """Append [B, Hkv, T, D] keys and values; return those that the new tokens may attend, which carry this layer.

        What is stored is constant: gradients flow to keys and values of several new tokens, in their own forward.
        """
        keys, values = self._as_stored(key_states, value_states)
        storage, num_new = self.storage, keys.shape[2]
        if storage.length == 0 and not storage.fits(keys, values):
            storage.discard()
        self._take_padding(keys.shape[0])
        if self.is_sliding and self.shared.draft_start is not None:
            storage.expect_drafts(min(num_new, self.length + num_new - self.shared.draft_start))
        keys, values = storage.append(keys, values)
        self._has_stored(num_new)
        by_module = generate.called_by_module()
        self.handed = Handed(num_new, by_module, is_seen=not self.evicts)
        if self.evicts and by_module:
            self.shared.to_settle.append(storage)
        else:
            storage.settle()
        return self._handed_over(keys, values)

    def _take_padding(self, batch_size):
        decided = self.shared.masks.left_padding
        decided = decided if decided is not None and len(decided) == batch_size else None
        if self.length == 0:
            self.storage.begin_rows(decided or (0,) * batch_size)
        elif decided is not None:
            self.set_left_padding(decided)

    def _has_stored(self, num_new, is_stored_by_kernel=True):
        """Have the method bring what it keeps beside the newest `num_new` tokens up to date."""
        is_done = self.method.fused is not None and self.has_kernels and is_stored_by_kernel
        if not self.is_dense and num_new > 0 and not is_done:
            self.method.stored(self.storage, num_new, self.length)

    def up_to_date(self):
        """The storage, in which nothing is put off."""
        if self.length and not self.is_dense:
            self.method.catch_up(self.storage)
        return self.storage

    def take(self, tokens):
        """Begin with what another cache's layer holds, a `stock.Tokens`."""
        keys, values = self._as_stored(tokens.keys.detach(), tokens.values.detach())
        self.storage.begin_rows((0,) * keys.shape[0])
        self.storage.begin_with(keys, values, tokens.length)
        self._has_stored(keys.shape[2])

    def update_captured(self, key_states, value_states):
        """`update` of a step in a graph, after `make_room`.

        What is returned carries this layer and stands for the stored tokens: all slots, filled or not, or with the
        kernels the new tokens alone, which `attend` or `newest` stores.
        """
        storage = self.storage
        keys, values = (new.detach().to(storage.keys.dtype) for new in (key_states, value_states))
        if self.has_kernels:
            self.handed.put(keys, values)
        else:
            self._store_in_graph(keys, values)
            keys, values = storage.keys, storage.values
        return self._handed_over(keys, values)

    def _store_in_graph(self, keys, values):
        if self.is_sliding:
            self.storage.write_in_graph(keys, values)
            return
        length = self.storage.on_device.length
        self.storage.write(keys, values, length)
        if not self.is_dense and not (self.has_kernels and self.method.fused is not None):
            self.method.stored(self.storage, keys.shape[2], length)

    def take_new(self):
        """The keys and values of a captured step that are not stored, which the caller stores; or None."""
        return self.handed.take()

    def store_handed(self):
        """Store the key and value of a captured step, where that is not done."""
        new = self.take_new()
        if new is not None:
            self._store_in_graph(*new)

    def newest(self, num_slots):
        """Copies of the keys and values in the newest slots of a captured step, see `Pages.newest`."""
        self.store_handed()
        return self.storage.newest(num_slots)

    def _handed_over(self, keys, values):
        # Fresh views: the attribute on a stored buffer would be a reference cycle, freed late.
        keys, values = keys.view_as(keys), values.view_as(values)
        keys.quest_layer = values.quest_layer = self
        if self.evicts:  # before it does
            keys.quest_positions, keys.quest_weights = self.storage.places, self.storage.weights
        return keys, values

    def receive(self, attention_mask):
        """The attention is called with what was handed over: the first time, note what its mask is."""
        # Further calls of this forward come from layers that share these keys and values, and may slice the mask.
        if self.handed.is_under_way:
            is_plain = self.shared.masks.is_plain(attention_mask)
            self.handed.arrive(is_plain and (attention_mask is None or self.handed.num_new > 1))
            if not self.evicts:  # which may still be undone
                self.handed.end()

    def see(self, query, mask, logits, position_bias):
        """Note what the newest queries attended, for a method that evicts."""
        see(self.method, self.storage, query, mask, logits, position_bias, self.shared.masks.empty_rows)
        self.handed.see()

    def evict(self):
        """Keep `budget` tokens per KV head, where the method evicts and knows the newest queries."""
        if self.evicts and self.handed.is_seen and self.storage.capacity > self.method.budget:
            priority = self.method.keep(self.storage)
            if priority is not None:
                self.storage.keep(self.storage.best(priority, self.method.budget))

    def took_step(self, num_new):
        """Count the tokens that a captured step has stored."""
        self.storage.took_step(num_new)
        self.handed.step(num_new)

    def _as_stored(self, keys, values):
        """`keys` and `values` in the dtype of what is stored, which is widened where it cannot hold them."""
        storage, is_cast = self.storage, self.shared.note_autocast(keys.device.type)
        check_arrival(self, keys, values)
        keys, values = (self.autocast(keys), self.autocast(values)) if is_cast else (keys, values)
        if storage.length > 0:
            storage.make_room(storage.length)
        if storage.length == 0 or keys.dtype == values.dtype == storage.keys.dtype:
            return keys, values
        dtype = torch.promote_types(torch.promote_types(keys.dtype, values.dtype), storage.keys.dtype)
        if dtype != storage.keys.dtype:
            storage.move(slice(None), storage.capacity, dtype)
        return keys.to(dtype), values.to(dtype)

    def autocast(self, tensor):
        """`tensor` in the dtype to which autocast, where it is on, casts what attention gets."""
        if not torch.is_autocast_enabled(tensor.device.type):
            return tensor
        return tensor.to(torch.get_autocast_dtype(tensor.device.type))

    def set_left_padding(self, left_padding):
        """Take over how many slots at the start of each row hold no token: a tuple of B ints."""
        if left_padding != self.left_padding:
            self.storage.set_left_padding(left_padding)
            self._has_stored(self.length, is_stored_by_kernel=False)

    def get_seq_length(self):
        return self.length

    def get_max_length(self):
        return -1 if self.shared.max_cache_len is None else self.shared.max_cache_len

    def get_mask_sizes(self, query_length):
        return self.storage.mask_sizes(query_length)

    def saved(self):
        """Tensors by name, and facts, from which `restore` makes the same of a new layer."""
        tensors, facts = self.up_to_date().saved()
        return tensors, {**facts, "is_plain": self.handed.is_plain}

    def restore(self, tensors, facts, device):
        self.storage.restore(tensors, facts, device)
        self.handed = Handed(is_plain=facts["is_plain"])

    def offload(self):
        """Move what is stored to the CPU, until `prefetch` or the next token."""
        self.storage.offload()

    def prefetch(self):
        """Move what is stored back to where the model computes."""
        self.storage.prefetch()

    def reset(self):
        """Forget every token; the storage is kept."""
        self.storage.reset()
        self.handed = Handed()

    def crop(self, tokens_to_remove):
        """Drop the newest `-tokens_to_remove` tokens."""
        check_crop(self, -tokens_to_remove)
        if tokens_to_remove < 0:
            self.storage.crop(self.length + tokens_to_remove)
            self._has_stored(min(self.length, 1), is_stored_by_kernel=False)

    def put_back(self, length):
        """Undo the last forward, before which there were `length` tokens; return whether that was possible."""
        is_changed = self.length != length
        is_back = self.storage.put_back(length)
        self.handed = Handed(is_under_way=not is_back)
        if is_changed and is_back and not self.evicts:
            self._has_stored(min(length, 1), is_stored_by_kernel=False)
        return is_back

    def reorder_cache(self, beam_idx):
        """Rows take the tokens of the rows `beam_idx` [B], in place."""
        self.shared.rows.are_others()
        self.reorder(beam_idx.tolist())

    def reorder(self, sources, start=0):
        """`reorder_cache` of a list of rows, which hold what their sources hold before the slot `start`."""
        if self.length:
            self.storage.reorder(sources, start)

    def batch_repeat_interleave(self, repeats):
        if self.length:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices):
        """Keep the rows `indices`, a [rows] tensor of row numbers or a [B] mask, in that order."""
        if self.length:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)[indices.to(self.keys.device)]
            self.storage.select_rows(rows)
