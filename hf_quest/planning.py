"""What a context will take of a device's memory, said before anything is loaded: by a model's config alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .seam.cache import MethodCache
from .seam.caches import QuestCache
from .sketch import Sketch

STEP = 1024  # tokens, to which the longest context is found


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a device that a model with a context takes, the caches' by what they hold, and of its host."""

    model: str
    dtype: str
    num_tokens: int
    batch_size: int
    chunk_size: int | None  # tokens of the prompt that are read at a time; None: all
    weights: int
    cache: dict[str, int]
    stock: dict[str, int]  # of a DynamicCache
    prompt: int  # at most, while the prompt is read, beside all that stays
    host: dict[str, int] = field(default_factory=dict)  # what a cache with offloading holds in the host's memory
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Bytes of the device at most, with the cache of this package."""
        return self.weights + sum(self.cache.values()) + self.prompt

    @property
    def stock_total(self) -> int:
        """Bytes at most, with a DynamicCache."""
        return self.weights + sum(self.stock.values()) + self.prompt

    def fits(self, num_bytes: int) -> bool:
        """Whether so much memory of the device is enough."""
        return self.total <= num_bytes


def plan_memory(
    model: str | Path | PreTrainedConfig | PreTrainedModel,
    num_tokens: int,
    cache: MethodCache | None = None,
    *,
    batch_size: int = 1,
    chunk_size: int | None = None,
    dtype: str | torch.dtype | None = None,
) -> MemoryPlan:
    """How much memory a model and an empty cache like `cache` will take with a context, without loading weights.

    Keys, values and what is beside them are what such a cache will hold, to the byte, but for some scratch of the CUDA
    kernels. What the prompt takes is the memory that the model's own operations ask for at a time, without what
    attention, PyTorch's allocator and CUDA itself take in addition.

    Args:
        model: a folder or a name on the hub, a config, or a model.
        num_tokens: of the prompt, in each row.
        cache: one with the settings to plan for; a `QuestCache()` by default.
        batch_size: rows.
        chunk_size: tokens of the prompt that are read at a time, as by `prefill_chunk_size` of `generate`.
        dtype: that of the weights; by default the config's own.

    Raises:
        ValueError: for numbers that are none, and a model that cannot be found.
        QuestError: for a model that cannot be served.
    """
    for name, value in (("num_tokens", num_tokens), ("batch_size", batch_size), ("chunk_size", chunk_size or 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is a number, 1 or more, not {value!r}.")
    return plan_of(Sketch(model, dtype), num_tokens, QuestCache() if cache is None else cache, batch_size, chunk_size)


def longest_context(plan_of: Callable[[int], MemoryPlan], num_bytes: int, num_tokens: int) -> int:
    """The most tokens below `num_tokens`, in steps of STEP, whose plan fits `num_bytes`; 0 for none.

    `plan_of` makes a plan of a number of tokens.
    """
    low, high = 0, num_tokens // STEP
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan_of(middle * STEP).fits(num_bytes) else (low, middle)
    return low * STEP


def plan_of(sketch, num_tokens, like, batch_size, chunk_size):
    """The MemoryPlan of a sketched model and a cache of the settings of `like`, an empty one."""
    chunk_size = min(chunk_size or num_tokens, num_tokens)
    last = (num_tokens - 1) % chunk_size + 1  # tokens of the last chunk
    held, on_host, prompt = sketch.ask(like, num_tokens, batch_size, chunk_size, last)
    return MemoryPlan(
        model=sketch.name,
        dtype=str(sketch.dtype).removeprefix("torch."),
        num_tokens=num_tokens,
        batch_size=batch_size,
        chunk_size=chunk_size if chunk_size < num_tokens else None,
        weights=sketch.weights,
        cache=held,
        stock=sketch.ask_stock(num_tokens, batch_size),
        prompt=prompt,
        host=on_host,
        notes=list(notes(sketch, num_tokens, batch_size, last)),
    )


def notes(sketch, num_tokens, batch_size, num_new):
    """What the numbers do not say."""
    if num_tokens > sketch.max_positions:
        yield f"The model is made for {sketch.max_positions:,} tokens."
    if sketch.is_quantised:
        yield "The config says that the weights are quantised; they are counted as if they were not, and take less."
    if batch_size > 1:
        num_bytes = batch_size * num_new * num_tokens
        yield f"A batch that is padded takes an attention mask while it is read, of {num_bytes:,} bytes or more."
