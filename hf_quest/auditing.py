"""Audits: of every so many decode steps the attention that they really missed, by all keys that are stored."""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from typing_extensions import Self

from .errors import QuestError
from .watch import Read, SegmentsRead, Watcher


def audit(cache: Any, every: int = 64) -> "Audit":
    """Measure, of every n-th decode step, the share of dense attention that each layer which chooses did not read.

    ```python
    cache = QuestCache(budget=512)
    with hf_quest.audit(cache, every=64) as audit:
        model.generate(**inputs, cache=cache)
    print(audit)  # what was missed, in how many steps, and the seconds that it took to know
    ```

    An audited step computes the weights of dense attention from all keys, in float32, and adds up those of tokens that
    it has not attended; what it writes is what it would write without. A step between two audits costs a comparison of
    two numbers in each layer. A graph can tell nothing: like every watcher, an audit keeps `generate` from compiling
    or recording its steps, which run eagerly until it ends.

    Args:
        cache: a `MethodCache` whose method evicts nothing. A watcher that it has is told as before.
        every: steps from one that is audited to the next. The first one after the audit begins is audited.

    Returns:
        An `Audit`, which begins and ends with a `with` block.

    Raises:
        TypeError, ValueError: for other arguments.
        QuestError: for a method that evicts, since what it has dropped can no longer be weighed.
    """
    if not hasattr(cache, "watcher") or not hasattr(cache, "method"):
        raise TypeError(f"An audit is of a cache of this package, such as QuestCache, not of a {type(cache).__name__}.")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every is a number of steps, 1 or more, not {every!r}.")
    if cache.method.evicts:
        raise QuestError(
            f"{type(cache).__name__} cannot be audited: it evicts or compresses tokens, whose weight nobody can know "
            "afterwards. `hf-quest eval compare` measures what that loses, beside dense attention."
        )
    return Audit(cache, every)


@dataclass
class Audit:
    """What audited steps have missed, by layer: see `audit`.

    Where less is stored than the budget, nothing is missed. Layers that always attend everything are not in it.
    """

    cache: Any
    every: int
    steps: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    """By layer, of each audited step the shares that its rows and query heads missed, [B, Hq] float32 on the CPU."""
    seconds: float = 0.0
    """What the audits took, in all layers and steps."""
    first: int | None = None  # the slot of the first query
    before: Watcher | None = None  # who watched before

    def __enter__(self) -> Self:
        if self.cache.watcher is self:
            raise QuestError("This audit is under way already. Begin another one with hf_quest.audit.")
        self.before = self.cache.watcher
        self.cache.shared.watch(self)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.cache.watcher is self:  # or it goes on telling whoever came after
            self.cache.shared.watch(self.before)
        self.before = None

    def __call__(self, read: Read | SegmentsRead) -> None:
        if self.before is not None:
            self.before(read)
        if not isinstance(read, Read) or read.layer.is_dense:
            return
        num_queries = read.query.shape[2]
        start = read.length - num_queries  # the slot of the first query
        self.first = start if self.first is None else self.first
        for query_idx in range((self.first - start) % self.every, num_queries, self.every):
            self.note(read, query_idx)

    def note(self, read: Read, query_idx: int) -> None:
        """Take down what one query of a layer has missed."""
        finish(read.query.device)  # or what is in the GPU's queue would count
        begin = time.perf_counter()
        missed = missed_by(read, query_idx).cpu()
        self.seconds += time.perf_counter() - begin
        self.steps[read.layer.layer_idx].append(missed)

    @property
    def num_steps(self) -> int:
        """Steps that were audited."""
        return min((len(steps) for steps in self.steps.values()), default=0)  # layers may share what another stores

    @property
    def missed(self) -> dict[int, float]:
        """By layer, the share of dense attention that steps have missed: a mean over steps, rows and query heads."""
        return {layer: float(joined(steps).mean()) for layer, steps in sorted(self.steps.items())}

    @property
    def worst(self) -> dict[int, float]:
        """By layer, the largest share that a query head has missed in a row and step."""
        return {layer: float(joined(steps).max()) for layer, steps in sorted(self.steps.items())}

    def __str__(self) -> str:
        if not self.num_steps:
            return "No step was audited: no layer that chooses has taken a decode step in plain PyTorch or by kernels."
        missed, worst = self.missed, self.worst
        lines = [f"layer {layer:>3}  missed {missed[layer]:7.2%}  worst head {worst[layer]:7.2%}" for layer in missed]
        mean, took = sum(missed.values()) / len(missed), f"{self.seconds:.3f} s"
        plural = "s" if self.num_steps > 1 else ""
        return "\n".join([*lines, f"{self.num_steps} step{plural} audited in {took}; missed in the mean {mean:.2%}"])


def joined(steps: list[torch.Tensor]) -> torch.Tensor:
    """All shares of a layer in one row: steps may have come in batches of several sizes."""
    return torch.cat([step.flatten() for step in steps])


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def missed_by(read: Read, query_idx: int) -> torch.Tensor:
    """[B, Hq] float32: of the weights of dense attention, sinks included, those of tokens that a query did not read."""
    if read.choice is None:
        return torch.zeros(read.query.shape[:2], dtype=torch.float32, device=read.query.device)
    weights = read.dense_weights(query_idx)  # [B, Hq, N]
    is_read = read.tokens(query_idx).repeat_interleave(weights.shape[1] // read.keys().shape[1], dim=1)
    return weights.masked_fill(is_read, 0.0).sum(dim=-1)
