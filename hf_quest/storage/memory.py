"""Memory: what a method remembers of a layer's rows from one step to a later one."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import QuestError

NUM_VERSIONS = 8  # that outlive a forward, for `crop`
PREFIX = "memory."  # of saved tensors


@dataclass
class Memory:
    """Versions of tensors [B, ...] by name, each with the number of slots that were filled when it was made.

    A version goes when one of its tokens is taken back. Then the one before it counts again, so taking tokens back is
    exact. All versions of the forward under way are held, and of earlier ones the newest NUM_VERSIONS.
    """

    versions: list[tuple[int, dict[str, torch.Tensor]]] = field(default_factory=list)  # of ascending length
    first: int | None = None  # the length of the first version, which may be gone

    def recall(self, length: int) -> dict[str, torch.Tensor]:
        """The newest version from before the token that is the last of `length`; empty if there is none."""
        return next((tensors for made, tensors in reversed(self.versions) if made < length), {})

    def remember(self, length: int, **tensors: torch.Tensor) -> None:
        """Hold tensors [B, ...], for the steps after the one whose token is the last of `length`."""
        self.crop(length - 1)
        self.first = length if self.first is None else self.first
        self.versions.append((length, {name: tensor.detach() for name, tensor in tensors.items()}))

    def begin_forward(self) -> None:
        """Forget what no forward can be undone to any more."""
        del self.versions[:-NUM_VERSIONS]

    def is_lost(self, length: int) -> bool:
        """Whether what was remembered at this length is gone."""
        return self.first is not None and self.first <= length < self.versions[0][0]

    def crop(self, length: int) -> None:
        """The tokens after the first `length` are taken back."""
        while self.versions and self.versions[-1][0] > length:
            self.versions.pop()
        if self.first is not None and length < self.first:
            self.first = None

    def forget(self) -> None:
        self.versions, self.first = [], None

    def change(self, changed) -> None:
        """Have `changed(tensor)` in place of every tensor: of other rows, or on another device."""
        self.versions = [
            (made, {name: changed(tensor) for name, tensor in tensors.items()}) for made, tensors in self.versions
        ]


@dataclass
class Memories:
    """A Memory for each layer that reads a storage: its own, and in their order those that share its keys."""

    by_reader: list[Memory] = field(default_factory=list)
    reader: int = -1  # whose turn it is in the forward under way

    @property
    def current(self) -> Memory:
        """That of the layer that reads now."""
        return self.by_reader[self.reader]

    def next_reader(self) -> None:
        """Another layer begins to read in the forward under way."""
        self.reader += 1
        if self.reader == len(self.by_reader):
            self.by_reader.append(Memory())

    def begin_forward(self) -> None:
        self.reader = -1
        for memory in self.by_reader:
            memory.begin_forward()

    def crop(self, length: int) -> None:
        for memory in self.by_reader:
            memory.crop(length)

    def forget(self) -> None:
        for memory in self.by_reader:
            memory.forget()

    def change(self, changed) -> None:
        for memory in self.by_reader:
            memory.change(changed)

    def saved(self) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """All that is remembered, tensors by name, and what JSON can hold of it: a fact for each reader."""
        tensors = {
            f"{PREFIX}{reader}.{version}.{name}": tensor
            for reader, memory in enumerate(self.by_reader)
            for version, (_, remembered) in enumerate(memory.versions)
            for name, tensor in remembered.items()
        }
        return tensors, [
            {"first": memory.first, "lengths": [made for made, _ in memory.versions]} for memory in self.by_reader
        ]

    @torch.inference_mode(False)
    def restore(self, tensors, facts, device) -> dict[str, torch.Tensor]:
        """Remember on a device what `saved` told of; return those of the tensors that are not of it."""
        self.by_reader = [Memory([(made, {}) for made in fact["lengths"]], fact["first"]) for fact in facts]
        for key in (key for key in tensors if key.startswith(PREFIX)):
            reader, version, name = key.removeprefix(PREFIX).split(".")
            self.by_reader[int(reader)].versions[int(version)][1][name] = tensors[key].to(device, copy=True)
        return {key: tensor for key, tensor in tensors.items() if not key.startswith(PREFIX)}

    def check_crop(self, num_removed: int, length: int, layer_idx: int) -> None:
        """Raise if what was remembered before the newest `num_removed` of `length` tokens is gone."""
        if any(memory.is_lost(length - num_removed) for memory in self.by_reader):
            oldest = max(memory.versions[0][0] for memory in self.by_reader if memory.versions)
            raise QuestError(
                f"crop cannot take back {num_removed} tokens: layer {layer_idx} remembers its last {NUM_VERSIONS} "
                "choices, and not what it had chosen then. Take back "
                f"{length - oldest} at most, or continue from a copy.deepcopy of the cache that was made earlier. The "
                "content of the cache is unchanged."
            )
