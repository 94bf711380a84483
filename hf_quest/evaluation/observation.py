"""What each layer attends to in a decode step, seen from beside `quest_attention`."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from ..attention import quest_attention, quest_mask
from ..baselines.layer import EvictingLayer
from ..cache import QuestLayer

OBSERVED = "quest_observed"  # an attn_implementation

Observer = Callable[[QuestLayer | EvictingLayer, Tensor, float], None]


def observed_attention(module, query, key, value, attention_mask, **kwargs):
    """`quest_attention`; before a decode step the layer's observer gets the layer, the query and its scaling."""
    layer = getattr(key, "quest_layer", None)
    observer = getattr(layer, "observer", None)
    if observer is not None and query.shape[2] == 1:
        scaling = kwargs.get("scaling")
        observer(layer, query, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return quest_attention(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(OBSERVED, observed_attention)
AttentionMaskInterface.register(OBSERVED, quest_mask)


def observe(cache: Cache, observers: list[Observer | None]) -> None:
    """Have each layer's decode steps observed, once the model is set to attend by OBSERVED."""
    for layer, observer in zip(cache.layers, observers, strict=True):
        layer.observer = observer


def attended(layer: QuestLayer | EvictingLayer, query: Tensor, scaling: float) -> Tensor:
    """[B, Hkv, N] bool: which of the N tokens seen the layer attends to for a [B, Hq, 1, D] query."""
    if isinstance(layer, EvictingLayer):
        tokens = torch.zeros(*layer.positions.shape[:2], layer.num_seen, dtype=torch.bool, device=query.device)
        return tokens.scatter(2, layer.positions, True)
    tokens = torch.ones(*layer.keys.shape[:2], layer.length, dtype=torch.bool, device=query.device)
    if not layer.selects_pages:
        return tokens
    page_size = layer.settings.page_size
    page_ids = layer.select(query, layer.length, scaling)[:, :, 0]
    num_pages = -(-layer.length // page_size)
    pages = torch.zeros(*tokens.shape[:2], num_pages, dtype=torch.bool, device=query.device).scatter(2, page_ids, True)
    return pages.repeat_interleave(page_size, dim=2)[:, :, : layer.length]


def logits(layer: QuestLayer, query: Tensor, scaling: float) -> Tensor:
    """[B, Hq, N] float32 attention logits of a [B, Hq, 1, D] query over all tokens stored: one row, never a matrix."""
    keys = layer.keys[:, :, : layer.length].float()
    grouped = query.float().unflatten(1, (keys.shape[1], -1))[:, :, :, 0]  # [B, Hkv, G, D]
    return (grouped @ keys.transpose(-1, -2)).flatten(1, 2) * scaling


def share_found(tokens: Tensor, is_attended: Tensor) -> Tensor:
    """[B, Hq]: the share of each head's `tokens`, [B, Hq, count] positions, that are attended, [B, Hkv, N]."""
    num_groups = tokens.shape[1] // is_attended.shape[1]
    return is_attended.repeat_interleave(num_groups, dim=1).gather(2, tokens).float().mean(dim=2)
