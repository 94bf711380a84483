"""What CritiPrefill costs: answers, held-out perplexity and attention mass after prompts that it read, beside dense."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import CACHE_NAME, CritiPrefill, QuestCache
from ..prompts.critiprefill import SCORES
from ..prompts.dense import attention
from ..prompts.segments import gather
from ..reference import Logits
from ..watch import Read, SegmentsRead
from .documents import JOBS, Document, Library, documents, heldout_text
from .methods import EVERYTHING, answer, check_length
from .recall import score
from .report import Results, mean, spread

PUBLISHED = {"segment_size": 512, "block_size": 32, "layer_fusion": 0.25}  # what the paper's score is used with


def new_cache(prefill_budget: int | None, budget: int = 2048, compile: bool = True, **settings) -> QuestCache:
    """A cache that reads prompts dense, or by CritiPrefill with this budget."""
    critical = None if prefill_budget is None else CritiPrefill(budget=prefill_budget, **settings)
    return QuestCache(budget=budget, prefill=critical, compile=compile)


def windows(library: Library, length: int, count: int) -> Tensor:
    """[count, length] token ids at equal steps through the library's text, each behind what a text begins with.

    There are fewer, but never none, where the text holds fewer that do not overlap.

    Raises:
        ValueError: if the text is shorter than `length`.
    """
    num_text = length - len(library.first)
    rows = torch.from_numpy(library.ids.astype("int64")).split(num_text)
    rows = [row for row in rows if len(row) == num_text]
    if not rows:
        raise ValueError(f"The held-out text has {len(library.ids):,} tokens, fewer than the length of {length:,}.")
    first = torch.tensor(library.first, dtype=torch.int64)
    return torch.stack([torch.cat([first, row]) for row in spread(rows, min(1, count / len(rows)))])


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: Tensor, prefill_budget: int | None = None) -> float:
    """exp of the mean loss per token of [count, N] token ids, each row read in one forward, dense by default."""
    total, count = 0.0, 0
    for row in rows.to(model.device):
        cache = {} if prefill_budget is None else {CACHE_NAME: new_cache(prefill_budget)}
        logits = model(row[None], use_cache=bool(cache), **cache).logits[0, :-1]
        for part, targets in zip(logits.split(4096), row[1:].split(4096), strict=True):
            total += cross_entropy(part.float(), targets, reduction="sum").item()
        count += len(row) - 1
    return math.exp(total / count)


@torch.no_grad()
def attention_mass(model: PreTrainedModel, ids: Tensor, cache: QuestCache) -> dict[int, float]:
    """For each layer with sparse segments, the share of dense attention mass that they keep while reading `ids` [1, N].

    Mean over their queries and heads: of the softmax over all keys, what falls on the attended blocks and the segment.
    """
    shares: dict[int, list[float]] = {}

    def watch(read: Read | SegmentsRead) -> None:
        if not isinstance(read, SegmentsRead):
            return
        segment_size, block_size, keys = cache.prefill.segment_size, cache.prefill.block_size, read.keys
        query = read.query.unflatten(1, (-1, segment_size)).transpose(0, 1)
        logits = Logits(query.shape[-1] ** -0.5)
        chosen = gather(keys, read.block_ids, block_size)
        for segment in range(query.shape[0]):
            start = read.position + segment * segment_size
            own, before = keys[None, :, start : start + segment_size], keys[None, :, :start]
            logsumexp = {}
            for name, part in (("own", own), ("before", before), ("chosen", chosen[segment, None])):
                one = query[segment, None]
                logsumexp[name] = attention(one, part, part, name == "own", logits)[1]
            kept, whole = (torch.logaddexp(logsumexp["own"], logsumexp[name]) for name in ("chosen", "before"))
            shares.setdefault(read.layer.layer_idx, []).append((kept - whole).exp().mean().item())

    model.set_attn_implementation("quest")
    cache.watcher = watch
    model(ids, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
    return {layer_idx: sum(values) / len(values) for layer_idx, values in shares.items()}


def evaluate_prefill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    jobs: Sequence[str] = tuple(JOBS),
    lengths: Sequence[int] = (16_384,),
    prefill_budgets: Sequence[int] = (1024,),
    num_documents: int = 100,
    seed: int = 1,
    batch_size: int = 8,
    output: Path | str | None = None,
) -> dict[str, Any]:
    """Reads documents dense and by CritiPrefill, and decodes with everything, so that only the prompt's half differs.

    Args:
        model, tokenizer: as in `recall.evaluate_recall`, the model with `attn_implementation="quest"`.
        jobs, lengths, num_documents, seed, batch_size, output: as there. The held-out perplexity is of at most as many
            windows.
        prefill_budgets: tokens that a segment reads before itself.

    Returns:
        The report. Its records are the scores of a batch for each prefill (None for dense), and for each length and
        prefill the held-out perplexity, and with CritiPrefill each score's attention mass by layer.

    Raises:
        ValueError: for what cannot be evaluated, before anything is.
    """
    for budget in prefill_budgets:
        new_cache(budget)  # raises for a wrong one
    for job in jobs:
        if job not in JOBS:
            raise ValueError(f"There is no job {job!r}. The jobs are {', '.join(JOBS)}.")
    configuration = {
        "evaluation": "prefill",
        "jobs": list(jobs),
        "lengths": list(lengths),
        "prefill_budgets": list(prefill_budgets),
        "num_documents": num_documents,
        "seed": seed,
        "batch_size": batch_size,
    }
    for length in lengths:
        check_length(model, length, [])
    results = Results(model, configuration, output)
    library = Library(tokenizer, heldout_text())
    rows = {length: windows(library, length, num_documents) for length in lengths}
    kinds = [None, *prefill_budgets]
    units: dict[str, tuple] = {}
    for length in lengths:
        units |= {f"perplexity, {length:,} tokens, prefill {kind or 'dense'}": (length, kind) for kind in kinds}
        for job in jobs:
            papers = list(documents(library, job, length, num_documents, seed))
            for first in range(0, len(papers), batch_size):
                batch = papers[first : first + batch_size]
                units[f"{job}, {length:,} tokens, from document {first + 1}"] = (length, job, batch)

    def evaluate(unit: str) -> Iterator[dict[str, Any]]:
        length, what, *batch = units[unit]
        if batch:
            for kind in kinds:
                scores = answer_scores(model, tokenizer, what, *batch, kind)
                yield {"job": what, "length": length, "prefill_budget": kind, "scores": scores}
            return
        record = {"job": "perplexity", "length": length, "prefill_budget": what}
        record["perplexity"] = perplexity(model, rows[length], what)
        if what is not None:
            record["attention_mass"] = {
                name: attention_mass(model, rows[length][:1].to(model.device), new_cache(what, score=name, **settings))
                for name, settings in (("mass", {}), ("published", PUBLISHED))
            }
        yield record

    results.run(units, evaluate)
    return results.report


def answer_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    job: str,
    batch: list[Document],
    prefill_budget: int | None,
) -> list[float]:
    """The score of each document's answer after a prefill of its context."""
    ids = torch.tensor([document.ids for document in batch], device=model.device)
    question_len, answer_len = (
        max(len(tokenizer.encode(getattr(document, part), add_special_tokens=False)) for document in batch)
        for part in ("question", "answer")
    )
    model.set_attn_implementation("quest")
    cache = new_cache(prefill_budget, EVERYTHING, compile=False)
    model.base_model(ids[:, :-question_len], **{CACHE_NAME: cache}, use_cache=True)
    output = answer(model, cache, ids, None, answer_len + 8)
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [score(job, text, document) for text, document in zip(texts, batch, strict=True)]


def prefill_table(report: dict[str, Any]) -> Table:
    """One row for each length and prefill: the share of right answers of every job, perplexity, and attention mass."""
    jobs = report["configuration"]["jobs"]
    table = Table("tokens", "prefill", *jobs, "perplexity", *(f"attention mass, {name}" for name in SCORES))
    rows: dict[tuple, dict[str, Any]] = {}
    for record in report["records"]:
        row = rows.setdefault((record["length"], record["prefill_budget"]), {})
        if "scores" in record:
            row.setdefault(record["job"], []).extend(record["scores"])
        else:
            row |= record
    for (length, budget), row in rows.items():
        shares = [f"{mean(row[job]):.1%}" if job in row else "-" for job in jobs]
        masses = [
            " ".join(f"{mass:.3f}" for mass in row["attention_mass"][name].values()) if "attention_mass" in row else "-"
            for name in SCORES
        ]
        loss = f"{row['perplexity']:.3f}" if "perplexity" in row else "-"
        table.add_row(f"{length:,}", "dense" if budget is None else f"{budget:,}", *shares, loss, *masses)
    return table
