"""Which pages the decode steps of a QuestCache read, and how much attention they paid to each."""

from collections import defaultdict
from dataclasses import dataclass

import torch

from . import reference


@dataclass
class Selection:
    """The pages that one layer selected for its newest T queries."""

    length: int  # slots filled, the queries' own included
    query: torch.Tensor  # [B, Hq, T, D]
    page_ids: torch.Tensor  # [B, Hkv, T, K] int64, ascending, -1 for none
    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None
    weights: torch.Tensor | None = None  # [B, Hkv, T, K] float32, see PageReads.weigh


class PageReads:
    """Keeps every page selection of a QuestCache from the moment that it is the cache's recorder.

    ```python
    cache = QuestCache(budget=256)
    cache.recorder = reads = PageReads()
    model.generate(**inputs, cache=cache)
    reads.share(num_pages=100)  # for each page, the share of reads that it was part of
    reads.weigh(cache)
    reads.attention(num_pages=100)  # for each page, the attention that was paid to it
    ```

    `selections` maps a layer's index to its Selections, in order. A read is one query of one KV head of one layer.
    Layers that read everything, as all do while the context is within the budget, select nothing and have none.
    """

    def __init__(self):
        self.selections = defaultdict(list)

    def __call__(self, layer, query, page_ids, scaling, softcap, sinks):
        self.selections[layer.layer_idx].append(Selection(layer.length, query, page_ids, scaling, softcap, sinks))

    @property
    def layers(self):
        """Indices of the layers that selected pages, ascending."""
        return sorted(self.selections)

    def share(self, num_pages, layer_idx=None, slots=None, row=0):
        """The share of reads, from 0 to 1, that each of the first `num_pages` pages was part of.

        Args:
            layer_idx: count one layer; by default all that selected.
            slots: count the queries in this range of slots of the cache; by default all. The query in slot s chooses
                the token of slot s + 1.
            row: of the batch.

        Returns:
            [num_pages] float32 on the CPU.
        """
        return self._average(num_pages, layer_idx, slots, row, lambda selection: torch.ones(selection.page_ids.shape))

    def attention(self, num_pages, layer_idx=None, slots=None, row=0):
        """The attention, averaged over reads, that each page got; arguments and result as of `share`.

        Their sum is 1 less what the pages after the first `num_pages` and attention sinks got.
        """
        return self._average(num_pages, layer_idx, slots, row, lambda selection: selection.weights)

    def weigh(self, cache):
        """Compute the attention that each selected page got, averaged over the query heads that share it.

        It is not done while a step runs, so that recording costs the step nothing, but it needs the keys: call it while
        `cache` holds every token that was read, in the same rows.
        """
        for layer_idx, selections in self.selections.items():
            layer = cache.layers[layer_idx]
            for selection in selections:
                if selection.weights is None:
                    selection.weights = page_weights(layer, selection)

    def _average(self, num_pages, layer_idx, slots, row, weights_of):
        total, num_reads = torch.zeros(num_pages), 0
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


def page_weights(layer, selection):
    """The attention mass of every selected page, [B, Hkv, T, K] float32 on the CPU, 0 where there is none.

    It is `reference.attend` over the selected pages alone, with values that say which page a token is of.
    """
    weights = torch.zeros(selection.page_ids.shape)
    batch_size, num_kv_heads, num_queries, _ = weights.shape
    page_size = layer.settings.page_size
    for row in range(batch_size):
        for query_idx in range(num_queries):
            page_ids = selection.page_ids[row, :, query_idx]
            page_ids = page_ids[:, page_ids[0] >= 0]  # every head has equally many
            num_pages = page_ids.shape[1]
            padding = layer.left_padding[row] if layer.left_padding else 0
            slot = page_ids[..., None] * page_size + torch.arange(page_size, device=page_ids.device) + padding
            slot = slot.clamp(max=layer.capacity - 1).flatten(1)  # [Hkv, K * S]
            keys = layer.keys[row].gather(1, slot[..., None].expand(-1, -1, layer.keys.shape[-1]))
            page_of_slot = torch.eye(num_pages, device=keys.device).repeat_interleave(page_size, dim=0)
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
                selection.scaling,
                selection.softcap,
                selection.sinks,
            )
            mass = mass.view(num_kv_heads, -1, num_pages).mean(dim=1)
            weights[row, :, query_idx, :num_pages] = mass.cpu()
    return weights
