"""Widened: the bounds of pages as a CPU multiplies them."""

import torch

from ..reference import from_8_bits
from .rows import cannot_be_written


class Widened:
    """A copy of bounds in 8 bits, [B, Hkv, 2 · D, capacity / S] bfloat16, which holds each times its scale exactly.

    It is made when a step first needs it, and kept: to widen all bounds at every step takes a CPU longer than to score
    by them, and so does a product with pages in rows. With pages of 16 it is 3 % of keys and values in float32.
    """

    def __init__(self):
        self.bounds: torch.Tensor | None = None
        self.num_pages = 0  # the first ones, that are up to date

    def forget(self, first_page=0):
        """The bounds of the pages from `first_page` on may be others by now."""
        self.num_pages = min(self.num_pages, first_page)

    def of(self, pages):
        """[B, Hkv, 2 · D, capacity / S]: the bounds of all full pages, and what says nothing of the others."""
        bounds, scales = pages.beside["bounds"], pages.beside.get("scales")
        if scales is None:
            return bounds.flatten(3).transpose(2, 3)
        if self.bounds is None or cannot_be_written(self.bounds):
            with torch.inference_mode(False):  # or it could not be written outside of it
                *rows, num_pages, extremes, head_dim = bounds.shape
                self.bounds = torch.zeros(
                    *rows, extremes * head_dim, num_pages, dtype=torch.bfloat16, device=bounds.device
                )
            self.num_pages = 0
        new = slice(self.num_pages, pages.length // pages.page_size)
        if new.start < new.stop:
            with torch.no_grad():
                widened = from_8_bits(bounds[:, :, new], scales[:, :, new])
                self.bounds[..., new] = widened.flatten(3).transpose(2, 3)
            self.num_pages = new.stop
        return self.bounds
