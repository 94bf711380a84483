"""Widened: the bounds of pages as a CPU multiplies them, in float32."""

import torch

from ..reference import from_8_bits
from .rows import cannot_be_written


class Widened:
    """A copy of bounds in 8 bits, widened when a step first needs them and kept: to widen all of them at every step
    takes a CPU longer than to score by them. With pages of 16 it is a sixteenth of keys and values in float32.
    """

    def __init__(self):
        self.bounds: torch.Tensor | None = None  # [B, Hkv, capacity / S, 2, D] float32
        self.num_pages = 0  # the first ones, that are up to date

    def forget(self, first_page=0):
        """The bounds of the pages from `first_page` on may be others by now."""
        self.num_pages = min(self.num_pages, first_page)

    def of(self, pages):
        """[B, Hkv, capacity / S, 2, D] float32: the bounds of all full pages, and what says nothing of the others."""
        bounds, scales = pages.beside["bounds"], pages.beside.get("scales")
        if scales is None:
            return bounds.float()
        if self.bounds is None or cannot_be_written(self.bounds):
            with torch.inference_mode(False):  # or it could not be written outside of it
                self.bounds, self.num_pages = torch.zeros(bounds.shape), 0
        new = slice(self.num_pages, pages.length // pages.page_size)
        if new.start < new.stop:
            with torch.no_grad():
                self.bounds[:, :, new] = from_8_bits(bounds[:, :, new], scales[:, :, new])
            self.num_pages = new.stop
        return self.bounds
