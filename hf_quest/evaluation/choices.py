"""The ways to choose what a decode step attends to that `hf-quest eval selection` compares, and what each reads."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference, stripes
from ..reference import DEFAULT, GROUPS, PUBLISHED, Score
from .scores import (
    agreed,
    bounds_of,
    by_bounds,
    is_earlier,
    page_mass,
    rounded,
    select_pages,
)


@dataclass(frozen=True)
class Choice:
    """One way to choose, whatever the budget.

    `width`, `keeps_first` and `group` say how pages are scored by their bounds of 8 or 16 bits, as in reference.Score.
    With `by` bounds that chooses. With codes, keys in `bits` per channel on their page's own grid, it only finds the
    candidates, `candidates` times as many pages as the budget has (0: all pages, unscored), and the codes choose among
    them. With keys the true weights choose, which no estimate can better. `unit` is what is chosen, pages or tokens;
    how the heads of a group agree on it is `group`, too, but for `max`, which is `share` there: weights are not bounds.
    """

    width: float = PUBLISHED.width
    keeps_first: bool = PUBLISHED.keeps_first
    group: str = PUBLISHED.group
    page_size: int = 16
    bounds_bits: int = 8
    by: str = "bounds"
    unit: str = "pages"
    bits: int = 2
    candidates: int = 0
    stripes: int = 0

    @property
    def score(self) -> Score:
        return Score(self.width, self.keeps_first, self.group)

    def num_pages(self, budget: int) -> int:
        return budget // self.page_size

    def bytes_of(self, budget: int, length: int, head_dim: int) -> float:
        """What a step reads of one KV head, with keys and values in 16 bits."""
        num_pages = -(-length // self.page_size)
        attended = 4 * min(budget, length)
        scales = 1 / reference.SCALE_BLOCK if self.bounds_bits == 8 else 0
        bounds = num_pages * (2 * self.bounds_bits / 8 + scales) if self.by != "keys" else 0
        num_coded = min(self.candidates * self.num_pages(budget), num_pages) if self.candidates else num_pages
        codes = num_coded * self.page_size * self.bits / 8 if self.by == "codes" else 0
        return head_dim * (attended + bounds + codes)


HALF = Choice(width=0.5, keeps_first=True, group="sum")
CODES = dataclasses.replace(HALF, by="codes", candidates=8)
BEST = Choice(by="keys", group="sum")
CHOICES = {
    "published": Choice(),
    "default": Choice(*DEFAULT),
    "half": HALF,
    "codes-pages": CODES,
    "codes-tokens": dataclasses.replace(CODES, unit="tokens"),
    "best-pages": BEST,
    "best-tokens": dataclasses.replace(BEST, unit="tokens"),
}
KINDS = {"by": ("bounds", "codes", "keys"), "unit": ("pages", "tokens"), "group": GROUPS}
NUMBERS = {"keeps_first": (0, 1), "bits": range(1, 9), "bounds_bits": (8, 16), "page_size": range(1, 1025)}


def parse_choice(text: str) -> Choice:
    """The choice of a name in CHOICES, with other settings behind it: `half,page_size=8`.

    Raises:
        ValueError: for a name or a setting that there is not.
    """
    name, *settings = text.split(",")
    if name not in CHOICES:
        raise ValueError(f"There is no method {name!r}. The methods are {', '.join(CHOICES)}.")
    changes = {}
    for setting in settings:
        field, _, value = setting.partition("=")
        changes[field] = parse_setting(field, value)
    choice = dataclasses.replace(CHOICES[name], **changes)
    if choice.by == "bounds" and choice.unit == "tokens":
        raise ValueError(f"{text}: bounds are of pages, so that only codes and keys choose tokens.")
    return choice


def parse_setting(field: str, value: str) -> Any:
    kinds = {each.name: type(each.default) for each in dataclasses.fields(Choice)}
    if field not in kinds:
        raise ValueError(f"There is no setting {field!r} of a method. The settings are {', '.join(kinds)}.")
    if field in KINDS:
        if value not in KINDS[field]:
            raise ValueError(f"{field} is one of {', '.join(KINDS[field])}, not {value!r}.")
        return value
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    is_possible = 0 <= number <= 1 if kinds[field] is float else number in NUMBERS.get(field, range(2**20))
    if not is_possible:
        raise ValueError(f"{field}={value} is out of range.")
    return kinds[field](number)


def attended_tokens(choice: Choice, budget: int, query: Tensor, keys: Tensor, logits: Tensor, scaling: float) -> Tensor:
    """[B, Hkv, T, N] bool: the tokens that each query attends, its own page among them, those behind it left out.

    Args:
        query: [B, Hq, T, D], of the newest T tokens.
        keys: [B, Hkv, N, D].
        logits: [B, Hkv, G, T, N] float32, the true ones, -inf for tokens behind a query.
    """
    length, num_queries, page_size = keys.shape[2], query.shape[2], choice.page_size
    num_pages = choice.num_pages(budget)
    is_open = is_earlier(num_queries, length, page_size, keys.device)  # [T, P]

    def of_tokens(pages: Tensor) -> Tensor:
        return pages.repeat_interleave(page_size, dim=-1)[..., :length]

    position = torch.arange(length, device=keys.device)
    is_visible = position <= position[-num_queries:, None]
    own_page = ~of_tokens(is_open) & is_visible
    if choice.by == "keys":
        estimated = logits
    else:
        bounds = bounds_of(keys, page_size, choice.bounds_bits)
        if choice.by == "codes":
            estimated = grouped_logits(query, rounded(keys, bounds, choice.bits, page_size), scaling)
        if choice.by == "bounds" or choice.candidates:
            scores = by_bounds(query, bounds, length, page_size, scaling, choice.score)
            num_found = num_pages if choice.by == "bounds" else choice.candidates * num_pages
            if choice.stripes:
                is_found = striped_pages(scores, length, num_found, page_size, choice.keeps_first)
            else:
                is_found = select_pages(scores, length, num_found, page_size, choice.keeps_first)
            if choice.by == "bounds":
                return of_tokens(is_found) & is_visible
            is_open = (is_open & is_found)[:, :, None]  # [B, Hkv, 1, T, P]
    estimated = estimated.masked_fill(~of_tokens(is_open), -torch.inf)
    group = "share" if choice.group == "max" else choice.group
    if choice.unit == "tokens":
        weights = agreed(estimated, group, of_tokens(is_open))
        if choice.stripes:
            return striped_tokens(weights, budget - page_size, page_size) | own_page
        best = weights.topk(min(length, budget - page_size), dim=-1)
        chosen = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, best.indices, best.values > 0)
        return chosen | own_page
    weights = agreed(page_mass(estimated, page_size), group, is_open)
    return of_tokens(select_pages(weights, length, num_pages, page_size, choice.keeps_first)) & is_visible


def grouped_logits(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """[B, Hkv, G, T, N] float32."""
    grouped = query.float().unflatten(1, (keys.shape[1], -1))
    return (grouped @ keys.float()[:, :, None].transpose(-1, -2)) * scaling


def striped_pages(scores, length, num_found, page_size, keeps_first):
    T, P = scores.shape[-2:]
    newest = torch.arange(length - T, length) // page_size  # [T]
    page = torch.arange(P)
    rank = reference.order_of(scores) - page
    if keeps_first:
        rank = rank.masked_fill(page == 0, reference.INT64.max)
    rank = rank.masked_fill(page >= newest[:, None], reference.INT64.min)
    num = torch.minimum(torch.tensor(num_found - 1), newest)
    shares = stripes.shares_of_pages(num, newest)
    return stripes.are_best(rank[..., None], shares, stripes.most_in_stripe(num_found))[..., 0]


def striped_tokens(weights, num, page_size):
    T, N = weights.shape[-2:]
    newest = torch.arange(N - T, N) // page_size
    rank = reference.order_of(weights) - torch.arange(N)
    rank = rank.masked_fill(weights <= 0, reference.INT64.min)
    rank = torch.nn.functional.pad(rank, (0, -N % page_size), value=reference.INT64.min).unflatten(-1, (-1, page_size))
    num = torch.minimum(torch.tensor(num), newest * page_size)
    shares = stripes.shares_of_tokens(num, newest)
    return stripes.are_best(rank, shares, int(shares.max())).flatten(-2)[..., :N]
