"""CritiPrefill (arXiv 2409.12490): how a prompt is read where not all of it is read by every query."""

from dataclasses import dataclass, field

SCORES = ("mass", "published")


@dataclass(frozen=True)
class CritiPrefill:
    """How a prompt is read: `QuestCache(prefill=CritiPrefill())`. Without it every prompt is dense.

    A whole segment of `segment_size` queries attends itself and, of what is before it, `budget` tokens per KV head in
    blocks of `block_size`. Dense stay the first `dense_layers`, segments that begin before `threshold`, and the tokens
    of a forward that fill no whole segment: what follows the prompt's last edge of a segment, which tends to be the
    question, and the ends of a chunk whose size is no multiple of `segment_size`. So a prompt read by
    `prefill_chunk_size` gives what it gives read at once, wherever chunks end with a segment.

    Args:
        budget: tokens before a segment that it attends, rounded up to whole blocks.
        segment_size: queries that share one selection, a multiple of `block_size`.
        block_size: tokens in a block, a multiple of the cache's `page_size`.
        threshold: tokens below which everything is dense, at least `budget`; rounded up to whole segments.
        dense_layers: how many of the first layers attend everything.
        layer_fusion: share of the last layer's scores in a layer's own, from 0 to below 1.
        score: "mass", the squares of the attention that some of the segment's queries pay to a block's best key, or
            "published", the paper's, by the extremes of blocks and of all queries. By "mass" a segment always attends
            the first block.

    Raises:
        ValueError: for settings outside these ranges.
    """

    budget: int = 2048
    segment_size: int = 128
    block_size: int = 16
    threshold: int = 4096
    dense_layers: int = 1
    layer_fusion: float = 0.0
    score: str = "mass"

    def __post_init__(self) -> None:
        for name, lowest in (("budget", 1), ("segment_size", 1), ("block_size", 1), ("threshold", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(f"{name} is a number of tokens, {lowest} or more, not {value!r}.")
        if not isinstance(self.dense_layers, int) or isinstance(self.dense_layers, bool) or self.dense_layers < 0:
            raise ValueError(f"dense_layers is a number of layers, 0 or more, not {self.dense_layers!r}.")
        if self.segment_size % self.block_size:
            raise ValueError(
                f"A segment of {self.segment_size} tokens is not divided by blocks of {self.block_size}: its own "
                "tokens would share a block with those before it. Make segment_size a multiple of block_size."
            )
        if self.threshold < self.num_selected * self.block_size:
            raise ValueError(
                f"threshold={self.threshold} is under the budget, {self.num_selected * self.block_size} tokens in "
                "whole blocks: the first sparse segments would have fewer tokens before them than they are to choose. "
                "Raise the threshold or lower the budget."
            )
        if not isinstance(self.layer_fusion, (int, float)) or not 0 <= self.layer_fusion < 1:
            raise ValueError(f"layer_fusion is a share from 0 to below 1, not {self.layer_fusion!r}.")
        if self.score not in SCORES:
            raise ValueError(f"score is one of {', '.join(SCORES)}, not {self.score!r}.")

    @property
    def num_selected(self) -> int:
        """K: blocks that a segment attends beside itself."""
        return -(-self.budget // self.block_size)

    def segments(self, first: int, end: int) -> tuple[int, int]:
        """(start, stop): the whole segments among the queries in positions `first` to `end` - 1 that are sparse."""
        start = -(-max(first, self.threshold) // self.segment_size) * self.segment_size
        return start, max(start, end // self.segment_size * self.segment_size)

    def read_share(self, num_tokens: int) -> float:
        """Products q·k of a prompt of `num_tokens` in a sparse layer, over those of dense attention."""
        start, stop = self.segments(0, num_tokens)
        pairs = num_tokens * (num_tokens + 1) // 2
        if stop == start:
            return 1.0
        of_segments = (stop * (stop + 1) - start * (start + 1)) // 2  # in dense attention
        per_query = self.num_selected * self.block_size + (self.segment_size + 1) / 2
        return (pairs - of_segments + (stop - start) * per_query) / pairs

    def is_sparse(self, num_queries: int, num_keys: int) -> bool:
        """Whether the newest `num_queries` of `num_keys` tokens have a sparse segment."""
        start, stop = self.segments(num_keys - num_queries, num_keys)
        return stop > start


@dataclass
class BlockScores:
    """What the last sparse layer of the forward under way found, for the next one: [Hkv, R, C] for each slab."""

    layer_idx: int = -1
    scores: dict = field(default_factory=dict)

    def enter(self, layer_idx: int) -> None:
        if layer_idx <= self.layer_idx:  # a forward goes up
            self.scores = {}
        self.layer_idx = layer_idx
