"""The stages of a decode step on a CPU by csrc/cpu_step.cpp, which `build` compiles. What they mean is in `reference`.

They are for one query per row in rows without padding, as those of `cpu`, which takes over where these do not serve.
"""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import build

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MULTIPLE, MAX_DIM, MAX_GROUP = 16, 1024, 128  # of head dims, and query heads of a KV head

Address, Number, Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
Threads = (Address, ctypes.c_int)
ARGUMENTS = {
    "bound": (Address, ctypes.c_int, *[Number] * 5, Address, Address),
    "estimate": (*[Address] * 4, ctypes.c_int, *[Number] * 5, Float, Float, *Threads),
    "select": (Address, Address, *[Number] * 3, ctypes.c_bool, *Threads),
    "attend": (*[Address] * 5, ctypes.c_int, Address, *[Number] * 8, Float, *Threads),
}


@functools.cache
def functions():
    """The functions of the library by name, and in `fork` that by which they reach PyTorch's threads; None without."""
    library = build.load_for_cpu()
    if library is None:
        return None
    found = {"fork": ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)}
    for name, types in ARGUMENTS.items():
        found[name] = ctypes.CFUNCTYPE(None, *types)((f"hf_quest_{name}", library))
    return found


def call(name, *arguments):
    found = functions()
    threads = () if name == "bound" else (found["fork"], torch.get_num_threads())
    found[name](*arguments, *threads)


def serves(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `attend` is for a query [B, Hq, 1, D] with these keys and values, and `bound`, `estimate` for the keys."""
    return (
        keys.dtype in TYPES
        and values.dtype is keys.dtype
        and all(0 < dim <= MAX_DIM and not dim % MULTIPLE for dim in (keys.shape[-1], values.shape[-1]))
        and query.shape[1] <= MAX_GROUP * keys.shape[1]
        and all(is_plain(each) and each.stride(-1) == 1 for each in (query, keys, values))
        and functions() is not None
    )


def is_plain(tensor):
    """Whether a tensor is numbers of the CPU, and no stand-in of a tracer."""
    return type(tensor) is Tensor and tensor.device.type == "cpu"


def with_gradients(output: Tensor, inputs: tuple[Tensor, ...], compute: Callable[[], Tensor]) -> Tensor:
    """`output`, which knows of no gradients, with those of what PyTorch's operators compute where an input gets some."""
    if not torch.is_grad_enabled() or not any(each.requires_grad for each in inputs):
        return output
    same = compute()
    return output + (same - same.detach())


def bound(keys: Tensor, bounds: Tensor, scales: Tensor, page: int, page_size: int) -> None:
    """`reference.refresh_bounds` of one full page of every row, for bounds in 8 bits."""
    *rows, capacity, head_dim = keys.shape
    where = (rows[0] * rows[1], capacity, head_dim, page_size, page)
    call("bound", keys.data_ptr(), TYPES[keys.dtype], *where, bounds.data_ptr(), scales.data_ptr())


def estimate(query: Tensor, bounds: Tensor, scales: Tensor | None, num_pages: int, scaling: float, width: float):
    """`reference.estimate` of the first `num_pages`, where the query heads agree by their largest score.

    Args:
        bounds: [B, Hkv, capacity / S, 2, D]. scales: [B, Hkv, capacity / S, D / 32] or None.
    """
    batch_size, num_kv_heads, capacity, _, head_dim = bounds.shape
    query = query.float().contiguous()
    scores = query.new_empty(batch_size, num_kv_heads, 1, num_pages)
    stored = (bounds.data_ptr(), None if scales is None else scales.data_ptr(), scores.data_ptr())
    shape = (batch_size * num_kv_heads, query.shape[1] // num_kv_heads, head_dim, num_pages, capacity)
    call("estimate", query.data_ptr(), *stored, TYPES.get(bounds.dtype, 0), *shape, scaling, width)
    return scores


def select(scores: Tensor, num_selected: int, keeps_first: bool) -> Tensor:
    """`reference.select` where the last of the P pages is the newest, of P ids at most."""
    *rows, num_pages = scores.shape
    ids = scores.new_empty(*rows, min(num_selected, num_pages), dtype=torch.int64)
    shape = (ids.shape[:-1].numel(), num_pages, ids.shape[-1])
    call("select", scores.data_ptr(), ids.data_ptr(), *shape, keeps_first)
    return ids


def attend(query: Tensor, keys: Tensor, values: Tensor, ids: Tensor | None, length: int, size: int, scaling: float):
    """`reference.attend` over the tokens of `ids` [B, Hkv, 1, K], each of which stands for `size` tokens, or over all."""
    batch_size, num_kv_heads, _, head_dim = keys.shape
    value_dim, num_heads, dtype = values.shape[-1], query.shape[1], query.dtype
    query = query.float().contiguous()
    output = query.new_empty(batch_size, num_heads, 1, value_dim)
    strides = (Number * 6)(*keys.stride()[:3], *values.stride()[:3])
    ids_at, num_ids = (None, 0) if ids is None else (ids.data_ptr(), ids.shape[-1])
    tensors = (query.data_ptr(), keys.data_ptr(), values.data_ptr(), ids_at, output.data_ptr(), TYPES[keys.dtype])
    shape = (batch_size, num_kv_heads, num_heads // num_kv_heads, head_dim, value_dim, num_ids, size, length)
    call("attend", *tensors, strides, *shape, scaling)
    return output.to(dtype)
