"""How memory is mapped several times by CUDA's driver: against cuda.h, and a driver whose memory is a CPU's.

The tests with a GPU are in test_shared_gpu.py.
"""

import ctypes
import gc
import subprocess
from pathlib import Path

import pytest
import torch
from on_cpu import needs_nvcc

from hf_quest import QuestError
from hf_quest.storage import Rows, host, mapped, shared
from hf_quest.storage.pages import Pages

pytestmark = needs_nvcc

GPU = torch.device("cuda", 3)
ENOUGH = 2**30


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = Path(__file__).parent / "driver_on_cpu.cpp"
    flags = ["-x", "c++", "-std=c++20", "-shared", "-Xcompiler", "-fPIC", "-cudart", "none"]
    subprocess.run(["nvcc", *flags, "-o", path, source], check=True)
    return path


@pytest.fixture
def driver(library, monkeypatch):
    """A driver whose memory is a CPU's; afterwards all of it was given back."""
    open_library = ctypes.CDLL
    counting = open_library(library)
    counting.limit.argtypes, counting.created.argtypes = (ctypes.c_size_t,), (ctypes.c_size_t,)
    counting.created.restype = counting.left.restype = ctypes.c_size_t
    counting.limit(ENOUGH)
    monkeypatch.setattr(ctypes, "CDLL", lambda name, *options: open_library(library if name else name, *options))
    monkeypatch.setattr(torch, "as_tensor", seen_by_cpu)
    monkeypatch.setattr(host, "release", lambda memory, unpin, device: unpin())
    mapped.memory_of.cache_clear()
    yield counting
    gc.collect()
    mapped.memory_of.cache_clear()
    assert counting.left() == 0


def seen_by_cpu(seen, device):
    """A tensor of the CPU where that of a GPU would be; it is referred to by its own memory."""
    (num_bytes,), (address, _) = seen.__cuda_array_interface__["shape"], seen.__cuda_array_interface__["data"]
    memory = (ctypes.c_char * num_bytes).from_address(address)
    memory.seen = seen
    return torch.frombuffer(memory, dtype=torch.uint8)


def test_structs_are_as_long_as_in_cuda_h(tmp_path):
    program = tmp_path / "sizes"
    lines = ["#include <cuda.h>", "#include <cstdio>", "#include <cstddef>", 'int main() { printf("']
    names = ("CUmemLocation", "CUmemAllocationProp", "CUmemAccessDesc", "CUdeviceptr", "CUmemGenericAllocationHandle")
    offsets = ("location", "win32HandleMetaData", "allocFlags")
    lines[-1] += "%zu " * (len(names) + len(offsets)) + '", '
    lines[-1] += ", ".join(f"sizeof({name})" for name in names) + ", "
    lines[-1] += ", ".join(f"offsetof(CUmemAllocationProp, {name})" for name in offsets) + "); }"
    (tmp_path / "sizes.cpp").write_text("\n".join(lines))
    subprocess.run(["nvcc", "-x", "c++", "-cudart", "none", "-o", program, tmp_path / "sizes.cpp"], check=True)
    sizes = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    mine = (mapped.Location, mapped.AllocationProp, mapped.AccessDesc, mapped.ADDRESS, mapped.HANDLE)
    found = [ctypes.sizeof(each) for each in mine] + [getattr(mapped.AllocationProp, name).offset for name in offsets]
    assert found == [int(size) for size in sizes]


def test_a_piece_is_seen_at_all_its_addresses(driver):
    memory = mapped.memory_of(GPU)
    assert isinstance(memory, mapped.OfGPU)
    piece, other = (memory.new_piece(2 * memory.granule) for _ in range(2))
    created = driver.created(ENOUGH)
    segments = memory.mapped([[piece, other], [piece], [other, piece]], 5 * memory.granule, [other])
    assert driver.created(ENOUGH) - created == (1 + 3 + 1) * memory.granule  # what each has of its own
    units = segments.view(17, memory.granule)
    units.zero_()
    units[0, 5], units[10, 7], units[14, 9] = 1, 2, 3
    assert units[:, 5].nonzero().flatten().tolist() == [0, 5, 12]
    assert units[:, 7].nonzero().flatten().tolist() == [2, 10, 15]
    assert units[:, 9].nonzero().flatten().tolist() == [14]


@pytest.mark.parametrize("num_there", range(6))
def test_what_runs_out_is_said_and_all_is_given_back(driver, num_there):
    memory = mapped.memory_of(GPU)
    driver.limit(num_there * memory.granule)

    def ask():
        piece = memory.new_piece(memory.granule)
        memory.mapped([[piece]] * 5, 2 * memory.granule, [])

    with pytest.raises(QuestError, match="CUDA out of memory"):
        ask()


def test_a_driver_that_refuses_is_not_used(driver, monkeypatch):
    monkeypatch.setattr(mapped, "READ_AND_WRITE", 1)
    assert mapped.memory_of(GPU) is None


def test_rows_that_begin_alike(driver, monkeypatch):
    """As on a GPU, what rows have in common is created once, and a unit for what each has of its own."""
    memory = mapped.memory_of(GPU)
    monkeypatch.setattr(shared, "memory_of", lambda device: memory)
    monkeypatch.setattr(memory, "device", torch.device("cpu"))
    pages = Pages(Rows(), None, 16, 16)
    new = torch.randn(1, 2, 3000, 64)
    pages.begin_rows((0,))
    pages.append(new, new + 1)
    before = driver.created(ENOUGH)
    pages.select_rows(torch.zeros(8, dtype=torch.int64))
    num_units = -(-3000 // pages.prefix.unit)
    # Of keys and of values, in two heads; that each row has one is enough for SPARE tokens.
    assert driver.created(ENOUGH) - before == 2 * 2 * (num_units + 8) * memory.granule
    pages.append(torch.full((8, 2, 5, 64), 2.0), torch.full((8, 2, 5, 64), 3.0))
    assert torch.equal(pages.keys[:, :, :3000], new.expand(8, -1, -1, -1))
    assert torch.equal(pages.values[:, :, :3000], new.expand(8, -1, -1, -1) + 1)
    assert pages.keys[:, :, 3000:3005].eq(2).all()
    pages.crop(10)
    pages.make_room(11)
    assert pages.prefix is None
