"""What a layer refuses, before anything is changed."""

import torch
from transformers import cache_utils

from ..errors import QuestError
from ..kernels.ops import MAX_SLOTS
from ..methods.base import is_int
from ..prompts import CritiPrefill
from ..storage import host
from .same_model import num_caching_layers

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# By the type that a config names, the class of a cache's layer, a model's own among them; and what Transformers' have.
LAYERS = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
KNOWN = {
    name
    for each in vars(cache_utils).values()
    if isinstance(each, type) and each.__module__ == cache_utils.__name__
    for name in dir(each)
}


def check_settings(method, dense_layers, max_cache_len, prefill, offloading, pool):
    """Raise for arguments of a cache that mean nothing, or nothing together."""
    if not is_int(dense_layers) or dense_layers < 0:
        raise ValueError(f"dense_layers is a number of layers, 0 or more, not {dense_layers!r}.")
    if max_cache_len is not None and (not is_int(max_cache_len) or max_cache_len < 1):
        raise ValueError(f"max_cache_len is a number of tokens, or None for a cache that grows, not {max_cache_len!r}.")
    if prefill is not None and not isinstance(prefill, CritiPrefill):
        raise ValueError(f"prefill is a CritiPrefill, or None for dense prompts, not {prefill!r}.")
    if prefill is not None and method.evicts:
        raise ValueError("A method that evicts needs every weight of the prompt: it is dense. Leave prefill out.")
    if prefill is not None and prefill.block_size % method.page_size:
        raise ValueError(
            f"CritiPrefill's blocks of {prefill.block_size} tokens are not made of whole pages of "
            f"{method.page_size}. Make block_size a multiple of page_size."
        )
    if not isinstance(offloading, bool):
        raise ValueError(f"offloading is True or False, not {offloading!r}.")
    if offloading and method.evicts:
        raise ValueError("A method that evicts keeps so little that the GPU has the room: leave offloading out.")
    if pool is not None and (not is_int(pool) or not 0 <= pool < MAX_SLOTS):
        raise ValueError(
            f"pool is a number of tokens below {MAX_SLOTS:,}, 0 for no pool, or None for the default, not {pool!r}."
        )
    if pool and not offloading:
        raise ValueError("pool is for keys and values in the host's memory: QuestCache(codes=2, offloading=True).")
    if pool and not method.num_pooled:
        raise ValueError(
            f"There are no CUDA kernels with a pool for {method}: those of QuestCache(codes=2) and codes=4 have one, "
            "with bounds in 8 bits and without mass. Leave pool out."
        )


def check_layer_types(config, name):
    """Raise for a model that asks more of its cache's layers than Transformers' layers have."""
    for layer_type in dict.fromkeys(getattr(config, "layer_types", None) or ()):
        own = LAYERS.get(layer_type)
        asked = [each for each in dir(own) if not each.startswith("_") and each not in KNOWN]
        if own is not None and asked:
            raise QuestError(
                f"The layers of this model that are {layer_type} keep more than keys and values ({own.__name__}."
                f"{asked[0]}), which {name} does not serve. Use the model without {name}."
            )


def check_arrival(layer, key_states, value_states):
    """Raise for keys and values that cannot be appended to a layer."""
    keeps_all = not layer.method.evicts
    if keeps_all and key_states.shape[1] == 1 and key_states.shape[-1] != value_states.shape[-1]:
        raise QuestError(
            "This model caches latents (MLA), not keys and values, so pages have no bounds to select by. Load it "
            "with another attn_implementation and without QuestCache."
        )
    if keeps_all and key_states.dtype not in DTYPES:
        raise ValueError(
            f"QuestCache stores float32, float16 or bfloat16 keys, and this model's are {key_states.dtype}. Load "
            "the model with one of these dtypes."
        )
    check_room(layer, key_states.shape[2])
    storage = layer.storage
    if storage.length == 0:
        return
    keys, values = storage.keys, storage.values
    check_rows(keys.shape[0], key_states.shape[0])
    if key_states.device != keys.device and not storage.is_away:  # where kernels would look for it
        raise ValueError(
            f"The cache holds tokens for a model on {keys.device}, and this one's keys are on {key_states.device}"
            ". Move the model back, or read the text with a new cache. The content of this one is unchanged."
        )
    for stored, new in ((keys, key_states), (values, value_states)):
        is_alike = stored.dtype == new.dtype or layer.shared.saw_autocast
        if (stored.shape[1], stored.shape[3]) != (new.shape[1], new.shape[3]) or not is_alike:
            raise ValueError(
                f"The cache holds {stored.shape[1]} heads of dim {stored.shape[3]} in {stored.dtype}, and this "
                f"model brings {new.shape[1]} of dim {new.shape[3]} in {new.dtype}: it is another model's cache. "
                "Use a new one. The content of this one is unchanged."
            )


def check_rows(num_stored, num_new):
    """Raise if a batch is not of the rows that are stored."""
    if num_stored == num_new:
        return
    repeats, rest = divmod(num_new, num_stored)
    repeat = (
        "" if rest else f", or cache.batch_repeat_interleave({repeats}) if each row goes on as {repeats} of the batch"
    )
    raise ValueError(
        f"The cache holds {num_stored} rows and this batch has {num_new}. Call cache.reset() or use a new cache for "
        f"another batch{repeat}. The content of the cache is unchanged."
    )


def check_room(layer, num_new):
    """Raise if `num_new` more tokens are more than max_cache_len."""
    max_cache_len = layer.shared.max_cache_len
    if max_cache_len is not None and layer.length + num_new > max_cache_len:
        raise ValueError(
            f"max_cache_len={max_cache_len} tokens are not enough: {layer.length} are stored and {num_new} more "
            "arrive. Make the cache with a larger max_cache_len, or without one to let it grow. Its content is "
            "unchanged."
        )


def reserve_host(cache, key_states, value_states):
    """Have host memory for such keys and values in all layers of a cache with offloading, or raise if there is none."""
    shared, config, end = cache.shared, cache.config, cache.layers[0].length + key_states.shape[2]
    shared.rows.reserve([])
    if shared.num_layers and all(end <= layer.capacity for layer in cache.layers):
        return
    if shared.reaches or config is None or config.is_encoder_decoder:
        return  # where layers may be of several shapes, or nothing is known of them, each asks for itself
    num_layers = max(len(cache.layers), num_caching_layers(config))
    layers = [cache.layers[idx] for idx in range(shared.dense_layers, len(cache.layers))]
    storages = [layer.storage for layer in layers]
    storages += [shared.new_storage(idx) for idx in range(max(len(cache.layers), shared.dense_layers), num_layers)]
    num_present = [storage.bytes_on_host for storage in storages]
    sizes = [size for storage in storages for size in storage.bytes_with(key_states, value_states)]
    if sum(sizes) > sum(num_present):  # one after the other grows, beside what it was
        host.check_room(sum(sizes) + max(num_present), sum(num_present))
    if not any(num_present):
        shared.rows.reserve(host.new_blocks(sizes, key_states.device))


def check_crop(layer, num_removed):
    """Raise if the newest `num_removed` tokens of a layer cannot be taken back."""
    if layer.evicts and num_removed:
        refuse_crop()
    layer.storage.check_crop(num_removed, layer.layer_idx)


def refuse_crop():
    raise QuestError(
        "A cache that evicts cannot take tokens back, as crop and assisted decoding do: what it dropped for them does "
        "not come back. Use generate without an assistant, or QuestCache."
    )
