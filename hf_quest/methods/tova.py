"""TOVA: what the newest query attends to least goes (arXiv 2401.06104)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from .base import Method
from .weights import attention_weights


@dataclass(frozen=True)
class TOVA(Method):
    """TOVA (arXiv 2401.06104, section 3) as its authors released it, the variant with one set of tokens for a layer.

    After attention the tokens with the highest weights of the newest query, averaged over all heads of the layer,
    stay. No token is protected, the newest and the first included. A prompt that is longer than the budget is cut at
    once, by its last query. The paper's compression of large position gaps, for contexts beyond those of training, is
    not part of this.

    kvpress's `TOVAPress` differs: it protects the last token and evicts after the prompt only.
    """

    evicts: ClassVar = True

    def beside_tokens(self, head_dim, dtype):
        return {"scores": ((), torch.float32)}

    def attended(self, pages, attended):
        (weights,) = attention_weights(pages.keys, of_newest(attended))
        scores = weights.mean(dim=(1, 2)).expand_as(pages.beside["scores"])  # over all heads
        if attended.is_token is not None:
            has_some = attended.is_token.any(dim=1)[:, None, None]
            scores = torch.where(has_some, scores, pages.beside["scores"])
        pages.beside["scores"] = scores

    def keep(self, pages):
        return pages.beside["scores"]


def of_newest(attended):
    """The part of each row's newest query that is of a token."""
    batch_size, num_queries = attended.query.shape[0], attended.query.shape[2]
    newest = torch.full((batch_size,), num_queries - 1, device=attended.query.device)
    if attended.is_token is not None:
        newest = (attended.is_token * torch.arange(1, num_queries + 1, device=newest.device)).argmax(dim=1)

    def part(by_query):
        if by_query is None:
            return None
        return by_query.expand(batch_size, -1, -1, -1).take_along_dim(newest[:, None, None, None], dim=2)

    parts = {name: part(getattr(attended, name)) for name in ("query", "mask", "position_bias")}
    return replace(attended, **parts, is_token=None)
