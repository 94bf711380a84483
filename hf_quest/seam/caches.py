"""The caches by the names that users type: each a method, with its options."""

from typing import Any

import torch

from .. import former
from ..methods import (
    H2O,
    TOVA,
    Cascading,
    Quest,
    RecycledAttention,
    SqueezedAttention,
    StreamingLLM,
    SubGen,
    ThinK,
    TokenSelect,
)
from ..methods.quest import score_named
from ..prompts import CritiPrefill
from ..reference import Score
from .cache import MethodCache
from .stock import Tokens


class QuestCache(MethodCache):
    """A key/value cache for `model.generate(cache=QuestCache(budget=2048))` of a model that was loaded with
    `attn_implementation="quest"` (Quest, arXiv 2406.10774). Before Transformers 5.24 the argument is called
    `past_key_values`.

    Every token is kept. A forward with one new token per row attends, in each layer after the first `dense_layers` and
    for each KV head, the newest page, the first and those that may matter most to the query, `budget` tokens in all.
    The rest is as of any `MethodCache`.

    Args:
        budget: tokens that each KV head may attend in one decode step, rounded up to whole pages, at least two pages.
            May be changed at any time by assignment.
        page_size: tokens in a page, a power of two.
        dense_layers: how many of the first layers attend everything (Quest, section 3.4).
        max_cache_len, compile, prefill, offloading, pool: see `MethodCache`.
        bounds_dtype: torch.int8, in which pages' minima and maxima are rounded outwards, so that scores stay upper
            bounds, and a step reads half as many bytes of them as in 16 bits; or None for the dtype of the keys, as in
            the paper.
        score: how pages are scored. "default": the middle of q·k within a page's bounds and half of its half width, the
            row's first page kept, which loses several times less on pretrained models than "published", the paper's
            upper bound. Or a `hf_quest.reference.Score`.
        codes: bits per channel, 1, 2, 4 or 8, in which each key is kept a second time, on the grid of its page's
            bounds; or None. With codes single tokens are chosen, `budget` of them, those of the newest page included: a
            step looks at the codes of candidate pages, which the bounds find. At equal budget that loses several times
            less, and it costs 2 bits beside the 32 of a key's and a value's channel. There are CUDA kernels for 2 and 4
            bits with bounds in 8; otherwise the layers that choose run in PyTorch, and no step is compiled.
        candidates: how many times the budget's pages are candidates, or None for all pages. They, and tokens, are
            chosen in 4 to 16 stripes of pages, of each a like share.
        mass: with codes, a share of the attention, 0.95 for instance: a step attends only as many tokens, best first,
            as hold that share of what all candidates get by their codes, an eighth of the budget at the least and the
            budget at the most. None for the budget, always. There are no CUDA kernels for it.

    Raises:
        ValueError, QuestError: as `MethodCache`.
    """

    def __init__(
        self,
        budget: int = 2048,
        *,
        page_size: int = 16,
        dense_layers: int = 2,
        max_cache_len: int | None = None,
        compile: bool = True,
        prefill: CritiPrefill | None = None,
        bounds_dtype: torch.dtype | None = torch.int8,
        score: str | Score = "default",
        codes: int | None = None,
        candidates: int | None = 8,
        mass: float | None = None,
        offloading: bool = False,
        pool: int | None = None,
    ):
        method = Quest(budget, page_size, score_named(score), bounds_dtype, codes, candidates, mass)
        super().__init__(
            method,
            dense_layers=dense_layers,
            max_cache_len=max_cache_len,
            compile=compile,
            prefill=prefill,
            offloading=offloading,
            pool=pool,
        )

    @property
    def pool_counts(self) -> tuple[int, int]:
        """How many tokens the steps with these pools have looked up in them, and how many of them were there."""
        pools = [layer.storage.pool for layer in self.layers if layer.storage.pool is not None]
        looked_up, found = (sum(int(pool.counts[..., which].sum()) for pool in pools) for which in range(2))
        return looked_up, found

    def take_former(self, settings: dict[str, Any], layers: list[former.Layer], compile: bool) -> None:
        """Become what a pickle of version 0.1 held."""
        names = ("page_size", "dense_layers", "max_cache_len", "prefill", "bounds_dtype", "score")
        self.__init__(settings["budget"], **{name: settings[name] for name in names}, compile=compile)  # type: ignore[misc]
        self._take([Tokens(*layer.tokens()) for layer in layers])
        self.set_left_padding(settings["left_padding"])

    def __repr__(self) -> str:
        return super().__repr__().replace(", dense_layers", f", page_size={self.page_size}, dense_layers", 1)


class H2OCache(MethodCache):
    """Keeps `budget` tokens per KV head by H2O, see `hf_quest.methods.H2O`; `dense_layers` keep everything."""

    def __init__(self, budget: int = 2048, *, dense_layers: int = 2):
        super().__init__(H2O(budget), dense_layers=dense_layers)


class TOVACache(MethodCache):
    """Keeps `budget` tokens in a layer by TOVA, see `hf_quest.methods.TOVA`; `dense_layers` keep everything."""

    def __init__(self, budget: int = 2048, *, dense_layers: int = 2):
        super().__init__(TOVA(budget), dense_layers=dense_layers)


class StreamingLLMCache(MethodCache):
    """Keeps the first four tokens and the newest `budget - 4`, see `hf_quest.methods.StreamingLLM`; `dense_layers` keep
    everything.
    """

    def __init__(self, budget: int = 2048, *, dense_layers: int = 2):
        super().__init__(StreamingLLM(budget), dense_layers=dense_layers)


class CascadingCache(MethodCache):
    """Keeps the first tokens and others ever more thinly towards the past, see `hf_quest.methods.Cascading`;
    `dense_layers` keep everything. Forwards are eager.
    """

    def __init__(
        self,
        budget: int = 2048,
        *,
        num_cascades: int = 4,
        num_first: int = 64,
        decay: float = 0.9999,
        dense_layers: int = 2,
    ):
        super().__init__(Cascading(budget, num_cascades, num_first, decay), dense_layers=dense_layers)


class ThinKCache(MethodCache):
    """Keeps every token, and of keys older than the newest `budget` the channels that the prompt's last queries used,
    see `hf_quest.methods.ThinK`; `dense_layers` keep everything. Forwards are eager.
    """

    def __init__(self, budget: int = 32, *, share: float = 0.4, num_queries: int = 32, dense_layers: int = 2):
        super().__init__(ThinK(budget, share, num_queries), dense_layers=dense_layers)


class SubGenCache(MethodCache):
    """Keeps the newest tokens, and of the others a sample by the norm of their values and clusters of their keys, see
    `hf_quest.methods.SubGen`; `dense_layers` keep everything. Forwards are eager.
    """

    def __init__(
        self,
        budget: int = 2048,
        *,
        recent: float = 0.5,
        num_first: int = 16,
        num_samples: int = 1,
        seed: int = 0,
        dense_layers: int = 2,
    ):
        super().__init__(SubGen(budget, recent, num_first, num_samples, seed), dense_layers=dense_layers)


class RecycledAttentionCache(MethodCache):
    """Attends everything every `stride` tokens or when the query has moved, in between what had most weight then, see
    `hf_quest.methods.RecycledAttention`. Every token is kept; steps are eager.
    """

    def __init__(
        self,
        budget: int = 2048,
        *,
        stride: int = 16,
        similarity: float | None = 0.7,
        dense_layers: int = 2,
        max_cache_len: int | None = None,
    ):
        method = RecycledAttention(budget, stride, similarity)
        super().__init__(method, dense_layers=dense_layers, max_cache_len=max_cache_len)


class TokenSelectCache(MethodCache):
    """Attends the first tokens, the newest, and those for which all heads of a layer vote together, see
    `hf_quest.methods.TokenSelect`. Every token is kept; steps are eager.
    """

    def __init__(
        self,
        budget: int = 2048,
        *,
        num_first: int | None = None,
        num_newest: int | None = None,
        similarity: float | None = 0.9,
        dense_layers: int = 2,
        max_cache_len: int | None = None,
    ):
        method = TokenSelect(budget, num_first, num_newest, similarity)
        super().__init__(method, dense_layers=dense_layers, max_cache_len=max_cache_len)


class SqueezedAttentionCache(MethodCache):
    """Attends the clusters of a prefix's keys that matter to the query, and all that follows the prefix, see
    `hf_quest.methods.SqueezedAttention`. Every token is kept; steps are eager.
    """

    method: SqueezedAttention  # type: ignore[assignment]

    def __init__(
        self,
        budget: int = 2048,
        *,
        share: float = 0.05,
        num_newest: int = 100,
        seed: int = 0,
        dense_layers: int = 2,
        max_cache_len: int | None = None,
    ):
        method = SqueezedAttention(budget, share, num_newest, seed)
        super().__init__(method, dense_layers=dense_layers, max_cache_len=max_cache_len)

    def squeeze(self) -> None:
        """Cluster the keys that are stored now, a document's: for many questions on it, once.

        Copies of the cache hold the clusters, and `crop` back to this length leaves them.

        Raises:
            ValueError: for an empty cache.
        """
        self._settle()
        self._check_last_forward_was_whole()
        if not self.get_seq_length():
            raise ValueError("There is nothing to cluster: let the model read the document with this cache first.")
        for layer in self.layers:
            if not layer.is_dense:
                layer.storage.read_anew()
                self.method.squeeze(layer.storage, layer.length)
