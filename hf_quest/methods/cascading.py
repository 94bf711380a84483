"""Cascading KV cache: sub-caches of falling density, so that few tokens span a long context (arXiv 2406.17808)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Method, is_int
from .weights import attention_weights


@dataclass(frozen=True)
class Cascading(Method):
    """Cascading KV cache (arXiv 2406.17808, algorithm 1) as its authors released it, but for positions.

    The first tokens stay. The others pass through sub-caches of equal size. A new token goes to the first, and what
    overflows a sub-cache is offered to the next. Sub-cache i, from 0 on, accepts it at every 2^i-th token of the row;
    between, it takes the place of that one's newest token if its score is no lower. While not all are full nothing is
    dropped. So `budget` tokens span about `budget / num_cascades · (2^num_cascades - 1)`, thinner towards the past.

    A token's score is the exponential moving average, over queries, of the attention weight that it gets from any head
    of the group, the largest one. In a prompt all weights count before its first token is passed on, so a prompt in
    chunks (`prefill_chunk_size`), as the authors read it, keeps other tokens than one that is read at once.

    Tokens keep the positions at which they were seen. The authors number what is kept anew, which matters beyond the
    length that a model was trained for. They have 64 first tokens of 32K; here these are an eighth of the budget at
    most.

    Args:
        budget: tokens that each KV head keeps, the first ones included.
        num_cascades: sub-caches.
        num_first: tokens that are kept whatever their scores, but no more than an eighth of the budget.
        decay: of the moving average, for each query.
    """

    num_cascades: int = 4
    num_first: int = 64
    decay: float = 0.9999

    evicts: ClassVar = True

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("num_cascades", 1), ("num_first", 0)):
            if not is_int(getattr(self, name)) or getattr(self, name) < least:
                raise ValueError(f"{name} is an integer, {least} or more, not {getattr(self, name)!r}.")
        if isinstance(self.decay, bool) or not isinstance(self.decay, (int, float)) or not 0 < self.decay <= 1:
            raise ValueError(f"decay is a number above 0 and at most 1, not {self.decay!r}.")
        if self.cascade_len < 1:
            raise ValueError(
                f"budget of CascadingCache has {self.num_cascades} sub-caches of one token or more, so it cannot be "
                f"{self.budget!r}. Give a larger budget or fewer cascades."
            )

    @property
    def num_sinks(self) -> int:
        """How many of a row's first tokens are kept whatever their scores."""
        return min(self.num_first, self.budget // 8)

    @property
    def cascade_len(self) -> int:
        """Tokens in a sub-cache; what is left over is in the first one."""
        return (self.budget - self.num_sinks) // self.num_cascades

    def beside_tokens(self, head_dim, dtype):
        return {"scores": ((), torch.float32), "numbers": ((), torch.int64)}  # in its row, from 1 on

    def attended(self, pages, attended):
        batch_size, num_new = attended.query.shape[0], attended.query.shape[2]
        is_token = attended.is_token
        if is_token is None:
            is_token = torch.ones(batch_size, num_new, dtype=torch.bool, device=attended.query.device)
        count = is_token.cumsum(dim=1)[:, None]  # [B, 1, T]
        share = (1 - self.decay) * self.decay ** (count[..., -1:] - count).float()
        scores, first = pages.beside["scores"] * self.decay ** count[..., -1:].float(), 0
        for weights in attention_weights(pages.keys, attended):
            some = share[:, :, first : first + weights.shape[3], None]
            scores, first = scores + (weights.amax(dim=2) * some).sum(dim=2), first + weights.shape[3]
        numbers = pages.beside["numbers"]
        new = numbers.amax(dim=-1, keepdim=True) + count
        pages.beside["scores"] = scores
        pages.beside["numbers"] = torch.cat([numbers[..., :-num_new], new.expand_as(numbers[..., -num_new:])], dim=-1)

    def keep(self, pages):
        scores, numbers, is_visible = pages.beside["scores"], pages.beside["numbers"], pages.is_visible
        order = is_visible.long().argsort(dim=-1, stable=True)  # what is visible last
        first = (~is_visible).sum(dim=-1, keepdim=True)
        place = first + torch.arange(self.budget, device=order.device)
        kept = order.gather(2, place.clamp(max=order.shape[2] - 1))  # as long as nothing is dropped
        for idx in range(order.shape[2] - self.budget - int(first.min())):
            place = first + self.budget + idx
            new = order.gather(2, place.clamp(max=order.shape[2] - 1))
            kept = torch.where(place < order.shape[2], self.passed_on(kept, new, scores, numbers), kept)
        recency = torch.arange(order.shape[2], device=order.device, dtype=torch.float32).expand_as(scores)
        return recency.scatter(2, kept, torch.inf)

    def passed_on(self, kept, new, scores, numbers):
        """Slots [B, Hkv, budget], in order, of what is kept when those of `kept` are and `new`, [B, Hkv, 1], comes."""
        seen = numbers.gather(2, new) - 1 - self.num_sinks
        # Each sub-cache passes one on to the next, until one does not accept it or there is no other.
        num_passed = sum((seen % 2**idx == 0).long() for idx in range(self.num_cascades))
        offered = self.num_sinks + self.cascade_len * (self.num_cascades - num_passed)  # its place in `kept`
        newest = (offered - 1).clamp(min=0)  # of the sub-cache that it is offered to
        is_better = scores.gather(2, kept.gather(2, offered)) >= scores.gather(2, kept.gather(2, newest))
        dropped = torch.where(is_better & (num_passed < self.num_cascades), newest, offered)
        place = torch.arange(self.budget, device=kept.device)
        return torch.cat([kept, new], dim=2).gather(2, place + (place >= dropped))
