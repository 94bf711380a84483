"""Weighted: tokens that stand for others, and count as often as these."""

from typing import ClassVar

import torch
import torch.nn.functional as F

from .kept import Kept


class Weighted(Kept):
    """Kept, whose n entries count with weights: a token may be there several times, or for its key alone.

    `numerator` and `denominator` [B, Hkv, n] float32 are logarithms of how often an entry counts in the two sums of
    attention, 0 for what is new: once in both.
    """

    names: ClassVar[tuple[str, ...]] = (*Kept.names, "numerator", "denominator")

    def __init__(self, rows, beside_tokens):
        super().__init__(rows, beside_tokens)
        self.numerator = self.denominator = None

    @property
    def weights(self):
        return None if self.capacity == self.length else (self.numerator, self.denominator)

    def allocate(self, like_keys, like_values):
        super().allocate(like_keys, like_values)
        self.numerator = self.denominator = self.keys.new_zeros(self.keys.shape[:3], dtype=torch.float32)

    def read_by_step(self):
        return [*super().read_by_step(), *(self.weights or ())]

    def append(self, keys, values):
        joined = super().append(keys, values)
        self.weigh(*(F.pad(weights, (0, keys.shape[2])) for weights in (self.numerator, self.denominator)))
        return joined

    def weigh(self, numerator, denominator):
        """Take over how often every entry counts, two logarithms [B, Hkv, n]."""
        self.numerator, self.denominator = numerator, denominator

    def discard(self):
        super().discard()
        self.numerator = self.denominator = None
