"""What each way makes of a text or a question: the runs of `hf-quest eval compare`, each of one batch."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from .. import MethodCache, SqueezedAttentionCache
from ..methods import Method
from . import ruler
from .measure import BytesRead, held, measured_generate
from .methods import DENSE, EVERYTHING, KINDS, Way, answer, at_budget, left_padded, new_cache, prefill, step, taken
from .selection import compare

LATER, FIRST = "asked later", "asked first"  # than the context has been read, and methods that evict have evicted


@dataclass(frozen=True)
class Asked:
    """A context and a question as token ids, how many tokens an answer may have, and what it is worth."""

    context: list[int]
    question: list[int]
    limit: int
    score: Callable[[str], float]


class Part(NamedTuple):
    """A prompt up to a place, read by a cache."""

    end: int
    cache: Cache
    next: Tensor  # [B, 1], the likeliest tokens


def read_parts(
    model: PreTrainedModel, ways: Sequence[Way], ids: Tensor, mask: Tensor | None, ends: Sequence[int]
) -> Iterator[tuple[Way, Part]]:
    """Reads [B, N] tokens, with a [B, N] mask for left padding, up to each of `ends`: all of it is a prompt, dense.

    Yields each way and part; its cache has evicted at the part's end. The model attends by that way.
    """
    padding = () if mask is None else tuple((ids.shape[1] - mask.sum(dim=1)).tolist())

    def parts_of(cache: Cache) -> Iterator[Part]:
        for end in ends:
            yield Part(end, cache, prefill(model, cache, ids[:, cache.get_seq_length() : end], mask))

    whole: list[Part] = []  # for all that keep every token
    for method, same in itertools.groupby(ways, key=lambda way: way.method):
        cache, of_method = new_cache(model, method), list(same)
        keeps_all = isinstance(cache, MethodCache) and not cache.method.evicts
        if keeps_all and not whole:
            everything = MethodCache(Method(EVERYTHING))
            whole = [part._replace(cache=copy.deepcopy(part.cache)) for part in parts_of(everything)]
        for part in whole if keeps_all else parts_of(cache):
            for way in of_method:
                if keeps_all:
                    yield way, part._replace(cache=ready(taken(method, part.cache, way.budget), padding))
                else:
                    yield way, part._replace(cache=at_budget(copy.deepcopy(part.cache), way.budget))


def ready(cache: Cache, padding: tuple[int, ...]) -> Cache:
    """A cache that has done with a document what it does before questions."""
    if padding:
        cache.set_left_padding(padding)
    if isinstance(cache, SqueezedAttentionCache):
        cache.squeeze()
    return cache


def predict(model: PreTrainedModel, ways: Sequence[Way], ids: Tensor, num_steps: int) -> Iterator[dict[str, Any]]:
    """What each way makes of the last `num_steps` tokens of [B, N] tokens, holds, and reads in a step, for one row."""
    fed, targets = ids[:, -num_steps - 1 : -1], ids[:, -num_steps:, None]
    dense = dense_losses = None
    for way, (_, cache, _) in read_parts(model, ways, ids, None, [ids.shape[1] - num_steps - 1]):
        read, log_probs = BytesRead(cache), []
        for token in fed.split(1, dim=1):
            log_probs.append(step(model, cache, token).log_softmax(dim=-1))
            read.step_is_done()
        found = torch.stack(log_probs, dim=1)
        losses = -found.gather(-1, targets)[..., 0].mean(dim=1)
        if dense is None:
            dense, dense_losses = found, losses
        yield {
            **way._asdict(),
            "losses": losses.tolist(),
            "loss_rise": (losses - dense_losses).tolist(),
            **compare(dense, found),
            "read_bytes": read.total / num_steps / len(ids),
            **held(cache),
        }


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ways: Sequence[Way], asked: Sequence[Asked]
) -> Iterator[dict[str, Any]]:
    """The answers to a batch of questions by each way: asked after the context is read, and with it.

    Dense attention is the same either way.
    """
    tail_len, limit = max(len(each.question) for each in asked), max(each.limit for each in asked)
    ids, mask = left_padded([each.context + each.question for each in asked], model.device)
    num_context, num_prompt = ids.shape[1] - tail_len, ids.shape[1]
    ends = [num_context] if ways[0].method == DENSE else [num_context, num_prompt]
    for way, (end, cache, following) in read_parts(model, ways, ids, mask, ends):
        if end == num_context:
            output = answer(model, cache, ids, mask, limit, pad_token_id=ruler.pad_of(tokenizer))
        else:
            begun = torch.cat([ids, following], dim=1)
            seen = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
            rest = answer(model, cache, begun, seen, limit - 1, pad_token_id=ruler.pad_of(tokenizer))
            output = torch.cat([following, rest], dim=1)
        answers = [tokenizer.decode(up_to_end(model, row), skip_special_tokens=True) for row in output]
        yield {
            **way._asdict(),
            "protocol": LATER if end == num_context else FIRST,
            "scores": [each.score(text) for each, text in zip(asked, answers, strict=True)],
            "answers": answers,
        }


def up_to_end(model: PreTrainedModel, row: Tensor) -> Tensor:
    """The tokens of an answer before the first that ends one."""
    ends = model.generation_config.eos_token_id
    is_end = torch.isin(row, torch.tensor([] if ends is None else ends, device=row.device))
    return row[: int(is_end.long().argmax())] if is_end.any() else row


def take(model: PreTrainedModel, ways: Sequence[Way], ids: Tensor) -> Iterator[dict[str, Any]]:
    """The time and memory of a `generate` by each way."""
    for way in ways:
        new_cache(model, way.method)  # and the model attends by it
        cache = DynamicCache(config=model.config) if way.budget is None else KINDS[way.method](budget=way.budget)
        yield {**way._asdict(), **measured_generate(model, cache, ids)}
