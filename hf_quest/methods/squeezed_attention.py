"""Squeezed Attention: of a fixed prefix the clusters of keys that matter to the query (arXiv 2411.09688)."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from ..reference import in_order, order_of
from .base import is_int
from .clusters import cluster
from .remembering import Remembering, or_everything, row_lengths


class Clusters(NamedTuple):
    """Those of the first tokens of each row, as `clusters.cluster` makes them for it, and what fills up the others."""

    num_tokens: torch.Tensor  # [B] int64, tokens of the row that are in clusters; 0: none
    labels: torch.Tensor  # [B, Hkv, N] int64, -1 after those tokens
    centroids: torch.Tensor  # [B, Hkv, C, D] float32
    sizes: torch.Tensor  # [B, Hkv, C] int64, 0 for a cluster that does not exist


@dataclass(frozen=True)
class SqueezedAttention(Remembering):
    """Squeezed Attention (arXiv 2411.09688) with one level of clusters.

    The keys of a fixed prefix are clustered for each KV head. A step scores a cluster by the share of attention that
    one of its tokens would get if all keys were the centroids of their clusters: the largest share that a query head of
    the group gives. Tokens of clusters above one threshold are attended, and all tokens after the prefix. So some heads
    attend more than others.

    The variant: the threshold is one for the heads of a layer and follows from the budget, in every step and row, as
    the lowest with which they attend no more than `budget` tokens on average. The paper has one for all layers too, set
    once by the prefix's last queries. Clusters begin at random tokens, the paper's by k-means++. Its code serves one
    row and no grouped queries.

    The prefix is what is stored when `cache.squeeze()` is called, or else at the first step beyond the budget, without
    its last `num_newest` tokens. When what comes after it outgrows three quarters of the budget, all is clustered anew.
    Such a step takes as long as k-means does, the others read the centroids and what they attend.

    Args:
        budget: tokens that the KV heads of a layer attend on average.
        share: clusters per token of the prefix.
        num_newest: tokens at the end of the prefix that are attended always, but no more than half of the budget.
        seed: of the tokens at which clusters begin.
    """

    share: float = 0.05
    num_newest: int = 100
    seed: int = 0

    min_budget: ClassVar = 2

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 < self.share <= 1:
            raise ValueError(f"share is a number of clusters per token, above 0 and at most 1, not {self.share!r}.")
        for name, least in (("num_newest", 1), ("seed", 0)):
            if not is_int(getattr(self, name)) or getattr(self, name) < least:
                raise ValueError(f"{name} is an integer, {least} or more, not {getattr(self, name)!r}.")

    def read_to_choose(self, pages, length):
        is_new = pages.memory.recall(length + 1) is not pages.memory.recall(length)
        of_keys = length * pages.keys[0, 0, 0].nbytes if is_new else 0  # which k-means reads once in every round
        return super().read_to_choose(pages, length) + of_keys

    def choose_next(self, pages, query, logits, length):
        num_tokens = row_lengths(pages, length)
        is_small = num_tokens <= self.budget
        if bool(is_small.all()):
            return None
        clusters = self.clusters_at(pages, length, ~is_small)
        is_chosen = self.above_threshold(clusters, shares_of(query, logits, clusters), num_tokens)
        labels = F.pad(clusters.labels, (0, length - clusters.labels.shape[2]), value=-1)
        is_read = is_chosen.gather(2, labels.clamp(min=0)) & (labels >= 0)
        token = torch.arange(length, device=query.device)
        is_read = is_read | ((token >= clusters.num_tokens[:, None]) & (token < num_tokens[:, None]))[:, None]
        ids = in_order(torch.where(is_read, token, -1))[..., : int(is_read.sum(dim=-1).max())]
        return or_everything(pages, length, is_small, ids)

    def clusters_at(self, pages, length, is_large):
        """The Clusters that count at the last of `length` tokens, made anew in rows [B] `is_large` that need it."""
        earlier = pages.memory.recall(length)
        num_after = row_lengths(pages, length) - (earlier["num_tokens"] if earlier else 0)
        is_new = is_large & (num_after > 3 * self.budget // 4)
        if bool(is_new.any()):
            return self.squeeze(pages, length, is_new)
        return Clusters(**earlier)

    @torch.no_grad()
    def squeeze(self, pages, length, is_new=None) -> Clusters:
        """Cluster the keys in the first `length` slots, of the rows [B] `is_new` or all, and remember it."""
        earlier = pages.memory.recall(length)
        num_newest = max(1, min(self.num_newest, self.budget // 2))
        rows = []
        for row, padding in enumerate(pages.left_padding):
            if is_new is None or bool(is_new[row]):
                keys = pages.keys[row, :, padding : max(padding, length - num_newest)]
                rows.append(cluster(keys, math.ceil(self.share * keys.shape[1]), self.seed))
            elif earlier:
                rows.append(tuple(earlier[name][row] for name in Clusters._fields[1:]))
            else:
                rows.append(cluster(pages.keys[row, :, :0], 0, self.seed))
        labels, centroids, sizes = zip(*rows, strict=True)
        labels = stacked(labels, -1)
        num_tokens = (labels[:, 0] >= 0).sum(dim=-1)
        clusters = Clusters(num_tokens, labels, stacked(centroids, 0), stacked(sizes, 0))
        pages.memory.remember(length, **clusters._asdict())
        return clusters

    def above_threshold(self, clusters, shares, num_tokens):
        """[B, Hkv, C] bool: the clusters of the largest shares, of all heads together, that the budget has room for."""
        num_heads = shares.shape[1]
        room = num_heads * (self.budget - (num_tokens - clusters.num_tokens))
        shares, sizes = shares.flatten(1), clusters.sizes.flatten(1)
        rank = order_of(shares) - torch.arange(shares.shape[1], device=shares.device)  # no two alike
        order = rank.argsort(dim=-1, descending=True)
        fits = sizes.gather(1, order).cumsum(dim=-1) <= room[:, None]
        return torch.zeros_like(fits).scatter(1, order, fits).unflatten(1, (num_heads, -1))


def shares_of(query, logits, clusters):
    """[B, Hkv, C] float32: the logarithm of the share of attention that a token of each cluster is estimated to get."""
    num_kv_heads = clusters.sizes.shape[1]
    grouped = query[:, :, 0].float().unflatten(1, (num_kv_heads, -1))  # [B, Hkv, G, D]
    estimate = (grouped @ clusters.centroids.transpose(-1, -2)) * logits.scaling
    if logits.softcap is not None:
        estimate = logits.softcap * torch.tanh(estimate / logits.softcap)
    total = (estimate + clusters.sizes.float().log()[:, :, None]).logsumexp(dim=-1)
    if logits.sinks is not None:
        total = torch.logaddexp(total, logits.sinks.float().view(num_kv_heads, -1))
    return (estimate - total[..., None]).amax(dim=2).masked_fill(clusters.sizes == 0, -torch.inf)


def stacked(rows, value):
    """[B, Hkv, most, ...] of rows [Hkv, n, ...], filled up with `value`."""
    most = max(row.shape[1] for row in rows)
    return torch.stack([F.pad(row, (0, 0) * (row.dim() - 2) + (0, most - row.shape[1]), value=value) for row in rows])
