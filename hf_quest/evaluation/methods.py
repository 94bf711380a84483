"""The methods under comparison, and the protocol that they share: a document is read, then tokens follow one by one.

The document is prefilled dense, once for each method; every budget goes on from a copy. What follows is fed token by
token, since a question in one forward would be a prompt, and no method's work (Quest's `evaluation/` does the same).
"""

import copy
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from .. import (
    CACHE_NAME,
    CascadingCache,
    H2OCache,
    QuestCache,
    RecycledAttentionCache,
    SqueezedAttentionCache,
    StreamingLLMCache,
    SubGenCache,
    ThinKCache,
    TokenSelectCache,
    TOVACache,
)
from .oracles import ORACLES

DENSE = "dense"
CACHES = {
    "quest": QuestCache,
    "h2o": H2OCache,
    "tova": TOVACache,
    "streamingllm": StreamingLLMCache,
    "recycled": RecycledAttentionCache,
    "tokenselect": TokenSelectCache,
    "squeezed": SqueezedAttentionCache,
    "quest-published": functools.partial(QuestCache, score="published"),
    "quest-codes": functools.partial(QuestCache, codes=2),
    "cascading": CascadingCache,
    "think": ThinKCache,
    "subgen": SubGenCache,
}
METHODS = (DENSE, *CACHES)
KINDS = CACHES | ORACLES
EVERYTHING = 2**30  # tokens, a budget that covers every document
# In one forward of a prefill, of all rows together, so that activations and masks stay bounded:
PREFILL_TOKENS = 2**18
PREFILL_MASK = 2**30  # elements of the attention mask that a chunk or left padding needs


class Way(NamedTuple):
    """A method at a budget in tokens, None for dense attention."""

    method: str
    budget: int | None

    def __str__(self) -> str:
        return self.method if self.budget is None else f"{self.method} {self.budget:,}"


def make_ways(methods: Iterable[str], budgets: Iterable[int]) -> list[Way]:
    """Every method at every budget, dense attention once.

    Raises:
        ValueError: for an unknown method, or a budget that a method cannot have.
    """
    methods, budgets = list(dict.fromkeys(methods)), sorted(set(budgets))
    ways = []
    for method in methods:
        if method == DENSE:
            ways.append(Way(DENSE, None))
        elif method not in KINDS:
            raise ValueError(f"There is no method {method!r}. The methods are {', '.join((DENSE, *KINDS))}.")
        else:
            ways += [Way(method, KINDS[method](budget=budget).budget) for budget in budgets]
    if not ways:
        raise ValueError("There is nothing to compare: give at least one method, and a budget for all but dense.")
    return ways


def check_length(model: PreTrainedModel, num_tokens: int, ways: Sequence[Way], num_context: int | None = None) -> None:
    """Raise for a text of `num_tokens` that the model cannot hold or of whose context a budget leaves nothing out."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and num_tokens > limit:
        raise ValueError(
            f"{num_tokens:,} tokens are more than this model's context of {limit:,}. Ask for fewer, or another model."
        )
    budget = max((way.budget for way in ways if way.budget), default=0)
    num_context = num_tokens if num_context is None else num_context
    if budget >= num_context:
        raise ValueError(
            f"A budget of {budget:,} tokens covers all {num_context:,} tokens of the context, so nothing would be left "
            "out. Give smaller budgets or longer text."
        )


def read(model: PreTrainedModel, ways: Sequence[Way], ids: Tensor, mask: Tensor | None) -> Iterator[tuple[Way, Cache]]:
    """Reads [B, N] tokens, with a [B, N] mask for left padding, and yields each way with its cache to go on from.

    The model attends by the way that was yielded last.
    """
    for method, same_method in itertools.groupby(ways, key=lambda way: way.method):
        cache = new_cache(model, method)
        prefill(model, cache, ids, mask)
        *before, last = same_method
        for way in before:
            yield way, at_budget(copy.deepcopy(cache), way.budget)
        yield last, at_budget(cache, last.budget)


def new_cache(model: PreTrainedModel, method: str, budget: int = EVERYTHING) -> Cache:
    """An empty cache for a method; the model is set to attend by it."""
    if method == DENSE:
        try:
            model.set_attn_implementation("sdpa")
        except ValueError:  # GPT-OSS, for one, has no SDPA
            model.set_attn_implementation("eager")
        return DynamicCache(config=model.config)
    model.set_attn_implementation("quest")
    return KINDS[method](budget=budget, **options_of(method))


def options_of(method: str) -> dict[str, bool]:
    """Compilation would be made again for each batch, budget and copy."""
    return {"compile": False} if method.startswith("quest") else {}


def taken(method: str, read: Cache, budget: int) -> Cache:
    """A cache for a method with all that another one, which keeps everything, has read."""
    kind = KINDS[method]
    if not isinstance(kind, functools.partial):
        return kind.from_cache(read, budget=budget, **options_of(method))
    return kind.func.from_cache(read, budget=budget, **kind.keywords, **options_of(method))


def at_budget(cache: Cache, budget: int | None) -> Cache:
    if budget is not None:
        cache.budget = budget
    return cache


def prefill(model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Runs [B, N] tokens through the model, in chunks of several tokens; returns the likeliest next ones, [B, 1]."""
    chunk_len = max(2, min(PREFILL_TOKENS // ids.shape[0], PREFILL_MASK // ids.numel()))
    chunks = list(ids.split(chunk_len, dim=1))
    if len(chunks) > 1 and chunks[-1].shape[1] == 1:  # alone, it would be a decode step
        chunks[-2:] = [torch.cat(chunks[-2:], dim=1)]
    end = cache.get_seq_length()
    for chunk in chunks:
        end += chunk.shape[1]
        told = positions(mask, end, chunk.shape[1])
        output = model.base_model(chunk, **{CACHE_NAME: cache}, use_cache=True, **told)
    return model.get_output_embeddings()(output.last_hidden_state[:, -1:]).argmax(dim=-1)


def step(model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Feeds one token per row, [B, 1], and returns the logits of the next, [B, V] float32."""
    end = cache.get_seq_length() + 1
    return model(ids, **{CACHE_NAME: cache}, use_cache=True, **positions(mask, end, 1)).logits[:, -1].float()


def positions(mask: Tensor | None, end: int, num_new: int) -> dict[str, Tensor]:
    """What a model wants to be told of a left-padded batch, as `generate` tells it."""
    if mask is None:
        return {}
    seen = mask[:, :end]
    return {"attention_mask": seen, "position_ids": (seen.cumsum(dim=1) - 1).clamp(min=0)[:, end - num_new :]}


def answer(
    model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor | None, max_new_tokens: int, **options
) -> Tensor:
    """Feeds what of the [B, N] tokens the cache does not hold one by one, and returns the greedy answers, [B, new]."""
    for position in range(cache.get_seq_length(), ids.shape[1] - 1):
        step(model, cache, ids[:, position : position + 1], mask)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        **{CACHE_NAME: cache},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **options,
    )
    return output[:, ids.shape[1] :]


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """[B, N] tokens of rows that end together, and their mask, None where they are of one length."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    if all(len(row) == longest for row in rows):
        return ids, None
    num_padding = torch.tensor([longest - len(row) for row in rows], device=device)
    return ids, (torch.arange(longest, device=device) >= num_padding[:, None]).long()
