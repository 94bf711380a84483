"""The registered attention function: which way a forward goes, dense or through the pages of a QuestCache."""

import sys

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .errors import QuestError, say_once
from .layers import Layer, QuestLayer
from .masks import quest_mask

# What a model may ask of its attention that only its own eager attention does everywhere.
EAGER_ONLY = ("softcap", "s_aux", "sinks")
# What a model may ask of its attention that selecting pages does not do.
NOT_SPARSE = ("position_bias", "indices", "block_indices")


def quest_attention(module, query, key, value, attention_mask, **kwargs):
    """The attention function behind `attn_implementation="quest"`.

    Args:
        query: [B, Hq, T, D].
        key, value: [B, Hkv, N, D], with a QuestCache what its layer returned.
        attention_mask: bool or float, broadcastable to [B, Hq, T, N], or None for causal attention.

    Returns:
        ([B, T, Hq, D], None). Dense without a QuestCache, for a mask that is more than causal with left padding, where
        the layer holds no more tokens than its budget, and for a prompt, unless the cache has a CritiPrefill.
    """
    layer = getattr(key, "quest_layer", None)
    if layer is None or getattr(value, "quest_layer", None) is not layer:
        say_once('attn_implementation="quest" runs dense attention: the forward was given no QuestCache.')
        return dense_attention(module, query, key, value, attention_mask, **kwargs)
    if not isinstance(layer, Layer):  # one of the baselines
        return layer.attention(module, query, key, value, attention_mask, **kwargs)
    check_is_causal(module, layer)
    query = layer.autocast(query)
    if layer.settings.is_captured and not layer.pending:
        return captured_attention(layer, module, query, attention_mask, **kwargs)
    if layer.pending:
        # Further calls of this forward come from layers that share these keys and values, and may slice the mask.
        layer.pending = False
        is_plain = layer.settings.masks.is_plain(attention_mask)
        layer.is_plainly_masked = is_plain and (attention_mask is None or layer.num_new > 1)
    if not isinstance(layer, QuestLayer):
        say_if_dense(layer)
        return masked_attention(layer, module, query, key, value, attention_mask, **kwargs)
    num_decoding = layer.num_decoding(query.shape[2])
    if not is_by_pages(layer, query, num_decoding, kwargs):
        return masked_attention(layer, module, query, key, value, attention_mask, num_decoding, **kwargs)
    num_prompt = query.shape[2] - num_decoding
    output = attend(layer, query[:, :, num_prompt:], **kwargs)
    if num_prompt:
        # Assisted decoding feeds the prompt and the first drafts in one forward.
        num_tokens = key.shape[2] - num_decoding
        prompt_mask = None if attention_mask is None else attention_mask[:, :, :num_prompt, :num_tokens]
        prompt = (query[:, :, :num_prompt], key[:, :, :num_tokens], value[:, :, :num_tokens], prompt_mask)
        output = torch.cat([prompt_attention(layer, module, *prompt, 0, **kwargs)[0], output], dim=1)
    return output, None


def check_is_causal(module, layer):
    """Raise for attention over other tokens than the text's own so far, for which the cache was asked for a mask."""
    decided = layer.settings.masks.decided
    if getattr(module, "is_causal", True) or layer.is_sliding or (decided is not None and decided[0] == layer.length):
        return
    if layer.pending:  # it holds what is not of its text
        layer.crop(-layer.num_new)
        layer.pending = False
    raise QuestError(
        f"{type(module).__name__} is cross-attention or otherwise not causal, and a QuestCache holds the tokens of a "
        "text in their order. For an encoder-decoder model pass EncoderDecoderCache(QuestCache(...), DynamicCache()), "
        "whose second half is for the cross-attention."
    )


def is_by_pages(layer, query, num_decoding, kwargs):
    """Whether the layer attends the last `num_decoding` of its new tokens by pages, some or all of them."""
    if not num_decoding:
        return False
    if any(kwargs.get(name) is not None for name in NOT_SPARSE):
        say_once(f"A model that asks its attention for one of {', '.join(NOT_SPARSE)} stays dense in these layers.")
        return False
    if not layer.is_plainly_masked:
        say_if_dense(layer)
        return False
    return layer.is_sparse or layer.kernels_attend(query)


def say_if_dense(layer):
    """Say of a layer that does not select why it does not, where there is more than its budget to select from."""
    if layer.is_sparse or (layer.is_sliding and layer.length > layer.settings.budget):
        say_once(
            "Quest leaves those layers dense whose attention mask is more than causal with left padding: a sliding "
            "window, chunks, or a mask of your own."
        )


def masked_attention(layer, module, query, key, value, attention_mask, num_decoding=0, **kwargs):
    """`quest_attention` that is dense, as far as the mask allows and a prompt is not read by CritiPrefill."""
    if query.shape[2] == 1:
        if attention_mask is None:
            attention_mask = layer.padding_mask()
        return dense_decode(module, query, key, value, attention_mask, **kwargs)
    num_drafts = num_decoding if layer.num_new > 1 else 0
    return prompt_attention(layer, module, query, key, value, attention_mask, num_drafts, **kwargs)


def prompt_attention(layer, module, query, key, value, attention_mask, num_drafts, scaling=None, **kwargs):
    """`quest_attention` of several tokens: by CritiPrefill where the layer has sparse segments, and else dense."""
    is_plain = layer.is_plainly_masked and not kwargs.get("dropout")
    is_plain = is_plain and all(kwargs.get(name) is None for name in NOT_SPARSE)
    needs_eager = any(kwargs.get(name) is not None for name in EAGER_ONLY)
    if is_plain and layer.reads_prompt(query, key.shape[2], num_drafts, needs_eager):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        sinks = kwargs.get("sinks") if kwargs.get("s_aux") is None else kwargs["s_aux"]
        options = (num_drafts, scaling, kwargs.get("softcap"), sinks)
        with torch.autocast(query.device.type, enabled=False):
            return layer.attend_prompt(query.to(layer.keys.dtype), key.shape[2], *options).contiguous(), None
    return dense_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def captured_attention(layer, module, query, attention_mask, **kwargs):
    """`quest_attention` of one new token per row in a graph, which must not depend on how many tokens are stored."""
    is_plain = attention_mask is None and all(kwargs.get(name) is None for name in NOT_SPARSE)
    if is_plain and isinstance(layer, QuestLayer):
        return attend(layer, query, **kwargs), None
    if attention_mask is None:
        raise QuestError(
            "A compiled decode step can attend everything that is stored by its attention mask alone, and this model "
            "has none here. Use QuestCache(compile=False)."
        )
    # As many of the newest slots as the mask has, which are those that a local layer reaches, or all.
    return dense_attention(module, query, *layer.newest(attention_mask.shape[-1]), attention_mask, **kwargs)


def attend(layer, query, scaling=None, softcap=None, s_aux=None, sinks=None, **kwargs):
    """The newest tokens' attention [B, T, Hq, D] by the layer's pages, with what models call it."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = s_aux if sinks is None else sinks
    with torch.autocast(query.device.type, enabled=False):
        output = layer.attend(query.to(layer.keys.dtype), scaling, softcap, sinks)
    return output.transpose(1, 2).contiguous()


def dense_attention(module, query, key, value, attention_mask, **kwargs):
    """What the model computes without Quest: SDPA, or its own eager attention where SDPA would leave something out."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    needs_eager = any(kwargs.get(name) is not None for name in EAGER_ONLY)
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # Without a mask the queries are the newest tokens. SDPA would take fewer queries than keys for the oldest.
    if attention_mask is None and is_causal and num_queries > 1 and (needs_eager or num_queries < num_keys):
        attention_mask = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=query.device)
        attention_mask = attention_mask.tril(num_keys - num_queries)
    if not needs_eager:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, lowest)
    eager_attention_forward = sys.modules[type(module).__module__].eager_attention_forward
    output, _ = eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output, None


def dense_decode(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """`dense_attention` of one new token: every key and value is read once, and of a local layer only its reach."""
    if attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
        # That of a local layer is for as many of the newest slots as it reaches, filled or not.
        num_reached = min(attention_mask.shape[-1], key.shape[2])
        key, value = key[:, :, -num_reached:], value[:, :, -num_reached:]
        attention_mask = attention_mask[..., -num_reached:]
    is_per_head = attention_mask is not None and attention_mask.shape[1] > 1
    if is_per_head or kwargs.get("dropout") or any(kwargs.get(name) is not None for name in EAGER_ONLY + NOT_SPARSE):
        return dense_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # The query heads of a group as queries of their KV head: left as heads, each would read all its keys again.
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(query.shape[0], 1, -1, value.shape[-1]), None


def register():
    """Make `attn_implementation="quest"` known to Transformers."""
    AttentionInterface.register("quest", quest_attention)
    AttentionMaskInterface.register("quest", quest_mask)
