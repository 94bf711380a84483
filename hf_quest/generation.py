"""What `generate` and models do not tell a cache, and their stack frames do; each function names what it leans on."""

import sys

import torch

MODULE_CALL = frozenset({torch.nn.Module._call_impl.__code__})


def called_from(codes, stop_at=frozenset()):
    """Whether one of the code objects `codes` is in the stack, below the innermost of `stop_at`."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code in codes:
            return True
        if frame.f_code in stop_at:
            return False
        frame = frame.f_back
    return False


def called_by_module():
    """Whether a model calls, and not somebody who fills a cache by hand."""
    return called_from(MODULE_CALL)
