"""Keys and values that other caches of Transformers hold, for `QuestCache.from_cache`."""

from dataclasses import dataclass

import torch
from transformers import Cache, EncoderDecoderCache

from ..errors import QuestError
from ..storage import Ring


@dataclass
class Tokens:
    """What one layer holds: the newest of its `length` tokens."""

    keys: torch.Tensor  # [B, Hkv, n, D]
    values: torch.Tensor
    length: int
    reach: int | None  # tokens that the layer attends, its own included; None: all


def tokens_of(cache):
    """The Tokens of every layer of a cache, in order.

    Raises:
        TypeError: for what is no cache of Transformers.
        QuestError: for one that does not hold keys and values of all tokens that its layers attend.
    """
    if isinstance(cache, EncoderDecoderCache):
        raise QuestError(
            "from_cache takes the self-attention half of an EncoderDecoderCache: pass cache.self_attention_cache, and "
            "give the model EncoderDecoderCache(quest_cache, cache.cross_attention_cache)."
        )
    if not isinstance(cache, Cache):
        raise TypeError(f"from_cache takes a cache of Transformers, not a {type(cache).__name__}.")
    layers = list(cache.layers)
    while layers and not hasattr(layers[-1], "get_seq_length"):  # of the last layers, which share others' keys
        layers.pop()
    tokens = [tokens_of_layer(idx, layer) for idx, layer in enumerate(layers)]
    lengths = sorted({layer.length for layer in tokens})
    if len(lengths) > 1:
        raise QuestError(
            f"The layers of this {type(cache).__name__} hold {lengths} tokens: it is not that of one text, or its last "
            "forward did not end."
        )
    return tokens


def tokens_of_layer(idx, layer):
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
        raise QuestError(
            f"Layer {idx} of this cache is a {type(layer).__name__} without keys and values, which a QuestCache cannot "
            "take over. Let the model read the prompt with the QuestCache itself."
        )
    length = int(layer.get_seq_length())
    if hasattr(layer, "_quantized_keys"):
        keys, values = (
            torch.cat([layer._dequantize(old), new.to(old.dtype) if old.is_floating_point() else new], dim=2)
            for old, new in ((layer._quantized_keys, keys), (layer._quantized_values, values))
        )
    storage = getattr(layer, "storage", None)
    reach = getattr(storage, "reach", None) or getattr(layer, "sliding_window", None)
    if getattr(layer, "is_sliding", False) and reach is None and not getattr(layer, "_is_croppable", False):
        reach = layer.max_cache_len  # of a static one, which is its window
    if isinstance(storage, Ring):  # one of ours, whose slots go round
        keys, values = storage.kept(length - storage.first)
    num_kept = min(length, keys.shape[2])
    if num_kept < (length if reach is None else min(length, reach - 1)):
        raise QuestError(
            f"Layer {idx} of this cache has kept {num_kept} of {length} tokens: it evicts, and a QuestCache cannot "
            "bring back what is gone."
        )
    # Static storage is filled from the start until it is full, and ends with the newest from then on.
    kept = slice(0, length) if keys.shape[2] >= length else slice(keys.shape[2] - num_kept, None)
    return Tokens(keys[:, :, kept], values[:, :, kept], length, reach)
