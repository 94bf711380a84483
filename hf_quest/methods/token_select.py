"""TokenSelect: the tokens to which all heads together would give most weight (arXiv 2411.02886)."""

from dataclasses import dataclass

import torch

from .base import is_int
from .remembering import (
    Remembering,
    best,
    check_similarity,
    ids_between,
    or_everything,
    recall,
    renew,
    row_lengths,
    similarity_of,
    weights_of,
)


@dataclass(frozen=True)
class TokenSelect(Remembering):
    """TokenSelect (arXiv 2411.02886): the first tokens, the newest, and those between with the most votes.

    A token's votes are its attention weights, summed over all query heads of the layer, so that one set of tokens
    serves them all. It is selected again when the query has moved, and else reused (the paper's Selection Cache).

    The variant as the paper's formulas have it, and not as the code of its authors: logits are scaled as the model
    scales them, and a query head votes by the keys of its own KV head; that code leaves the scale out and maps query
    heads to KV heads in another order. Keys and queries are those after the rotary embedding, at the positions at which
    tokens were seen; the authors vote by keys before it and number the chosen tokens anew, which matters beyond the
    length that a model was trained for. Prompts are not selected from: they are dense.

    Every selection reads all keys, so it is no faster than dense attention unless it is reused.

    Args:
        budget: tokens that each KV head attends, all three kinds together. The authors' are 128, 512 and 2,048.
        num_first, num_newest: tokens that are attended whatever their votes; None for the same shares of the budget as
            the authors', 1/21 and 4/21, the newest one at least.
        similarity: the least cosine of a query with the one that selected, after the rotary embedding and on average
            over the query heads of a layer, with which the selection is reused, until `num_newest` tokens have come
            since. None: every step selects. The authors' code has 0.9, and is released with reuse switched off.
    """

    num_first: int | None = None
    num_newest: int | None = None
    similarity: float | None = 0.9

    def __post_init__(self):
        super().__post_init__()
        check_similarity(self.similarity)
        for name, least in (("num_first", 0), ("num_newest", 1)):
            given = getattr(self, name)
            if given is not None and (not is_int(given) or given < least):
                raise ValueError(f"{name} is a number of tokens, {least} or more, or None, not {given!r}.")
        if self.num_voted < 0:
            raise ValueError(
                f"budget of TokenSelectCache includes its first and newest tokens, {sum(self.fixed)} here, so it "
                f"cannot be {self.budget!r}. Give a larger budget, or smaller num_first and num_newest."
            )

    @property
    def fixed(self) -> tuple[int, int]:
        """How many of the first and of the newest tokens are attended whatever their votes."""
        first = self.budget // 21 if self.num_first is None else self.num_first
        newest = max(1, 4 * self.budget // 21) if self.num_newest is None else self.num_newest
        return first, newest

    @property
    def num_voted(self) -> int:
        """Tokens that are selected by votes."""
        return self.budget - sum(self.fixed)

    def read_to_choose(self, pages, length):
        num_tokens = pages.memory.recall(length + 1)["num_tokens"]
        num_voted_by = num_tokens.where(num_tokens == row_lengths(pages, length), 0)  # a row that votes reads all keys
        return super().read_to_choose(pages, length) + num_voted_by.float().mean().item() * pages.keys[0, 0, 0].nbytes

    def choose_next(self, pages, query, logits, length):
        num_first, num_newest = self.fixed
        num_tokens, last = row_lengths(pages, length), recall(pages, query, length, self.num_voted)
        is_new = (last.num_tokens == 0) | (num_tokens - last.num_tokens > num_newest)
        if self.similarity is None:
            is_new = torch.ones_like(is_new)
        else:
            is_new = is_new | (similarity_of(query, last.query) < self.similarity)
        is_small = num_tokens <= self.budget
        is_new = is_new & ~is_small
        before_newest = num_tokens - num_newest
        if bool(is_new.any()):
            token = torch.arange(length, device=query.device)
            is_between = (token >= num_first) & (token < before_newest[:, None, None])
            votes = weights_of(pages, query, logits, length).sum(dim=(1, 2))[:, None]
            ids = best(votes, is_between, self.num_voted).expand_as(last.ids)
            last = renew(pages, length, is_new, last, ids, query)
        first = ids_between(pages, torch.zeros_like(num_tokens), num_tokens, num_first)
        newest = ids_between(pages, before_newest.clamp(min=0), num_tokens, num_newest)
        return or_everything(pages, length, is_small, torch.cat([first, last.ids, newest], dim=2))
