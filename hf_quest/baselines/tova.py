"""TOVA: what the newest query attends to least goes (arXiv 2401.06104)."""

import torch

from .evicting import EvictingCache, EvictingLayer, attention_weights


class TOVALayer(EvictingLayer):
    def observe(self, query, mask, is_visible, **kwargs):
        newest_mask = None if mask is None else mask[:, :, -1:]
        (weights,) = attention_weights(query[:, :, -1:], self.keys, newest_mask, **kwargs)
        mean = weights.mean(dim=(1, 2))  # over all heads: [B, 1, n]
        self.scores = mean.expand_as(self.scores).masked_fill(~is_visible, -torch.inf)


class TOVACache(EvictingCache):
    """TOVA (arXiv 2401.06104, section 3) as its authors released it, the variant with one set of tokens for a layer.

    After attention the tokens with the highest weights of the newest query, averaged over all heads of the layer,
    stay. No token is protected, the newest and the first included. A prompt that is longer than the budget is cut at
    once, by its last query. The paper's compression of large position gaps, for contexts beyond those of training, is
    not part of this.

    kvpress's `TOVAPress` differs: it protects the last token and evicts after the prompt only.

    Args and errors: those of `EvictingCache`.
    """

    layer_class = TOVALayer
