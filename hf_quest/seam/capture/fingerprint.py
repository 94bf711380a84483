"""What a recorded step has baked in of its model: where tensors lie, and what decides which operations run."""

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig

PLAIN = frozenset((bool, int, float, str, torch.dtype, torch.device, type(None)))
# Attributes of a model that say how it is called, not what it computes.
OF_CALLS = frozenset(("_compiled_call", "_last_compile_config", "get_compiled_call", "generation_config"))


def fingerprint(model):
    """A list that stays equal as long as nothing has changed that a graph of `model` depends on.

    That is of every tensor the address, shape, strides and dtype; of every module the class, and its flags, numbers,
    names (is it training, which adapter is active), hooks and other objects, each as the object that it is, not by
    what is in it; and the values in configurations. Weights that change in place leave it as it is, as they should.
    """
    seen = set()
    return [(id(module), type(module), describe_items(vars(module), seen)) for module in model.modules()]


def describe_items(items, seen):
    """(name, description) of all that is not an empty table, as those of hooks mostly are."""
    found = []
    for name, value in items.items():
        kind = type(value)
        if kind in PLAIN:
            found.append((name, value))
        elif issubclass(kind, (dict, list, tuple, set)):
            if value:
                found.append((name, describe_container(value, seen)))
        elif name not in OF_CALLS:
            found.append((name, describe(value, seen)))
    return found


def describe_container(value, seen):
    if id(value) in seen:
        return id(value)
    seen.add(id(value))
    if isinstance(value, dict):
        return describe_items(value, seen)
    if isinstance(value, set):
        return frozenset(value)
    return describe_items(dict(enumerate(value)), seen)


def describe(value, seen):
    if isinstance(value, torch.Tensor):
        return describe_tensor(value, seen)
    if isinstance(value, PreTrainedConfig) and id(value) not in seen:
        seen.add(id(value))
        return describe_items(vars(value), seen)
    return id(value)  # a module, too, which has its own place in the list


def describe_tensor(tensor, seen):
    if is_traceable_wrapper_subclass(tensor):  # quantised or distributed: made of other tensors and what places them
        names, _ = tensor.__tensor_flatten__()
        return [describe(getattr(tensor, name), seen) for name in names]
    if tensor.layout != torch.strided:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
