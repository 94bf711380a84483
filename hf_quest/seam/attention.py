"""The registered attention function: which way a forward goes, dense or through the pages of a QuestCache."""

import sys

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..errors import QuestError, say_once
from ..kernels import native
from ..methods import Attended
from ..methods.weights import weighted_attention
from ..reference import Logits
from .evicting import at_positions
from .masks import quest_mask
from .reading import attend, attend_prompt, is_read_by_segments, kernels_attend, num_decoding, tell
from .region import region_attention

# What a model may ask of its attention that only its own eager attention does everywhere.
EAGER_ONLY = ("softcap", "s_aux", "sinks")
# What a model may ask of its attention that selecting pages does not do.
NOT_SPARSE = ("position_bias", "indices", "block_indices")


def quest_attention(module, query, key, value, attention_mask, **kwargs):
    """The attention function behind `attn_implementation="quest"`.

    Args:
        query: [B, Hq, T, D].
        key, value: [B, Hkv, N, D], with a cache of this package what its layer returned.
        attention_mask: bool or float, broadcastable to [B, Hq, T, N], or None for causal attention.

    Returns:
        ([B, T, Hq, D], None). Dense without such a cache, for a mask that is more than causal with left padding, where
        the layer holds no more tokens than its budget, and for a prompt, unless the cache has a CritiPrefill.
    """
    if getattr(key, "quest_region", None) is not None and getattr(value, "quest_region", None) is not None:
        return region_attention(query, key, value, attention_mask, **kwargs)
    layer = getattr(key, "quest_layer", None)
    if layer is None or getattr(value, "quest_layer", None) is not layer:
        say_once('attn_implementation="quest" runs dense attention: the forward was given no QuestCache.')
        return dense_attention(module, query, key, value, attention_mask, **kwargs)
    query = layer.autocast(query)
    if layer.shared.step.is_captured and not layer.handed.is_under_way:
        return captured_attention(layer, module, query, attention_mask, **kwargs)
    check_is_causal(module, layer)
    layer.receive(attention_mask)
    if layer.evicts:
        return kept_attention(layer, module, query, key, value, attention_mask, **kwargs)
    num_steps = num_decoding(layer, query.shape[2])
    if not is_by_pages(layer, query, num_steps, kwargs):
        output = masked_attention(layer, module, query, key, value, attention_mask, num_steps, **kwargs)
    else:
        output = attend_by_pages(layer, module, query, key, value, attention_mask, num_steps, **kwargs)
    layer.shared.end_forward(layer.layer_idx)
    return output


def attend_by_pages(layer, module, query, key, value, attention_mask, num_steps, **kwargs):
    """`quest_attention` whose last `num_steps` queries are decode steps that choose, and what is before them a prompt.

    Assisted decoding feeds the prompt and the first drafts in one forward.
    """
    num_prompt = query.shape[2] - num_steps
    if not num_prompt:
        return by_pages(layer, query, **kwargs), None
    output = by_pages(layer, query[:, :, num_prompt:], **kwargs)
    num_tokens = key.shape[2] - num_steps
    prompt_mask = None if attention_mask is None else attention_mask[:, :, :num_prompt, :num_tokens]
    prompt = (query[:, :, :num_prompt], key[:, :, :num_tokens], value[:, :, :num_tokens], prompt_mask)
    return torch.cat([prompt_attention(layer, module, *prompt, 0, **kwargs)[0], output], dim=1), None


def check_is_causal(module, layer):
    """Raise for attention over other tokens than the text's own so far, for which the cache was asked for a mask."""
    if getattr(module, "is_causal", True) or layer.is_sliding or layer.shared.masks.asked == layer.length:
        return
    if layer.handed.is_under_way:  # it holds what is not of its text
        layer.put_back(layer.length - layer.handed.num_new)
    name = f"{type(layer.method).__name__}Cache"
    raise QuestError(
        f"{type(module).__name__} is cross-attention or otherwise not causal, and a {name} holds the tokens of a text "
        f"in their order. For an encoder-decoder model pass EncoderDecoderCache({name}(...), DynamicCache()), whose "
        "second half is for the cross-attention."
    )


def is_by_pages(layer, query, num_steps, kwargs):
    """Whether the layer attends the last `num_steps` of its new tokens by pages, some or all of them."""
    if layer.is_sliding:
        say_if_dense(layer)
        return False
    if not num_steps:
        return False
    if any(kwargs.get(name) is not None for name in NOT_SPARSE):
        say_once(f"A model that asks its attention for one of {', '.join(NOT_SPARSE)} stays dense in these layers.")
        return False
    if not layer.handed.is_plain:
        say_if_dense(layer)
        return False
    return layer.is_sparse or kernels_attend(layer, query)


def say_if_dense(layer):
    """Say of a layer that does not select why it does not, where there is more than its budget to select from."""
    if layer.is_sparse or (layer.is_sliding and layer.length > layer.method.budget):
        say_once(
            "Quest leaves those layers dense whose attention mask is more than causal with left padding: a sliding "
            "window, chunks, or a mask of your own."
        )


def masked_attention(layer, module, query, key, value, attention_mask, num_steps=0, **kwargs):
    """`quest_attention` that is dense, as far as the mask allows and a prompt is not read by CritiPrefill."""
    if query.shape[2] == 1:
        attention_mask = with_padding(attention_mask, layer)
        tell(layer, query, None, logits_of(query, **kwargs))
        key, value = layer.storage.at_hand(key, value)
        return dense_decode(module, query, key, value, attention_mask, **kwargs)
    num_drafts = num_steps if layer.handed.num_new > 1 else 0
    return prompt_attention(layer, module, query, key, value, attention_mask, num_drafts, **kwargs)


def with_padding(attention_mask, layer):
    """The mask of one new token with left padding hidden, for which the model was given no mask: it may have made one
    of its own in its place (Doge).
    """
    padding = layer.storage.padding_mask()
    if attention_mask is None:
        return padding
    is_for_all = attention_mask.shape[-1] == layer.length  # and not for as many of the newest as a window reaches
    if padding is None or layer.shared.masks.left_padding is None or not is_for_all:
        return attention_mask
    if attention_mask.dtype == torch.bool:
        return attention_mask & padding
    return attention_mask.masked_fill(~padding, torch.finfo(attention_mask.dtype).min)


def prompt_attention(layer, module, query, key, value, attention_mask, num_drafts, **kwargs):
    """`quest_attention` of several tokens: by CritiPrefill where the layer has sparse segments, and else dense."""
    is_plain = layer.handed.is_plain and not layer.is_sliding and not kwargs.get("dropout")
    is_plain = is_plain and all(kwargs.get(name) is None for name in NOT_SPARSE)
    needs_eager = any(kwargs.get(name) is not None for name in EAGER_ONLY)
    if is_plain and is_read_by_segments(layer, query, key.shape[2], num_drafts, needs_eager):
        with torch.autocast(query.device.type, enabled=False):
            query = query.to(layer.keys.dtype)
            output = attend_prompt(layer, query, key.shape[2], num_drafts, logits_of(query, **kwargs))
            return output.contiguous(), None
    key, value = layer.storage.at_hand(key, value)
    return dense_attention(module, query, key, value, attention_mask, **kwargs)


def captured_attention(layer, module, query, attention_mask, **kwargs):
    """`quest_attention` of a step in a graph, which must not depend on how many tokens are stored."""
    is_plain = attention_mask is None and all(kwargs.get(name) is None for name in NOT_SPARSE)
    if is_plain and not layer.is_sliding:
        return by_pages(layer, query, **kwargs), None
    if attention_mask is None:
        raise QuestError(
            "A compiled decode step can attend everything that is stored by its attention mask alone, and this model "
            "has none here. Use QuestCache(compile=False)."
        )
    # As many of the newest slots as the mask has, which are those that a local layer reaches, or all.
    return dense_attention(module, query, *layer.newest(attention_mask.shape[-1]), attention_mask, **kwargs)


def by_pages(layer, query, **kwargs):
    """The newest tokens' attention [B, T, Hq, D] by the layer's pages."""
    logits, query = logits_of(query, **kwargs), query.to(layer.keys.dtype)
    if torch.is_autocast_enabled(query.device.type):
        with torch.autocast(query.device.type, enabled=False):
            output = attend(layer, query, logits)
    else:
        output = attend(layer, query, logits)
    return output.transpose(1, 2).contiguous()


def logits_of(query, scaling=None, softcap=None, s_aux=None, sinks=None, **kwargs):
    """What models call `reference.Logits`."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return Logits(scaling, softcap, s_aux if sinks is None else sinks)


def kept_attention(layer, module, query, key, value, attention_mask, **kwargs):
    """`quest_attention` of a layer whose method evicts: attend to all that it keeps, then evict."""
    handed = layer.handed
    if query.shape[2] == 1 and handed.num_new == 1:
        attention_mask = with_padding(attention_mask, layer)
    mask = at_positions(attention_mask, key.quest_positions, query, layer.length)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = at_positions(kwargs["position_bias"], key.quest_positions, query, layer.length)
    if key.quest_weights is not None:
        output = attend_by_weights(query, key, value, mask, key.quest_weights, **kwargs)
    else:
        attend_all = dense_decode if query.shape[2] == 1 else dense_attention
        output = attend_all(module, query, key, value, mask, **kwargs)
    if not handed.is_seen:  # else it was by the layer whose keys and values this call shares
        logits = logits_of(query, **kwargs)
        tell(layer, query, None, logits)
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            layer.see(query, mask, logits, kwargs.get("position_bias"))
            layer.evict()
        handed.end()
        layer.shared.end_forward(layer.layer_idx)
    return output


def attend_by_weights(query, key, value, mask, weights, position_bias=None, dropout=0.0, **kwargs):
    """`dense_attention` in which tokens count as often as the weights of a `storage.Weighted` say."""
    attended = Attended(query, mask, None, logits_of(query, **kwargs), position_bias)
    with torch.autocast(query.device.type, enabled=False):
        output = weighted_attention(key, value, attended, *weights, dropout)
    return output.transpose(1, 2).contiguous(), None


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

    def attend():
        # The query heads of a group as queries of their KV head: left as heads, each would read all its keys again.
        grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
        output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return output.reshape(query.shape[0], 1, -1, value.shape[-1])

    if attention_mask is not None or torch.compiler.is_dynamo_compiling() or not native.serves(query, key, value):
        return attend(), None
    logits = logits_of(query, scaling)
    output = native.attend(query, key, value, None, key.shape[2], 1, logits.scaling).transpose(1, 2)
    return native.with_gradients(output, (query, key, value), attend), None


def register():
    """Make `attn_implementation="quest"` known to Transformers."""
    AttentionInterface.register("quest", quest_attention)
    AttentionMaskInterface.register("quest", quest_mask)
