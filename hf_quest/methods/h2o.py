"""H2O: heavy hitters, the tokens with the most attention so far, and the most recent ones (arXiv 2306.14048)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Method
from .weights import attention_weights


@dataclass(frozen=True)
class H2O(Method):
    """H2O (arXiv 2306.14048, algorithm 1) as its authors released it, the variant `H2OKVCache_LayerWise`.

    A token's score is the sum of the attention weights that all queries so far gave it, the prompt's included and not
    divided by how many queries could see it. Half of the budget is the newest tokens, half those of the highest scores
    among the others, for each head. Theirs has no grouped-query attention; here a KV head sums over its query heads.

    Quest's paper, for long inputs, and kvpress's `ObservedAttentionPress` call other things H2O: the former scores only
    from the first decoded token on, the latter divides by the number of queries and evicts once.
    """

    min_budget: ClassVar = 2
    evicts: ClassVar = True

    def beside_tokens(self, head_dim, dtype):
        return {"scores": ((), torch.float32)}

    def attended(self, pages, attended):
        for weights in attention_weights(pages.keys, attended):
            pages.beside["scores"] = pages.beside["scores"] + weights.sum(dim=(2, 3))

    def keep(self, pages):
        num_recent = self.budget - self.budget // 2
        seen_later = pages.is_visible.flip(-1).cumsum(dim=-1).flip(-1)  # of the row: padding does not count
        return pages.beside["scores"].masked_fill(seen_later <= num_recent, torch.inf)
