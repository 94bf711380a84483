"""Handed: what a layer's `update` gave the model, on its way to the attention of the same forward."""

from dataclasses import dataclass

import torch


@dataclass
class Handed:
    """It is dead with the forward. The attention may be called with it several times, by layers that share keys."""

    num_new: int = 0  # tokens of the forward
    is_under_way: bool = False  # the attention is not done with it
    is_seen: bool = True  # a method that evicts has taken note of it
    is_plain: bool = True  # the forward's mask is causal with left padding at most
    new: tuple[torch.Tensor, torch.Tensor] | None = None  # of a captured step: keys and values that are not stored

    def arrive(self, is_plain):
        """The attention is called with it, and with a mask that is plain or not."""
        self.is_plain = is_plain

    def see(self):
        self.is_seen = True

    def end(self):
        """The attention is done with it, and what was stored stays."""
        self.is_under_way = False

    def step(self, num_new):
        """It is that of a captured step now."""
        self.num_new = num_new

    def put(self, keys, values):
        """Hold the keys and values of a captured step until its attention stores them."""
        self.new = (keys, values)

    def take(self):
        """What `put` holds, or None; the caller stores it."""
        new, self.new = self.new, None
        return new
