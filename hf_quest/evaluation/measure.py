"""What a cache holds and what its steps read, and what `generate` takes of time and memory: as measured."""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Cache, PreTrainedModel, StoppingCriteria

from .. import CACHE_NAME, MethodCache
from ..storage import Pages
from ..watch import Read, SegmentsRead

NUM_PROFILED = 2  # tokens whose memory is measured, the prompt's own among them
NUM_TIMED = 16  # steps in a run, as many as RecycledAttention has from one full step to the next
NUM_TURNS = 2  # runs of steps, of which the fastest counts: others use the machine, too


KEYS_VALUES = ("keys", "values", "pruned")  # the last are keys that have lost channels
NUM_GENERATED = NUM_PROFILED + NUM_TURNS * NUM_TIMED + 1


def held(cache: Cache) -> dict[str, float]:
    """What a cache holds of one row: `kept`, tokens of a KV head, a mean over the layers that may read or keep fewer;
    `kv_bytes`, of keys and values; `metadata_bytes`, of all that is beside them.

    Storage that is not filled yet does not count.
    """
    kept, kv_bytes, metadata_bytes = [], 0, 0
    for layer in cache.layers:
        tensors = stored(layer)
        kv_bytes += sum(tensor.nbytes for name, tensor in tensors.items() if name in KEYS_VALUES)
        metadata_bytes += sum(tensor.nbytes for name, tensor in tensors.items() if name not in KEYS_VALUES)
        if not getattr(layer, "is_dense", False) and not layer.is_sliding:
            kept.append(tensors["values"].shape[2])
    num_rows = tensors["keys"].shape[0]
    return {
        "kept": sum(kept) / max(1, len(kept)),
        "kv_bytes": kv_bytes / num_rows,
        "metadata_bytes": metadata_bytes / num_rows,
    }


def stored(layer: Any) -> dict[str, Tensor]:
    """The tensors of a cache's layer by name, and what its method remembers of it."""
    storage = getattr(layer, "storage", None)
    if storage is None:
        return {"keys": layer.keys, "values": layer.values}
    if not isinstance(storage, Pages):
        return storage.tensors()
    tensors = dict(zip(storage.tensors(), storage.filled(), strict=True))
    for memory in storage.memories.by_reader:
        for made, version in memory.versions:
            tensors |= {f"{name} at {made}": tensor for name, tensor in version.items()}
    return tensors


@dataclass
class BytesRead:
    """Counts the bytes that steps of a cache read of keys, values and what they choose by, for all rows together."""

    cache: Cache
    total: float = 0.0

    def __post_init__(self):
        if isinstance(self.cache, MethodCache):
            self.cache.watcher = self.note

    def note(self, read: Read | SegmentsRead) -> None:
        if isinstance(read, Read):
            self.total += read.num_bytes()

    def step_is_done(self) -> None:
        if not isinstance(self.cache, MethodCache):  # which reads all that it holds
            self.total += sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class Clock(StoppingCriteria):
    """Notes when each token of `generate` is there, by the wall's clock and by this process's, and stops nothing."""

    def __init__(self):
        self.times: list[tuple[float, float]] = []

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append((time.perf_counter(), time.process_time()))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def measured_generate(model: PreTrainedModel, cache: Cache, ids: Tensor) -> dict[str, float]:
    """Generates NUM_GENERATED tokens behind [1, N] with an empty cache.

    Returns:
        `ms`, per step: the fastest of NUM_TURNS runs of NUM_TIMED steps, and `cpu_ms`, the processor's time in all
        threads, which others that use the machine do not lengthen. `peak_bytes`, the most memory that was in use beyond
        the model's while it read the prompt and took its first step.
    """

    def generate(tokens: Tensor, count: int) -> tuple[Tensor, list[tuple[float, float]]]:
        clock = Clock()
        options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False, CACHE_NAME: cache}
        tokens = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, stopping_criteria=[clock], **options
        )
        return tokens, clock.times

    with peak_memory(ids.device) as most_bytes:
        ids, _ = generate(ids, NUM_PROFILED)
    peak_bytes = most_bytes()
    _, times = generate(ids, NUM_TURNS * NUM_TIMED + 1)
    ends = times[::NUM_TIMED]
    runs = [[1000 * (end - begin) / NUM_TIMED for begin, end in zip(*pair, strict=True)] for pair in pairwise(ends)]
    ms, cpu_ms = map(min, zip(*runs, strict=True))
    return {"ms": ms, "cpu_ms": cpu_ms, "peak_bytes": peak_bytes}


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yields a function that tells, afterwards, how many bytes were in use at most beyond those before.

    On a CPU they are counted by the tensors that operations make: what one of them uses inside of itself is not seen.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    with Made() as made:
        yield lambda: made.most


class Made(TorchDispatchMode):
    """Counts the bytes of the tensors that were made meanwhile and are still there, and how many they were at most."""

    def __init__(self):
        super().__init__()
        self.known: set[int] = set()
        self.in_use = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in storages((args, kwargs)):  # of what was there before, too
            if id(storage) not in self.known:
                self.know(storage, 0)
        output = function(*args, **(kwargs or {}))
        for storage in storages(output):
            if id(storage) not in self.known:
                self.know(storage, storage.nbytes())
        self.most = max(self.most, self.in_use)
        return output

    def know(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        self.known.add(id(storage))
        self.in_use += num_bytes
        weakref.finalize(storage, self.forget, id(storage), num_bytes)

    def forget(self, key: int, num_bytes: int) -> None:
        self.known.discard(key)
        self.in_use -= num_bytes


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
