"""Clusters of keys, by k-means on their directions."""

import math

import torch
import torch.nn.functional as F

MOST_ROUNDS = 100
NUM_PRODUCTS = 2**26  # float32 numbers that `nearest` may hold at a time, about


def cluster(keys, num_clusters, seed):
    """Clusters of [H, N, D] keys, for each head: (labels [H, N] int64, centroids [H, C, D], sizes [H, C] int64).

    Lloyd's k-means on the normalised keys, from C of the N tokens that `seed` picks, the same ones in every head, until
    nothing changes or for MOST_ROUNDS. A centroid is the mean of its members' keys, not normalised. A cluster may lose
    all members: its size is 0 and its centroid means nothing. C is 0 only without tokens.
    """
    points = F.normalize(keys.float(), dim=-1)
    if not num_clusters:
        none = torch.zeros(keys.shape[:2], dtype=torch.int64, device=keys.device)
        return none, points, none
    generator = torch.Generator("cpu").manual_seed(seed)
    start = torch.randperm(keys.shape[1], generator=generator, device="cpu")[:num_clusters]
    centres, labels = points[:, start.sort().values.to(keys.device)], None
    for _ in range(MOST_ROUNDS):
        before, labels = labels, nearest(points, centres)
        if before is not None and torch.equal(labels, before):
            break
        means, sizes = means_of(points, labels, num_clusters)
        centres = torch.where(sizes[..., None] > 0, means, centres)
    return labels, *means_of(keys, labels, num_clusters)


def nearest(points, centres):
    """[H, N] int64: the nearest of the centres [H, C, D], of two as near the first."""
    offset = centres.square().sum(dim=-1)[:, None] / 2
    chunk_len = max(1, NUM_PRODUCTS // math.prod(centres.shape[:2]))
    chunks = [chunk @ centres.transpose(1, 2) - offset for chunk in points.split(chunk_len, dim=1)]
    return torch.cat([chunk.argmax(dim=-1) for chunk in chunks], dim=1)


def means_of(points, labels, num_clusters):
    """(means [H, C, D] float32 of the points with each label, how many they are [H, C] int64)."""
    # In float64, where the order in which a GPU adds does not show after rounding.
    sums = points.new_zeros(points.shape[0], num_clusters, points.shape[2], dtype=torch.float64)
    sums.scatter_add_(1, labels[..., None].expand(points.shape), points.double())
    sizes = labels.new_zeros(sums.shape[:2]).scatter_add_(1, labels, torch.ones_like(labels))
    return (sums / sizes.clamp(min=1)[..., None]).float(), sizes
