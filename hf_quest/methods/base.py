"""Method: one way to choose what a decode step reads, or what is kept."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..reference import Choice, Length, Logits
from ..storage import Kept, Pages


@dataclass
class Attended:
    """What the newest T tokens attended to in a layer, for `Method.attended`."""

    query: torch.Tensor  # [B, Hq, T, D]
    mask: torch.Tensor | None  # bool or added, broadcastable to [B, Hq, T, n]; None: causal
    is_token: torch.Tensor | None  # [B, T] bool, False for queries of padding; None: all are of tokens
    logits: Logits
    position_bias: torch.Tensor | None = None  # added to the logits, broadcastable to [B, Hq, T, n]


@dataclass(frozen=True)
class Method:
    """How the layers of a cache choose, after its dense ones. Settings only: what a layer remembers is in its storage.

    A method that reads less overrides `choose`; one that keeps less sets `evicts` and overrides `keep`. The other hooks
    are for what either needs to know. `pages` is the layer's storage, a `storage.Pages`, or a `storage.Kept` for a
    method that evicts: `keys` and `values` [B, Hkv, slots, D], `length`, `padding` [B], in `beside` what was declared.

    Args:
        budget: tokens that each KV head attends in one decode step, or keeps.

    Raises:
        ValueError: for a budget below the least.
    """

    budget: int = 2048

    min_budget: ClassVar[int] = 1  # tokens
    evicts: ClassVar[bool] = False  # what `keep` leaves out is gone
    storage: ClassVar[type[Kept]] = Kept  # of a method that evicts
    fused: ClassVar[Any] = None  # kernels that store, choose and attend in one, see `methods.quest.Chain`

    def __post_init__(self) -> None:
        if not is_int(self.budget) or self.budget < self.min_budget:
            raise ValueError(
                f"budget of {type(self).__name__}Cache is a number of tokens, {self.min_budget} or more, not "
                f"{self.budget!r}."
            )

    @property
    def page_size(self) -> int:
        """Tokens in a page of storage."""
        return 16

    @property
    def num_attended(self) -> int:
        """Tokens that a decode step attends per KV head at most."""
        return self.budget

    @property
    def num_pooled(self) -> int:
        """Tokens of a KV head of which the kernels hold copies on the device by default, where keys and values lie in
        the host's memory; 0 if they cannot.
        """
        return 0

    def beside_tokens(self, head_dim: int, dtype: torch.dtype) -> dict:
        """What is kept beside every token, for keys of this dim and dtype: by name, the shape that follows [B, Hkv,
        slots] and the dtype.
        """
        return {}

    def beside_pages(self, head_dim: int, dtype: torch.dtype) -> dict:
        """What is kept beside every page, as in `beside_tokens`."""
        return {}

    def read_beside(self, pages: Pages) -> float:
        """Bytes that a step reads of one KV head besides keys and values."""
        return pages.num_pages(pages.length) * pages.bytes_beside_pages

    def read_to_choose(self, pages: Pages, length: int) -> float:
        """Bytes of one KV head that the step just done, on `length` slots, has read to choose, a mean over rows."""
        return self.read_beside(pages)

    def stored(self, pages: Pages, num_new: int, length: Length) -> None:
        """The newest `num_new` of `length` slots are new, or were cut anew: bring what is beside them up to date.

        `length` is an int, or in a graph, which does not know it, [1] int64.
        """

    def catch_up(self, pages: Kept | Pages) -> None:
        """What is beside the newest tokens is looked at, saved or copied: do what `stored` has put off."""

    def choose(self, pages: Pages, query: torch.Tensor, logits: Logits, length: Length) -> Choice | None:
        """What the queries [B, Hq, T, D] of the newest T of `length` tokens attend; None for everything."""
        return None

    def attended(self, pages: Kept, attended: Attended) -> None:
        """The newest tokens have attended: take note of it."""

    def keep(self, pages: Kept) -> torch.Tensor | None:
        """[B, Hkv, n] float32: the `budget` tokens of highest priority outlive the forward; None for all."""
        return None


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
