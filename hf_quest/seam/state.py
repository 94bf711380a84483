"""State: what the layers of one cache share."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ..methods import Method
from ..prompts import BlockScores, CritiPrefill
from ..storage import Kept, Rows
from .masks import Masks
from .step import Step


@dataclass
class State:
    """What the layers of one cache share: the first four are settings, the others what has happened."""

    method: Method
    dense_layers: int
    max_cache_len: int | None = None  # tokens
    prefill: CritiPrefill | None = None

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
    watcher: Callable | None = None  # is told what is read, see watch.Read

    def widen(self, layer_idx):
        """Know that a layer which came with a window, of another cache, reaches everything."""
        self.reaches.pop(layer_idx, None)

    def begin_forward(self, num_layers):
        """A forward reaches the first layer of a cache with `num_layers` so far."""
        self.num_layers = num_layers or None
        self.to_settle.clear()

    def ends_forward(self, layer_idx):
        """Settle the forward under way if this layer, whose attention is done, is the last."""
        if self.num_layers is not None and layer_idx + 1 == self.num_layers:
            for storage in self.to_settle:
                storage.settle()
            self.to_settle.clear()
