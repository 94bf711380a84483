"""How many of the tokens that a step chooses are among those chosen lately: what a pool on the GPU saves of the bus."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import MethodCache, PageReads, stripes
from ..kernels.ops import POOL_STEP
from .methods import Way, check_length, read, step
from .perplexity import windows
from .report import Results, mean, merged

TIMES = (1.0, 1.5, 2.0, 3.0, 4.0, 8.0)
WAYS, MOST_USES = 16, 15  # as in csrc/pool.cuh
NUM_BEFORE = 64  # steps that fill a pool, and do not count
NEVER = 2**31  # a step that does not come


class SetPool:
    """The pool of csrc/pool.cuh, for the tokens of H heads: in each stripe sets of 16 slots.

    `tokens`, `time` and `num_uses` [H, sets, 16] int64 tell of each slot which token is there, -1 for none, when it was
    chosen last and how often.
    """

    def __init__(self, num_heads: int, size: int, page_size: int, num_stripes: int):
        self.page_size, self.num_stripes, self.num_sets = page_size, num_stripes, size // WAYS
        self.tokens = torch.full((num_heads, self.num_sets, WAYS), -1)
        self.time, self.num_uses = torch.zeros_like(self.tokens), torch.zeros_like(self.tokens)

    def sets_of(self, tokens: Tensor) -> Tensor:
        page, of_stripe = tokens // self.page_size, self.num_sets // self.num_stripes
        place = page // self.num_stripes * self.page_size + tokens % self.page_size
        return page % self.num_stripes * of_stripe + place % of_stripe

    def look_up(self, tokens: Tensor, now: int) -> Tensor:
        """[H, K] bool: which of [H, K] tokens, -1 for none, are there when `now` are stored. The others come there in
        their order, each in place of the one that was not chosen for longest, but for the newest.
        """
        wanted = (tokens >= 0) & (tokens < now - 1)
        own = self.sets_of(tokens.clamp(min=0))
        head = torch.arange(len(tokens))[:, None].expand_as(tokens)
        is_way = (self.tokens[head, own] == tokens[..., None]) & wanted[..., None]
        found = is_way.any(dim=-1)
        place = head[found], own[found], is_way.int().argmax(dim=-1)[found]
        self.time[place] = now
        self.num_uses[place] = (self.num_uses[place] + 1).clamp(max=MOST_USES)
        missing = (wanted & ~found).nonzero()
        head, own, missed = missing[:, 0], own[wanted & ~found], tokens[wanted & ~found]
        while len(missed):  # the first of each set
            order = (head * self.num_sets + own).sort(stable=True)
            is_first = torch.ones(len(missed), dtype=torch.bool)
            is_first[order.indices[1:]] = order.values[1:] != order.values[:-1]
            place = head[is_first], own[is_first]
            age = (self.time + self.num_uses)[place].masked_fill(self.time[place] == now, torch.iinfo(torch.int64).max)
            oldest, way = age.min(dim=-1)
            is_free = oldest < torch.iinfo(torch.int64).max
            place = place[0][is_free], place[1][is_free], way[is_free]
            self.tokens[place], self.time[place], self.num_uses[place] = missed[is_first][is_free], now, 0
            head, own, missed = (each[~is_first] for each in (head, own, missed))
        return found


def lru_shares(chosen: list[Tensor], sizes: Sequence[int]) -> list[float]:
    """For each size the share of [H, K] tokens, step after step, that are among the last ones chosen, so many of them.

    Of tokens that a step chose together and that are too many, each is there with the same chance.
    """
    last = torch.zeros(len(chosen[0]), int(max(ids.max() for ids in chosen)) + 1, dtype=torch.int64)
    counts = torch.zeros(len(chosen[0]), len(chosen) + 1)  # tokens that were chosen last in each step
    hits, num_tokens = [0.0] * len(sizes), 0
    for time, ids in enumerate(chosen, start=1):
        before = last.gather(1, ids.clamp(min=0))
        newer = counts.flip(1).cumsum(dim=1).flip(1) - counts
        num_newer, num_equal = newer.gather(1, before), counts.gather(1, before)
        is_counted = ids >= 0
        if time > NUM_BEFORE:
            num_tokens += int(is_counted.sum())
            for idx, size in enumerate(sizes):
                chance = ((size - num_newer) / num_equal.clamp(min=1)).clamp(0, 1)
                hits[idx] += float(chance[is_counted & (before > 0)].sum())
        counts.scatter_add_(1, before, -((before > 0) & is_counted).float())
        last = torch.cat([last, last[:, :1]], dim=1).scatter(1, ids.masked_fill(~is_counted, last.shape[1]), time)[
            :, :-1
        ]
        counts[:, time] = is_counted.sum(dim=1)
    return [each / num_tokens for each in hits]


def pool_share(chosen: list[Tensor], size: int, page_size: int, length: int) -> float:
    """The share that the kernels' pool of a size has; `length` tokens are stored in the first step."""
    num_heads, budget = chosen[0].shape
    pool, hits, num_tokens = SetPool(num_heads, size, page_size, stripes.count(budget, page_size)), 0, 0
    for time, ids in enumerate(chosen):
        found = pool.look_up(ids, length + time)
        if time >= NUM_BEFORE:
            hits, num_tokens = hits + int(found.sum()), num_tokens + int((ids >= 0).sum())
    return hits / num_tokens


def optimal_shares(chosen: list[Tensor], sizes: Sequence[int]) -> list[float]:
    """For each size the share that no pool exceeds: it keeps what is chosen again soonest, as if it knew what comes
    (Belady's optimal replacement).
    """
    before, counted = chosen[:NUM_BEFORE], chosen[NUM_BEFORE:]
    no_token = int(max(ids.max() for ids in chosen)) + 1
    following = torch.full((len(chosen[0]), no_token + 1), NEVER)  # the step that chooses a token next
    again = []
    for time, ids in reversed(list(enumerate(counted))):
        again.append(following.gather(1, ids.masked_fill(ids < 0, no_token)))
        following.scatter_(1, ids.masked_fill(ids < 0, no_token), time)
        following[:, no_token] = NEVER
    was_chosen = torch.zeros_like(following, dtype=torch.bool)
    for ids in before:
        was_chosen.scatter_(1, ids.masked_fill(ids < 0, no_token), True)
    hits, num_tokens = [0] * len(sizes), sum(int((ids >= 0).sum()) for ids in counted)
    for idx, size in enumerate(sizes):
        # Of a token in the pool it matters only when it is chosen again.
        held = following.masked_fill(~was_chosen, NEVER)
        for time, coming in enumerate(reversed(again)):
            held = held.topk(min(size, held.shape[1]), largest=False, sorted=False).values
            hits[idx] += int((held == time).sum())
            held = torch.cat([held.masked_fill(held == time, NEVER), coming], dim=1)
    return [each / num_tokens for each in hits]


def share_again(chosen: list[Tensor]) -> float:
    """The share of a step's tokens that the step before has chosen, too."""
    heads = torch.arange(len(chosen[0]))[:, None] << 32
    pairs = pairwise(chosen)
    shares = (
        torch.isin((now + heads)[now >= 0], (before + heads)[before >= 0]).float().mean() for before, now in pairs
    )
    return mean([float(share) for share in shares])


def evaluate_hits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    source: str = "text",
    length: int = 8192,
    budgets: Sequence[int] = (256, 512),
    num_steps: int = 256,
    num_windows: int = 2,
    output: Path | str | None = None,
) -> dict[str, Any]:
    """How many of the tokens that steps choose by codes of 2 bits are in pools of several sizes.

    Args:
        model, tokenizer: as `methods.load` brings them.
        text: what is read and fed. source: its name, for the report.
        length: tokens of a window, the steps included.
        budgets: tokens that a step chooses.
        num_steps: tokens at the end of a window that are fed one by one, of which the first 64 do not count.
        num_windows: at equal steps through the text; fewer where it holds fewer.
        output: a JSON file, with which an interrupted run goes on.

    Returns:
        The report: configuration, environment and records, of each window and budget the shares by TIMES, how many
        times the budget a pool has room for: of an LRU, of the kernels' pool where it can be of that size, and of the
        best there can be.

    Raises:
        ValueError: for what cannot be evaluated, before anything is.
    """
    check_length(model, length, [Way("quest-codes", budget) for budget in budgets], length - num_steps)
    if num_steps <= NUM_BEFORE:
        raise ValueError(f"{NUM_BEFORE} steps fill the pool, and do not count: give more than {num_steps}.")
    configuration = {
        "evaluation": "hits",
        "source": source,
        "length": length,
        "budgets": list(budgets),
        "num_steps": num_steps,
        "num_windows": num_windows,
    }
    results = Results(model, configuration, output)
    rows = torch.from_numpy(windows(tokenizer, text, length, num_windows))
    units = {f"window {row + 1}": rows[row : row + 1].to(model.device) for row in range(len(rows))}
    ways = [Way("quest-codes", budget) for budget in budgets]

    def evaluate(unit: str) -> Iterator[dict[str, Any]]:
        fed = units[unit][:, -num_steps:]
        caches = read(model, ways, units[unit][:, :-num_steps], None)
        for budget, (_, cache) in zip(budgets, caches, strict=True):
            chosen = chosen_tokens(model, cache, fed)
            sizes = [math.ceil(times * budget) for times in TIMES]
            first = length - num_steps + 1
            pools = [pool_share(chosen, size, 16, first) if size % POOL_STEP == 0 else None for size in sizes]
            shares = {"again": [share_again(chosen)], "lru": [lru_shares(chosen, sizes)], "pool": [pools]}
            shares["optimal"] = [optimal_shares(chosen, sizes)]
            yield {"length": length, "method": "quest-codes", "budget": budget, **shares}

    results.run(units, evaluate)
    return results.report


def chosen_tokens(model: PreTrainedModel, cache: MethodCache, ids: Tensor) -> list[Tensor]:
    """For each of [1, N] tokens, fed one by one, the [H, K] tokens that the heads of all layers choose."""
    cache.watcher = reads = PageReads()
    for token in ids.split(1, dim=1):
        step(model, cache, token)
    by_layer = [reads.selections[layer_idx] for layer_idx in reads.layers]
    return [torch.cat([each.choice.ids[0, :, 0].cpu() for each in layers]) for layers in zip(*by_layer, strict=True)]


def hits_table(report: dict[str, Any]) -> Table:
    """One row for each budget: hits of an LRU, of the kernels' pool, and of the best there can be, by size."""
    again, *kinds = (merged(report["records"], ("length",), name) for name in ("again", "lru", "pool", "optimal"))
    table = Table("tokens", "budget", "chosen again", *(f"{times:g} x" for times in TIMES))
    for (place, way), shares in again.items():
        by_times = zip(*(zip(*kind[place, way], strict=True) for kind in kinds), strict=True)
        cells = (" / ".join("-" if None in each else f"{mean(each):.1%}" for each in by_kind) for by_kind in by_times)
        table.add_row(f"{place[0]:,}", f"{way.budget:,}", f"{mean(shares):.1%}", *cells)
    return table
