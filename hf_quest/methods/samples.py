"""Clusters of a stream of keys and samples of it, for `SubGen`: what a row's tokens decide, and a seed."""

from dataclasses import dataclass

import torch

LOW_32 = 0xFFFFFFFF


@dataclass
class Clusters:
    """Clusters of the keys that a head has seen, in C places; size 0 is none.

    A cluster has the oldest of its keys, `t` uniform samples of its members, drawn one by one, and their number.
    """

    keys: torch.Tensor  # [B, Hkv, C, D] of the centres
    born: torch.Tensor  # [B, Hkv, C] int64, the centres' positions
    centres: torch.Tensor  # [B, Hkv, C] int64, slots
    samples: torch.Tensor  # [B, Hkv, C, t] int64, slots
    sizes: torch.Tensor  # [B, Hkv, C] int64

    def __post_init__(self):
        self.distances = torch.cdist(self.keys, self.keys, compute_mode="donot_use_mm_for_euclid_dist")
        is_none = self.sizes == 0
        is_none = is_none[..., None] | is_none[..., None, :]
        is_none = is_none | torch.eye(is_none.shape[-1], dtype=torch.bool, device=is_none.device)
        self.distances = self.distances.masked_fill(is_none, torch.inf)

    def add(self, key, born, slot, size):
        """Open a cluster with the key [B, Hkv, D] in a slot, [B, Hkv, 1], where its size, [B, Hkv, 1], is 1."""
        place = (self.sizes == 0).long().argmax(dim=-1, keepdim=True)  # [B, Hkv, 1]
        distance = (self.keys - key[:, :, None]).norm(dim=-1).masked_fill(self.sizes == 0, torch.inf)
        self.set_distances(place, distance.masked_fill(size == 0, torch.inf))
        self.keys.scatter_(2, place[..., None].expand(*place.shape, key.shape[-1]), key[:, :, None])
        for tensor, new in ((self.born, born), (self.centres, slot), (self.sizes, size)):
            tensor.scatter_(2, place, new)
        self.samples.scatter_(2, self.of_samples(place), slot[..., None].expand(-1, -1, -1, self.samples.shape[3]))

    def merge(self, most, uniform):
        """Make one of the two clusters whose centres are nearest, where there are more than `most`: the older centre
        stays, and each sample, by `uniform` [B, Hkv, t], is of one or the other.
        """
        is_more = (self.sizes > 0).sum(dim=-1, keepdim=True) > most
        num_places = self.sizes.shape[2]
        nearest = self.distances.flatten(2).argmin(dim=-1, keepdim=True)
        one, other = nearest // num_places, nearest % num_places
        is_older = self.born.gather(2, one) < self.born.gather(2, other)
        older, newer = torch.where(is_older, one, other), torch.where(is_older, other, one)
        num_newer = self.sizes.gather(2, newer)
        size = self.sizes.gather(2, older) + num_newer
        samples = [self.samples.gather(2, self.of_samples(place)) for place in (older, newer)]
        is_newer = (uniform < num_newer / size) & is_more
        self.samples.scatter_(2, self.of_samples(older), torch.where(is_newer[:, :, None], *samples[::-1]))
        self.sizes.scatter_(2, older, torch.where(is_more, size, size - num_newer))
        self.sizes.scatter_(2, newer, torch.where(is_more, 0, num_newer))
        gone = self.distances.gather(2, newer[..., None].expand(-1, -1, -1, num_places))[:, :, 0]
        self.set_distances(newer, gone.masked_fill(is_more, torch.inf))

    def set_distances(self, place, distances):
        """Note how far the centre in a place, [B, Hkv, 1], is from all, [B, Hkv, C]."""
        row = place[..., None].expand(-1, -1, -1, distances.shape[2])
        self.distances.scatter_(2, row, distances[:, :, None])
        self.distances.scatter_(3, row.transpose(2, 3), distances[..., None])

    def of_samples(self, place):
        return place[..., None].expand(-1, -1, -1, self.samples.shape[3])

    def first(self, num_clusters):
        """(centres, samples, sizes) of `num_clusters`, the oldest first, and then those of size 0."""
        age = self.born.masked_fill(self.sizes == 0, torch.iinfo(torch.int64).max)
        place = age.argsort(dim=-1, stable=True)[..., :num_clusters]
        samples = self.samples.gather(2, self.of_samples(place))
        return self.centres.gather(2, place), samples, self.sizes.gather(2, place)


def sampled(slots, masses, new_slots, new_masses, uniform):
    """Slots [B, Hkv, s], each a sample of all tokens so far by mass, after L more: each takes the place of a sample
    with a probability of its share of the mass until then.

    Args:
        masses: [B, Hkv, 1] float64, the sum of those before.
        new_slots, new_masses: [B, Hkv, L].
        uniform: [B, Hkv, L, s].

    Returns:
        The slots and the sum of masses.
    """
    total = masses + new_masses.cumsum(dim=-1)
    share = torch.where(new_masses > 0, new_masses / total, 0.0)
    turn = torch.arange(1, share.shape[2] + 1, device=slots.device)[:, None]
    last = (turn * (uniform < share[..., None])).amax(dim=2)  # [B, Hkv, s]: which took its place last, 0 for none
    return torch.where(last > 0, new_slots.gather(2, (last - 1).clamp(min=0)), slots), total[..., -1:]


def uniform_numbers(seed, numbers, num_draws):
    """[B, Hkv, ..., num_draws] float64, from 0 to 1, of [B, Hkv, ...] numbers: of each, a head, a draw and the seed."""
    head = torch.arange(numbers.shape[1], device=numbers.device).view(1, -1, *(1,) * (numbers.dim() - 2))
    mixed = mix(mix(mix(numbers & LOW_32) ^ (seed & LOW_32)) ^ head)
    return mix(mixed[..., None] ^ torch.arange(num_draws, device=numbers.device)).double() / 2**32


def mix(bits):
    """A permutation of the integers below 2^32, whose products stay below 2^63."""
    for _ in range(2):
        bits = ((bits >> 16) ^ bits) * 0x45D9F3B & LOW_32
    return (bits >> 16) ^ bits
