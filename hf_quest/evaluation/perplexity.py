"""Perplexity over input length (Quest, section 4.2.1 and figure 6): what a budget costs a language model's guess."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from .documents import first_tokens
from .methods import DENSE, EVERYTHING, METHODS, Way, check_length, make_ways, new_cache, read, step
from .plots import add_legend, draw_methods, figure
from .report import Results, comparison, mean, merged, spread


def hub_text(name: str, split: str = "test") -> str:
    """The first document of a data set on the hub, or in a folder, that has a column `text`: of PG-19 the first book.

    Raises:
        ValueError: in one line, where that cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError('Data sets of the hub need datasets: pip install "hf-quest[eval]"') from None
    try:
        first = next(iter(datasets.load_dataset(name, split=split, streaming=True)))
        return first["text"]
    except KeyError:
        raise ValueError(f"The data set {name} has no column 'text'.") from None
    except Exception as error:  # whatever the hub, the file formats or the network raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"The data set {name} cannot be read: {reason}") from None


def windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int, count: int) -> np.ndarray:
    """[count, length] token ids that end at equal steps through the text, each after what the tokenizer begins with.

    There are fewer, but never none, where the text holds fewer that do not overlap.

    Raises:
        ValueError: if the text is shorter than `length`.
    """
    ids = np.array(tokenizer.encode(text, add_special_tokens=False))
    first = first_tokens(tokenizer)
    num_text = length - len(first)
    if len(ids) < num_text:
        raise ValueError(f"The text has {len(ids) + len(first):,} tokens, fewer than the length of {length:,}.")
    ends = np.linspace(num_text, len(ids), min(count, len(ids) // num_text)).astype(int)
    return np.stack([np.concatenate([first, ids[end - num_text : end]]).astype(int) for end in ends])


def losses(model: PreTrainedModel, cache: Cache, ids: Tensor, num_scored: int) -> Tensor:
    """Feeds what of the [B, N] tokens the cache does not hold one by one.

    Returns:
        [B, num_scored] negative log-likelihoods in nats, of the last tokens. The cache must have held none of them, nor
        the token before.
    """
    by_token = torch.empty(ids.shape[0], num_scored, device=ids.device)
    first_scored = ids.shape[1] - num_scored
    for position in range(cache.get_seq_length(), ids.shape[1] - 1):
        logits = step(model, cache, ids[:, position : position + 1])
        if position + 1 >= first_scored:
            by_token[:, position + 1 - first_scored] = cross_entropy(logits, ids[:, position + 1], reduction="none")
    return by_token


def evaluate_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    source: str = "text",
    lengths: Sequence[int] = (1024, 2048, 4096, 8192, 16_384),
    methods: Sequence[str] = METHODS,
    budgets: Sequence[int] = (),
    share: float | None = None,
    num_scored: int | None = 128,
    num_rows: int = 16,
    fraction: float = 1.0,
    batch_size: int = 8,
    output: Path | str | None = None,
) -> dict[str, Any]:
    """Perplexity of the last `num_scored` tokens before the same places of the text, after inputs of each length.

    All before them is prefilled dense. With `num_scored=None` nothing is prefilled: from the first token on all are fed
    one by one, as in the paper, and the perplexity at a length is that of the tokens up to it.

    Args:
        model, tokenizer: as `methods.load` brings them.
        text: what to predict.
        source: its name, for the report.
        lengths: tokens, what is scored included.
        methods, budgets: what to compare; budgets are tokens.
        share: budgets as a share of each length, instead of `budgets`. Token by token, of the longest.
        num_rows: windows of the text, at equal steps through it.
        fraction: the share of them to run.
        batch_size: windows at a time.
        output: a JSON file, with which an interrupted run goes on.

    Returns:
        The report: configuration, environment and records, each with the losses of a batch, one mean for each window.

    Raises:
        ValueError: for what cannot be evaluated, before anything is.
    """
    lengths = sorted(set(lengths))
    if (share is None) == (not budgets) and set(methods) != {DENSE}:
        raise ValueError("Give budgets in tokens or a share of each length, one of them.")
    if num_scored is not None and not 1 <= num_scored < lengths[0]:
        raise ValueError(
            f"Of {lengths[0]:,} tokens {num_scored:,} cannot be scored: give at least 1 and fewer than all."
        )
    by_length = {}
    for length in lengths if num_scored is not None else lengths[-1:]:
        by_length[length] = make_ways(methods, budgets if share is None else [int(length * share)])
        check_length(model, length, by_length[length], length - 1 - (num_scored or 0))
    configuration = {
        "evaluation": "perplexity",
        "source": source,
        "lengths": list(lengths),
        "methods": list(methods),
        "budgets": list(budgets),
        "share": share,
        "num_scored": num_scored,
        "num_rows": num_rows,
        "fraction": fraction,
        "batch_size": batch_size,
    }
    results = Results(model, configuration, output)
    # The rows of the longest, so that every length is scored on the same tokens.
    rows = np.array(spread(windows(tokenizer, text, lengths[-1], num_rows), fraction))
    num_first = len(first_tokens(tokenizer))
    units = {}
    for length in by_length:
        for first in range(0, len(rows), batch_size):
            units[f"{length:,} tokens, from window {first + 1}"] = (length, rows[first : first + batch_size])

    def evaluate(unit: str) -> Iterator[dict[str, Any]]:
        length, batch = units[unit]
        shortened = np.concatenate([batch[:, :num_first], batch[:, batch.shape[1] - length + num_first :]], axis=1)
        ids = torch.from_numpy(shortened).to(model.device)
        if num_scored is None:
            for way in by_length[length]:
                by_token = losses(model, new_cache(model, way.method, way.budget or EVERYTHING), ids, length - 1)
                for end in lengths:
                    yield record(way, end, by_token[:, : end - 1])
        else:
            for way, cache in read(model, by_length[length], ids[:, : -num_scored - 1], None):
                yield record(way, length, losses(model, cache, ids, num_scored))

    results.run(units, evaluate)
    return results.report


def record(way: Way, length: int, by_token: Tensor) -> dict[str, Any]:
    return {"length": length, **way._asdict(), "losses": by_token.mean(dim=1).tolist()}


def perplexities(report: dict[str, Any]) -> dict[tuple[int, Way], float]:
    """exp of the mean loss, by length and way. All windows score equally many tokens."""
    together = merged(report["records"], ("length",), "losses")
    return {(length, way): math.exp(mean(values)) for ((length,), way), values in together.items()}


def perplexity_table(report: dict[str, Any]) -> Table:
    """Perplexity, and in brackets by how much it is above dense attention's."""
    found = perplexities(report)
    dense = {length: value for (length, way), value in found.items() if way.method == DENSE}

    def cells() -> Iterator[tuple[tuple[str, ...], Way, str]]:
        for (length, way), value in found.items():
            change = f" ({value / dense[length] - 1:+.2%})" if way.method != DENSE and length in dense else ""
            yield (f"{length:,}",), way, f"{value:.3f}{change}"

    return comparison(("tokens",), cells())


def draw_over_length(report: dict[str, Any]) -> Any:
    """Perplexity over length, one panel for each budget in tokens or one for a share of the length.

    Raises:
        ValueError: where no method has a budget.
    """
    found = perplexities(report)
    is_share = report["configuration"]["share"] is not None
    budgets = [None] if is_share else sorted({way.budget for _, way in found if way.budget})
    if not budgets:
        raise ValueError("Nothing is drawn, since no method here has a budget.")
    drawing = figure(figsize=(4 * len(budgets) + 1.4, 3.2))
    for budget, axes in zip(budgets, drawing.subplots(1, len(budgets), squeeze=False)[0], strict=True):
        points: dict[str, list[tuple[float, float]]] = {}
        for (length, way), value in found.items():
            if is_share or way.budget in (None, budget):
                points.setdefault(way.method, []).append((length, value))
        draw_methods(axes, points)
        lengths = sorted({length for length, _ in found})
        axes.set(xscale="log", xlabel="tokens of input", ylabel="perplexity")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        share = report["configuration"]["share"]
        axes.set_title(f"budget: {share:.3g} of the input" if is_share else f"budget: {budget:,} tokens")
    add_legend(drawing, axes)
    return drawing
