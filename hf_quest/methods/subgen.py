"""SubGen: clusters of keys for attention's denominator, samples by norm of values for its numerator (2402.06082)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..storage import Weighted
from .base import Method, is_int
from .samples import Clusters, sampled, uniform_numbers

# What an entry is. In a row that has samples those are first, in this order.
TOKEN, FIRST, SAMPLE_BY_NORM, CENTRE, SAMPLE = range(5)
SAMPLED = (SAMPLE_BY_NORM, CENTRE, SAMPLE)
TOGETHER = 256  # tokens for which numbers are drawn together


@dataclass(frozen=True)
class SubGen(Method):
    """SubGen (arXiv 2402.06082, algorithm 1), written from descriptions of it: no code of its authors could be found.

    The newest tokens are kept as they are. A token that is older takes part in two samples. Attention's numerator is
    estimated from tokens that were sampled by the squared norm of their values, its denominator from clusters of keys,
    of each of which uniform samples stand for all members. The two are other tokens, so what comes out is no average of
    values. Both are computed in the logarithm. All keys are those after the rotary embedding, by KV head.

    What is not verified: the paper gives a radius within which a key joins a cluster. Here it is the least distance of
    two centres: a key opens a cluster, and of more than there is room for the two nearest become one, whose centre is
    the older. A reviewer of a later paper of the authors reports that the experiments ran a clustering of the whole
    prompt instead of this one. The split of the budget and the number of samples are not known; those here are ours.
    So are the first tokens that are kept as they are: where attention has sinks the estimate is useless without them,
    and with them it still loses, on SmolLM2, several times what a window of as many tokens loses.

    What the mask hides later takes part all the same, and is hidden where it was sampled.

    Args:
        budget: entries of each KV head: newest tokens, samples by norm, and for each cluster a centre and its samples.
        recent: share of the budget that is tokens as they are, the newest and the first; half of the rest are samples
            by norm.
        num_first: how many of a row's first tokens are kept as they are, but no more than an eighth of the budget.
        num_samples: of each cluster.
        seed: of the samples.
    """

    recent: float = 0.5
    num_first: int = 16
    num_samples: int = 1
    seed: int = 0

    evicts: ClassVar = True
    storage: ClassVar = Weighted

    def __post_init__(self):
        super().__post_init__()
        is_number = isinstance(self.recent, (int, float)) and not isinstance(self.recent, bool)
        if not is_number or not 0 <= self.recent < 1:
            raise ValueError(f"recent is a share of the budget, 0 or more and below 1, not {self.recent!r}.")
        for name, least in (("num_first", 0), ("num_samples", 1), ("seed", 0)):
            if not is_int(getattr(self, name)) or getattr(self, name) < least:
                raise ValueError(f"{name} is an integer, {least} or more, not {getattr(self, name)!r}.")
        if self.num_recent < 1:
            raise ValueError(
                f"budget of SubGenCache includes a new token, a sample by norm and a cluster with num_samples="
                f"{self.num_samples}, so it cannot be {self.budget!r}. Give a larger budget, more of it to recent "
                "tokens, or fewer samples."
            )

    @property
    def num_by_norm(self) -> int:
        """Samples by the norm of the values."""
        return max(1, int(self.budget * (1 - self.recent) / 2))

    @property
    def num_clusters(self) -> int:
        return max(1, self.num_by_norm // (1 + self.num_samples))

    @property
    def num_recent(self) -> int:
        """Tokens that are kept as they are, the first ones included."""
        return self.budget - self.num_by_norm - self.num_clusters * (1 + self.num_samples)

    def beside_tokens(self, head_dim, dtype):
        # Of samples by norm the sum of all squared norms, of a cluster's entries how many keys it has.
        return {"kinds": ((), torch.int8), "totals": ((), torch.float64)}

    def keep(self, pages):
        kinds = pages.beside["kinds"]
        is_token = (kinds <= FIRST) & pages.is_token
        is_sampled = (kinds == CENTRE).any(dim=-1, keepdim=True)  # by row: a shorter one is not yet
        fits = ~is_sampled & (is_token.sum(dim=-1, keepdim=True) <= self.budget)
        is_first = torch.where(is_sampled, kinds == FIRST, is_token)
        is_first = is_first & (is_first.cumsum(dim=-1) <= min(self.num_first, self.budget // 8)) & ~fits
        order = (is_token.long() + is_first).argsort(dim=-1, stable=True)  # the first last, before them the newest
        is_leaving = is_token.gather(2, order[..., : -self.num_recent]) & ~fits
        num_leaving = int(is_leaving.sum(dim=-1).max())
        first = is_leaving.shape[2] - num_leaving
        slots, is_leaving = order[..., first : -self.num_recent], is_leaving[..., first:]
        samples = self.sample(pages, is_sampled, slots, is_leaving)
        self.lay_out(pages, samples, order[..., -self.budget :], is_first, fits)

    def sample(self, pages, is_sampled, slots, is_leaving):
        """Have the tokens in `slots`, [B, Hkv, L], take part in the samples so far.

        Returns:
            Slots of samples by norm [B, Hkv, s], of centres [B, Hkv, m] and of samples [B, Hkv, m, t], and how often
            they count: the sum of squared norms [B, Hkv, 1] and the sizes of clusters [B, Hkv, m].
        """
        by_norm, mass = self.by_norm_so_far(pages, is_sampled)
        clusters = self.clusters_so_far(pages, is_sampled)
        numbers = clusters.sizes.sum(dim=-1, keepdim=True) + is_leaving.cumsum(dim=-1)
        masses = squared_norms(pages.values).gather(2, slots) * is_leaving
        for first in range(0, slots.shape[2], TOGETHER):
            some = slice(first, first + TOGETHER)
            uniform = uniform_numbers(self.seed, numbers[..., some], self.num_by_norm + self.num_samples)
            uniform, by_cluster = uniform.split([self.num_by_norm, self.num_samples], dim=-1)
            by_norm, mass = sampled(by_norm, mass, slots[..., some], masses[..., some], uniform)
            self.cluster(clusters, pages, slots[..., some], is_leaving[..., some], by_cluster)
        return by_norm, mass, *clusters.first(self.num_clusters)

    def by_norm_so_far(self, pages, is_sampled):
        """Slots of the samples by norm, again from the first on for a larger budget, and their sum of squared norms."""
        kinds = pages.beside["kinds"]
        num_before = int((kinds == SAMPLE_BY_NORM).sum(dim=-1).max())
        slots = torch.arange(self.num_by_norm, device=kinds.device) % max(1, num_before)
        return slots.expand(*kinds.shape[:2], -1), pages.beside["totals"][..., :1] * is_sampled

    def clusters_so_far(self, pages, is_sampled):
        """The Clusters, no more of them than there is room for and a place for one more."""
        kinds = pages.beside["kinds"]
        first, num_before = (int((kinds == kind).sum(dim=-1).max()) for kind in (SAMPLE_BY_NORM, CENTRE))
        place = torch.arange(max(num_before, self.num_clusters) + 1, device=kinds.device)
        is_there = is_sampled & (place < num_before)
        centres = torch.where(is_there, first + place, 0)
        samples = first + num_before + place[:, None] * self.num_samples
        samples = torch.where(is_there[..., None], samples + torch.arange(self.num_samples, device=place.device), 0)
        sizes = pages.beside["totals"].gather(2, centres).long() * is_there
        clusters = Clusters(keys_in(pages, centres), pages.positions.gather(2, centres), centres, samples, sizes)
        for excess in range(num_before - self.num_clusters):  # of a larger budget
            number = clusters.sizes.sum(dim=-1)
            clusters.merge(self.num_clusters, uniform_numbers(self.seed + 1 + excess, number, self.num_samples))
        return clusters

    def cluster(self, clusters, pages, slots, is_leaving, uniform):
        """Add the keys in `slots` to the clusters, one after the other."""
        keys, born, sizes = keys_in(pages, slots), pages.positions.gather(2, slots), is_leaving.long()
        for idx in range(slots.shape[2]):
            part = slice(idx, idx + 1)
            clusters.add(keys[:, :, idx], born[..., part], slots[..., part], sizes[..., part])
            clusters.merge(self.num_clusters, uniform[:, :, idx])

    def lay_out(self, pages, samples, newest, is_first, fits):
        """Keep the samples and then the newest tokens, or where all fit these alone, and note what they are and how
        often they count.
        """
        by_norm, mass, centres, samples, sizes = samples
        slots, recent = (by_norm, centres, samples.flatten(2)), newest[..., -self.num_recent :]
        kinds = [torch.full_like(part, kind) for part, kind in zip(slots, SAMPLED, strict=True)]
        kinds = torch.cat([*kinds, torch.where(is_first.gather(2, recent), FIRST, TOKEN)], dim=2)
        kinds = kinds.masked_fill(fits, TOKEN)
        pages.keep(torch.where(fits, newest, torch.cat([*slots, recent], dim=2)))
        members = sizes.repeat_interleave(self.num_samples, dim=2)
        totals = torch.cat([mass.expand(by_norm.shape), sizes, members, torch.zeros_like(recent)], dim=2)
        pages.beside["kinds"], pages.beside["totals"] = kinds.to(torch.int8), totals.double()
        by_norm = torch.where(totals > 0, totals / squared_norms(pages.values) / self.num_by_norm, 0.0).log()
        by_size = (totals / self.num_samples).log()
        is_token = kinds <= FIRST
        numerator = by_norm.masked_fill(kinds != SAMPLE_BY_NORM, -torch.inf).masked_fill(is_token, 0.0)
        denominator = by_size.masked_fill(kinds != SAMPLE, -torch.inf).masked_fill(is_token, 0.0)
        pages.weigh(numerator.float(), denominator.float())


def squared_norms(values):
    """[B, Hkv, n] float64."""
    return wide(values).square().sum(dim=-1).double()


def keys_in(pages, slots):
    """[B, Hkv, L, D]: the keys in `slots`."""
    return wide(pages.keys.gather(2, slots[..., None].expand(*slots.shape, pages.keys.shape[3])))


def wide(tensor):
    """In 32 bits, or in more as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
