"""Host memory that tensors of a GPU lie in: its kernels read and write there in place, in the order of their stream.

Such a tensor is one of the GPU to whoever uses it, and takes nothing of its memory. Blocks of pages are registered with
CUDA, so that they take what was asked for, while PyTorch's own pinned memory comes in powers of two. Tensors of the CPU
lie in blocks of their own, too, so that it can be told where there is no GPU what has stayed in its place.
"""

import contextlib
import ctypes
import math
import mmap
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..errors import QuestError

SHARED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped
NUM_THREADS = 8
blocks: dict[int, int] = {}  # bytes of those that are there, by address
waiting: list[tuple] = []  # what could not be released while a graph was recorded


def empty(shape, dtype, device, spare=()):
    """A tensor of a device, in host memory: in one of the blocks `spare`, which is taken out, or in a new one.

    Raises:
        QuestError: for a device whose kernels cannot reach it, and where there is none to be had.
    """
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    num_elements = math.prod(shape)
    num_bytes = max(num_elements, 1) * dtype.itemsize
    release_waiting()
    fitting = [idx for idx, block in enumerate(spare) if (len(block), block.device) == (num_bytes, device)]
    block = spare.pop(fitting[0]) if fitting else new_block(num_bytes, device)
    with torch.inference_mode(False):  # or it could not be written outside of it
        return block[: num_elements * dtype.itemsize].view(dtype).view(shape)


def new_blocks(sizes, device):
    """Blocks of so many bytes, all of them or an error. Pinning takes long, and is done side by side."""
    release_waiting()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(lambda num_bytes: new_block(num_bytes, device), sizes))


def new_block(num_bytes, device):
    """[num_bytes] uint8 of a device, in host memory of its own."""
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and sys.platform != "linux"):
        raise QuestError(
            f"offloading=True is for NVIDIA GPUs under Linux, whose kernels read host memory in place, and this model "
            f"is on {device}. Use a cache without it."
        )
    check_room(num_bytes)
    with torch.inference_mode(False):
        block = block_of_cpu(num_bytes) if device.type == "cpu" else block_of_gpu(num_bytes, device)
        address = block.data_ptr()
        blocks[address] = num_bytes
        weakref.finalize(block.untyped_storage(), blocks.pop, address, None).atexit = False
        return block


def holds(tensor):
    """Whether a tensor lies in such memory."""
    return tensor.device.type != "meta" and tensor.untyped_storage().data_ptr() in blocks


def seen_by_cpu(tensor, waits=True):
    """A tensor of the CPU in the same memory, which has to outlive it.

    With `waits` once the GPU has done what it was to do there; without it is for copies in the order of its stream.
    """
    if tensor.device.type != "cuda":
        return tensor
    if waits:
        torch.cuda.synchronize(tensor.device)
    storage = tensor.untyped_storage()
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=tensor.dtype)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def copied(tensor, device):
    """A tensor of a device in host memory of its own, with the content of one of the CPU."""
    copy = empty(tensor.shape, tensor.dtype, device)
    seen_by_cpu(copy).copy_(tensor)
    return copy


def check_room(num_bytes, num_present=0):
    """Raise if there is not so much host memory to be had, beside what is there already."""
    room = available()
    if num_bytes - num_present > room:
        raise no_memory(num_bytes, f"of which {max(0, int(room)) + num_present:,} can be had")


def no_memory(num_bytes, reason):
    return QuestError(
        f"Keys and values of a cache with offloading=True take {num_bytes:,} bytes of host memory, {reason}. Free some "
        "of it, give the process more, read less text, or take a cache without offloading if it fits the GPU. What the "
        "cache held is unchanged, and hf-quest plan says how much a context takes."
    )


def available():
    """Bytes of host memory that can be had, by what the system and the process's control group say."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        return min(free, *(left_of_group(*names) for names in GROUPS))
    return math.inf


GROUPS = (  # files of the limit, of the use, and what of it is given up when others need it
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def left_of_group(limit, use, statistics, spare, folder=Path("/sys/fs/cgroup")):
    """What a control group has left, by the names of its files."""
    with contextlib.suppress(OSError, ValueError):
        limit, use = (int((folder / name).read_text()) for name in (limit, use))  # or "max"
        lines = (line.split() for line in (folder / statistics).read_text().splitlines())
        return limit - use + int(dict(lines).get(spare, 0))
    return math.inf


def block_of_cpu(num_bytes):
    """[num_bytes] uint8 in whole pages of the system that nothing else lies in."""
    try:
        memory = mmap.mmap(-1, num_bytes, **PRIVATE)
    except (OSError, ValueError, OverflowError) as error:
        raise no_memory(num_bytes, f"which the system does not give: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # not every system has them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


def block_of_gpu(num_bytes, device):
    """The same as a tensor of a GPU."""
    memory, unpin = registered(num_bytes, device)
    seen = SeenByGPU(memory.data_ptr(), num_bytes)
    release_with(seen, memory, unpin, device)
    return torch.as_tensor(seen, device=device)


class SeenByGPU:
    """Host memory as `torch.as_tensor` takes memory of a GPU; it is referred to as long as the tensor is there."""

    def __init__(self, address, num_bytes):
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def registered(num_bytes, device):
    """(uint8 of the CPU that the GPU can reach, what is called before its memory is freed)."""
    runtime, memory = torch.cuda.cudart(), block_of_cpu(num_bytes)
    address = memory.zero_().data_ptr()  # in all threads: one by itself, CUDA's, takes much longer to have pages made
    with torch.cuda.device(device):
        status = int(runtime.cudaHostRegister(address, num_bytes, SHARED))
        if not status:
            return memory, lambda: runtime.cudaHostUnregister(address)
        del memory
        with contextlib.suppress(RuntimeError):  # a launch tells of the error, of which nothing is known then
            torch.zeros(1, dtype=torch.uint8, device=device)
        try:  # a driver that registers none may give some of its own, in powers of two
            return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True), lambda: None
        except RuntimeError as error:
            raise no_memory(num_bytes, f"which CUDA cannot pin (error {status}): {error}") from error


def release_with(owner, memory, unpin, device):
    """Have memory that a GPU reaches given back when its owner is gone, by a call of `unpin`."""
    weakref.finalize(owner, release, memory, unpin, device).atexit = False


def release_waiting():
    while waiting and not torch.cuda.is_current_stream_capturing():
        release(*waiting.pop())


def release(memory, unpin, device):
    """Give memory back once the GPU has done with it."""
    if torch.cuda.is_current_stream_capturing():
        waiting.append((memory, unpin, device))
        return
    torch.cuda.synchronize(device)
    with torch.cuda.device(device):
        unpin()
