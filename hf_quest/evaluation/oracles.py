"""The best pages and the best tokens, which no estimate can better: they are chosen by the true weights.

As caches like any other, so that they answer questions, too. To know it, every step looks at all keys, which is not
counted as read: an oracle is told.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from .. import MethodCache, reference
from ..methods import Method
from ..methods.remembering import weights_of
from ..reference import Choice


@dataclass(frozen=True)
class Best(Method):
    """Of each KV head the newest page and those with the most attention weight, summed over its query heads.

    Args:
        budget: tokens, a number of whole pages.
        size: tokens in a page; with 1 single tokens are chosen.
    """

    size: int = 1

    @torch.no_grad()
    def choose(self, pages, query, logits, length):
        first = length - query.shape[2] + 1
        masses = [self.masses(pages, query[:, :, i : i + 1], logits, first + i) for i in range(query.shape[2])]
        most = masses[-1].shape[-1]
        scores = torch.stack([torch.nn.functional.pad(mass, (0, most - mass.shape[-1])) for mass in masses], dim=2)
        return Choice(reference.select(scores, length, pages.padding, self.budget // self.size, self.size), self.size)

    def masses(self, pages, query, logits, length):
        """[B, Hkv, P] float32: the weight of each page's tokens for one query per row, the last of `length`."""
        weights = weights_of(pages, query, logits, length).sum(dim=2)
        num_tokens = length - pages.padding
        weights = weights * (torch.arange(length, device=query.device) < num_tokens[:, None, None])
        return torch.nn.functional.pad(weights, (0, -length % self.size)).unflatten(-1, (-1, self.size)).sum(dim=-1)

    def read_to_choose(self, pages, length):
        return 0  # as if it were known


class BestCache(MethodCache):
    """Attends what `Best` chooses, of the budget rounded up to whole pages."""

    def __init__(self, budget: int = 2048, *, size: int, **options: Any):
        super().__init__(Best(-(-budget // size) * size, size), **options)


ORACLES = {"best-pages": functools.partial(BestCache, size=16), "best-tokens": functools.partial(BestCache, size=1)}
