"""The registered attention and mask functions: which way a forward goes, dense or through the pages of a QuestCache."""

import math
import sys

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils import logging

from .cache import MaskLength, QuestError, QuestLayer

logger = logging.get_logger(__name__)

# What a model may ask of its attention that only its own eager attention does everywhere.
EAGER_ONLY = ("softcap", "s_aux", "sinks")
# What a model may ask of its attention that selecting pages does not do.
NOT_SPARSE = ("position_bias", "indices", "block_indices")


class Mask(torch.Tensor):
    """An attention mask whose attributes go with it to another device, where a later layer of the model may be."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # else a plain tensor

    def to(self, *args, **kwargs):
        mask = super().to(*args, **kwargs).as_subclass(Mask)
        mask.__dict__.update(self.__dict__)
        return mask


def quest_attention(module, query, key, value, attention_mask, **kwargs):
    """The attention function behind `attn_implementation="quest"`.

    Args:
        query: [B, Hq, T, D].
        key, value: [B, Hkv, N, D], with a QuestCache the views that its layer returned.
        attention_mask: bool or float, broadcastable to [B, Hq, T, N], or None for causal attention.

    Returns:
        ([B, T, Hq, D], None). Dense without a QuestCache, for a mask that is more than causal with left padding, where
        the layer holds no more tokens than its budget, and for a prompt, unless the cache has a CritiPrefill.
    """
    layer = getattr(key, "quest_layer", None)
    if layer is None or getattr(value, "quest_layer", None) is not layer:
        say_once('attn_implementation="quest" runs dense attention: the forward was given no QuestCache.')
        return dense_attention(module, query, key, value, attention_mask, **kwargs)
    if not isinstance(layer, QuestLayer):  # one of the baselines
        return layer.attention(module, query, key, value, attention_mask, **kwargs)
    if layer.settings.is_captured and not layer.pending:
        return captured_attention(layer, module, query, attention_mask, **kwargs)
    if layer.pending:
        # Further calls of this forward come from layers that share these keys and values, and may slice the mask.
        layer.pending = False
        left_padding = getattr(attention_mask, "left_padding", None)
        layer.is_plainly_masked = attention_mask is None or left_padding is not None
        layer.has_foreign_mask = not layer.is_plainly_masked and not hasattr(attention_mask, "local_size")
        if left_padding is not None:
            layer.set_left_padding(left_padding)

    num_queries, num_keys = query.shape[2], key.shape[2]
    num_decoding = layer.num_decoding(num_queries)
    if num_decoding and layer.is_sparse and not layer.is_plainly_masked:
        say_once(
            "Quest leaves those layers dense whose attention mask is more than causal with left padding: a sliding "
            "window, chunks, or a mask of your own."
        )
        num_decoding = 0
    if any(kwargs.get(name) is not None for name in NOT_SPARSE):
        say_once(f"A model that asks its attention for one of {', '.join(NOT_SPARSE)} stays dense in these layers.")
        num_decoding = 0

    by_pages = layer.is_sparse or (layer.is_plainly_masked and layer.kernels_attend(query))
    if not num_decoding or not by_pages:
        if num_queries == 1:
            if attention_mask is None:
                attention_mask = layer.padding_mask()
            return dense_decode(module, query, key, value, attention_mask, **kwargs)
        return prompt_attention(layer, module, query, key, value, attention_mask, **kwargs)

    num_prompt = num_queries - num_decoding
    output = attend(layer, query[:, :, num_prompt:], **kwargs)
    if num_prompt:
        # Assisted decoding feeds the prompt and the first drafts in one forward.
        num_tokens = num_keys - num_decoding
        prompt_mask = None if attention_mask is None else attention_mask[:, :, :num_prompt, :num_tokens]
        prompt = (query[:, :, :num_prompt], key[:, :, :num_tokens], value[:, :, :num_tokens], prompt_mask)
        output = torch.cat([prompt_attention(layer, module, *prompt, **kwargs)[0], output], dim=1)
    return output, None


def prompt_attention(layer, module, query, key, value, attention_mask, scaling=None, **kwargs):
    """`quest_attention` of several tokens: by CritiPrefill where the layer has sparse segments, and else dense."""
    is_plain = layer.is_plainly_masked and not kwargs.get("dropout")
    is_plain = is_plain and all(kwargs.get(name) is None for name in NOT_SPARSE)
    needs_eager = any(kwargs.get(name) is not None for name in EAGER_ONLY)
    if is_plain and layer.reads_prompt(query, key.shape[2], needs_eager):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        sinks = kwargs.get("sinks") if kwargs.get("s_aux") is None else kwargs["s_aux"]
        return layer.attend_prompt(query, key, value, scaling, kwargs.get("softcap"), sinks).contiguous(), None
    return dense_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def captured_attention(layer, module, query, attention_mask, **kwargs):
    """`quest_attention` of one new token per row in a graph, which must not depend on how many tokens are stored."""
    if attention_mask is None and all(kwargs.get(name) is None for name in NOT_SPARSE):
        return attend(layer, query, **kwargs), None
    local_size = getattr(attention_mask, "local_size", None)
    if local_size is None:
        raise QuestError("A compiled decode step takes no attention mask of one's own. Use QuestCache(compile=False).")
    return dense_attention(module, query, *layer.newest(local_size), attention_mask, **kwargs)


def attend(layer, query, scaling=None, softcap=None, s_aux=None, sinks=None, **kwargs):
    """The newest tokens' attention [B, T, Hq, D] by the layer's pages, with what models call it."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = s_aux if sinks is None else sinks
    return layer.attend(query, scaling, softcap, sinks).transpose(1, 2).contiguous()


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
    # The mask tells, not the layer's `sliding_window`: a mask of the user's own may reach further.
    local_size = getattr(attention_mask, "local_size", None)
    if local_size is not None:
        key, value = key[:, :, -local_size:], value[:, :, -local_size:]
        attention_mask = attention_mask[..., -key.shape[2] :]
    is_per_head = attention_mask is not None and attention_mask.shape[1] > 1
    if is_per_head or kwargs.get("dropout") or any(kwargs.get(name) is not None for name in EAGER_ONLY + NOT_SPARSE):
        return dense_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # The query heads of a group as queries of their KV head: left as heads, each would read all its keys again.
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(query.shape[0], 1, -1, value.shape[-1]), None


def quest_mask(
    *,
    q_length,
    kv_length,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask=None,
    local_size=None,
    config=None,
    allow_is_causal_skip=True,
    use_vmap=False,
    **kwargs,
):
    """The mask function behind `attn_implementation="quest"`: SDPA's, and what Quest needs to know about it.

    A mask that is causal with left padding and nothing else carries `left_padding`, the slots without a token at the
    start of each row, as a tuple of B ints. One of local attention (a window, chunks) carries `local_size`, its reach
    in tokens, and `left_padding` only if no position of the model lies beyond that reach. How long the context is does
    not count: a row is longer in a batch than alone, and must have the same sparse layers.

    With a QuestCache the mask of one new token does not grow with the context, since a captured graph could not have
    that: there is none where it would only repeat the left padding that the cache has seen in the prompt, and that of
    a local layer is [B, 1, 1, local_size], for the newest slots.
    """
    model_class = causal_lm_class(config)
    check_has_attention_interface(model_class, config)
    check_heads_split(config)
    max_positions = getattr(config, "max_position_embeddings", None) or math.inf
    is_local = local_size is not None and local_size < max_positions
    cache = kv_length.cache if isinstance(kv_length, MaskLength) else None
    if cache is not None:
        cache.settings.max_positions = max_positions
    is_plain = mask_function is causal_mask_function if local_size is None else not is_local and kv_length <= local_size
    if is_plain and kv_length == 0:  # in a captured step of a QuestCache
        return None
    num_missing = 0
    if cache is not None and q_length == 1 and not use_vmap:
        if is_plain and (attention_mask is None or cache.knows_mask(kv_length)):
            return None
        if is_local:
            num_missing = max(0, local_size - kv_length)
            kv_offset += max(0, kv_length - local_size)
            kv_length = min(kv_length, local_size)
    # A mask left out is causal over the queries' own keys, and only so in a model that is made for SDPA. A local layer
    # without its mask could not be told from a full one.
    is_causal_without = q_length == kv_length and (model_class is None or model_class._supports_sdpa)
    can_skip = not is_local and (q_length == 1 or is_causal_without)
    # A chunk of a prompt needs none where the attention is this package's own. It could be gigabytes.
    is_own = cache is not None and torch.device(kwargs.get("device") or "cpu").type == "cuda"
    is_chunk = is_plain and 1 < q_length < kv_length and allow_is_causal_skip and not use_vmap
    if is_own and is_chunk and (attention_mask is None or attention_mask.all()):
        if attention_mask is not None:
            cache.settings.num_masked = int(kv_length)
        return None
    mask = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        config=config,
        allow_is_causal_skip=allow_is_causal_skip and can_skip,
        use_vmap=use_vmap,
        **kwargs,
    )
    if use_vmap:  # which Transformers sets where the caller brings a pattern
        return mask
    if mask is not None:
        if num_missing:
            mask = F.pad(mask, (num_missing, 0), value=False)
        # On one device a mask goes nowhere, and what may be the input of a compiled step must be a plain tensor.
        if not torch.compiler.is_compiling() and (q_length > 1 or (cache is not None and cache.is_on_several_devices)):
            mask = mask.as_subclass(Mask)
        if local_size is not None:
            mask.local_size = local_size
        left_padding = count_left_padding(attention_mask, mask.shape[0]) if is_plain else None
        if left_padding is None:
            return mask
        mask.left_padding = left_padding
    if cache is not None and attention_mask is not None:
        cache.settings.num_masked = int(kv_length)
    return mask


def count_left_padding(attention_mask, batch_size):
    """A tuple with the zeros at the start of each row of a [B, N] mask, or None if it has zeros elsewhere."""
    if attention_mask is None:
        return (0,) * batch_size
    num_tokens = attention_mask.sum(dim=-1)
    left_padding = attention_mask.shape[-1] - num_tokens
    is_token = torch.arange(attention_mask.shape[-1], device=attention_mask.device) >= left_padding[:, None]
    if not torch.equal(is_token, attention_mask.bool()):
        return None
    return tuple(left_padding.tolist())


def causal_lm_class(config):
    """The class that `AutoModelForCausalLM` makes of a config, or None."""
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None) if config is not None else None
    # Some models name several classes, by architecture.
    return model_class[0] if isinstance(model_class, tuple) else model_class


def check_has_attention_interface(model_class, config):
    """Raise for a model that never calls the registered attention: it would get this mask and lose causality."""
    if model_class is not None and not model_class._can_set_attn_implementation():
        raise QuestError(
            f'{config.model_type} has an attention of its own and does not use attn_implementation="quest". Load it '
            "with another attn_implementation and without QuestCache."
        )


def check_heads_split(config):
    """Raise for tensor parallelism over a number of processes that the KV heads cannot be split among."""
    num_ranks = getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1
    num_kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
    plan = getattr(config, "base_model_tp_plan", None) or {}
    is_split = any(name.endswith(".k_proj") and style == "colwise" for name, style in plan.items())
    if is_split and isinstance(num_kv_heads, int) and num_kv_heads % num_ranks:
        counts = [count for count in range(1, num_kv_heads + 1) if num_kv_heads % count == 0]
        raise QuestError(
            f"Tensor parallelism gives every process whole KV heads, and the {num_kv_heads} of this model do not split "
            f"evenly over {num_ranks} processes. Start torchrun with one of {counts} as --nproc-per-node."
        )


def say_once(message):
    if not torch.compiler.is_compiling():
        logger.warning_once(message)


def register():
    """Make `attn_implementation="quest"` known to Transformers."""
    AttentionInterface.register("quest", quest_attention)
    AttentionMaskInterface.register("quest", quest_mask)
