"""State: what the layers of one cache share."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ..methods import Method
from ..prompts import BlockScores, CritiPrefill
from ..storage import Kept, Offloaded, Pages, Ring, Rows, Storage
from ..watch import Watcher
from .masks import Masks
from .step import Step


@dataclass
class State:
    """What the layers of one cache share: the first six are settings, the others what has happened."""

    method: Method
    dense_layers: int
    max_cache_len: int | None = None  # tokens
    prefill: CritiPrefill | None = None
    offloading: bool = False
    pool: int | None = None  # tokens of a KV head, for layers that lie in the host's memory; None: as the method says

    rows: Rows = field(default_factory=Rows)
    step: Step = field(default_factory=Step)
    masks: Masks = field(default_factory=Masks)
    block_scores: BlockScores = field(default_factory=BlockScores)
    draft_start: int | None = None  # slot from which on several new tokens are drafts and select one by one
    reaches: dict[int, int] = field(default_factory=dict)  # tokens that a local layer attends, by its index
    max_positions: float = math.inf  # tokens of context that the model is made for
    saw_autocast: bool = False  # so that keys and values of several dtypes come from one model
    num_layers: int | None = None  # of the model, known from its second forward on
    to_settle: list[Kept] = field(default_factory=list)  # storage that can undo the forward under way
    region: Any = None  # a Region, while the decoder layer under way is compiled around its attention
    is_broken: bool = False  # by a forward that did not end and could not be undone
    watcher: Watcher | None = None  # is told what is read

    def is_dense(self, layer_idx: int) -> bool:
        """Whether a layer attends everything that it stores."""
        return layer_idx in self.reaches or layer_idx < self.dense_layers

    @property
    def num_pooled(self) -> int:
        """Tokens of a KV head that pools have room for, where there are some."""
        return self.method.num_pooled if self.pool is None else self.pool

    def new_storage(self, layer_idx: int) -> Storage:
        """Where a layer keeps its tokens: a local one what it reaches, one of a method that evicts what that keeps."""
        method = self.method
        if layer_idx in self.reaches:
            return Ring(self.rows, self.max_cache_len, self.reaches[layer_idx])
        if method.evicts and not self.is_dense(layer_idx):
            return method.storage(self.rows, method.beside_tokens)
        is_dense, is_fused = self.is_dense(layer_idx), method.fused is not None
        beside = {} if is_dense else {"beside_tokens": method.beside_tokens, "beside_pages": method.beside_pages}
        block_size = method.page_size if self.prefill is None else self.prefill.block_size  # pages are in whole blocks
        options = {"keeps_bounds": is_fused and not is_dense, "gives_step_gradients": method.evicts, **beside}
        pages = Offloaded if self.offloading and not is_dense else Pages
        if pages is Offloaded:
            options |= {"num_pooled": self.num_pooled, "is_pool_wanted": bool(self.pool)}
        return pages(self.rows, self.max_cache_len, method.page_size, block_size, **options)

    def choose_by(self, method: Method) -> None:
        if method != self.method:  # or a graph that holds it would be another one
            self.method = method

    def watch(self, watcher: Watcher | None) -> None:
        self.watcher = watcher

    def learn(self, reaches: dict[int, int]) -> None:
        """Know how far the local layers of a model reach, before the first of them is filled."""
        self.reaches = reaches

    def widen(self, layer_idx: int) -> None:
        """Know that a layer which came with a window, of another cache, reaches everything."""
        self.reaches.pop(layer_idx, None)

    def limit(self, max_positions: float) -> None:
        """Know how many tokens of context the model is made for."""
        self.max_positions = max_positions

    def note_autocast(self, device_type: str) -> bool:
        """Whether autocast is on."""
        is_on = torch.is_autocast_enabled(device_type)
        self.saw_autocast |= is_on
        return is_on

    def expect_drafts(self, start: int | None) -> None:
        """From slot `start` on several new tokens are drafts; from None on they are not."""
        self.draft_start = start

    def begin_forward(self, num_layers: int) -> None:
        """A forward reaches the first layer of a cache with `num_layers` so far."""
        self.num_layers = num_layers or None
        self.to_settle.clear()

    def end_forward(self, layer_idx: int) -> None:
        """Settle the forward under way if this layer, whose attention is done, is the last."""
        if self.num_layers is not None and layer_idx + 1 == self.num_layers:
            for storage in self.to_settle:
                storage.settle()
            self.to_settle.clear()

    def enter(self, region: Any) -> None:
        """A compiled decoder layer begins, or None: it ends."""
        self.region = region

    def undo_forward(self, is_undone: bool) -> None:
        """The forward under way was undone in all layers, or could not be."""
        self.to_settle.clear()
        self.is_broken |= not is_undone

    def saved(self) -> dict[str, Any]:
        """What JSON can hold of what has happened, for `restore`."""
        reaches = {str(idx): reach for idx, reach in self.reaches.items()}
        return {"reaches": reaches, "saw_autocast": self.saw_autocast, "masks_are_changed": self.masks.are_changed}

    def restore(self, saved: dict[str, Any]) -> None:
        """Know, before there are layers, what `saved` told of."""
        self.learn({int(idx): reach for idx, reach in saved["reaches"].items()})
        self.saw_autocast, self.masks = saved["saw_autocast"], Masks(are_changed=saved["masks_are_changed"])

    def reset(self) -> None:
        """All tokens are forgotten."""
        self.draft_start, self.masks, self.is_broken = None, Masks(), False
