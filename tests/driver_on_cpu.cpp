// The part of CUDA's driver that maps memory several times, by cuda.h, with a CPU's memory in the place of a GPU's.
// It refuses what the documentation of CUDA forbids, and counts what is not given back.
#include <cuda.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>

namespace {

constexpr size_t kGranule = 1 << 16;
struct Handle {
    int file;
    size_t size;
};
struct Mapping {
    size_t size;
    bool is_accessible;
};
std::map<CUmemGenericAllocationHandle, Handle> handles;
std::map<CUdeviceptr, size_t> ranges;
std::map<CUdeviceptr, Mapping> mappings;
CUmemGenericAllocationHandle next_handle = 1ull << 40;  // which no 32 bits hold
size_t room = ~size_t(0);                               // bytes that can be created
bool is_initialised = false;

bool is_whole(size_t size) { return size > 0 && size % kGranule == 0; }

bool is_valid(const CUmemAllocationProp& prop) {
    return prop.type == CU_MEM_ALLOCATION_TYPE_PINNED && prop.requestedHandleTypes == CU_MEM_HANDLE_TYPE_NONE &&
           prop.location.type == CU_MEM_LOCATION_TYPE_DEVICE && prop.location.id == 3 &&
           prop.win32HandleMetaData == nullptr && prop.allocFlags.compressionType == 0 &&
           prop.allocFlags.gpuDirectRDMACapable == 0 && prop.allocFlags.usage == 0;
}

bool is_reserved(CUdeviceptr address, size_t size) {
    auto range = ranges.upper_bound(address);
    return range != ranges.begin() && (--range, address + size <= range->first + range->second);
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned int flags) {
    is_initialised = flags == 0;
    return is_initialised ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    if (attribute != CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED || device != 3)
        return CUDA_ERROR_INVALID_VALUE;
    *value = 1;
    return is_initialised ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

CUresult cuMemGetAllocationGranularity(size_t* granule, const CUmemAllocationProp* prop,
                                       CUmemAllocationGranularity_flags option) {
    if (!is_valid(*prop) || option != CU_MEM_ALLOC_GRANULARITY_MINIMUM) return CUDA_ERROR_INVALID_VALUE;
    *granule = kGranule;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* address, size_t size, size_t alignment, CUdeviceptr hint,
                             unsigned long long flags) {
    if (!is_whole(size) || alignment != kGranule || hint != 0 || flags != 0) return CUDA_ERROR_INVALID_VALUE;
    void* found = mmap(nullptr, size + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    *address = (CUdeviceptr(found) + alignment - 1) / alignment * alignment;
    ranges[*address] = size;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
    auto range = ranges.find(address);
    auto mapping = mappings.lower_bound(address);
    bool is_mapped = mapping != mappings.end() && mapping->first < address + size;
    if (range == ranges.end() || range->second != size || is_mapped) return CUDA_ERROR_INVALID_VALUE;
    ranges.erase(range);
    munmap((void*)address, size);
    return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size, const CUmemAllocationProp* prop,
                     unsigned long long flags) {
    if (!is_whole(size) || !is_valid(*prop) || flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if (size > room) return CUDA_ERROR_OUT_OF_MEMORY;
    int file = memfd_create("piece", 0);
    if (file < 0 || ftruncate(file, size) != 0) return CUDA_ERROR_OUT_OF_MEMORY;
    room -= size;
    handles[*handle = next_handle++] = {file, size};
    return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    auto found = handles.find(handle);
    if (found == handles.end()) return CUDA_ERROR_INVALID_VALUE;
    close(found->second.file);
    handles.erase(found);
    return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
    auto found = handles.find(handle);
    auto next = mappings.lower_bound(address);
    bool is_free = next == mappings.end() || next->first >= address + size;
    if (next != mappings.begin()) {
        auto before = std::prev(next);
        is_free = is_free && before->first + before->second.size <= address;
    }
    if (found == handles.end() || size != found->second.size || address % kGranule || offset != 0 || flags != 0 ||
        !is_reserved(address, size) || !is_free)
        return CUDA_ERROR_INVALID_VALUE;
    if (mmap((void*)address, size, PROT_NONE, MAP_SHARED | MAP_FIXED, found->second.file, 0) == MAP_FAILED)
        return CUDA_ERROR_OUT_OF_MEMORY;
    mappings[address] = {size, false};
    return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc* access, size_t count) {
    if (count != 1 || access->location.type != CU_MEM_LOCATION_TYPE_DEVICE || access->location.id != 3 ||
        access->flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        return CUDA_ERROR_INVALID_VALUE;
    for (CUdeviceptr at = address; at < address + size; at += mappings[at].size) {
        if (!mappings.count(at) || at + mappings[at].size > address + size) return CUDA_ERROR_INVALID_VALUE;
        mappings[at].is_accessible = true;
    }
    return mprotect((void*)address, size, PROT_READ | PROT_WRITE) == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
    auto found = mappings.find(address);
    if (found == mappings.end() || found->second.size != size) return CUDA_ERROR_INVALID_VALUE;
    mappings.erase(found);
    mmap((void*)address, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return CUDA_SUCCESS;
}

// For the tests.
void limit(size_t num_bytes) { room = num_bytes; }
size_t created(size_t num_bytes) { return num_bytes - room; }
size_t left() { return handles.size() + ranges.size() + mappings.size(); }
}
