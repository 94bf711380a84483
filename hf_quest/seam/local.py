"""What a model's config tells of its layers: their heads, and which are local and how far they reach."""

from transformers import DynamicCache


def configs_of_layers(config):
    """The configs of a model's layers, or its own alone if they are alike."""
    # Of a model whose layers differ Transformers tells what they differ in by layer only.
    return config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]


def head_dims_of(config):
    """The head dims that a model's layers have, each once."""
    dims = {
        getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        for layer in configs_of_layers(config)
    }
    return sorted(dims)


def kv_heads_of(config):
    """The numbers of KV heads that a model's layers have, each once."""
    counts = [
        getattr(layer, "num_key_value_heads", None) or getattr(layer, "num_attention_heads", None)
        for layer in configs_of_layers(config)
    ]
    return {count for count in counts if isinstance(count, int)}


def reaches_of(config, max_positions):
    """How many tokens the local layers of a model attend, the newest included, by their index.

    By Transformers' own cache, which keeps as many. A layer that reaches all positions of the model is not local.
    """
    names = ("sliding_window", "attention_chunk_size")
    if not any(getattr(layer, name, None) for layer in configs_of_layers(config) for name in names):
        return {}
    reaches = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    return {idx: reach for idx, reach in enumerate(reaches) if reach is not None and reach < max_positions}
