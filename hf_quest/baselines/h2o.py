"""H2O: heavy hitters, the tokens with the most attention so far, and the most recent ones (arXiv 2306.14048)."""

import torch

from .evicting import EvictingCache
from .layer import EvictingLayer
from .weights import attention_weights


class H2OLayer(EvictingLayer):
    def observe(self, query, mask, is_token, **kwargs):
        for weights in attention_weights(query, self.keys, mask, is_token, **kwargs):
            self.scores = self.scores + weights.sum(dim=(2, 3))

    def priority(self):
        num_recent = self.settings.budget - self.settings.budget // 2
        is_recent = self.is_visible.flip(-1).cumsum(dim=-1).flip(-1) <= num_recent  # of the row: padding does not count
        return self.scores.masked_fill(is_recent, torch.inf)


class H2OCache(EvictingCache):
    """H2O (arXiv 2306.14048, algorithm 1) as its authors released it, the variant `H2OKVCache_LayerWise`.

    A token's score is the sum of the attention weights that all queries so far gave it, the prompt's included and not
    divided by how many queries could see it. Half of the budget is the newest tokens, half those of the highest scores
    among the others, for each head. Theirs has no grouped-query attention; here a KV head sums over its query heads.

    Quest's paper, for long inputs, and kvpress's `ObservedAttentionPress` call other things H2O: the former scores only
    from the first decoded token on, the latter divides by the number of queries and evicts once.

    Args and errors: those of `EvictingCache`.
    """

    layer_class = H2OLayer
    min_budget = 2
