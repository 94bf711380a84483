"""A step run once before it is recorded, to see whether a CUDA graph can hold it.

A recording that fails leaves PyTorch's allocator and random numbers in a state of their own, so none is begun in vain.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
FROM_PYTHON = (aten.lift_fresh.default, aten.lift_fresh_copy.default)  # torch.tensor(numbers), whose copy is not seen
WRITES_BY_INDEX = (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Rehearsal(TorchDispatchMode):
    """Takes down in `misfits` the operations of this thread on a device that cannot be recorded.

    They are those whose end the host waits for, to know a value or a number of elements; those that copy between the
    host's memory and the device's; and those that draw random numbers, which `graphs` counts on.
    """

    def __init__(self, device):
        super().__init__()
        self.device, self.misfits = device, set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = operator(*args, **kwargs)
        values = tree_iter((args, kwargs, output))
        devices = {value.device for value in values if isinstance(value, torch.Tensor)}
        if self.device in devices and is_misfit(operator, args, devices):
            self.misfits.add(str(operator))
        return output


def is_misfit(operator, args, devices):
    """Whether a graph cannot hold `operator` with these arguments, of tensors on these devices."""
    if operator in COPIES:
        return len(devices) > 1
    if operator == aten.index.Tensor:
        return not are_places(args[1], args[0].device)
    if operator in WRITES_BY_INDEX:
        is_number = args[2].numel() == 1 and args[2].device.type == "cpu"  # which is filled in where a mask says
        return not are_places(args[1], args[0].device) and not is_number
    if torch.Tag.nondeterministic_seeded in operator.tags:
        return "attention" not in str(operator)  # has dropout, which is none
    is_known_late = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operator.tags)
    is_copied = operator in FROM_PYTHON and torch.device("cpu") not in devices
    return bool(is_known_late) or is_copied


def are_places(indices, device):
    """Whether they are numbers on the device: a mask's elements would be counted, numbers of the host copied."""
    given = [index for index in indices if index is not None]
    return all(index.device == device and index.dtype not in (torch.bool, torch.uint8) for index in given)
