"""Shared prefixes: rows that begin alike keep that once, and each of them its own end.

Keys and values have one address after the other, as ever: no kernel knows of this. Where rows have the same tokens at
their start, these addresses are of the same memory, see `mapped`, in whole units of it. Nothing is written there:
storage whose next token would be is moved first.
"""

import math

import torch

from .base import Storage
from .copies import copy_rows
from .mapped import memory_of

LEAST = 2  # units of a prefix from which on it is shared: below, what a row has of its own takes as much
SPARE = 256  # tokens that a row has room for at least, when its prefix begins to be shared


class Stretch:
    """Some units of a prefix, in memory that is there once: pieces of keys and of values, one for each KV head."""

    def __init__(self, memory, num_units, unit, like):
        self.num_units = num_units
        sizes = [num_units * unit * each.shape[3] * each.element_size() for each in like]
        self.pieces = [[memory.new_piece(size) for _ in range(like[0].shape[1])] for size in sizes]


class Prefix:
    """Keys and values [B, Hkv, capacity, D], in which rows with the same stretches have these in the same memory.

    Args:
        memory: that of the device, see `mapped.memory_of`.
        like: keys and values of any number of slots, whose heads, dims and dtypes these have.
        chains: B tuples, the stretches with which each row begins, in all rows of the same sizes.
        unit: slots that are whole granules of memory in keys and in values.
        offset: slots that are left out before the first, so that a prefix of any length may end where a unit does. So
            many at the end of a row are no room for tokens: the next head's begin there.
        num_units: of a row, with those that are its own.
    """

    def __init__(self, memory, like, chains, unit, offset, num_units):
        self.like, self.chains, self.unit, self.offset = like, chains, unit, offset
        self.end = sum(stretch.num_units for stretch in chains[0]) * unit - offset  # where a row's own slots begin
        self.capacity = num_units * unit
        self.room = self.capacity - offset
        with torch.inference_mode(False):  # or they could not be written outside of it
            self.tensors = [self.mapped(memory, which, each) for which, each in enumerate(like)]

    def mapped(self, memory, which, like):
        num_heads, head_dim, itemsize = like.shape[1], like.shape[3], like.element_size()
        heads = [[each.pieces[which][head] for each in chain] for chain in self.chains for head in range(num_heads)]
        last = heads[0][:1] if self.offset else []  # the last row has something at its end, too
        memory = memory.mapped(heads, self.capacity * head_dim * itemsize, last)
        shape = (len(self.chains), num_heads, self.capacity, head_dim)
        start = self.offset * head_dim * itemsize
        return memory[start : start + math.prod(shape) * itemsize].view(like.dtype).view(shape)

    def fill(self, tensors, sources, length, filled):
        """Copy what rows `sources` of keys and values hold in `length` slots, but for the stretches `filled`, a set."""
        for row, (source, chain) in enumerate(zip(sources, self.chains, strict=True)):
            num_there = next((idx for idx, each in enumerate(chain) if each not in filled), len(chain))
            filled = filled.union(chain)
            first = max(sum(each.num_units for each in chain[:num_there]) * self.unit - self.offset, 0)
            for mine, theirs in zip(self.tensors, tensors, strict=True):
                mine[row, :, first:length].copy_(theirs[source, :, first:length])

    @property
    def stretches(self):
        return {stretch for chain in self.chains for stretch in chain}

    def with_memory(self, memory, chains, filled):
        """The same in other memory, with other stretches in place of those that `chains` does not have."""
        like = [each.to(memory.device) for each in self.like]
        copy = Prefix(memory, like, chains, self.unit, self.offset, self.capacity // self.unit)
        copy.fill(self.tensors, range(len(chains)), self.room, filled)
        return copy

    def __deepcopy__(self, memo):
        """One of the same stretches, in which nobody writes; or copies of keys and values, if the system refuses."""
        try:
            return self.with_memory(memory_of(self.like[0].device), self.chains, self.stretches)
        except OSError:
            return [tensor.clone() for tensor in self.tensors]

    def __reduce__(self):
        """For pickles: keys and values, of every row all."""
        return list, (self.tensors,)

    def to(self, device):
        """The same on a device, or None where there is no such memory."""
        memory = memory_of(device)
        if memory is None:
            return None
        try:
            moved = {each: Stretch(memory, each.num_units, self.unit, self.like) for each in self.stretches}
            return self.with_memory(memory, [tuple(moved[each] for each in chain) for chain in self.chains], set())
        except OSError:
            return None


def prefix_of(pages, sources, num_slots, dtype):
    """A Prefix of the rows `sources` of Pages, a list, filled with what they hold; None where nothing is shared.

    Args:
        num_slots: those of the storage, or what `with_headroom` gave for more tokens.
        dtype: of the new storage.
    """
    old, memory = pages.prefix, memory_of(pages.keys.device)
    if memory is None or (old is None and len(set(sources)) == len(sources)):
        return None
    tensors = [pages.keys, pages.values]
    like = [each.new_empty((0, *each.shape[1:]), dtype=dtype) for each in tensors]
    unit, offset = (old.unit, old.offset) if old is not None else where_to_begin(pages, like, memory.granule)
    whole = (pages.length + offset) // unit
    levels = list(levels_of(old, sources, whole, is_kept=dtype == pages.keys.dtype))
    if not levels or (old is None and whole < LEAST):
        return None
    _, keys, is_kept = levels[0]
    if not is_kept and len(set(keys)) == len(keys):
        return None
    chains = [()] * len(sources)
    try:
        for num_units, keys, is_kept in levels:
            made = {key: key if is_kept else Stretch(memory, num_units, unit, like) for key in dict.fromkeys(keys)}
            chains = [(*chain, made[key]) for chain, key in zip(chains, keys, strict=True)]
        num_units = -(-(slots_wanted(pages, num_slots) + offset) // unit)
        prefix = Prefix(memory, like, chains, unit, offset, num_units)
    except OSError:  # the system gives no more addresses, say
        return None
    prefix.fill(tensors, sources, pages.length, set() if old is None else old.stretches)
    return prefix


def where_to_begin(pages, like, granule):
    """(unit, offset) of a Prefix for what Pages hold: as many slots are left out as give each row less of its own."""
    sizes = (each.shape[3] * each.element_size() for each in like)
    unit = math.lcm(pages.block_size, *(granule // math.gcd(granule, size) for size in sizes))
    end = pages.max_cache_len or pages.length + max(unit // 2, SPARE)
    own_without = -(-end // unit) - pages.length // unit
    own_with = -(-(end - pages.length) // unit)
    return unit, -pages.length % unit if own_with < own_without else 0


def levels_of(old, sources, whole, is_kept):
    """(units, what tells each row from those with other tokens there, whether that is a stretch to keep), one after the
    other, of the first `whole` units: of what was shared, and then of rows that come from one.
    """
    num_there = 0
    for level, stretch in enumerate(old.chains[0] if old is not None else ()):
        num_units = min(stretch.num_units, whole - num_there)
        if num_units > 0:
            keys = [old.chains[source][level] for source in sources]
            yield num_units, keys, is_kept and num_units == stretch.num_units
        num_there += num_units
    if num_there < whole and len(set(sources)) < len(sources):
        yield whole - num_there, sources, False


def slots_wanted(pages, num_slots):
    """How many slots a Prefix should have room for. A row's own take memory by the unit, so there are few to spare."""
    if pages.max_cache_len is not None:
        return max(pages.max_cache_len, pages.length)
    if pages.prefix is None:
        return pages.length + SPARE
    return num_slots - pages.prefix.offset


class Sharing(Storage):
    """Storage whose rows may have a shared prefix."""

    prefix: Prefix | None = None

    @property
    def room(self):
        return self.capacity if self.prefix is None else self.prefix.room

    @property
    def first_own(self):
        """The slot from which on what is written is seen by its row alone."""
        return 0 if self.prefix is None else self.prefix.end

    def with_headroom(self, num_tokens):
        if self.prefix is None or self.max_cache_len is not None:
            return super().with_headroom(num_tokens)
        return num_tokens + max((num_tokens - self.prefix.end) // 8, SPARE) + self.prefix.offset

    def moves_to_prefix(self, batch_rows, num_slots, dtype):
        """Move what is stored of `batch_rows`, a slice or row numbers, to a Prefix; return whether there is one."""
        rows = range(self.keys.shape[0])
        sources = list(rows[batch_rows]) if isinstance(batch_rows, slice) else batch_rows.tolist()
        prefix = prefix_of(self, sources, num_slots, dtype)
        if prefix is None:
            return False
        filled = self.filled()
        self.allocate(*filled[:2], len(sources), prefix.capacity, dtype, prefix)
        for tensor, content in zip(self.filled()[2:], filled[2:], strict=True):
            copy_rows(tensor, content, sources)
        return True

    def are_alike(self, sources):
        """Whether rows have their prefix in the memory of that of the rows `sources`."""
        chains = [] if self.prefix is None else self.prefix.chains
        return all(chain == chains[source] for chain, source in zip(chains, sources, strict=False))

    def not_shared(self, start):
        """`filled`, of whose keys and values a shared prefix is left out."""
        return self.filled(max(start, self.first_own))[:2] + self.filled(start)[2:]

    def set_length(self, length):
        super().set_length(length)
        if length < self.first_own:
            self.rows.have_moved()  # so that a step in a graph asks for room, too

    def to(self, device):
        if self.prefix is not None and self.keys.device != torch.device(device):
            self.prefix = self.prefix.to(torch.device(device))
            if self.prefix is not None:
                self.keys, self.values = self.prefix.tensors
        super().to(device)

    def discard(self):
        super().discard()
        self.prefix = None

    def __getstate__(self):
        return self.__dict__ if self.prefix is None else {**self.__dict__, "keys": None, "values": None}

    def __setstate__(self, state):
        """Of a copy, which shares the prefix, or of a pickle, which has it in every row."""
        self.__dict__.update(state)
        if self.prefix is None:
            return
        if isinstance(self.prefix, Prefix):
            self.keys, self.values = self.prefix.tensors
        else:
            (self.keys, self.values), self.prefix = self.prefix, None
        self.be_written()

    def be_written(self):
        """Have what is beside keys and values, in a copy, in tensors that can be written outside of inference mode."""
        with torch.inference_mode(False):
            self.beside = {name: tensor.clone() for name, tensor in self.beside.items()}
            self.work, self.counters = (None if each is None else each.clone() for each in (self.work, self.counters))
