"""Which layers of a model are local, and how far they reach."""

from transformers import DynamicCache


def reaches_of(config, max_positions):
    """How many tokens the local layers of a model attend, the newest included, by their index.

    By Transformers' own cache, which keeps as many. A layer that reaches all positions of the model is not local.
    """
    if not any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")):
        return {}
    reaches = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    return {idx: reach for idx, reach in enumerate(reaches) if reach is not None and reach < max_positions}
