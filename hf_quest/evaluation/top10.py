"""The share of dense attention's top ten tokens that each method attends to (Quest, figure 4).

Dense attention reads a document, its question and the right answer, and at every token of these two each head's ten
highest weights are noted. Every method is then fed the same tokens, and at each it is counted how many of the ten are
among what it attends to.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from ..watch import Read
from .documents import JOBS, Document, Library, documents, heldout_text
from .methods import CACHES, EVERYTHING, Way, check_length, make_ways, new_cache, prefill, read, step
from .plots import add_legend, figure
from .report import Results, comparison, mean, merged, spread, way_of

NUM_TOP = 10


def top_tokens(model: PreTrainedModel, cache: Cache, ids: Tensor) -> list[list[Tensor]]:
    """For each token fed and each layer the [B, Hq, 10] positions of the highest dense attention weights."""
    by_step: list[list[Tensor]] = []

    def note(read: Read) -> None:
        by_step[-1].append(read.all_logits().topk(NUM_TOP, dim=-1).indices)

    cache.watcher = note
    for position in range(cache.get_seq_length(), ids.shape[1]):
        by_step.append([])
        step(model, cache, ids[:, position : position + 1])
    cache.watcher = None
    return by_step


def shares_attended(model: PreTrainedModel, cache: Cache, ids: Tensor, tops: list[list[Tensor]]) -> Tensor:
    """[B, layers]: the share of `tops` that a cache with a budget attends to, mean over heads and tokens fed."""
    shares: list[list[Tensor]] = []

    def note(read: Read) -> None:
        place = (len(shares) - 1, len(shares[-1]))
        found = share_found(tops[place[0]][place[1]], read.tokens())
        shares[-1].append(found.mean(dim=1))

    cache.watcher = note
    for position in range(cache.get_seq_length(), ids.shape[1]):
        shares.append([])
        step(model, cache, ids[:, position : position + 1])
    cache.watcher = None
    return torch.stack([torch.stack(by_layer, dim=1) for by_layer in shares]).mean(dim=0)


def share_found(tokens: Tensor, is_attended: Tensor) -> Tensor:
    """[B, Hq]: the share of each head's `tokens`, [B, Hq, count] positions, that are attended, [B, Hkv, N]."""
    num_groups = tokens.shape[1] // is_attended.shape[1]
    return is_attended.repeat_interleave(num_groups, dim=1).gather(2, tokens).float().mean(dim=2)


def evaluate_top10(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    jobs: Sequence[str] = ("passkey",),
    length: int = 10_240,
    methods: Sequence[str] = tuple(CACHES),
    budgets: Sequence[int] = (64, 128, 256, 512, 1024),
    num_documents: int = 10,
    fraction: float = 1.0,
    seed: int = 1,
    batch_size: int = 8,
    output: Path | str | None = None,
) -> dict[str, Any]:
    """The share of the ten tokens with the most dense attention that each method attends to.

    Args: as `evaluate_recall`'s; dense attention is what is compared with, and no method of its own here.

    Returns:
        The report: configuration, environment and records, each with the shares of one batch by method and budget for
        each document, mean over the layers that are not always dense, and for each layer.

    Raises:
        ValueError: for what cannot be evaluated, before anything is.
    """
    ways = [way for way in make_ways(methods, budgets) if way.budget]
    check_length(model, length, ways)
    configuration = {
        "evaluation": "top10",
        "jobs": list(jobs),
        "length": length,
        "methods": list(methods),
        "budgets": list(budgets),
        "num_documents": num_documents,
        "fraction": fraction,
        "seed": seed,
        "batch_size": batch_size,
    }
    results = Results(model, configuration, output)
    library = Library(tokenizer, heldout_text())
    units: dict[str, tuple[str, list[Document]]] = {}
    for job in jobs:
        if job not in JOBS:
            raise ValueError(f"There is no job {job!r}. The jobs are {', '.join(JOBS)}.")
        papers = spread(list(documents(library, job, length, num_documents, seed)), fraction)
        for first in range(0, len(papers), batch_size):
            units[f"{job}, from document {first + 1}"] = (job, papers[first : first + batch_size])

    def evaluate(unit: str) -> Iterator[dict[str, Any]]:
        job, batch = units[unit]
        answers = [library.encode(document.answer) for document in batch]
        answer_len = min(map(len, answers))
        rows = [document.ids + answer[:answer_len] for document, answer in zip(batch, answers, strict=True)]
        ids = torch.tensor(rows, device=model.device)
        question_len = max(len(library.encode(document.question)) for document in batch)
        context = ids[:, : length - question_len]
        everything = new_cache(model, "quest", EVERYTHING)
        prefill(model, everything, context)
        tops = top_tokens(model, everything, ids)
        del everything
        for way, cache in read(model, ways, context, None):
            shares = shares_attended(model, cache, ids, tops)[:, cache.dense_layers :]
            yield {
                "job": job,
                **way._asdict(),
                "scores": shares.mean(dim=1).tolist(),
                "by_layer": shares.mean(dim=0).tolist(),
                "first_layer": cache.dense_layers,
            }

    results.run(units, evaluate)
    return results.report


def top10_table(report: dict[str, Any]) -> Table:
    """The share of the top ten tokens attended to."""
    scores = merged(report["records"], ("job",), "scores")
    cells = (((job,), way, f"{mean(values):.1%}") for ((job,), way), values in scores.items())
    return comparison(("job",), cells)


def draw_by_layer(report: dict[str, Any]) -> Any:
    """The share attended to in each layer, one panel for each method, one line for each budget."""
    by_way: dict[Way, list[list[float]]] = {}
    for record in report["records"]:
        by_way.setdefault(way_of(record), []).append(record["by_layer"])
    first = report["records"][0]["first_layer"]
    methods = list(dict.fromkeys(way.method for way in by_way))
    drawing = figure(figsize=(3.2 * len(methods), 3.2))
    panels = drawing.subplots(1, len(methods), squeeze=False, sharey=True)[0]
    for method, axes in zip(methods, panels, strict=True):
        for way, runs in by_way.items():
            if way.method == method:
                shares = [mean(values) for values in zip(*runs, strict=True)]
                axes.plot(range(first, first + len(shares)), shares, marker="o", label=f"budget {way.budget:,}")
        axes.set(title=method, xlabel="layer", ylim=(-0.03, 1.03))
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("share of the top ten tokens")
    add_legend(drawing, panels[-1])
    return drawing
