"""The stages of a decode step on a CPU by csrc/cpu_step.cpp, which `build` compiles. What they mean is in `reference`.

They are for one query per row in rows without padding, as those of `cpu`, which takes over where these do not serve.
"""

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_double as Float
from ctypes import c_int64 as Number
from ctypes import c_void_p as Address
from typing import Any

import torch
from torch import Tensor

from . import build

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MULTIPLE, MAX_DIM, MAX_GROUP = 16, 1024, 128  # of head dims, and query heads of a KV head


def struct(addresses: str, numbers: str, floats: str = "", strides: str = "", has_threads: bool = True):
    """One of csrc/cpu_step.cpp, by the names of its members, in their order."""
    fields: list[tuple[str, Any]] = [(name, Address) for name in addresses.split()]
    fields += [(name, Number) for name in numbers.split()]
    fields += [(name, Number * 3) for name in strides.split()]
    fields += [(name, Float) for name in floats.split()]
    fields += [("fork", Address), ("num_threads", Number)] if has_threads else []
    return type("Struct", (ctypes.Structure,), {"_fields_": fields})


STRUCTS = {
    "bound": struct("keys bounds scales", "type num_rows head_dim capacity page_size page", has_threads=False),
    "estimate": struct(
        "query bounds scales scores", "type num_rows group_size head_dim num_pages capacity", "scaling width"
    ),
    "select": struct("scores ids", "num_rows num_pages num_selected keeps_first"),
    "attend": struct(
        "query keys values ids output",
        "type batch_size num_kv_heads group_size head_dim value_dim num_ids size length",
        "scaling",
        "key_strides value_strides",
    ),
}


@functools.cache
def functions():
    """(the functions of the library by name, the address by which they reach PyTorch's threads), or None."""
    library = build.load_for_cpu()
    if library is None:
        return None
    kind = ctypes.CFUNCTYPE(None, Address)
    fork = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, Address).value
    return {name: kind((f"hf_quest_{name}", library)) for name in STRUCTS}, fork


def call(name, *members):
    found, fork = functions()
    threads = () if name == "bound" else (fork, torch.get_num_threads())
    found[name](ctypes.byref(STRUCTS[name](*members, *threads)))


def serves(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `attend` is for a query, [B, Hq, 1, D], these keys and values; and the other stages for their layer."""
    head_dim, value_dim = keys.shape[-1], values.shape[-1]
    return (
        keys.dtype in TYPES
        and values.dtype is keys.dtype
        and not (head_dim % MULTIPLE or value_dim % MULTIPLE)
        and 0 < head_dim <= MAX_DIM
        and 0 < value_dim <= MAX_DIM
        and query.shape[1] <= MAX_GROUP * keys.shape[1]
        and is_in_rows(query)
        and is_in_rows(keys)
        and is_in_rows(values)
        and functions() is not None
    )


def is_in_rows(tensor):
    """Whether a tensor is rows of numbers of the CPU, and no stand-in of a tracer."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.stride(-1) == 1


def with_gradients(output: Tensor, inputs: tuple[Tensor, ...], compute: Callable[[], Tensor]) -> Tensor:
    """`output`, which has no gradients, with those of the same from PyTorch's operators where an input gets some."""
    if not torch.is_grad_enabled() or not any(each.requires_grad for each in inputs):
        return output
    same = compute()
    return output + (same - same.detach())


def bound(keys: Tensor, bounds: Tensor, scales: Tensor, page: int, page_size: int) -> None:
    """`reference.refresh_bounds` of one full page of every row, for bounds in 8 bits."""
    assert all(tensor.is_contiguous() for tensor in (keys, bounds, scales)), "storage is contiguous"
    batch_size, num_kv_heads, capacity, _, head_dim = bounds.shape
    where = (batch_size * num_kv_heads, head_dim, capacity, page_size, page)
    call("bound", keys.data_ptr(), bounds.data_ptr(), scales.data_ptr(), TYPES[keys.dtype], *where)


def estimate(query: Tensor, bounds: Tensor, scales: Tensor | None, num_pages: int, scaling: float, width: float):
    """`reference.estimate` of the first `num_pages`, where the query heads agree by their largest score.

    Args:
        bounds: [B, Hkv, capacity / S, 2, D]. scales: [B, Hkv, capacity / S, D / 32] or None.
    """
    batch_size, num_kv_heads, capacity, _, head_dim = bounds.shape
    query, bounds = query.float().contiguous(), bounds.contiguous()
    scores = query.new_empty(batch_size, num_kv_heads, 1, num_pages)
    scales = None if scales is None else scales.contiguous()
    of_scales, kind = (None, TYPES[bounds.dtype]) if scales is None else (scales.data_ptr(), 0)
    tensors = (query.data_ptr(), bounds.data_ptr(), of_scales, scores.data_ptr())
    shape = (batch_size * num_kv_heads, query.shape[1] // num_kv_heads, head_dim, num_pages, capacity)
    call("estimate", *tensors, kind, *shape, scaling, width)
    return scores


def select(scores: Tensor, num_selected: int, keeps_first: bool) -> Tensor:
    """`reference.select` where the last of the P pages is the newest, of P ids at most."""
    *rows, num_pages = scores.shape
    ids = scores.new_empty(*rows, min(num_selected, num_pages), dtype=torch.int64)
    call(
        "select", scores.data_ptr(), ids.data_ptr(), scores.numel() // num_pages, num_pages, ids.shape[-1], keeps_first
    )
    return ids


def attend(query: Tensor, keys: Tensor, values: Tensor, ids: Tensor | None, length: int, size: int, scaling: float):
    """`reference.attend` over what `ids` [B, Hkv, 1, K] name, each of which stands for `size` tokens, or over all."""
    batch_size, num_kv_heads, _, head_dim = keys.shape
    value_dim, num_heads, dtype = values.shape[-1], query.shape[1], query.dtype
    query, ids = query.float().contiguous(), None if ids is None else ids.contiguous()
    output = query.new_empty(batch_size, num_heads, 1, value_dim)
    of_ids, num_ids = (None, 0) if ids is None else (ids.data_ptr(), ids.shape[-1])
    tensors = (query.data_ptr(), keys.data_ptr(), values.data_ptr(), of_ids, output.data_ptr())
    shape = (batch_size, num_kv_heads, num_heads // num_kv_heads, head_dim, value_dim, num_ids, size, length)
    call("attend", *tensors, TYPES[keys.dtype], *shape, keys.stride()[:3], values.stride()[:3], scaling)
    return output.to(dtype)
