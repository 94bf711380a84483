"""The Quest paper's passkey retrieval (arXiv 2406.10774, §4.2.2) for any model, by its repository's protocol."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .documents import GARBAGE, PASSKEY_QUESTION
from .methods import METHODS, answer, check_length, left_padded, make_ways, read
from .report import Results, comparison, mean, merged, spread

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
CHARACTERS_PER_TOKEN = 4  # of garbage, which makes about that many tokens
TAIL = 400  # characters at the end that are fed token by token
MAX_NEW_TOKENS = 10


@dataclass(frozen=True)
class Prompt:
    """`context` is what is prefilled, `tail` what is fed token by token, as token ids."""

    context: list[int]
    tail: list[int]
    key: int
    depth: float


def passkey_text(length: int, depth: float, key: int) -> str:
    """The prompt of about `length` tokens, with the key behind `depth`, from 0 to 1, of the garbage."""
    num_garbage = CHARACTERS_PER_TOKEN * length
    num_before = int(num_garbage * depth)
    garbage = " ".join([GARBAGE] * (num_garbage // len(GARBAGE) + 1))
    needle = NEEDLE.format(key=key)
    lines = [INTRODUCTION, garbage[:num_before], needle, garbage[: num_garbage - num_before], PASSKEY_QUESTION]
    return "\n".join(lines)


def passkey_prompts(tokenizer: PreTrainedTokenizerBase, length: int, iterations: int, seed: int) -> list[Prompt]:
    """`iterations` prompts with their keys at equal steps of depth, the last at the end."""
    rng = np.random.default_rng([seed, length])
    prompts = []
    for depth in (np.arange(iterations) + 1) / iterations:
        key = int(rng.integers(1, 50_001))
        text = passkey_text(length, depth, key)
        tail = tokenizer.encode(text[-TAIL:], add_special_tokens=False)
        prompts.append(Prompt(tokenizer.encode(text[:-TAIL]), tail, key, float(depth)))
    return prompts


def passkey_score(answer: str, key: int) -> float:
    """1 if the first number in the answer is the key."""
    number = re.search(r"\d+", answer)
    return float(number is not None and int(number.group()) == key)


def evaluate_passkey(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lengths: Sequence[int] = (10_000,),
    methods: Sequence[str] = METHODS,
    budgets: Sequence[int] = (64, 256, 1024),
    iterations: int = 100,
    fraction: float = 1.0,
    seed: int = 1,
    batch_size: int = 8,
    output: Path | str | None = None,
) -> dict[str, Any]:
    """The share of pass keys found. All but the last 400 characters are prefilled, those are fed token by token, and
    the first number of the greedy answer counts. In a batch those prompts whose 400 characters have fewer tokens than
    another's have a few tokens more fed one by one.

    Args:
        model, tokenizer: as `methods.load` brings them.
        lengths: tokens, each four characters of garbage.
        methods, budgets: what to compare; budgets are tokens.
        iterations: prompts of each length, their depths at equal steps.
        fraction: the share of them to run.
        batch_size: prompts at a time, left-padded.
        output: a JSON file, with which an interrupted run goes on.

    Returns:
        The report: configuration, environment and records, each with the answers to a batch by one method and budget.

    Raises:
        ValueError: for what cannot be evaluated, before anything is.
    """
    ways = make_ways(methods, budgets)
    configuration = {
        "evaluation": "passkey",
        "lengths": list(lengths),
        "methods": list(methods),
        "budgets": list(budgets),
        "iterations": iterations,
        "fraction": fraction,
        "seed": seed,
        "batch_size": batch_size,
    }
    results = Results(model, configuration, output)
    units = {}
    for length in lengths:
        (first,) = passkey_prompts(tokenizer, length, 1, seed)
        check_length(model, len(first.context) + len(first.tail) + MAX_NEW_TOKENS, ways, len(first.context))
        prompts = spread(passkey_prompts(tokenizer, length, iterations, seed), fraction)
        prompts.sort(key=lambda prompt: len(prompt.tail))  # those of a batch leave the context at once
        for begin in range(0, len(prompts), batch_size):
            units[f"{length:,} tokens, from prompt {begin + 1}"] = (length, prompts[begin : begin + batch_size])

    def evaluate(unit: str) -> Iterator[dict[str, Any]]:
        length, batch = units[unit]
        tail_len = len(batch[-1].tail)
        ids, mask = left_padded([prompt.context + prompt.tail for prompt in batch], model.device)
        context_mask = None if mask is None else mask[:, :-tail_len]
        for way, cache in read(model, ways, ids[:, :-tail_len], context_mask):
            output = answer(model, cache, ids, mask, MAX_NEW_TOKENS)
            answers = tokenizer.batch_decode(output, skip_special_tokens=True)
            yield {
                "length": length,
                **way._asdict(),
                "scores": [passkey_score(text, prompt.key) for text, prompt in zip(answers, batch, strict=True)],
                "depths": [prompt.depth for prompt in batch],
                "keys": [prompt.key for prompt in batch],
                "answers": answers,
            }

    results.run(units, evaluate)
    return results.report


def passkey_table(report: dict[str, Any]) -> Table:
    """The share of keys found."""
    scores = merged(report["records"], ("length",), "scores")
    cells = (
        ((f"{length:,}", str(len(values))), way, f"{mean(values):.1%}") for ((length,), way), values in scores.items()
    )
    return comparison(("tokens", "prompts"), cells)
