"""Stripes: every 16th page of a row, or 8th or 4th, of each of which a like share is chosen: part of the specification.

Blocks of a GPU that look after stripes of their own choose without a word to each other. What matters lies together in
a text, so neighbours belong to different stripes. A share of few tokens leaves out what is best where it lies in one
stripe, so for small budgets there are fewer stripes.

Letters in shapes are those of `reference.py`; X is the number of stripes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

COUNTS = (16, 8, 4)  # which two or four blocks share evenly
LEAST_SHARE = 12  # tokens of a stripe, where there are more than the fewest stripes


def count(num_tokens: int, page_size: int) -> int:
    """X: into how many stripes pages are dealt where `num_tokens` are chosen, those of the newest page included."""
    return next((num for num in COUNTS if num * LEAST_SHARE <= num_tokens - page_size), COUNTS[-1])


def starts(num_pages: Tensor, num_stripes: int) -> Tensor:
    """[..., X + 1]: how many of `num_pages` [...] pages are in the stripes before each, and in all."""
    stripe = torch.arange(num_stripes + 1, device=num_pages.device)
    num_pages = num_pages[..., None]
    return stripe * (num_pages // num_stripes) + torch.minimum(stripe, num_pages % num_stripes)


def shares_of_tokens(num: Tensor, num_pages: Tensor, num_stripes: int) -> Tensor:
    """[..., X]: how many of `num` [...] tokens each stripe gets, in proportion to its pages; in all they are `num`."""
    return (num[..., None] * starts(num_pages, num_stripes) // num_pages[..., None].clamp(min=1)).diff(dim=-1)


def shares_of_pages(num: Tensor, num_pages: Tensor, num_stripes: int) -> Tensor:
    """[..., X]: the same of pages, rounded up, so that they hold its share of the tokens of as many pages."""
    own = starts(num_pages, num_stripes).diff(dim=-1)
    return torch.minimum(own, -(-num[..., None] * own // num_pages[..., None].clamp(min=1)))


def most_pages(num: int, num_stripes: int) -> int:
    """The largest share of `num` pages, however many pages there are."""
    return -(-num // num_stripes) + 1


def by_stripe(of_pages: Tensor, num_stripes: int, fill: int) -> Tensor:
    """[..., X, P / X]: what [..., P] are, where `fill` stands for pages that there are not."""
    filled = F.pad(of_pages, (0, -of_pages.shape[-1] % num_stripes), value=fill)
    return filled.unflatten(-1, (-1, num_stripes)).transpose(-1, -2)


def best(rank: Tensor, shares: Tensor, most: int) -> Tensor:
    """[..., X, most] int64: indices of the `shares` [..., X] highest of `rank` [..., X, M], ascending; -1 fills up.

    Fewer where the rest of the ranks is INT64.min. No share is above `most`.
    """
    highest = rank.topk(min(most, rank.shape[-1]), dim=-1)
    place = torch.arange(highest.indices.shape[-1], device=rank.device)
    is_taken = (place < shares[..., None]) & (highest.values > reference.INT64.min)
    taken = reference.in_order(highest.indices.masked_fill(~is_taken, -1))
    return F.pad(taken, (0, most - taken.shape[-1]), value=-1)
