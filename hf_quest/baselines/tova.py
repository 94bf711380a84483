"""TOVA: what the newest query attends to least goes (arXiv 2401.06104)."""

import torch

from .evicting import EvictingCache
from .layer import EvictingLayer
from .weights import attention_weights


class TOVALayer(EvictingLayer):
    def observe(self, query, mask, is_token, position_bias=None, **kwargs):
        newest = torch.full((query.shape[0],), query.shape[2] - 1, device=query.device)
        if is_token is not None:  # of each row the last one that is
            newest = (is_token * torch.arange(1, query.shape[2] + 1, device=query.device)).argmax(dim=1)

        def of_newest(by_query):
            if by_query is None:
                return None
            by_query = by_query.expand(query.shape[0], -1, -1, -1)
            return by_query.take_along_dim(newest[:, None, None, None], dim=2)

        bias = of_newest(position_bias)
        (weights,) = attention_weights(of_newest(query), self.keys, of_newest(mask), position_bias=bias, **kwargs)
        scores = weights.mean(dim=(1, 2)).expand_as(self.scores)  # over all heads
        if is_token is not None:
            scores = torch.where(is_token.any(dim=1)[:, None, None], scores, self.scores)
        self.scores = scores


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
