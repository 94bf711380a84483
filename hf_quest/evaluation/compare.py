"""All methods beside dense attention and the best choices there are: what each loses, holds, reads and takes.

Every way is a real cache behind the model. A question is fed token by token to a cache that holds the context (it is
asked later), and once more it is part of the prompt, so that a method that evicts has seen it (it is asked first).
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import recall, ruler
from .compare_runs import Asked, Prompts, forget, predict, take
from .documents import JOBS, Library, documents, heldout_text
from .measure import NUM_GENERATED
from .methods import DENSE, METHODS, Way, check_length, make_ways
from .oracles import ORACLES
from .perplexity import windows
from .report import Results
from .ruler_tasks import TASKS as RULER_TASKS

TEXT, SPEED = "text", "speed"
QUESTIONS = (*JOBS, *RULER_TASKS)
TASKS = (TEXT, *QUESTIONS, SPEED)
USUAL = tuple(task for task in TASKS if task != "digest")  # whose answers are long
WAYS = (*METHODS, *ORACLES)
ANSWER_ROOM = 16  # tokens beyond those of a right answer, for a model that says more


def evaluate_compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    source: str = "text",
    tasks: Sequence[str] = USUAL,
    lengths: Sequence[int] = (2048,),
    methods: Sequence[str] = WAYS,
    budgets: Sequence[int] = (256,),
    num_windows: int = 4,
    num_steps: int = 32,
    num_samples: int = 4,
    max_new_tokens: int | None = None,
    at_least: float = 0.5,
    num_rounds: int = 2,
    machine: str | None = None,
    seed: int = 1,
    batch_size: int = 4,
    output: Path | str | None = None,
) -> dict[str, Any]:
    """Loss, answers, memory, bytes read and time of every method at every budget, beside dense attention.

    `text` predicts the last tokens of windows of a text, each in a step: loss, divergence from dense attention, what
    the cache holds and what its steps read. `passkey`, `facts` and `digest` are those of `evaluate_recall`, the others
    RULER's. A task that dense attention does less than `at_least` of is not asked of others. `speed` is a `generate`
    behind the text's first window.

    Args:
        model, tokenizer: as `methods.load` brings them.
        text: what to predict. source: its name, for the report.
        tasks: of TASKS.
        lengths: tokens of a window or a prompt, the steps or the answer included.
        methods: of WAYS. Dense attention is always among them.
        budgets: tokens.
        num_windows, num_steps: windows of the text, at equal steps through it, and tokens at the end of each.
        num_samples: questions of each task and length.
        max_new_tokens: the longest answer to a task of RULER, by default the paper's.
        num_rounds: times that all ways take turns at `speed`; of each the fastest counts.
        machine: what the table calls this machine, by default its processor.
        batch_size: windows or questions at a time.
        output: a JSON file, with which an interrupted run goes on, as does one with more tasks or methods.

    Returns:
        The report: configuration, environment and records, each of one way and one batch of one task.

    Raises:
        ValueError: for what cannot be evaluated, before anything is.
    """
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"There is no task {task!r}. The tasks are {', '.join(TASKS)}.")
    ways = make_ways([DENSE, *(method for method in methods if method != DENSE)], budgets)
    num_behind = max(num_steps + 1, NUM_GENERATED if SPEED in tasks else 0)  # the prompt
    for length in lengths:
        if not 1 <= num_behind < length:
            raise ValueError(f"{length:,} tokens are too few to decode {num_behind} behind others. Give more.")
        check_length(model, length, ways, length - num_behind)
    configuration = {
        "evaluation": "compare",
        "source": source,
        "tasks": list(tasks),
        "lengths": list(lengths),
        "methods": list(methods),
        "budgets": list(budgets),
        "num_windows": num_windows,
        "num_steps": num_steps,
        "num_samples": num_samples,
        "max_new_tokens": max_new_tokens,
        "at_least": at_least,
        "machine": machine,
        "seed": seed,
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
    }
    results = Results(model, configuration, output, growing=["tasks", "methods"])
    exam = Exam(model, tokenizer, ways, batch_size)
    units: dict[str, Unit] = {}
    for length in lengths:
        if TEXT in tasks:
            units |= exam.of_text(windows(tokenizer, text, length + 1, num_windows), num_steps)
        if SPEED in tasks:
            units |= exam.of_speed(windows(tokenizer, text, length - NUM_GENERATED, 1), length, num_rounds)
    library = Library(tokenizer, heldout_text()) if set(tasks) & set(JOBS) else None
    asked = {
        (task, length): questions(tokenizer, library, task, length, num_samples, max_new_tokens, seed)
        for task, length in itertools.product(tasks, lengths)
        if task in QUESTIONS
    }
    for of_others in (False, True):  # dense attention first
        for (task, length), samples in asked.items():
            units |= exam.of_questions(task, length, samples, of_others)

    def evaluate(name: str) -> Iterator[dict[str, Any]]:
        unit = units[name]
        where = {"task": unit.task, "length": unit.length}
        if unit.of_others and ruler.dense_score(results.report, unit.task, unit.length) < at_least:
            yield {**where, **Way(ruler.UNCOUNTED, None)._asdict(), "scores": []}
            return
        for record in unit.run():
            yield {**where, **record}

    try:
        results.run(units, evaluate)
    finally:
        forget()
    return results.report


@dataclass(frozen=True)
class Unit:
    """What is run, and kept, at once: the records of one method and one batch of a task."""

    task: str
    length: int
    run: Callable[[], Iterator[dict[str, Any]]]
    of_others: bool = False  # whether dense attention has to have answered before


@dataclass(frozen=True)
class Exam:
    """One model's units, by name. Those of a batch follow each other, so that it is read once for all that keep it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ways: Sequence[Way]
    batch_size: int

    @property
    def methods(self) -> dict[str, list[Way]]:
        """The ways of each method, dense attention first."""
        return {name: list(same) for name, same in itertools.groupby(self.ways, key=lambda way: way.method)}

    def batches(self, items: Sequence) -> Iterator[tuple[int, Sequence]]:
        for first in range(0, len(items), self.batch_size):
            yield first + 1, items[first : first + self.batch_size]

    def of_text(self, rows: np.ndarray, num_steps: int) -> dict[str, Unit]:
        units, length = {}, rows.shape[1] - 1
        for first, batch in self.batches(torch.from_numpy(rows).to(self.model.device)):
            for method, ways in self.methods.items():
                name = f"text, {length:,} tokens, from window {first}, {method}"
                units[name] = Unit(TEXT, length, functools.partial(predict, self.model, ways, batch, num_steps))
        return units

    def of_questions(self, task: str, length: int, asked: Sequence[Asked], of_others: bool) -> dict[str, Unit]:
        units = {}
        for first, batch in self.batches(asked):
            prompts = Prompts(self.model, self.tokenizer, batch)
            for method, ways in self.methods.items():
                if (method != DENSE) == of_others:
                    name = f"{task}, {length:,} tokens, from question {first}, {method}"
                    units[name] = Unit(task, length, functools.partial(prompts.ask, ways), of_others)
        return units

    def of_speed(self, rows: np.ndarray, length: int, num_rounds: int) -> dict[str, Unit]:
        ids = torch.from_numpy(rows).to(self.model.device)
        return {
            f"speed, {length:,} tokens, round {round_idx + 1}, {method}": Unit(
                SPEED, length, functools.partial(take, self.model, ways, ids)
            )
            for round_idx in range(num_rounds)
            for method, ways in self.methods.items()
        }


def questions(
    tokenizer: PreTrainedTokenizerBase,
    library: Library | None,
    task: str,
    length: int,
    count: int,
    max_new_tokens: int | None,
    seed: int,
) -> list[Asked]:
    """`count` questions of a task, those of about as many tokens beside each other; JOBS are of the library's text.

    Raises:
        ValueError: for a length that is too short for the task.
    """
    asked = []
    if library is not None and task in JOBS:
        for document in documents(library, task, length, count, seed):
            num_context = len(document.ids) - len(library.encode(document.question))
            limit = len(library.encode(document.answer)) + ANSWER_ROOM
            right = functools.partial(recall.score, task, document=document)
            asked.append(Asked(document.ids[:num_context], document.ids[num_context:], limit, right))
    else:
        limit = max_new_tokens or RULER_TASKS[task][1]
        for context, question, sample in ruler.make_samples(tokenizer, task, length, range(count), seed, limit):
            asked.append(Asked(context, question, limit, functools.partial(ruler.score, answers=sample.answers)))
    return sorted(asked, key=lambda each: len(each.question))
