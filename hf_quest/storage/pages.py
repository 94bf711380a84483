"""Pages: every token of a layer, in pages, and what a method keeps beside tokens and pages."""

import torch

from .. import reference
from ..errors import say_if_constant, say_once
from ..kernels import cpu, native, ops
from .copies import check_restored, copy_by_head, exchange_rows, filled_up
from .memory import Memories, Memory
from .rows import cannot_be_written
from .shared import Sharing
from .widened import Widened


class Pages(Sharing):
    """`keys`, `values` [B, Hkv, capacity, D], appended to in place; the first `length` slots are filled.

    Page p of row b starts at slot left_padding[b] + p · page_size. In `beside` are, by name, what a method declared:
    tensors [B, Hkv, capacity, ...] beside tokens and [B, Hkv, capacity / page_size, ...] beside pages, which grow,
    crop, reorder and repeat with them. `memory` is what a method remembers of the rows.

    Args:
        page_size, block_size: tokens; there is storage for whole blocks, which are made of whole pages.
        beside_tokens, beside_pages: functions of a head dim and a dtype, those of the keys, that give for each name the
            shape that follows [B, Hkv, slots or pages] and the dtype.
        keeps_bounds: whether `bounds`, `scales`, `codes` are among them, which the kernels bring up to date and read.
        gives_step_gradients: whether keys and values of a single token get gradients, too, for which all are copied.
    """

    def __init__(
        self,
        rows,
        max_cache_len,
        page_size,
        block_size,
        beside_tokens=None,
        beside_pages=None,
        keeps_bounds=False,
        gives_step_gradients=False,
    ):
        super().__init__(rows, max_cache_len)
        self.keeps_bounds, self.gives_step_gradients = keeps_bounds, gives_step_gradients
        self.page_size, self.block_size = page_size, block_size
        self.beside_tokens = beside_tokens or nothing
        self.beside_pages = beside_pages or nothing
        self.memories = Memories()
        self.widened = Widened()
        self.num_kv_heads = 0
        self.work = None  # [B, Hkv, 1, P] float32, page scores of a captured step with the kernels
        self.counters = None  # of the kernels, see ops.new_counters

    @property
    def memory(self) -> Memory:
        """What the method remembers of the rows, in the layer that reads now."""
        return self.memories.current

    def next_reader(self):
        """A layer begins to read, this storage's own or one that shares its keys and values."""
        self.memories.next_reader()

    def read_anew(self):
        """This storage's own layer begins to read, outside of a forward."""
        self.memories.begin_forward()
        self.memories.next_reader()

    def append(self, keys, values):
        start, end = self.length, self.length + keys.shape[2]
        self.memories.begin_forward()
        if self.keys is None:
            self.allocate(keys, values, keys.shape[0], self.with_headroom(end), keys.dtype)
        self.make_room(end)
        self.rows.set_length(end)
        self.widened.forget(self.first_page(start))
        self.write(keys.detach(), values.detach(), end)
        self.length = end
        stored = self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)
        if not torch.is_grad_enabled() or not (keys.requires_grad or values.requires_grad):
            return stored
        if keys.shape[2] == 1 and not self.gives_step_gradients:
            say_if_constant(keys)
            return stored
        if start == 0:
            return keys, values
        say_once(
            "Gradients flow to the keys and values of the forward under way alone. Those that a QuestCache holds from "
            "earlier forwards are constants."
        )
        return [torch.cat([old[:, :, :start], new], dim=2) for old, new in zip(stored, (keys, values), strict=True)]

    def begin_with(self, keys, values, length):
        self.append(keys, values)

    def write(self, keys, values, end):
        """Write keys and values to the slots before `end`, an int, or in a graph the [1] int64 of `on_device`."""
        if self.has_kernels:
            bounds, scales, codes = self.known_to_kernels
            where = (self.on_device.length, self.padding, self.page_size)
            torch.ops.hf_quest.append(self.keys, self.values, bounds, scales, keys, values, *where, codes)
        elif isinstance(end, int):
            slots = (2, end - keys.shape[2], keys.shape[2])
            self.keys.narrow(*slots).copy_(keys)
            self.values.narrow(*slots).copy_(values)
        else:
            reference.append(self.keys, self.values, None, None, keys, values, end, self.padding, self.page_size)

    def attend(self, query, choice, length, logits):
        """`reference.attend` of the newest T tokens, [B, Hq, T, D], over what a `Choice` names, or over all."""
        page_ids, page_size = (None, self.page_size) if choice is None else choice
        is_plain = logits.softcap is None and logits.sinks is None
        if page_ids is not None and is_plain and cpu.serves(query, length, self.left_padding):
            chosen = (query, self.keys, self.values, page_ids, length, page_size, logits.scaling)
            if not native.serves(*chosen[:3]):
                return cpu.attend(*chosen)
            return native.with_gradients(native.attend(*chosen), chosen[:1], lambda: cpu.attend(*chosen))
        return reference.attend(query, self.keys, self.values, page_ids, length, self.padding, page_size, *logits)

    def attend_all_by_kernel(self, query, length, logits):
        """Dense attention of one query per row, [B, Hq, 1, D], in the slots before `length`, [1] int64."""
        # Not by `ops`, whose checks would tell of this storage's own tensors at every step.
        stored = (self.keys, self.values, None)
        where = (length, self.padding, self.counters, self.page_size)
        return torch.ops.hf_quest.attend(query, *stored, *where, *logits)

    def aligned(self, tensor):
        """[B, Hkv, N, ...] of [B, Hkv, N, ...] in slots: each row from its first token on, then its last one again."""
        slot = torch.arange(tensor.shape[2], device=tensor.device) + self.padding[:, None]
        slot = slot.clamp(max=tensor.shape[2] - 1).view(len(slot), 1, -1, *(1,) * (tensor.dim() - 3))
        return tensor.gather(2, slot.expand_as(tensor)) if any(self.left_padding) else tensor

    def newest(self, num_slots):
        """Copies of the keys and values in the newest slots; where fewer are filled, what is before them repeats one.

        The one view of the stored tokens that a captured graph, which does not know the length, can have.
        """
        slot = torch.arange(-num_slots, 0, device=self.keys.device) + self.on_device.length
        slot = slot.clamp(min=0)
        return self.keys.index_select(2, slot), self.values.index_select(2, slot)

    def make_room(self, num_tokens):
        self.prefetch()
        if num_tokens > self.room:
            self.move(slice(None), self.with_headroom(num_tokens))
        elif cannot_be_written(self.keys) or self.length < self.first_own:
            self.move(slice(None), self.capacity)

    def set_left_padding(self, left_padding):
        self.rows.are_others()
        self.make_room(self.length)
        self.memories.forget()  # it is of other tokens
        self.widened.forget()
        self.begin_rows(left_padding)

    def padding_mask(self):
        if not any(self.left_padding):
            return None
        slot = torch.arange(self.length, device=self.padding.device)
        return (slot >= self.padding[:, None])[:, None, None]

    def set_length(self, length):
        super().set_length(length)
        self.memories.crop(length)
        self.widened.forget(self.first_page(length))

    def check_crop(self, num_removed, layer_idx):
        super().check_crop(num_removed, layer_idx)
        self.memories.check_crop(num_removed, self.length, layer_idx)

    def to(self, device):
        super().to(device)
        self.memories.change(lambda tensor: tensor.to(device, non_blocking=True))

    def crop(self, length):
        if length < self.length:
            self.make_room(self.length)
            self.widened.forget(self.first_page(length))
            self.set_length(length)
            if length == 0:
                self.begin_rows((0,) * self.keys.shape[0])

    def reorder(self, sources, start=0):
        self.make_room(self.length)
        self.widened.forget(self.first_page(start))
        if start < self.first_own and not self.are_alike(sources):
            self.move(torch.tensor(sources, device="cpu"), self.capacity)
        else:
            for part in (part for tensor in self.not_shared(start) for part in self.parts(tensor)):
                exchange_rows(part, sources)
            self.memories.change(lambda tensor: tensor[sources])
        if any(self.left_padding):
            self.begin_rows(tuple(self.left_padding[row] for row in sources))

    def move(self, batch_rows, num_slots, dtype=None):
        if not self.moves_to_prefix(batch_rows, num_slots, dtype or self.keys.dtype):
            filled = [tensor[batch_rows] for tensor in self.filled()]
            self.allocate(*filled[:2], filled[0].shape[0], num_slots, dtype or self.keys.dtype)
            for tensor, content in zip(self.filled(), filled, strict=True):
                tensor.copy_(content)
        self.memories.change(lambda tensor: tensor[batch_rows])

    def saved(self):
        remembered, memories = self.memories.saved()
        stored = dict(zip(self.tensors(), self.filled(), strict=True))
        num_pages = [self.num_pages(self.length - padding) for padding in self.left_padding]
        of_pages = self.beside_pages(self.keys.shape[-1], self.keys.dtype)
        stored |= {name: filled_up(stored[name], num_pages) for name in of_pages}
        return {**stored, **remembered}, {**super().saved()[1], "memories": memories}

    def restore_tensors(self, tensors, facts, device):
        tensors = self.memories.restore(tensors, facts["memories"], device)
        like_keys, like_values = (tensors[name][:, :, :0].to(device) for name in self.names)
        num_slots = self.with_headroom(facts["length"])
        self.allocate(like_keys, like_values, like_keys.shape[0], num_slots, like_keys.dtype)
        self.length = facts["length"]
        filled = dict(zip(self.tensors(), self.filled(), strict=True))
        check_restored(tensors, filled)
        for name, content in tensors.items():
            self.fill(filled[name], content)

    def fill(self, stored, content):
        copy_by_head(stored, content)

    def filled(self, start=0):
        """Views of what is stored of the slots from `start` on: keys, values, and what is beside tokens and pages."""
        slots = slice(start, self.length)
        pages = slice(self.first_page(start), self.num_pages(self.length))
        of_tokens = self.beside_tokens(self.keys.shape[-1], self.keys.dtype)
        # What is beside a token may hang on its page.
        of_their_pages = slice(max(0, start - self.page_size), self.length)
        beside = [tensor[:, :, of_their_pages if name in of_tokens else pages] for name, tensor in self.beside.items()]
        return [self.keys[:, :, slots], self.values[:, :, slots], *beside]

    def allocate(self, like_keys, like_values, batch_size, num_slots, dtype, prefix=None):
        """New storage, its slots rounded up to whole pages, or a Prefix's, and what the kernels want beside it."""
        num_slots = self.in_blocks(num_slots)
        num_kv_heads, head_dim = like_keys.shape[1], like_keys.shape[-1]
        slots, pages = (batch_size, num_kv_heads, num_slots), (batch_size, num_kv_heads, self.num_pages(num_slots))
        # Tensors made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            likes = (like_keys, like_values)
            keys, values = prefix.tensors if prefix else [self.new_slots(like, slots, dtype) for like in likes]
            of_tokens, of_pages = self.beside_tokens(head_dim, dtype), self.beside_pages(head_dim, dtype)
            beside = {name: keys.new_zeros(*slots, *shape, dtype=kind) for name, (shape, kind) in of_tokens.items()}
            beside |= {name: keys.new_empty(*pages, *shape, dtype=kind) for name, (shape, kind) in of_pages.items()}
            has_kernels, counters, work = ops.serves(keys, values, self.page_size), None, None
            pool = self.new_pool(keys, values, has_kernels)
            if has_kernels:
                counters = ops.new_counters(keys)
                work = keys.new_empty(*pages[:2], 1, pages[2], dtype=torch.float32) if self.keeps_bounds else None
        # Together: memory that runs out on the way leaves what there was.
        self.keys, self.values, self.beside, self.prefix = keys, values, beside, prefix
        self.has_kernels, self.counters, self.work, self.pool = has_kernels, counters, work, pool
        self.num_kv_heads = num_kv_heads
        self.widened = Widened()
        self.has_moved()

    def parts(self, tensor):
        """[B, ...] views of a tensor that are copied one after the other."""
        return [tensor]

    def new_slots(self, like, slots, dtype):
        """Memory of [B, Hkv, slots] keys or values such as `like`."""
        return like.new_empty(*slots, like.shape[-1], dtype=dtype)

    @property
    def known_to_kernels(self):  # or None, as all are where a method means something else by these names
        return [self.beside.get(name) if self.keeps_bounds else None for name in ("bounds", "scales", "codes")]

    def in_blocks(self, num_slots):
        return -(-num_slots // self.block_size) * self.block_size

    def first_page(self, slot):
        """The page of a slot in the most padded row, whose pages have the lowest numbers."""
        return max(0, slot - max(self.left_padding, default=0)) // self.page_size

    def num_pages(self, num_tokens):
        return -(-num_tokens // self.page_size)

    @property
    def bytes_of_token(self):
        """Of one token's key and value in one KV head."""
        return self.keys[0, 0, 0].nbytes + self.values[0, 0, 0].nbytes

    @property
    def bytes_beside_pages(self):
        """Of what is beside one page of one KV head."""
        names = self.beside_pages(self.keys.shape[-1], self.keys.dtype)
        return sum(self.beside[name][0, 0, 0].nbytes for name in names)

    def find_addresses(self):
        if not self.has_kernels:
            return super().find_addresses()
        bounds, scales, codes = self.known_to_kernels
        tensors = (self.keys, self.values, bounds, scales, self.work, codes)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        return [*addresses[:5], self.capacity, addresses[5], *[0] * 5]


def nothing(head_dim, dtype):
    """What a dense layer keeps beside its tokens and pages."""
    return {}
