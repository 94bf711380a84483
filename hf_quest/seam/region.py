"""Region: a decoder layer of a prompt that is compiled around its attention, which no compiler looks into.

In the graph `update` hands over the new keys and values only, and the attention is one operator. When that runs, it
stores them and attends as in a forward that is not compiled. So the graph depends neither on how many tokens are
stored, nor on which layer it is, nor on how the layer attends.
"""

import threading
from typing import Any

import torch

here = threading.local()  # .region: that of the layer which this thread computes, or None


class Region:
    """One forward of a decoder layer: its cache, the module that attends in it, and the attention function."""

    def __init__(self, cache: Any, module: torch.nn.Module, attention: Any) -> None:
        self.cache, self.module, self.attention = cache, module, attention
        self.num_calls = 0  # of the attention
        self.outer: Region | None = None

    def __enter__(self) -> "Region":
        self.outer = getattr(here, "region", None)
        here.region = self
        self.cache.shared.enter(self)
        return self

    def __exit__(self, *error: Any) -> None:
        here.region = self.outer
        self.cache.shared.enter(None)

    def hand_over(self, keys, values):
        """What `update` returns in the graph: the new keys and values, which carry this region."""
        keys, values = keys.view_as(keys), values.view_as(values)
        keys.quest_region = values.quest_region = self
        return keys, values

    def attend(self, query, keys, values, attention_mask, **options):
        """Store the new keys and values, and attend: [B, T, Hq, D]."""
        self.num_calls += 1
        if self.cache.method.fused is None:  # a method may keep what it is given, where the graph writes again
            query, keys, values = query.clone(), keys.clone(), values.clone()
        keys, values = self.cache.update(keys, values, self.module.layer_idx)
        output, _ = self.attention(self.module, query, keys, values, attention_mask, **options)
        return output


@torch.library.custom_op("hf_quest::attend_in_region", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attend_in_region(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    names: str,
    tensors: list[torch.Tensor],
    integers: list[int],
    floats: list[float],
) -> torch.Tensor:
    """`Region.attend` of the region that this thread is in.

    The operator changes the cache, of which its schema says nothing. Its output feeds the rest of the model, so it runs
    once, and after the layers before it. A CUDA graph must not hold it: replayed, that would store nothing. The graph
    may write to what it is given once it is done, so nothing of that is kept.

    Args:
        query: [B, Hq, T, D].
        keys, values: [B, Hkv, T, D], of the new tokens.
        attention_mask: broadcastable to [B, Hq, T, N].
        names, tensors, integers, floats: the attention's other arguments, see `packed`.

    Returns:
        [B, T, Hq, D].
    """
    options = unpacked(names, tensors, integers, floats)
    output = here.region.attend(query, keys, values, attention_mask, **options)
    return output.to(query.dtype).contiguous()


@attend_in_region.register_fake
def _(query, keys, values, attention_mask, names, tensors, integers, floats):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], values.shape[3])


def region_attention(query, key, value, attention_mask, **options):
    """`quest_attention` in the graph of a region."""
    return attend_in_region(query, key, value, attention_mask, *packed(options)), None


def packed(options):
    """A dict of tensors, numbers, flags and None as an operator takes it: names, each after its kind, and values."""
    names, tensors, integers, floats = [], [], [], []
    for name, value in options.items():
        if value is None:
            names.append(f"-{name}")
        elif isinstance(value, bool):
            names.append(f"{'+' if value else '!'}{name}")
        elif isinstance(value, torch.Tensor):
            names.append(f"t{name}")
            tensors.append(value)
        elif isinstance(value, int):
            names.append(f"i{name}")
            integers.append(value)
        elif isinstance(value, float):
            names.append(f"f{name}")
            floats.append(value)
        else:
            raise TypeError(f"An operator takes no {type(value).__name__}, as which {name} comes.")
    return " ".join(names), tensors, integers, floats


def unpacked(names, tensors, integers, floats):
    """The dict of which `packed` made these."""
    constants = {"-": None, "+": True, "!": False}
    numbers = {"t": iter(tensors), "i": iter(integers), "f": iter(floats)}
    return {name[1:]: constants[name[0]] if name[0] in constants else next(numbers[name[0]]) for name in names.split()}
