"""How often a model finds what a long document of real text holds: a pass key, one fact of many, or all key points."""

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .documents import JOBS, Document, Library, documents, heldout_text
from .methods import METHODS, Way, answer, check_length, make_ways, read
from .report import Results, comparison, mean, merged, spread


def score(job: str, answer: str, document: Document) -> float:
    """1 or 0 for a code; for a digest the share of its key points that `answer` gives verbatim."""
    if job == "digest":
        points = document.answer.strip().splitlines()
        return len(set(points) & set(answer.splitlines())) / len(points)
    number = re.search(r"\d+", answer)
    return float(number is not None and number.group() == document.answer.strip())


class Examiner:
    """Asks one model about batches of documents, in every way."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ways: Sequence[Way]):
        self.model = model
        self.tokenizer = tokenizer
        self.ways = ways

    @torch.no_grad()
    def ask(self, batch: list[Document]) -> Iterator[tuple[Way, list[str]]]:
        """Yields each way with its answers to documents of one length."""
        ids = torch.tensor([document.ids for document in batch], device=self.model.device)
        question_len = max(len(self.encode(document.question)) for document in batch)
        max_new_tokens = max(len(self.encode(document.answer)) for document in batch) + 8
        for way, cache in read(self.model, self.ways, ids[:, :-question_len], None):
            output = answer(self.model, cache, ids, None, max_new_tokens)
            yield way, self.tokenizer.batch_decode(output, skip_special_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def evaluate_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    jobs: Sequence[str] = tuple(JOBS),
    lengths: Sequence[int] = (10_240,),
    methods: Sequence[str] = METHODS,
    budgets: Sequence[int] = (64, 256, 1024),
    num_documents: int = 100,
    fraction: float = 1.0,
    seed: int = 1,
    batch_size: int = 8,
    output: Path | str | None = None,
) -> dict[str, Any]:
    """The share of right answers to questions about documents of held-out text, of exact lengths.

    Args:
        model, tokenizer: as `methods.load` brings them. The tokenizer must keep digits and newlines as tokens of their
            own, as the tiny model's does.
        jobs: of `documents.JOBS`.
        lengths: tokens of a document, its question included.
        methods, budgets: what to compare; budgets are tokens.
        num_documents: of each job and length, their depths spread evenly.
        fraction: the share of them to ask about.
        batch_size: documents at a time.
        output: a JSON file, with which an interrupted run goes on.

    Returns:
        The report: configuration, environment and records, each with the scores of a batch by one method and budget.

    Raises:
        ValueError: for what cannot be evaluated, before anything is.
    """
    ways = make_ways(methods, budgets)
    for job in jobs:
        if job not in JOBS:
            raise ValueError(f"There is no job {job!r}. The jobs are {', '.join(JOBS)}.")
    for length in lengths:
        check_length(model, length, ways)
    configuration = {
        "evaluation": "recall",
        "jobs": list(jobs),
        "lengths": list(lengths),
        "methods": list(methods),
        "budgets": list(budgets),
        "num_documents": num_documents,
        "fraction": fraction,
        "seed": seed,
        "batch_size": batch_size,
    }
    results = Results(model, configuration, output)
    library = Library(tokenizer, heldout_text())
    examiner = Examiner(model, tokenizer, ways)
    units = {}
    for job in jobs:
        for length in lengths:
            papers = spread(list(documents(library, job, length, num_documents, seed)), fraction)
            for first in range(0, len(papers), batch_size):
                batch = papers[first : first + batch_size]
                units[f"{job}, {length:,} tokens, from document {first + 1}"] = (job, length, batch)

    def evaluate(unit: str) -> Iterator[dict[str, Any]]:
        job, length, batch = units[unit]
        started = time.perf_counter()
        for way, answers in examiner.ask(batch):
            scores = [score(job, text, document) for text, document in zip(answers, batch, strict=True)]
            seconds = round(time.perf_counter() - started, 3)
            depths = [[round(depth, 4) for depth in document.depths] for document in batch]
            yield {
                "job": job,
                "length": length,
                **way._asdict(),
                "scores": scores,
                "depths": depths,
                "seconds": seconds,
            }
            started = time.perf_counter()

    results.run(units, evaluate)
    return results.report


def recall_table(report: dict[str, Any]) -> Table:
    """The share of right answers."""
    scores = merged(report["records"], ("job", "length"), "scores")
    cells = (((job, f"{length:,}"), way, f"{mean(values):.1%}") for ((job, length), way), values in scores.items())
    return comparison(("job", "tokens"), cells)
