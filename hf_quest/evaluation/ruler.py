"""What a model answers to the tasks of RULER (arXiv 2404.06654), by method, budget and length.

A model's chat template is applied once. The text is prefilled dense, question and answer's beginning are fed token by
token.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .documents import first_tokens
from .methods import DENSE, METHODS, answer, check_length, left_padded, make_ways, read
from .report import Results, comparison, mean, merged, spread
from .ruler_tasks import MIN_UNITS, TASKS, Sample, words

SEPARATOR = "<<the text ends here>>"  # between text and question while a chat template is applied
UNCOUNTED = "dense attention alone, which cannot do it"


def encode(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> tuple[list[int], list[int]]:
    """Token ids of what is prefilled, and of what is fed token by token: the question and the answer's beginning.

    In the model's chat template, if it has one, which writes its own special tokens.
    """
    if tokenizer.chat_template is None:
        text, question, first = sample.text, sample.question, first_tokens(tokenizer)
    else:
        message = {"role": "user", "content": f"{sample.text}{SEPARATOR}{sample.question}"}
        chat = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        text, question = chat.split(SEPARATOR)
        first = []
    parts = text, question + (sample.prefix.lstrip() if question.endswith("\n") else sample.prefix).rstrip()
    context, tail = (tokenizer.encode(part, add_special_tokens=False) for part in parts)
    return first + context, tail


def make_samples(
    tokenizer: PreTrainedTokenizerBase, task: str, length: int, indices: Sequence[int], seed: int, max_new_tokens: int
) -> list[tuple[list[int], list[int], Sample]]:
    """Samples as long as leaves their answers room within `length` tokens, and their token ids as `encode` has them.

    Raises:
        ValueError: for a length that is too short for the task.
    """
    make, _ = TASKS[task]

    def built(num_units: int, index: int) -> tuple[list[int], list[int], Sample] | None:
        """A sample of so many units, None where it is too long."""
        sample = make(num_units, np.random.default_rng([seed, length, index, *task.encode()]), length)
        context, tail = encode(tokenizer, sample)
        fits = len(context) + len(tail) + max_new_tokens <= length
        return (context, tail, sample) if fits else None

    def most_units(limit: int, index: int) -> int:
        """The most units up to `limit` whose sample is not too long; below MIN_UNITS where none is."""
        sizes = range(MIN_UNITS, limit + 1)
        if built(limit, index):
            return limit
        return MIN_UNITS - 1 + bisect_left(sizes, True, key=lambda num_units: built(num_units, index) is None)

    num_units = most_units(len(words()) - 10 if task == "cwe" else length, indices[0])
    samples = []
    for index in indices:
        own = most_units(num_units, index) if num_units >= MIN_UNITS else num_units
        sample = built(own, index) if own >= MIN_UNITS else None
        if sample is None:
            raise ValueError(f"{length:,} tokens are too few for {task} and its answer of {max_new_tokens} tokens.")
        samples.append(sample)
    return samples


def score(answer_text: str, answers: Sequence[str]) -> float:
    """The share of the answers that stand in the text, as in the paper."""
    return mean([float(each.lower() in answer_text.lower()) for each in answers])


def evaluate_ruler(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    lengths: Sequence[int] = (4096,),
    methods: Sequence[str] = METHODS,
    budgets: Sequence[int] = (256, 1024),
    num_samples: int = 20,
    at_least: float = 0.5,
    max_new_tokens: int | None = None,
    fraction: float = 1.0,
    seed: int = 1,
    batch_size: int = 8,
    output: Path | str | None = None,
) -> dict[str, Any]:
    """The mean share of right answers by task, length, method and budget, of greedy answers.

    Dense attention comes first. A task at a length of which it does less than `at_least` says nothing about the other
    methods: it is reported and not run with them.

    Args:
        model, tokenizer: as `methods.load` brings them.
        tasks: of TASKS.
        lengths: tokens of a prompt, the answer's included.
        methods, budgets: what to compare; budgets are tokens.
        num_samples: of each task and length.
        max_new_tokens: the longest answer, by default the task's in the paper.
        fraction: the share of the samples to run.
        batch_size: samples at a time, left-padded.
        output: a JSON file, with which an interrupted run goes on.

    Returns:
        The report: configuration, environment and records, each with the answers to a batch by one method and budget.

    Raises:
        ValueError: for what cannot be evaluated, before anything is.
    """
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"There is no task {task!r}. The tasks are {', '.join(TASKS)}.")
    dense, *ways = make_ways([DENSE, *(method for method in methods if method != DENSE)], budgets)
    for length in lengths:
        check_length(model, length, ways)
    configuration = {
        "evaluation": "ruler",
        "tasks": list(tasks),
        "lengths": list(lengths),
        "methods": list(methods),
        "budgets": list(budgets),
        "num_samples": num_samples,
        "at_least": at_least,
        "max_new_tokens": max_new_tokens,
        "fraction": fraction,
        "seed": seed,
        "batch_size": batch_size,
    }
    results = Results(model, configuration, output)
    units: dict[str, tuple] = {}
    samples = {}
    for task in tasks:
        for length in lengths:
            limit = max_new_tokens or TASKS[task][1]
            made = make_samples(tokenizer, task, length, spread(range(num_samples), fraction), seed, limit)
            # Those of a batch leave the context at once.
            samples[task, length, limit] = sorted(made, key=lambda sample: len(sample[1]))
    for of_dense in (True, False):
        for (task, length, limit), of_length in samples.items():
            for first in range(0, len(of_length), batch_size):
                way = "dense" if of_dense else "others"
                name = f"{task}, {length:,} tokens, {way}, from sample {first + 1}"
                units[name] = (of_dense, task, length, limit, of_length[first : first + batch_size])

    def evaluate(unit: str) -> Iterator[dict[str, Any]]:
        of_dense, task, length, limit, batch = units[unit]
        if not of_dense and dense_score(results.report, task, length) < at_least:
            yield {"task": task, "length": length, "method": UNCOUNTED, "budget": None, "scores": []}
            return
        tail_len = len(batch[-1][1])
        ids, mask = left_padded([context + tail for context, tail, _ in batch], model.device)
        context_mask = None if mask is None else mask[:, :-tail_len]
        for way, cache_of_way in read(model, [dense] if of_dense else ways, ids[:, :-tail_len], context_mask):
            output_ids = answer(model, cache_of_way, ids, mask, limit, pad_token_id=pad_of(tokenizer))
            texts = tokenizer.batch_decode(output_ids, skip_special_tokens=True)
            scores = [score(text, sample.answers) for text, (_, _, sample) in zip(texts, batch, strict=True)]
            yield {"task": task, "length": length, **way._asdict(), "scores": scores, "answers": texts}

    results.run(units, evaluate)
    return results.report


def pad_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills a row of a batch behind its end."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token_id for token_id in known if token_id is not None)


def dense_score(report: dict[str, Any], task: str, length: int) -> float:
    records = (each for each in report["records"] if (each["task"], each["length"]) == (task, length))
    return mean([score for each in records if each["method"] == DENSE for score in each["scores"]])


def counted(report: dict[str, Any]) -> dict[str, Any]:
    """The report with those records alone that count."""
    records = [record for record in report["records"] if record["method"] != UNCOUNTED]
    others = {(record["task"], record["length"]) for record in records if record["method"] != DENSE}
    return {**report, "records": [each for each in records if (each["task"], each["length"]) in others]}


def ruler_table(report: dict[str, Any]) -> Table:
    """The mean score of each task and length, and of all that count: those that dense attention can do."""
    scores = {
        key: mean(values) for key, values in merged(report["records"], ("task", "length"), "scores").items() if values
    }
    at_least = report["configuration"]["at_least"]
    counts = [key for key, way in scores if way.method == DENSE and scores[key, way] >= at_least]
    cells = [((task, f"{length:,}"), way, f"{value:.1%}") for ((task, length), way), value in scores.items()]
    for way in dict.fromkeys(way for _, way in scores):
        values = [scores[key, way] for key in counts if (key, way) in scores]
        if values:
            cells.append(((f"mean of the {len(counts)} that count", ""), way, f"{mean(values):.1%}"))
    return comparison(("task", "tokens"), cells)
