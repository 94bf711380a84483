"""The ways to choose what a decode step attends to that `hf-quest eval selection` compares, and what each reads."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference, stripes
from ..codes import LEAST, find_candidates, is_held
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
    them; `share` is the least share of all pages that are candidates. With keys the true weights choose, which no
    estimate can better. `unit` is what is chosen, pages or tokens, on which the heads of a group agree by codes or keys
    as `agreement` says. With a `mass` a step attends of these tokens only as many, best first, as hold that share of
    the estimated attention of all candidates, and at least 1 / LEAST of the budget. Values are read in `value_bits`.
    """

    width: float = PUBLISHED.width
    keeps_first: bool = PUBLISHED.keeps_first
    group: str = PUBLISHED.group
    page_size: int = 16
    bounds_bits: int = 8
    by: str = "bounds"
    unit: str = "pages"
    agreement: str = "sum"
    bits: float = 2
    candidates: int = 0
    share: float = 0.0
    stripes: int = 0
    mass: float = 0.0
    value_bits: int = 16
    fold: int = 0

    @property
    def score(self) -> Score:
        return Score(self.width, self.keeps_first, self.group)

    def num_pages(self, budget: int) -> int:
        return budget // self.page_size

    def num_stripes(self, budget: int) -> int:
        return stripes.count(budget, self.page_size)

    @property
    def num_levels(self) -> int:
        """Values that a channel of a code can have: 1.6 bits are five of three values each in a byte."""
        return int(2**self.bits)

    def num_candidates(self, budget: int, num_pages: int) -> int:
        """Pages that are looked at by their codes, the newest among them."""
        if not self.candidates:
            return num_pages
        return min(max(self.candidates * self.num_pages(budget), math.ceil(self.share * num_pages)), num_pages)

    def num_folds(self, budget: int, num_pages: int) -> int:
        """Folds that hold all candidates, besides the newest, of which there may be a single page."""
        return min(-(-self.num_candidates(budget, num_pages) // self.fold) + 1, -(-num_pages // self.fold))

    def bytes_of(self, budget: int, length: int, head_dim: int, num_attended: float | None = None) -> float:
        """What a step reads of one KV head, with keys in 16 bits: of `num_attended` tokens, by default its budget."""
        num_pages = -(-length // self.page_size)
        scale = 0 if self.value_bits == 16 else 2 / head_dim  # of a token's values
        attended = (num_attended or min(budget, length)) * (2 + self.value_bits / 8 + scale)
        scales = 1 / reference.SCALE_BLOCK if self.bounds_bits == 8 else 0
        bounds = num_pages * (2 * self.bounds_bits / 8 + scales) if self.by != "keys" else 0
        if self.fold:
            bounds *= (-(-num_pages // self.fold) + self.fold * self.num_folds(budget, num_pages)) / num_pages
        num_coded = self.num_candidates(budget, num_pages)
        if self.stripes and self.candidates:
            num_earlier = torch.tensor(num_pages - 1)
            num_found = num_earlier.clamp(max=num_coded - 1)
            num_coded = int(stripes.shares_of_pages(num_found, num_earlier, self.num_stripes(budget)).sum())
        codes = num_coded * self.page_size * self.bits / 8 if self.by == "codes" else 0
        return head_dim * (attended + bounds + codes)


HALF = Choice(width=0.5, keeps_first=True, group="sum")
CODES = Choice(*DEFAULT, by="codes", candidates=8)
BEST = Choice(by="keys", group="sum")
CHOICES = {
    "published": Choice(),
    "default": Choice(*DEFAULT),
    "half": HALF,
    "codes-pages": CODES,
    "codes-tokens": dataclasses.replace(CODES, unit="tokens", stripes=1),
    "best-pages": BEST,
    "best-tokens": dataclasses.replace(BEST, unit="tokens"),
}
KINDS = {"by": ("bounds", "codes", "keys"), "unit": ("pages", "tokens"), "group": GROUPS, "agreement": ("sum", "share")}
NUMBERS = {
    "keeps_first": (0, 1),
    "bits": (1, 1.6, *range(2, 9)),
    "bounds_bits": (8, 16),
    "value_bits": (8, 16),
    "page_size": range(1, 1025),
    "stripes": (0, 1),
}


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
    if choice.stripes and (choice.by, choice.unit) != ("codes", "tokens"):
        raise ValueError(f"{text}: in stripes, codes choose tokens, and nothing else is chosen.")
    if choice.by == "bounds" and choice.unit == "tokens":
        raise ValueError(f"{text}: bounds are of pages, so that only codes and keys choose tokens.")
    if choice.fold and (choice.by != "codes" or not choice.candidates):
        raise ValueError(f"{text}: pages are found together as candidates, among which codes choose.")
    if choice.mass and choice.unit != "tokens":
        raise ValueError(f"{text}: only single tokens are attended as far as they hold a share of the mass.")
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
    is_share = kinds[field] is float and field not in NUMBERS
    is_possible = 0 <= number <= 1 if is_share else number in NUMBERS.get(field, range(2**20))
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
            estimated = grouped_logits(query, rounded(keys, bounds, math.log2(choice.num_levels), page_size), scaling)
        if choice.by == "bounds" or choice.candidates:
            is_found = found_pages(choice, budget, query, keys, bounds, scaling)
            if choice.by == "bounds":
                return of_tokens(is_found) & is_visible
            is_open = (is_open & is_found)[:, :, None]  # [B, Hkv, 1, T, P]
    estimated = estimated.masked_fill(~of_tokens(is_open), -torch.inf)
    if choice.unit == "tokens":
        weights = agreed(estimated, choice.agreement, of_tokens(is_open))
        return best_tokens(choice, budget, weights) | own_page
    weights = agreed(page_mass(estimated, page_size), choice.agreement, is_open)
    return of_tokens(select_pages(weights, length, num_pages, page_size, choice.keeps_first)) & is_visible


def found_pages(choice: Choice, budget: int, query: Tensor, keys: Tensor, bounds: Tensor, scaling: float) -> Tensor:
    """[B, Hkv, T, P] bool: the pages that bounds find, or with a fold those of the folds that theirs find."""
    length, size, num_pages = keys.shape[2], choice.page_size, bounds.shape[2]
    num_found = choice.num_candidates(budget, num_pages) if choice.by == "codes" else choice.num_pages(budget)
    in_stripes = functools.partial(select_in_stripes, num_stripes=choice.num_stripes(budget))
    find = in_stripes if choice.stripes else select_pages
    if choice.fold:
        size *= choice.fold
        bounds, num_found = bounds_of(keys, size, choice.bounds_bits), choice.num_folds(budget, num_pages)
        find = select_pages
    scores = by_bounds(query, bounds, length, size, scaling, choice.score)
    is_found = find(scores, length, num_found, size, choice.keeps_first)
    return is_found.repeat_interleave(choice.fold, dim=-1)[..., :num_pages] if choice.fold else is_found


def best_tokens(choice: Choice, budget: int, weights: Tensor) -> Tensor:
    """[B, Hkv, T, N] bool: the tokens of the highest weights, [B, Hkv, T, N], before each query's own page."""
    num = budget - choice.page_size
    if choice.stripes:
        chosen = best_in_stripes(weights, num, choice.page_size, choice.num_stripes(budget))
    else:
        best = weights.topk(min(weights.shape[-1], num), dim=-1)
        chosen = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, best.indices, best.values > 0)
    return holding(weights, chosen, choice.mass, budget // LEAST) if choice.mass else chosen


def holding(weights: Tensor, chosen: Tensor, mass: float, least: int) -> Tensor:
    """[..., N] bool: of the `chosen` those, best first, that hold a share of all `weights`, and the first `least`."""
    best, order = weights.masked_fill(~chosen, 0.0).double().sort(dim=-1, descending=True, stable=True)
    is_needed = is_held(best, weights.double().sum(dim=-1, keepdim=True), mass, least)
    return chosen & torch.zeros_like(chosen).scatter(-1, order, is_needed)


def grouped_logits(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """[B, Hkv, G, T, N] float32."""
    grouped = query.float().unflatten(1, (keys.shape[1], -1))
    return (grouped @ keys.float()[:, :, None].transpose(-1, -2)) * scaling


def select_in_stripes(
    scores: Tensor, length: int, num_selected: int, page_size: int, keeps_first: bool, num_stripes: int
) -> Tensor:
    """[B, Hkv, T, P] bool of [B, Hkv, T, P] scores: the pages before each query's own that are candidates."""
    padding = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    ids = find_candidates(scores, length, padding, num_selected, page_size, keeps_first, num_stripes).flatten(3)
    return has_ids(ids, scores.shape[-1])


def best_in_stripes(weights: Tensor, num: int, page_size: int, num_stripes: int) -> Tensor:
    """[B, Hkv, T, N] bool: of `num` tokens before each query's own page those of the highest weights in each stripe."""
    num_queries, length = weights.shape[-2:]
    position = torch.arange(length, device=weights.device)
    num_earlier = position[-num_queries:] // page_size
    rank = (reference.order_of(weights) - position).masked_fill(weights <= 0, reference.INT64.min)
    of_pages = F.pad(rank, (0, -length % page_size), value=reference.INT64.min).unflatten(-1, (-1, page_size))
    of_stripes = stripes.by_stripe(of_pages.transpose(-1, -2), num_stripes, reference.INT64.min)  # [..., S, X, P / X]
    of_stripes = of_stripes.movedim(-3, -1).flatten(-2)  # [..., X, tokens]
    shares = stripes.shares_of_tokens((num_earlier * page_size).clamp(max=num), num_earlier, num_stripes)
    best = stripes.best(of_stripes, shares, int(shares.max()))
    stripe = torch.arange(num_stripes, device=weights.device)[:, None]
    ids = (best // page_size * num_stripes + stripe) * page_size + best % page_size
    return has_ids(torch.where(best < 0, -1, ids).flatten(-2), length)


def has_ids(ids: Tensor, num: int) -> Tensor:
    """[..., num] bool: which of so many the `ids` [..., K] name, of which -1 names none."""
    found = torch.zeros(*ids.shape[:-1], num + 1, dtype=torch.bool, device=ids.device)
    return found.scatter(-1, ids.masked_fill(ids < 0, num), True)[..., :num]
