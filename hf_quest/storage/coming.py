"""Coming: keys and values of the host's memory on their way to the device, while the layer before computes."""

import torch

from . import host
from .copies import copy_by_head

streams: dict[torch.device, torch.cuda.Stream] = {}


def stream_of(device):
    """That on which everything comes to a device."""
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


class Coming:
    """Copies of the first tokens of an `Offloaded` storage, made on a stream of their own.

    Args:
        storage: whose they are.
        num_tokens: those that are stored.
        num_slots: of each copy, of which the others are left for tokens that come later.
    """

    def __init__(self, storage, num_tokens, num_slots):
        self.storage, self.num_tokens, self.done, self.reader = storage, num_tokens, None, None
        tensors = storage.keys, storage.values
        self.copies = [tensor.new_empty(*tensor.shape[:2], num_slots, tensor.shape[3]) for tensor in tensors]
        device = tensors[0].device
        if device.type != "cuda":
            self.copy(0, num_tokens)
            return
        stream, self.reader = stream_of(device), torch.cuda.current_stream(device)
        stream.wait_stream(self.reader)  # on which they were stored, and others had the memory of the copies
        with torch.cuda.stream(stream):
            self.copy(0, num_tokens)
            self.done = stream.record_event()

    def __del__(self):
        """What nobody took goes on: the copies' memory, which is the reader's, must not be another's until then.

        `record_stream` for every copy would have the allocator keep memory for as many layers as the host is ahead of.
        """
        if self.done is None:
            return
        if torch.cuda.is_current_stream_capturing():
            for copy in self.copies:
                copy.record_stream(stream_of(copy.device))
        else:
            self.reader.wait_event(self.done)

    def copy(self, first, end):
        """Copy the tokens in the slots `first` to `end - 1`, on the current stream."""
        for copy, tensor in zip(self.copies, (self.storage.keys, self.storage.values), strict=True):
            stored = host.seen_by_cpu(tensor, waits=False)[:, :, first:end]
            copy_by_head(copy[:, :, first:end], stored, non_blocking=True)

    def arrive(self, num_tokens):
        """Keys and values of the first `num_tokens` on the device, those that were stored meanwhile included."""
        if self.done is not None:
            torch.cuda.current_stream(self.copies[0].device).wait_event(self.done)
            self.done = None
        self.copy(self.num_tokens, num_tokens)
        return [copy[:, :, :num_tokens] for copy in self.copies]

    def serves(self, num_tokens):
        """Whether they are of the storage as it is now, and there is room for so many tokens."""
        is_alike = self.copies[0].dtype == self.storage.keys.dtype and len(self.copies[0]) == len(self.storage.keys)
        return is_alike and self.num_tokens <= num_tokens <= self.copies[0].shape[2]
