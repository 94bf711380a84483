"""Which budget does one's own document need, in one's own model? Dense attention beside Quest, budget by budget.

The document but for its last tokens is prefilled once. Those are fed one by one, with everything attended and then at
every budget, on the same cache: it is cropped in between. What a head would have attended to is computed for one query
at a time, so that the largest thing in memory beside the model is its cache. Then it is read once more, for what the
best pages and the best tokens of each budget would lose, in one forward each: no estimate can do better.
"""

import functools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import CACHE_NAME, QuestCache
from ..watch import Read
from .calibration_report import BEST, recommended
from .choices import CHOICES
from .forced import Forced
from .methods import EVERYTHING, Way, check_length, make_ways, new_cache, step
from .report import Results
from .selection import compare
from .top10 import NUM_TOP, share_found

PREFILL_CHUNK = 512  # tokens


@dataclass
class Run:
    """The decode steps of one budget. `log_probs` [steps, V], of the next token; seconds of each step."""

    log_probs: Tensor
    seconds: list[float]
    read_share: float


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    source: str = "text",
    budgets: Sequence[int] | None = None,
    tolerance: float = 0.01,
    num_scored: int = 64,
    max_tokens: int | None = None,
    output: Path | str | None = None,
) -> dict[str, Any]:
    """Measures on a document, for each budget, what Quest changes about the model's predictions and what it reads.

    A budget is within the tolerance if exp(KL) - 1 is, where KL is the mean Kullback-Leibler divergence of its
    next-token distribution from dense attention's: by so much would perplexity rise on text that the dense model
    writes. Unlike a perplexity measured on a few tokens it is never lucky.

    Args:
        model, tokenizer: as `methods.load` brings them.
        text: the document.
        source: its name, for the report.
        budgets: tokens. By default powers of two up to 4,096 that leave something out.
        tolerance: a share, 0.01 for one percent.
        num_scored: tokens at the end that are fed one by one.
        max_tokens: how much of the document to take, from its beginning. By default all.
        output: a JSON file.

    Returns:
        The report: configuration, environment, the recommended budget (None if there is none), and a record for dense
        attention, and for each budget of Quest, of the best pages and of the best tokens.

    Raises:
        ValueError: for what cannot be calibrated, before anything is.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance is a share above 0, such as 0.01, not {tolerance}.")
    ids = torch.tensor([tokenizer.encode(text)[:max_tokens]], device=model.device)
    num_context = ids.shape[1] - num_scored - 1
    if num_scored < 2 or num_context < 2:
        raise ValueError(f"The document has {ids.shape[1]:,} tokens, too few to score {num_scored} of them.")
    budgets = default_budgets(num_context) if budgets is None else budgets
    ways = make_ways(["dense", "quest"], budgets)
    check_length(model, ids.shape[1], ways, num_context)
    configuration = {
        "evaluation": "calibration",
        "source": source,
        "budgets": list(budgets),
        "tolerance": tolerance,
        "num_scored": num_scored,
        "num_tokens": ids.shape[1],
    }
    results = Results(model, configuration, output)
    calibration = Calibration(model, ids, num_context)
    by_unit = {str(way): way for way in ways}
    # An interrupted calibration is begun again: the runs are compared with the dense one, which is not kept.
    results.records.clear()
    measures = {"prefill": calibration.prefill, "the best pages and tokens": lambda: calibration.best(budgets)}
    for unit, way in by_unit.items():
        measures[unit] = functools.partial(calibration.measure, way)
    results.run(["prefill", *by_unit, "the best pages and tokens"], lambda unit: measures[unit]())
    report = results.report
    report["recommended_budget"] = recommended(report)
    results.write()
    return report


def default_budgets(num_context: int) -> list[int]:
    """Powers of two from 128 to 4,096, smaller ones for a short document.

    Raises:
        ValueError: for a document that the smallest budget covers.
    """
    budgets = [2**power for power in range(5, 13) if 2**power < num_context]
    if not budgets:
        raise ValueError(
            f"The context has {num_context:,} tokens, which the smallest budget covers, so nothing would be left out. "
            "Give a longer document."
        )
    return [budget for budget in budgets if budget >= 128] or budgets


class Calibration:
    """A document in a model's cache, and the runs over its last tokens."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, num_context: int):
        self.model = model
        self.ids = ids
        self.num_context = num_context
        self.cache: QuestCache = new_cache(model, "quest", EVERYTHING)
        self.dense: Run | None = None
        self.tops: list[list[Tensor]] = []  # of dense attention, by step and layer: [1, Hq, 10] positions

    def measure(self, way: Way) -> Iterator[dict[str, Any]]:
        """The record of dense attention or of Quest at a budget."""
        self.cache.budget = way.budget or EVERYTHING
        run = self.run()
        if self.dense is None:
            self.dense = run
        speed = {"read_share": run.read_share, "ms_per_token": 1000 * statistics.median(run.seconds)}
        yield {**way._asdict(), **self.compare(run.log_probs), **speed, "layers": self.observe(way)}

    def best(self, budgets: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The records of the best pages and tokens of each budget; what the others need is let go of first."""
        dense_layers, self.tops = self.cache.dense_layers, []
        del self.cache
        forced = Forced(self.model, self.ids, self.ids.shape[1] - self.num_context - 1, dense_layers)
        for method in BEST:
            for budget in sorted(set(budgets)):
                log_probs, layers = forced.log_probs(CHOICES[method], budget)
                record = {"method": method, "budget": budget, **self.compare(log_probs[0]), "layers": []}
                for layer_idx, layer in layers.items():
                    shares = {"mass": layer.mass[0].tolist(), "top10": layer.top10[0].tolist()}
                    record["layers"].append({"layer": layer_idx, **shares})
                yield record

    def prefill(self) -> Iterator[dict[str, Any]]:
        """Reads the document, of which there is no record."""
        chunks = list(self.ids[:, : self.num_context].split(PREFILL_CHUNK, dim=1))
        if len(chunks) > 1 and chunks[-1].shape[1] == 1:  # alone, it would be a decode step
            chunks[-2:] = [torch.cat(chunks[-2:], dim=1)]
        for chunk in chunks:
            self.model.base_model(chunk, **{CACHE_NAME: self.cache}, use_cache=True)
        return iter(())

    def steps(self) -> Iterator[Tensor]:
        """Feeds the last tokens one by one, and takes them back: the logits [1, V] of each next one."""
        for position in range(self.num_context, self.ids.shape[1] - 1):
            yield step(self.model, self.cache, self.ids[:, position : position + 1])
        self.cache.crop(self.num_context - self.cache.get_seq_length())

    def run(self) -> Run:
        self.model.set_attn_implementation("quest")
        log_probs, seconds, started = [], [], time.perf_counter()
        for row in self.steps():
            if row.is_cuda:
                torch.cuda.synchronize(row.device)
            seconds.append(time.perf_counter() - started)
            log_probs.append(row.log_softmax(dim=-1))
            read_share = self.cache.read_share
            started = time.perf_counter()
        return Run(torch.cat(log_probs), seconds[1:], read_share)

    def compare(self, log_probs: Tensor) -> dict[str, float]:
        """What [steps, V] log-probabilities predict beside dense attention's."""
        targets = self.ids[0, self.num_context + 1 :, None]
        measures = compare(self.dense.log_probs[None], log_probs[None])
        return {
            "kl": measures["kl"][0],
            "top1_agreement": measures["agreement"][0],
            "perplexity": math.exp(-log_probs.gather(1, targets).mean().item()),
        }

    def observe(self, way: Way) -> list[dict[str, Any]]:
        """For each layer that selects pages: the share of attention mass on what each query head attends to, of all
        mass, and of the ten tokens that dense attention weighs most."""
        mass: dict[int, list[Tensor]] = {}
        found: dict[int, list[Tensor]] = {}
        step_idx = 0

        def note(read: Read) -> None:
            row, layer_idx = read.all_logits(), read.layer.layer_idx
            if way.budget is None:
                self.tops[-1].append(row.topk(min(NUM_TOP, row.shape[-1]), dim=-1).indices)
                return
            is_attended = read.tokens()
            weights = row.softmax(dim=-1).unflatten(1, (is_attended.shape[1], -1))
            kept = (weights * is_attended[:, :, None]).sum(dim=-1).flatten(1)[0]
            mass.setdefault(layer_idx, []).append(kept)
            found.setdefault(layer_idx, []).append(share_found(self.tops[step_idx][layer_idx], is_attended)[0])

        self.cache.watcher = note
        if way.budget is None:
            self.tops = [[]]
        for step_idx, _ in enumerate(self.steps(), start=1):  # noqa: B007
            if way.budget is None:
                self.tops.append([])
        self.cache.watcher = None
        return [
            {
                "layer": layer_idx,
                "mass": torch.stack(rows).mean(dim=0).tolist(),
                "top10": torch.stack(found[layer_idx]).mean(dim=0).tolist(),
            }
            for layer_idx, rows in mass.items()
            if layer_idx >= self.cache.dense_layers
        ]
