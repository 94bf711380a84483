"""StreamingLLM: the first tokens, where attention sinks, and a window of the most recent (arXiv 2309.17453)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Method

NUM_SINKS = 4  # tokens (StreamingLLM, section 3.2)


@dataclass(frozen=True)
class StreamingLLM(Method):
    """StreamingLLM (arXiv 2309.17453, section 3.2): the first four tokens and the newest `budget - 4`.

    The variant whose tokens keep the positions at which they were seen, as kvpress's `StreamingLLMPress` has it. The
    authors' `StartRecentKVCache` keeps the same tokens and gives them positions within the cache, which moves the four
    sinks closer to the query and matters beyond the length that the model was trained for.
    """

    min_budget: ClassVar = NUM_SINKS + 1
    evicts: ClassVar = True

    def keep(self, pages):
        is_sink = pages.is_visible.cumsum(dim=-1) <= NUM_SINKS  # of the row: padding does not count
        # A float32 counts exactly to 2^24, so by place among the kept and not by position.
        recency = torch.arange(is_sink.shape[2], device=is_sink.device, dtype=torch.float32)
        return torch.where(is_sink, torch.inf, recency)
