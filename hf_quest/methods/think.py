"""ThinK: channels of keys that the last queries hardly use go (arXiv 2407.21018)."""

from dataclasses import dataclass
from typing import ClassVar

from ..storage import Pruned
from .base import Method, is_int


@dataclass(frozen=True)
class ThinK(Method):
    """ThinK (arXiv 2407.21018) as its authors released it, without another method's eviction before it.

    No token goes. Keys that are older than the newest `budget` lose `share` of their channels: for each KV head those
    of the smallest product of two means, of the squares of the last `num_queries` queries and of the squares of all
    keys of the row. Keys and queries are those after the rotary embedding. The channels are chosen when a row first has
    more tokens than the budget, at the end of its prompt as a rule, and stay the same.

    The variant: query heads that share a KV head count together, so that it has one set of channels; the authors repeat
    the keys for each. `budget` is theirs at its default of 32. Their keys of an answer stay whole; here they are pruned
    as they grow older than the budget. Of a prompt in chunks the first that is longer than the budget decides.

    It is eager: a step makes whole keys of one layer at a time, with zeros, so it saves memory but no time.

    Args:
        budget: tokens whose keys stay whole, the newest ones.
        share: of the channels that the others lose, rounded down.
        num_queries: how many of the last queries choose.
    """

    budget: int = 32
    share: float = 0.4
    num_queries: int = 32

    evicts: ClassVar = True
    storage: ClassVar = Pruned

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 <= self.share < 1:
            raise ValueError(f"share is a share of channels, 0 or more and below 1, not {self.share!r}.")
        if not is_int(self.num_queries) or self.num_queries < 1:
            raise ValueError(f"num_queries is a number of tokens, 1 or more, not {self.num_queries!r}.")

    def attended(self, pages, attended):
        query, is_token = attended.query, attended.is_token
        if is_token is None:
            query = query[:, :, -self.num_queries :]
        else:
            query = query.masked_fill(~is_token[:, None, :, None], 0.0)
        squares = query.float().square().unflatten(1, (pages.keys.shape[1], -1)).mean(dim=2)  # [B, Hkv, T, D]
        pages.note(squares, self.num_queries)

    def keep(self, pages):
        is_token = pages.whole_is_token()[..., None]
        keys = pages.keys.float().masked_fill(~is_token, 0.0)
        importance = pages.squares.sum(dim=2) * keys.square().sum(dim=2)  # [B, Hkv, D]
        num_kept = importance.shape[2] - int(self.share * importance.shape[2])
        order = importance.argsort(dim=-1, descending=True, stable=True)[..., :num_kept]
        pages.prune(order.sort(dim=-1).values, self.budget)
