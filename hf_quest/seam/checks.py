"""What a layer refuses, before anything is changed."""

import torch

from ..errors import QuestError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    if layer.length == 0:
        return
    for stored, new in ((layer.keys, key_states), (layer.values, value_states)):
        if stored.shape[0] != new.shape[0]:
            raise ValueError(
                f"The cache holds {stored.shape[0]} rows and this batch has {new.shape[0]}. Call cache.reset() or "
                "use a new cache for another batch. The content of the cache is unchanged."
            )
        is_alike = stored.dtype == new.dtype or layer.shared.saw_autocast
        if (stored.shape[1], stored.shape[3]) != (new.shape[1], new.shape[3]) or not is_alike:
            raise ValueError(
                f"The cache holds {stored.shape[1]} heads of dim {stored.shape[3]} in {stored.dtype}, and this "
                f"model brings {new.shape[1]} of dim {new.shape[3]} in {new.dtype}: it is another model's cache. "
                "Use a new one. The content of this one is unchanged."
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
