"""What each way makes of a text or a question: the runs of `hf-quest eval compare`, each of one batch."""

import copy
import functools
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
    model: PreTrainedModel, ways: Sequence[Way], ids: Tensor, mask: Tensor | None, ends: tuple[int, ...]
) -> Iterator[tuple[Way, Part]]:
    """Reads [B, N] tokens, with a [B, N] mask for left padding, up to each of `ends`: all of it is a prompt, dense.

    Yields each way of one method and part; its cache has evicted at the part's end. The model attends by that way.
    """
    cache, method = new_cache(model, ways[0].method), ways[0].method
    padding = () if mask is None else tuple((ids.shape[1] - mask.sum(dim=1)).tolist())
    if isinstance(cache, MethodCache) and not cache.method.evicts:
        for part in read_whole(model, ids, mask, ends):
            for way in ways:
                yield way, part._replace(cache=ready(taken(method, part.cache, way.budget), padding))
    else:
        for part in parts_of(model, cache, ids, mask, ends):
            for way in ways:
                yield way, part._replace(cache=at_budget(copy.deepcopy(part.cache), way.budget))


def parts_of(
    model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor | None, ends: tuple[int, ...]
) -> Iterator[Part]:
    for end in ends:
        yield Part(end, cache, prefill(model, cache, ids[:, cache.get_seq_length() : end], mask))


@functools.lru_cache(maxsize=1)
def read_whole(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, ends: tuple[int, ...]) -> list[Part]:
    """The parts for all methods that keep every token: they read a prompt in the same way."""
    parts = parts_of(model, MethodCache(Method(EVERYTHING)), ids, mask, ends)
    return [part._replace(cache=copy.deepcopy(part.cache)) for part in parts]


@functools.lru_cache(maxsize=1)
def dense_log_probs(model: PreTrainedModel, ids: Tensor, num_steps: int) -> Tensor:
    """[B, num_steps, V]: what dense attention says."""
    ((_, part),) = read_parts(model, [Way(DENSE, None)], ids, None, (ids.shape[1] - num_steps - 1,))
    return fed(model, part.cache, ids, num_steps, BytesRead(part.cache))


def forget() -> None:
    """Let go of what is held for the next method."""
    read_whole.cache_clear()
    dense_log_probs.cache_clear()


def ready(cache: Cache, padding: tuple[int, ...]) -> Cache:
    """A cache that has done with a document what it does before questions."""
    if padding:
        cache.set_left_padding(padding)
    if isinstance(cache, SqueezedAttentionCache):
        cache.squeeze()
    return cache


def fed(model: PreTrainedModel, cache: Cache, ids: Tensor, num_steps: int, read: BytesRead) -> Tensor:
    """[B, num_steps, V] log-probabilities of the last `num_steps` of [B, N] tokens, each in a step of its own."""
    log_probs = []
    for token in ids[:, -num_steps - 1 : -1].split(1, dim=1):
        log_probs.append(step(model, cache, token).log_softmax(dim=-1))
        read.step_is_done()
    return torch.stack(log_probs, dim=1)


def predict(model: PreTrainedModel, ways: Sequence[Way], ids: Tensor, num_steps: int) -> Iterator[dict[str, Any]]:
    """What each way makes of the last `num_steps` tokens of [B, N] tokens, holds, and reads in a step, for one row."""
    dense = dense_log_probs(model, ids, num_steps)
    targets = ids[:, -num_steps:, None]
    dense_losses = -dense.gather(-1, targets)[..., 0].mean(dim=1)
    for way, part in read_parts(model, ways, ids, None, (ids.shape[1] - num_steps - 1,)):
        read = BytesRead(part.cache)
        log_probs = fed(model, part.cache, ids, num_steps, read)
        losses = -log_probs.gather(-1, targets)[..., 0].mean(dim=1)
        yield {
            **way._asdict(),
            "losses": losses.tolist(),
            "loss_rise": (losses - dense_losses).tolist(),
            **compare(dense, log_probs),
            "read_bytes": read.total / num_steps / len(ids),
            **held(part.cache),
        }


class Prompts:
    """A batch of questions with their contexts."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked]):
        self.model, self.tokenizer, self.asked = model, tokenizer, asked
        self.ids, self.mask = left_padded([each.context + each.question for each in asked], model.device)
        self.num_context = self.ids.shape[1] - max(len(each.question) for each in asked)
        self.limit = max(each.limit for each in asked)

    def ask(self, ways: Sequence[Way]) -> Iterator[dict[str, Any]]:
        """The answers by each way: asked after the context is read, and with it. Dense attention is the same then."""
        ends = (self.num_context,) if ways[0].method == DENSE else (self.num_context, self.ids.shape[1])
        for way, part in read_parts(self.model, ways, self.ids, self.mask, ends):
            is_later = part.end == self.num_context
            output = self.answer_later(part) if is_later else self.answer_first(part)
            rows = [up_to_end(self.model, row) for row in output]
            answers = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
            yield {
                **way._asdict(),
                "protocol": LATER if is_later else FIRST,
                "scores": [each.score(text) for each, text in zip(self.asked, answers, strict=True)],
                "answers": answers,
            }

    def answer_later(self, part: Part) -> Tensor:
        """[B, new] tokens. The question is fed token by token."""
        return answer(
            self.model, part.cache, self.ids, self.mask, self.limit, pad_token_id=ruler.pad_of(self.tokenizer)
        )

    def answer_first(self, part: Part) -> Tensor:
        """[B, new] tokens, the first of which follows the prompt."""
        ids = torch.cat([self.ids, part.next], dim=1)
        mask = None if self.mask is None else torch.nn.functional.pad(self.mask, (0, 1), value=1)
        rest = answer(self.model, part.cache, ids, mask, self.limit - 1, pad_token_id=ruler.pad_of(self.tokenizer))
        return torch.cat([part.next, rest], dim=1)


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
