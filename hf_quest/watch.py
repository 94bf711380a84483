"""The one way to watch what a cache reads: `cache.watcher`, which is told by a Read or SegmentsRead.

`PageReads` is a watcher: which pages decode steps read, and how much attention they paid to each.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from . import reference
from .reference import Choice, Logits

OF_RESULTS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # what is told of reads
WEIGHED = 2**14  # tokens whose keys are in float32 at a time


@dataclass
class Read:
    """What one layer attends for its newest T tokens, each a decode step."""

    layer: Any  # a seam.layer.Layer
    query: torch.Tensor  # [B, Hq, T, D]
    choice: Choice | None  # ids [B, Hkv, T, K] of pages or tokens; None: everything that the layer holds
    logits: Logits
    length: int  # slots filled, the newest of these tokens included

    def keys(self) -> torch.Tensor:
        """[B, Hkv, N, D]: the keys that the layer holds, all of the text or of what a window reaches."""
        return self.layer.storage.newest_keys()

    def all_logits(self) -> torch.Tensor:
        """[B, Hq, N] float32: the newest query's scaled q·k with every key that the layer holds: a row, no matrix."""
        keys = self.keys().float()
        grouped = self.query[:, :, -1].float().unflatten(1, (keys.shape[1], -1))  # [B, Hkv, G, D]
        return (grouped @ keys.transpose(-1, -2)).flatten(1, 2) * self.logits.scaling

    def dense_weights(self, query_idx: int = -1) -> torch.Tensor:
        """[B, Hq, N] float32: what one of the queries would give each key that the layer holds in dense attention.

        It is 0 in left padding and for later tokens. With sinks, which get the rest, a row's sum is below 1.
        """
        keys, (scaling, softcap, sinks) = self.keys(), self.logits
        query = self.query[:, :, query_idx].float().unflatten(1, (keys.shape[1], -1))  # [B, Hkv, G, D]
        parts = keys.split(WEIGHED, dim=2)  # not all keys in float32 at once
        logits = torch.cat([query @ part.float().transpose(-1, -2) for part in parts], dim=-1) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        slot = torch.arange(keys.shape[2], device=keys.device)
        newest = self.length - self.query.shape[2] + query_idx % self.query.shape[2]
        is_visible = (slot >= self.layer.storage.padding[:, None]) & (slot <= newest)
        logits = logits.masked_fill(~is_visible[:, None, None], -torch.inf).flatten(1, 2)
        if sinks is not None:
            sink = sinks.float().view(1, -1, 1).expand(*logits.shape[:2], 1)
            logits = torch.cat([logits, sink], dim=-1)
        return logits.softmax(dim=-1)[..., : keys.shape[2]]

    def num_bytes(self) -> float:
        """Bytes that the step has read of this layer in all rows: keys, values, and what it was chosen by.

        Called while the step is told of, of one new token per row.
        """
        storage = self.layer.storage
        if self.layer.evicts:
            return sum(tensor.nbytes for tensor in storage.read_by_step())
        of_token = storage.keys[0, 0, 0].nbytes + storage.values[0, 0, 0].nbytes
        num_bytes = float(self.tokens().sum()) * of_token
        if self.choice is not None:
            num_heads = storage.keys.shape[0] * storage.keys.shape[1]
            num_bytes += num_heads * self.layer.method.read_to_choose(storage, self.length)
        return num_bytes

    def tokens(self, query_idx: int = -1) -> torch.Tensor:
        """[B, Hkv, N] bool: which of these, or with a method that evicts of all seen, a query attends, by default the
        newest; padding included where all are.
        """
        storage = self.layer.storage
        num_tokens = self.layer.length if self.layer.evicts else self.keys().shape[2]
        shape = (*storage.keys.shape[:2], num_tokens)
        if self.layer.evicts:
            tokens = torch.zeros(shape, dtype=torch.bool, device=self.query.device)
            return tokens.scatter(2, storage.positions, True)
        if self.choice is None:
            return torch.ones(shape, dtype=torch.bool, device=self.query.device)
        ids, size = self.choice.ids[:, :, query_idx, :, None], self.choice.size
        slot = ids * size + torch.arange(size, device=ids.device) + storage.padding[:, None, None, None]
        slot = slot.masked_fill(ids < 0, shape[2]).clamp(max=shape[2]).flatten(2)  # the last one is cut off
        tokens = torch.zeros(*shape[:2], shape[2] + 1, dtype=torch.bool, device=ids.device)
        return tokens.scatter(2, slot, True)[:, :, :-1]


@dataclass
class SegmentsRead:
    """What the segments of a slab of one row's prompt attend in a layer, besides themselves."""

    layer: Any  # a seam.layer.Layer
    row: int
    position: int  # of the slab's first token in its row
    query: torch.Tensor  # [Hq, R · L, D] of R segments
    keys: torch.Tensor  # [Hkv, N, D] of the row
    block_ids: torch.Tensor  # [Hkv, R, K]


Watcher = Callable[[Read | SegmentsRead], None]


@dataclass
class Selection:
    """The pages that one layer selected for its newest T queries."""

    length: int  # slots filled, the queries' own included
    query: torch.Tensor  # [B, Hq, T, D]
    page_ids: torch.Tensor  # [B, Hkv, T, K] int64, ascending, -1 for none
    logits: Logits
    choice: Choice  # which may be of single tokens in these pages
    weights: torch.Tensor | None = None  # [B, Hkv, T, K] float32, see PageReads.weigh


class PageReads:
    """Keeps every page selection of a QuestCache from the moment that it is the cache's watcher.

    ```python
    cache = QuestCache(budget=256)
    cache.watcher = reads = PageReads()
    model.generate(**inputs, cache=cache)
    reads.share(num_pages=100)  # for each page, the share of reads that it was part of
    reads.weigh(cache)
    reads.attention(num_pages=100)  # for each page, the attention that was paid to it
    ```

    `selections` maps a layer's index to its Selections, in order. A read is one query of one KV head of one layer.
    Layers that read everything, as all do while the context is within the budget, select nothing and have none.
    """

    def __init__(self) -> None:
        self.selections: dict[int, list[Selection]] = defaultdict(list)

    def __call__(self, read: Read | SegmentsRead) -> None:
        if isinstance(read, Read) and read.choice is not None:
            pages = pages_of(read.choice, read.layer.method.page_size)
            selection = Selection(read.length, read.query, pages, read.logits, read.choice)
            self.selections[read.layer.layer_idx].append(selection)

    @property
    def layers(self) -> list[int]:
        """Indices of the layers that selected pages, ascending."""
        return sorted(self.selections)

    def share(
        self, num_pages: int, layer_idx: int | None = None, slots: range | None = None, row: int = 0
    ) -> torch.Tensor:
        """The share of reads, from 0 to 1, that each of the first `num_pages` pages was part of.

        Args:
            layer_idx: count one layer; by default all that selected.
            slots: count the queries in this range of slots of the cache; by default all. The query in slot s chooses
                the token of slot s + 1.
            row: of the batch.

        Returns:
            [num_pages] float32 on the CPU.
        """
        return self._average(num_pages, layer_idx, slots, row, count_of)

    def attention(
        self, num_pages: int, layer_idx: int | None = None, slots: range | None = None, row: int = 0
    ) -> torch.Tensor:
        """The attention, averaged over reads, that each page got; arguments and result as of `share`.

        Their sum is 1 less what the pages after the first `num_pages` and attention sinks got.
        """
        return self._average(num_pages, layer_idx, slots, row, lambda selection: selection.weights)

    def weigh(self, cache: Cache) -> None:
        """Compute the attention that each selected page got, averaged over the query heads that share it.

        It is not done while a step runs, so that recording costs the step nothing, but it needs the keys: call it while
        `cache` holds every token that was read, in the same rows.
        """
        for layer_idx, selections in self.selections.items():
            layer: Any = cache.layers[layer_idx]
            for selection in selections:
                if selection.weights is None:
                    by_page = selection.choice.size == layer.method.page_size
                    selection.weights = (page_weights if by_page else token_weights)(layer, selection)

    def _average(self, num_pages, layer_idx, slots, row, weights_of):
        total, num_reads = torch.zeros(num_pages, **OF_RESULTS), 0
        for layer in self.layers if layer_idx is None else [layer_idx]:
            chosen, weights = [], []
            for selection in self.selections.get(layer, []):
                first = selection.length - selection.page_ids.shape[2]
                here = slice(None)
                if slots is not None:
                    here = slice(max(slots.start - first, 0), max(slots.stop - first, 0))
                page_ids = selection.page_ids[row, :, here]  # [Hkv, queries, K]
                num_reads += page_ids.shape[0] * page_ids.shape[1]
                chosen.append(page_ids.flatten())
                weights.append(weights_of(selection)[row, :, here].flatten())
            if chosen:
                page_ids, weight = torch.cat(chosen).cpu(), torch.cat(weights).cpu()
                is_counted = (page_ids >= 0) & (page_ids < num_pages)
                total.index_add_(0, page_ids[is_counted], weight[is_counted])
        return total / max(num_reads, 1)


def count_of(selection):
    """[B, Hkv, T, K]: every page that was selected counts once."""
    return torch.ones(selection.page_ids.shape, **OF_RESULTS)


def pages_of(choice, page_size):
    """[B, Hkv, T, K] int64: the pages in which the chosen tokens are, each once, ascending, -1 for none."""
    if choice.size == page_size:
        return choice.ids
    pages = choice.ids.div(page_size, rounding_mode="floor")
    is_again = torch.nn.functional.pad(pages[..., 1:] == pages[..., :-1], (1, 0))
    return reference.in_order(pages.masked_fill(is_again | (choice.ids < 0), -1))


def token_weights(layer, selection):
    """`page_weights` where single tokens were read: the attention of these, by their page."""
    scaling, softcap, sinks = selection.logits
    ids, page_size = selection.choice.ids, layer.method.page_size
    slot = ids.clamp(min=0) + layer.padding[:, None, None, None]
    keys = layer.keys[:, :, None].expand(-1, -1, ids.shape[2], -1, -1)
    keys = keys.gather(3, slot[..., None].expand(*slot.shape, keys.shape[-1])).float()  # [B, Hkv, T, K, D]
    query = selection.query.float().unflatten(1, (ids.shape[1], -1)).transpose(2, 3)  # [B, Hkv, T, G, D]
    products = query @ keys.transpose(-1, -2) * scaling
    if softcap is not None:
        products = softcap * torch.tanh(products / softcap)
    products = products.masked_fill((ids < 0)[:, :, :, None], -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(1, ids.shape[1], 1, -1, 1).expand(*products.shape[:-1], 1)
        products = torch.cat([products, sink], dim=-1)
    weights = products.softmax(dim=-1)[..., : ids.shape[-1]].mean(dim=3)
    pages = selection.page_ids.masked_fill(selection.page_ids < 0, reference.INT64.max)
    place = torch.searchsorted(pages, ids.clamp(min=0).div(page_size, rounding_mode="floor").contiguous())
    return torch.zeros_like(weights).scatter_add(-1, place.clamp(max=ids.shape[-1] - 1), weights).cpu()


def page_weights(layer, selection):
    """The attention mass of every selected page, [B, Hkv, T, K] float32 on the CPU, 0 where there is none.

    It is `reference.attend` over the selected pages alone, with values that say which page a token is of.
    """
    weights = torch.zeros(selection.page_ids.shape, **OF_RESULTS)
    batch_size, num_kv_heads, num_queries, _ = weights.shape
    page_size = layer.method.page_size
    for row in range(batch_size):
        for query_idx in range(num_queries):
            page_ids = selection.page_ids[row, :, query_idx]
            page_ids = page_ids[:, page_ids[0] >= 0]  # every head has equally many
            num_pages = page_ids.shape[1]
            padding = layer.left_padding[row] if layer.left_padding else 0
            slot = page_ids[..., None] * page_size + torch.arange(page_size, device=page_ids.device) + padding
            slot = slot.clamp(max=layer.capacity - 1).flatten(1)  # [Hkv, K * S]
            keys = layer.keys[row].gather(1, slot[..., None].expand(-1, -1, layer.keys.shape[-1]))
            page_of_slot = torch.eye(num_pages, dtype=torch.float32, device=keys.device).repeat_interleave(
                page_size, dim=0
            )
            # Only the newest page, which is the last one, may be partly filled.
            num_visible = selection.length - num_queries + query_idx + 1 - padding
            num_tokens = (num_pages - 1) * page_size + (num_visible - 1) % page_size + 1
            mass = reference.attend(
                selection.query[row : row + 1, :, query_idx : query_idx + 1].float(),
                keys[None],
                page_of_slot.expand(1, num_kv_heads, -1, -1),
                None,
                num_tokens,
                torch.zeros(1, dtype=torch.int64, device=keys.device),
                page_size,
                *selection.logits,
            )
            mass = mass.view(num_kv_heads, -1, num_pages).mean(dim=1)
            weights[row, :, query_idx, :num_pages] = mass.cpu()
    return weights
