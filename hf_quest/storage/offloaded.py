"""Offloaded: every token of a layer, keys and values in the host's memory."""

from ..errors import say_once
from ..kernels import ops
from . import host
from .coming import Coming
from .pages import Pages
from .pool import Pool


class Offloaded(Pages):
    """Pages whose keys and values lie in host memory, where kernels read and write them in place, see `host`.

    What is beside tokens and pages is on the device. Nothing makes a copy of all keys there but `at_hand`, for the
    attention of one layer. Where the kernels serve it, a `pool` on the device has what steps attended lately: no token
    that is stored no more, or in another slot.

    Args:
        num_pooled: tokens of a row's head that the pool has room for, or 0 for none.
        is_pool_wanted: whether it is said where there is none.
        arguments, options: of Pages.
    """

    offloading = True
    coming: Coming | None = None  # copies for the attention of the forward under way

    def __init__(self, *arguments, num_pooled=0, is_pool_wanted=False, **options):
        super().__init__(*arguments, **options)
        self.num_pooled, self.is_pool_wanted = num_pooled, is_pool_wanted

    def new_pool(self, keys, values, has_kernels):
        # A plan of memory is made as if for kernels.
        is_served = has_kernels or (keys.is_meta and ops.why_not(keys, values, self.page_size) is None)
        if not (self.num_pooled and is_served and ops.has_pools(keys.device, keys.shape[0] * keys.shape[1])):
            if self.is_pool_wanted:
                say_once("There is no pool for these keys on this device: all that is chosen comes from the host.")
            return None
        return Pool(keys, values, min(self.num_pooled, keys.shape[2]))

    def resize_pool(self, num_tokens):
        if num_tokens == self.num_pooled:
            return
        self.num_pooled = num_tokens
        if self.pool is not None:
            self.pool = None  # so that there is not a new one beside it
            self.pool = self.new_pool(self.keys, self.values, self.has_kernels)
            self.rows.have_moved()

    def forget(self, slot):
        """Have nothing in the pool of what is in the slots from `slot` on."""
        if self.pool is not None:
            self.pool.forget(slot, self.padding)

    def set_length(self, length):
        self.forget(length)
        super().set_length(length)

    def set_left_padding(self, left_padding):
        super().set_left_padding(left_padding)
        self.forget(0)

    def reorder(self, sources, start=0):
        super().reorder(sources, start)
        self.forget(start)

    def offload(self):
        super().offload()
        self.pool = None

    def prefetch(self):
        if self.is_away:
            super().prefetch()
            self.pool = self.new_pool(self.keys, self.values, self.has_kernels)

    def discard(self):
        super().discard()
        self.pool = None

    def find_addresses(self):
        addresses = super().find_addresses()
        return addresses if self.pool is None else [*addresses[:7], *self.pool.addresses()]

    def new_slots(self, like, slots, dtype):
        return host.empty((*slots, like.shape[-1]), dtype, like.device, self.rows.reserved)

    def with_headroom(self, num_tokens):
        return super().with_headroom(max(num_tokens, self.rows.expected))

    @property
    def bytes_on_host(self):
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes

    def bytes_with(self, keys, values):
        """Bytes of keys and of values on the host once these, [B, Hkv, T, D], are stored, too."""
        end = self.length + keys.shape[2]
        num_slots = self.capacity if self.length or self.fits(keys, values) else 0  # or others would take their place
        if end > num_slots:
            num_slots = self.in_blocks(self.with_headroom(end))
        return [each[:, :, 0].nbytes * num_slots for each in (keys, values)]

    def at_hand(self, keys, values):
        if not host.holds(keys):
            return keys, values
        num_tokens, coming = keys.shape[2], self.coming
        self.coming = None
        if coming is None or not coming.serves(num_tokens):
            coming = Coming(self, 0, self.in_blocks(num_tokens))  # whole ones, as the segments of a prompt want them
        return coming.arrive(num_tokens)

    def come(self, num_new):
        """Bring what is stored to the device, for a forward of `num_new` tokens that will attend it."""
        if self.length:
            self.coming = Coming(self, self.length, self.in_blocks(self.length + num_new))

    def begin_forward(self):
        """Forget what came for a forward that did not attend it."""
        self.coming = None

    def move(self, batch_rows, num_slots, dtype=None):
        """As of Pages, without a copy of all of it on the way."""
        filled, rows = self.filled(), range(self.keys.shape[0])
        sources = rows[batch_rows] if isinstance(batch_rows, slice) else batch_rows.tolist()
        keys, values = filled[:2]
        self.allocate(keys, values, len(sources), num_slots, dtype or keys.dtype)
        self.memories.change(lambda tensor: tensor[batch_rows])
        for stored, content in zip(self.filled(), filled, strict=True):
            for row, source in enumerate(sources):
                self.fill(stored[row, None], content[source, None])

    def parts(self, tensor):
        if not host.holds(tensor):
            return super().parts(tensor)
        return host.seen_by_cpu(tensor).unbind(1)  # heads, of which a row to spare takes little

    def fill(self, stored, content):
        if host.holds(stored):
            content = host.seen_by_cpu(content) if host.holds(content) else content
            host.seen_by_cpu(stored).copy_(content)
        else:
            super().fill(stored, content)

    def saved(self):
        tensors, facts = super().saved()
        return {**tensors, **self.seen_by_cpu(tensors)}, facts

    def seen_by_cpu(self, tensors):
        """Keys and values among tensors by name, as the CPU's."""
        return {name: host.seen_by_cpu(tensors[name]) for name in self.names if tensors.get(name) is not None}

    def __getstate__(self):
        return {**self.__dict__, **self.seen_by_cpu(self.__dict__), "coming": None, "pool": None}

    def __setstate__(self, state):
        """Of a copy or a pickle, whose keys and values are where such things are put."""
        self.__dict__.update(state)
        if self.keys is not None:
            self.keys, self.values = (host.copied(tensor, self.device) for tensor in (self.keys, self.values))
            self.be_written()  # as these are: all can be, or none
            self.pool = self.new_pool(self.keys, self.values, self.has_kernels)
