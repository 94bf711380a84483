"""Memory that is there once and has several addresses: physical pieces, mapped into ranges of addresses as often as one
likes. Under Linux the system does so with its own memory, and CUDA's driver with that of a GPU.
"""

import ctypes
import functools
import mmap
import sys

import torch

from ..errors import QuestError
from . import host


@functools.cache
def memory_of(device):
    """What gives memory of a device several addresses, or None where nothing does."""
    kinds = {"cpu": OfSystem, "cuda": OfGPU}
    if sys.platform != "linux" or device.type not in kinds:
        return None
    try:
        memory = kinds[device.type](device)
        return memory if holds_once(memory) else None
    except QuestError:  # of too little memory, which may be another time
        raise
    except (OSError, AttributeError, RuntimeError):  # there is no such library or function, or something refuses
        return None


def holds_once(memory):
    """Whether what is written to one of two addresses of a piece can be read at the other."""
    with torch.inference_mode(False), torch.no_grad():
        piece = memory.new_piece(memory.granule)
        found = memory.mapped([[piece], [piece]], 2 * memory.granule, [piece]).view(5, -1)
        found.zero_()
        found[0, 3] = 7
        return found[:, 3].tolist() == [7, 0, 7, 0, 7]


POINTER, SIZE = ctypes.c_void_p, ctypes.c_size_t


class OfSystem:
    """The system's memory. What is not mapped from a piece takes memory where it is written to."""

    def __init__(self, device):
        self.device = device
        self.granule = max(mmap.PAGESIZE, 2**16)  # bytes; a page would do, and take as many mappings
        kind = ctypes.CFUNCTYPE(POINTER, POINTER, SIZE, SIZE, ctypes.c_int, POINTER, use_errno=True)
        self.mremap = kind(("mremap", ctypes.CDLL(None)))

    def new_piece(self, num_bytes):
        """Physical memory. It is freed when nobody refers to it and it has no address."""
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)

    def mapped(self, segments, segment_bytes, last):
        """uint8 of the device: segments of so many bytes, and the pieces `last`. Each segment begins with its pieces;
        what follows them there is memory of its own, undefined.

        Raises:
            OSError: where the system does not do so.
            QuestError: where there is not enough memory.
        """
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        memory = mmap.mmap(-1, len(segments) * segment_bytes + sum(map(len, last)), flags=flags)
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        for idx, pieces in enumerate([*segments, last]):
            address = tensor.data_ptr() + idx * segment_bytes
            for piece in pieces:
                # Of what several may see, a size of 0 asks for one more address. The range unmaps it with all the rest.
                found = self.mremap(address_of(piece), 0, len(piece), MAYMOVE | FIXED, address)
                if found != address:
                    raise OSError(ctypes.get_errno(), "mremap")
                address += len(piece)
        return tensor


MAYMOVE, FIXED = 1, 2  # of mremap


def address_of(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class AllocationFlags(ctypes.Structure):
    """CUmemAllocationProp.allocFlags."""

    _fields_ = (
        ("compressionType", ctypes.c_ubyte),
        ("gpuDirectRDMACapable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class AllocationProp(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("requestedHandleTypes", ctypes.c_int),
        ("location", Location),
        ("win32HandleMetaData", ctypes.c_void_p),
        ("allocFlags", AllocationFlags),
    )


class AccessDesc(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", ctypes.c_int))


ADDRESS = HANDLE = FLAGS = ctypes.c_ulonglong  # CUdeviceptr, CUmemGenericAllocationHandle
SIGNATURES = {  # of cuda.h
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGetAttribute": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int),
    "cuMemGetAllocationGranularity": (ctypes.POINTER(SIZE), ctypes.POINTER(AllocationProp), ctypes.c_int),
    "cuMemAddressReserve": (ctypes.POINTER(ADDRESS), SIZE, SIZE, ADDRESS, FLAGS),
    "cuMemAddressFree": (ADDRESS, SIZE),
    "cuMemCreate": (ctypes.POINTER(HANDLE), SIZE, ctypes.POINTER(AllocationProp), FLAGS),
    "cuMemRelease": (HANDLE,),
    "cuMemMap": (ADDRESS, SIZE, SIZE, HANDLE, FLAGS),
    "cuMemSetAccess": (ADDRESS, SIZE, ctypes.POINTER(AccessDesc), SIZE),
    "cuMemUnmap": (ADDRESS, SIZE),
}
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
SUPPORTED = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
PINNED = ON_DEVICE = 1  # CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_LOCATION_TYPE_DEVICE
MINIMUM, READ_AND_WRITE = 0, 3  # CU_MEM_ALLOC_GRANULARITY_MINIMUM, CU_MEM_ACCESS_FLAGS_PROT_READWRITE


class Piece:
    """Physical memory of a GPU, released when nobody refers to it; CUDA frees it when it has no address either."""

    def __init__(self, handle, num_bytes):
        self.handle, self.num_bytes = handle, num_bytes

    def __len__(self):
        return self.num_bytes


class OfGPU:
    """A GPU's memory, see `OfSystem`."""

    def __init__(self, device):
        self.device = device
        library = ctypes.CDLL("libcuda.so.1")
        kinds = {name: ctypes.CFUNCTYPE(ctypes.c_int, *types) for name, types in SIGNATURES.items()}
        self.functions = {name: kind((name, library)) for name, kind in kinds.items()}
        self.location = Location(ON_DEVICE, device.index)
        self.prop = AllocationProp(type=PINNED, location=self.location)
        self.access = AccessDesc(location=self.location, flags=READ_AND_WRITE)
        self.granule = self.find_granule()

    def find_granule(self):
        is_supported, granule = ctypes.c_int(), SIZE()
        self.call("cuInit", 0)
        self.call("cuDeviceGetAttribute", ctypes.byref(is_supported), SUPPORTED, self.device.index)
        if not is_supported.value:
            raise OSError(f"{self.device} has no virtual memory management")
        self.call("cuMemGetAllocationGranularity", ctypes.byref(granule), ctypes.byref(self.prop), MINIMUM)
        return granule.value

    def call(self, name, *arguments):
        status = self.functions[name](*arguments)
        if status == OUT_OF_MEMORY:
            raise QuestError(
                f"CUDA out of memory. {name} found none left on {self.device} for keys and values of rows that begin "
                "alike. Free some of it, or repeat fewer rows; hf-quest plan says how much a context takes."
            )
        if status:
            raise OSError(f"{name}: CUDA error {status}")

    def new_piece(self, num_bytes):
        host.release_waiting()
        piece = Piece(self.new_handle(num_bytes), num_bytes)
        release = functools.partial(self.call, "cuMemRelease", piece.handle)
        host.release_with(piece, None, release, self.device)
        return piece

    def new_handle(self, num_bytes):
        handle = HANDLE()
        self.call("cuMemCreate", ctypes.byref(handle), num_bytes, ctypes.byref(self.prop), 0)
        return handle.value

    def mapped(self, segments, segment_bytes, last):
        host.release_waiting()
        torch.cuda.empty_cache()  # what PyTorch keeps for later is no memory that the driver could give
        address, num_bytes, parts = ADDRESS(), len(segments) * segment_bytes + sum(map(len, last)), []
        self.call("cuMemAddressReserve", ctypes.byref(address), num_bytes, self.granule, 0, 0)
        unmap = functools.partial(self.unmap, address.value, num_bytes, parts)
        try:
            for idx, pieces in enumerate(segments):
                self.fill(address.value + idx * segment_bytes, segment_bytes, pieces, parts)
            self.fill(address.value + len(segments) * segment_bytes, 0, last, parts)
            self.call("cuMemSetAccess", address.value, num_bytes, ctypes.byref(self.access), 1)
        except BaseException:
            unmap()
            raise
        seen = host.SeenByGPU(address.value, num_bytes)
        host.release_with(seen, None, unmap, self.device)
        tensor = torch.as_tensor(seen, device=self.device)
        if tensor.data_ptr() != address.value:
            raise OSError("PyTorch copies what lies at such addresses")
        return tensor

    def fill(self, address, num_bytes, pieces, parts):
        """Map pieces one after the other, and memory of its own into what is left of so many bytes.

        `parts` gets the address and the size of each mapping.
        """
        end = address + num_bytes
        for piece in pieces:
            self.map(address, len(piece), piece.handle, parts)
            address += len(piece)
        if address < end:
            handle = self.new_handle(end - address)
            try:
                self.map(address, end - address, handle, parts)
            finally:
                self.call("cuMemRelease", handle)  # it stays as long as it is mapped

    def map(self, address, num_bytes, handle, parts):
        self.call("cuMemMap", address, num_bytes, 0, handle, 0)
        parts.append((address, num_bytes))

    def unmap(self, address, num_bytes, parts):
        for part in parts:
            self.call("cuMemUnmap", *part)
        self.call("cuMemAddressFree", address, num_bytes)
