"""What a recording is given and what it returns: which inputs can stand for one another, and copies of results."""

import torch
from transformers.utils import ModelOutput


def kinds_of(inputs):
    return tuple((name, kind_of(value)) for name, value in inputs.items())


def kind_of(value):
    """Equal for values that can stand for one another in a recording: tensors of one shape, and else the same."""
    if isinstance(value, dict):  # of masks, by the kinds of layers
        return tuple((name, kind_of(item)) for name, item in value.items())
    return (value.shape, value.dtype, value.device) if torch.is_tensor(value) else (type(value), value)


def copied(value, copies):
    """`value` with copies of the tensors that are in it, however deep: the next replay writes where they are.

    `copies` are those made already, by the ids of their tensors, so that a tensor that is in it twice is copied once.
    """
    if torch.is_tensor(value):
        if id(value) not in copies:
            copies[id(value)] = value.clone()
        return copies[id(value)]
    if isinstance(value, dict):
        items = {name: copied(item, copies) for name, item in value.items()}
        return type(value)(**items) if isinstance(value, ModelOutput) else type(value)(items)
    if isinstance(value, (tuple, list)):
        items = [copied(item, copies) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
