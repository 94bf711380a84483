"""Storage: what Pages, Ring and Kept share."""

from typing import Any, ClassVar

import torch

from ..kernels import ops
from .rows import Rows


class Storage:
    """Keys and values of one layer, [B, Hkv, slots, D], and what a method keeps beside their tokens or pages.

    A subclass says in `append` and `move` which token is in which slot. `length` counts the tokens that were stored,
    padding and what is gone since included, and `left_padding` is how many of them, at the start of each row, hold no
    token: B ints.
    """

    names: ClassVar[tuple[str, ...]] = ("keys", "values")  # of the tensors that move together; those of `beside` do too
    evicts = False  # what a method leaves out is gone
    is_local = False  # it holds what a window reaches
    has_kernels = False  # whether the CUDA kernels serve it
    offloading = False  # whether keys and values lie in the host's memory, see `host`
    num_unread = 0.0  # what a step that reads all reads less, in tokens, where some have lost channels
    reach: int | None = None  # tokens that the layer attends, the query's own included; None: all

    def __init__(self, rows: Rows, max_cache_len: int | None = None):
        self.rows = rows
        self.max_cache_len = max_cache_len  # tokens to allocate at once, or None
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.beside: dict[str, torch.Tensor] = {}  # what a method keeps, by name
        self.length = 0
        self.left_padding: tuple[int, ...] = ()
        self.on_device = None  # rows.on the device of this storage
        self.device = None  # where the model computes
        self.is_away = False  # on the CPU, see `offload`
        self.pool = None  # of what lies in the host's memory, see `new_pool`

    @property
    def capacity(self):
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def room(self):
        """Tokens that there is room for."""
        return self.capacity

    @property
    def padding(self):
        """[B] int64, slots at the start of each row that hold no token."""
        return self.on_device.padding

    def append(self, keys, values):
        """Store new keys and values, [B, Hkv, T, D]; return those that the new tokens may attend, [B, Hkv, N, D], the
        new ones with their gradients where several tokens have some.
        """
        raise NotImplementedError

    def move(self, batch_rows, num_slots, dtype=None):
        """Move what is stored of `batch_rows`, a slice or row numbers, to new storage of `num_slots`."""
        raise NotImplementedError

    def make_room(self, num_tokens):
        """Have storage for `num_tokens` that can be written."""
        self.prefetch()

    def begin_with(self, keys, values, length):
        """Begin with the newest of `length` tokens, those of another cache."""
        raise NotImplementedError

    def fits(self, keys, values):
        """Whether the storage, empty now, is one for these keys and values."""
        return self.keys is not None and all(
            (stored.shape[:2], stored.shape[3], stored.dtype, stored.device)
            == (new.shape[:2], new.shape[3], new.dtype, new.device)
            for stored, new in ((self.keys, keys), (self.values, values))
        )

    def discard(self):
        """Have new storage for the next tokens, where none are stored."""
        self.keys = self.values = None
        self.beside = {}

    def new_pool(self, keys, values, has_kernels):
        """A Pool beside such keys and values, or None."""
        return None

    def at_hand(self, keys, values):
        """Keys and values that `append` returned, where attention that reads them several times should find them."""
        return keys, values

    def with_headroom(self, num_tokens):
        """What to allocate for `num_tokens`: an eighth more, so that a long generation copies its cache seldom."""
        return num_tokens + max(num_tokens // 8, 256) if self.max_cache_len is None else self.max_cache_len

    def set_length(self, length):
        self.length = length
        self.rows.set_length(length)

    def set_left_padding(self, left_padding):
        """Take over how many slots at the start of each row hold no token, where tokens are stored."""
        self.begin_rows(left_padding)

    def begin_rows(self, left_padding):
        self.left_padding = left_padding
        self.rows.set_left_padding(left_padding)

    def newest_keys(self):
        """[B, Hkv, n, D]: all keys that are held, in order."""
        return self.keys[:, :, : self.length]

    def padding_mask(self):
        """[B, 1, 1, N] bool, False in left padding, or None without any."""
        return None

    def has_moved(self):
        """Tell the rows and graphs of new storage.

        Without the kernels: one graph for every capacity, and one more recording of it where the storage moves.
        """
        self.device, self.is_away = self.keys.device, False
        self.on_device = self.rows.on(self.device)
        self.rows.have_moved()
        for tensor in self.tensors().values():
            torch._dynamo.maybe_mark_dynamic(tensor, 2)
            torch._dynamo.mark_static_address(tensor)

    def tensors(self):
        """All that is stored, by name."""
        stored = {name: getattr(self, name) for name in self.names if getattr(self, name) is not None}
        return stored | self.beside

    def to(self, device):
        for name, tensor in self.tensors().items():
            if self.offloading and name in self.names:
                continue
            moved = tensor.to(device, non_blocking=True)
            if name in self.beside:
                self.beside[name] = moved
            else:
                setattr(self, name, moved)

    def saved(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What it takes to go on elsewhere: all that is stored, by name, and facts that JSON can hold."""
        return self.tensors(), {"length": self.length, "left_padding": list(self.left_padding)}

    def restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any], device: torch.device) -> None:
        """Be, where nothing is stored, what `saved` told of, on a device. The tensors are copied."""
        self.begin_rows(tuple(facts["left_padding"]))
        self.restore_tensors(tensors, facts, device)
        self.set_length(facts["length"])

    def restore_tensors(self, tensors, facts, device):
        """Have copies of what was stored, for `restore`."""
        raise NotImplementedError

    def offload(self):
        """Move what is stored to the CPU, until `prefetch` or the next token."""
        self.is_away = self.keys is not None
        self.rows.have_moved()
        self.to("cpu")

    def prefetch(self):
        """Move what is stored back to where the model computes."""
        if self.is_away:
            self.to(self.device)
            self.has_moved()

    def resize_pool(self, num_tokens):
        """Have room for so many tokens of a row's head in the pool, where there is one."""

    def select_rows(self, batch_rows):
        """Keep the rows `batch_rows`, a [rows] tensor of row numbers, in that order."""
        self.make_room(self.length)
        self.rows.are_others()
        self.move(batch_rows.to(self.keys.device), self.capacity)
        self.begin_rows(tuple(self.left_padding[row] for row in batch_rows.tolist()))

    def reorder(self, sources, start=0):
        """Rows take the tokens of the rows `sources`, a list; before slot `start` they hold the same."""
        raise NotImplementedError

    def check_crop(self, num_removed, layer_idx):
        """Raise if the newest `num_removed` tokens cannot be taken back."""
        if not 0 <= num_removed <= self.length:
            raise ValueError(
                f"crop takes minus the number of tokens to remove, from 0 to -{self.length} here, not {-num_removed}. "
                "The content of the cache is unchanged."
            )

    def crop(self, length):
        """Drop the tokens after the first `length`."""
        raise NotImplementedError

    def put_back(self, length):
        """Undo the last forward, before which there were `length` tokens; return whether that was possible."""
        self.crop(length)
        return True

    def settle(self):
        """The forward has ended: what it took to undo it can go."""

    def took_step(self, num_new):
        """Count the tokens that a captured step has stored."""
        self.length += num_new

    def reset(self):
        """Forget every token; storage is kept for others."""
        self.set_length(0)
        if self.keys is not None:
            self.begin_rows((0,) * self.keys.shape[0])

    def mask_sizes(self, num_new):
        """(keys, first): how many keys the mask of `num_new` tokens is for, and the slot of the first of them."""
        return self.length + num_new, 0

    def find_addresses(self):
        """The row of this layer in `kernels.ops.decode`'s addresses."""
        return [0] * ops.NUM_ADDRESSES
