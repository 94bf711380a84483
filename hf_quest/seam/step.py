"""Step: the decode step that a graph may hold, which is prepared outside of it and settled after it."""

from dataclasses import dataclass

import torch

from ..kernels.ops import MAX_SLOTS

PREPARED, TAKEN = "prepared", "taken"


@dataclass
class Step:
    """Where the decode step under way stands. A replayed graph tells the host nothing, so it is known by marks.

    `generate` asks for the sizes of a mask before every step, and outside of the graph: then it is PREPARED. Its first
    layer marks it as TAKEN. Whatever is done to the cache next settles it: the token is counted.
    """

    state: str | None = None  # None, PREPARED or TAKEN
    is_recording: bool = False  # of a step in a CUDA graph, without compilation
    num_new: int = 1  # tokens of it: several are drafts, which choose one by one
    reads_everything: bool = False  # as far as the model's context goes

    @property
    def is_captured(self):
        """Whether the forward under way goes into a graph, which must not depend on what is stored."""
        # Not `is_compiling`, which in PyTorch 2.13 is true for all threads while one of them compiles.
        return self.is_recording or torch.compiler.is_dynamo_compiling()

    def prepare(self, num_new, num_tokens, method, end):
        """Be ready for a step of `num_new` that makes it `num_tokens`, of a text that may grow to `end`.

        It reads everything if the budget covers these tokens and all to come. Not if it covers these alone, or the
        graph would have to be another one in the middle of a text.
        """
        self.reads_everything = method.num_attended >= max(num_tokens, end)
        self.num_new, self.state = num_new, PREPARED

    def is_prepared(self):
        return self.is_captured and self.state == PREPARED

    def is_prepared_for(self, num_new):
        """Whether a step of so many tokens was prepared, whether or not a graph will hold it."""
        return self.state == PREPARED and self.num_new == num_new

    def takes(self, layer_idx, num_new):
        """In a graph: whether this is the decode step that was prepared."""
        if layer_idx == 0 and self.is_prepared_for(num_new):
            self.state = TAKEN  # a mark, since a count would be compiled as a constant
            return True
        return layer_idx > 0 and self.state == TAKEN

    def was_replayed(self):
        """A graph that holds the step has run."""
        self.state = TAKEN

    def is_over(self):
        self.state = None

    def record(self):
        """Be a step that is recorded."""
        self.is_recording, self.state = True, PREPARED

    def end_recording(self):
        """The step that was recorded can be done again: the next one stores the same token in the same slot."""
        self.is_recording, self.state = False, PREPARED


def end_of_text(max_positions, max_cache_len):
    """Tokens that a text may grow to, no more of which than the kernels serve."""
    return min(max_positions, max_cache_len or MAX_SLOTS, MAX_SLOTS)
