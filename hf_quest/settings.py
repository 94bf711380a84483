"""What a cache shares with its layers, and what of it lies on a device for the kernels and captured graphs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from . import reference
from .masks import Masks
from .prefill import BlockScores, CritiPrefill

PREPARED, TAKEN = "prepared", "taken"


@dataclass
class OnDevice:
    """What the kernels and captured graphs read of a cache, on one device, in tensors that stay the same.

    It is written outside of captured graphs, so that they stay right while the sequence grows and its storage moves.
    """

    length: torch.Tensor = None  # [1] int64, slots filled, those of the forward under way included
    padding: torch.Tensor = None  # [B] int64, slots at the start of each row that hold no token
    addresses: torch.Tensor = None  # [layers, 6] int64, see ops.decode


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
    room: float = 0  # tokens for which all layers are known to have storage, at these addresses
    devices: dict = field(default_factory=dict)  # of every device of a layer, the OnDevice
    step: str | None = None  # of a captured decode: None, PREPARED or TAKEN
    is_recording: bool = False  # of a step in a CUDA graph, without compilation
    max_positions: float = math.inf  # tokens of context that the model is made for
    reads_everything: bool = False  # in a captured decode, as far as the model's context goes
    reaches: dict = field(default_factory=dict)  # tokens that a local layer attends, by its index
    masks: Masks = field(default_factory=Masks)
    saw_autocast: bool = False  # so that keys and values of several dtypes come from one model
    common: list = field(default_factory=list)  # [B][B] slots from the first on that two rows are known to share
    score: reference.Score = reference.DEFAULT
    recorder: Callable | None = None  # is told which pages a layer selected, see QuestCache.recorder

    def __getstate__(self):
        """For copies and pickles, whose storage lies elsewhere."""
        return {**self.__dict__, "room": 0}

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

    def with_headroom(self, num_tokens):
        """What to allocate for `num_tokens`: an eighth more, so that a long generation copies its cache seldom."""
        return num_tokens + max(num_tokens // 8, 256) if self.max_cache_len is None else self.max_cache_len

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
    """`tensor` with `numbers` in it, or a new int64 tensor on `device` where it cannot hold them."""
    with torch.inference_mode(False):  # or a tensor made here could not be written outside of it
        numbers = torch.tensor(numbers, dtype=torch.int64)
        if tensor is None or tensor.shape != numbers.shape or tensor.is_inference():
            return numbers.to(device)
    return tensor.copy_(numbers)


def cannot_be_written(tensor):
    """Whether it was made, copied or loaded in inference mode and is used outside."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()
