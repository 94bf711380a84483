"""Rows: what is known of the rows of a cache as a whole, on the host and, for kernels and graphs, on every device."""

from dataclasses import dataclass, field

import torch


@dataclass
class OnDevice:
    """What the kernels and captured graphs read of a cache, on one device, in tensors that stay the same.

    It is written outside of captured graphs, so that they stay right while the sequence grows and its storage moves.
    """

    length: torch.Tensor | None = None  # [1] int64, slots filled, those of the forward under way included
    padding: torch.Tensor | None = None  # [B] int64, slots at the start of each row that hold no token
    addresses: torch.Tensor | None = None  # [layers, NUM_ADDRESSES] int64, see kernels.ops.decode


@dataclass
class Rows:
    """How much the rows of a cache hold, and where; the only owner of the copies of that on devices."""

    length: int = 0  # slots filled, those of the forward under way included
    left_padding: tuple[int, ...] = ()  # slots at the start of each row that hold no token
    common: list[list[int]] = field(default_factory=list)  # [B][B] slots from the first on that two rows share
    addresses: list[list[int]] = field(default_factory=list)  # a row for each layer, see kernels.ops.decode
    expected: int = 0  # tokens that the text under way is known to have
    reserved: list[torch.Tensor] = field(default_factory=list)  # blocks of host memory, for layers that need some next
    room: float = 0  # tokens for which all layers are known to have storage, at these addresses
    devices: dict[torch.device, OnDevice] = field(default_factory=dict)

    def __getstate__(self):
        """For copies and pickles, whose storage lies elsewhere."""
        return {**self.__dict__, "room": 0, "reserved": []}

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

    def set_left_padding(self, left_padding):
        """Take over a tuple of B ints."""
        if left_padding != self.left_padding:
            self.left_padding = left_padding
            for device in self.devices:
                on_device = self.on(device)
                on_device.padding = written_to(on_device.padding, left_padding, device)

    def expect(self, num_tokens):
        """Know how long the text under way will be at least."""
        self.expected = num_tokens

    def reserve(self, blocks):
        """Hold blocks of host memory, in place of what nobody took."""
        self.reserved = blocks

    def set_addresses(self, addresses, room):
        """Take over a list with one row for each layer, and for how many tokens there is storage there."""
        self.room = room
        if addresses != self.addresses:
            self.addresses = addresses
            for device in self.devices:
                on_device = self.on(device)
                on_device.addresses = written_to(on_device.addresses, addresses, device)

    def have_moved(self):
        """Have room and addresses asked again: some storage lies elsewhere."""
        self.room = 0

    def are_others(self):
        """Forget what rows share: they were exchanged, repeated or cut otherwise."""
        self.common = []

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


def written_to(tensor, numbers, device):
    """`tensor` with `numbers` in it, or a new int64 tensor on `device` where it cannot hold them."""
    with torch.inference_mode(False):  # or a tensor made here could not be written outside of it
        numbers = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        if tensor is None or tensor.shape != numbers.shape or tensor.is_inference():
            return numbers.to(device)
    return tensor.copy_(numbers)


def cannot_be_written(tensor):
    """Whether it was made, copied or loaded in inference mode and is used outside."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()
