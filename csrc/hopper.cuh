// What kernels of sm_90a are made of beside barriers: the bulk tensor copy engine, and products by a warpgroup.
//
// Matrices in shared memory are panels of 64 channels: rows of 128 bytes, of which the copy engine and the tensor cores
// both find 16 bytes at their place xor the row modulo 8. A panel begins at a multiple of 1024 bytes.
#pragma once

#include <cuda.h>

#include <initializer_list>

#include "barrier.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HF_QUEST_HAS_WARPGROUPS
#endif

namespace hf_quest {

constexpr int kWarpgroup = 4 * kWarpSize;
constexpr int kHeadDim = 128;
constexpr int kPanel = 64;  // channels of two bytes
constexpr int kPanels = kHeadDim / kPanel;

// One dimension of memory as the copy engine sees it, without the first, channels.
struct Dimension {
    int64_t size, stride;  // in elements
    int num_copied = 1;  // at a time
};

// Describes memory whose panels, 64 channels of the given tokens, the copy engine brings.
inline cudaError_t describe_tokens(CUtensorMap& map, DataType data_type, const void* tokens,
                                   std::initializer_list<Dimension> dimensions) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) return error;
    if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
    constexpr int kMostDimensions = 5;
    cuuint64_t sizes[kMostDimensions] = {kHeadDim}, strides[kMostDimensions - 1];
    cuuint32_t box[kMostDimensions] = {kPanel}, steps[kMostDimensions] = {1, 1, 1, 1, 1};
    int rank = 1;
    for (const Dimension& dimension : dimensions) {
        sizes[rank] = dimension.size;
        box[rank] = dimension.num_copied;
        strides[rank++ - 1] = 2 * dimension.stride;
    }
    const auto type = data_type == DataType::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const CUresult status =
        encode(&map, type, rank, const_cast<void*>(tokens), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Launches a kernel with a `Shared` in its shared memory, where shared_as() finds it.
template <typename Shared, typename Arguments>
cudaError_t launch_with_shared(void (*kernel)(Arguments), dim3 grid, int num_threads, cudaStream_t stream,
                               const Arguments& arguments) {
    constexpr int kBytes = sizeof(Shared) + alignof(Shared);  // to begin at a multiple of it
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
    kernel<<<grid, num_threads, kBytes, stream>>>(arguments);
    return cudaGetLastError();
}

template <typename Shared>
__device__ Shared& shared_as(uint8_t* bytes) {
    constexpr uintptr_t kMultiple = alignof(Shared);
    return *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(bytes) + kMultiple - 1) / kMultiple * kMultiple);
}

#ifdef HF_QUEST_HAS_WARPGROUPS

// Until the phase of that parity has ended.
__device__ inline void wait_for(uint64_t& barrier, int parity) {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "again: mbarrier.try_wait.parity.shared.b64 ended, [%0], %1;\n"
        "@ended bra done;\nbra again;\ndone:\n}" ::"r"(address_of(&barrier)),
        "r"(parity)
        : "memory");
}

// Begins to copy a panel: channels from `channel`, tokens from `token`, of `head`.
__device__ inline void copy_panel(void* target, const CUtensorMap& map, int channel, int token, int head,
                                  uint64_t& barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
            "r"(address_of(target)),
        "l"(&map), "r"(channel), "r"(token), "r"(head), "r"(address_of(&barrier))
        : "memory");
}

// The same of memory with two dimensions more, after channels, of which all is copied.
__device__ inline void copy_dealt_panel(void* target, const CUtensorMap& map, int channel, int token, int head,
                                        uint64_t& barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %3, %4, %5}], [%6];" ::"r"(address_of(target)),
        "l"(&map), "r"(channel), "r"(0), "r"(token), "r"(head), "r"(address_of(&barrier))
        : "memory");
}

// Where in a ring of stages a warp is, each with barriers whose parity turns at every round.
template <int kStages>
struct Place {
    int stage = 0, parity = 0;

    __device__ void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

// What this thread wrote to shared memory is there for the copy engine, and what it read may be overwritten by it.
__device__ inline void fence_for_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int kNumRegisters>
__device__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kNumRegisters));
}

template <int kNumRegisters>
__device__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kNumRegisters));
}

__device__ inline void synchronize(int barrier_idx, int num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier_idx), "r"(num_threads) : "memory");
}

__device__ inline void arrive(int barrier_idx, int num_threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier_idx), "r"(num_threads) : "memory");
}

// A matrix for the tensor cores, whose groups of 8 rows follow each other. Of one that is read across its rows,
// `panel_bytes` is the way from a panel to the next.
__device__ inline uint64_t describe_matrix(const void* matrix, int panel_bytes = 16) {
    constexpr uint64_t kGroupBytes = 8 * 128, kSwizzle128 = 1;
    return (address_of(matrix) & 0x3ffffu) >> 4 | uint64_t(panel_bytes >> 4) << 16 | (kGroupBytes >> 4) << 32 |
           kSwizzle128 << 62;
}

// The same some bytes further on, and fewer instructions than describe_matrix().
__device__ inline uint64_t advance(uint64_t matrix, int num_bytes) { return matrix + (num_bytes >> 4); }

// Known to be the same for all of a warp, which the compiler does not see of threadIdx.
__device__ inline int warpgroup_idx() { return __shfl_sync(kWholeWarp, threadIdx.x / kWarpgroup, 0); }

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until no more than the last `kNumGroups` are under way.
template <int kNumGroups>
__device__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNumGroups) : "memory");
}

// The registers of a product under way may not be touched: tells the compiler that they change here.
template <int kSize>
__device__ void pin(float (&registers)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// A branch on a sum of weights that is never taken. Without it the assembler waits for products first, and computes
// afterwards what was meant to be computed meanwhile.
__device__ inline void finish_first(float sum) {
    asm volatile("{\n.reg .pred never;\nsetp.lt.f32 never, %0, 0f00000000;\n@never nanosleep.u32 1;\n}" ::"f"(sum)
                 : "memory");
}

#define HF_QUEST_64(x) HF_QUEST_16(x, 0), HF_QUEST_16(x, 16), HF_QUEST_16(x, 32), HF_QUEST_16(x, 48)
#define HF_QUEST_16(x, i) HF_QUEST_4(x, i), HF_QUEST_4(x, i + 4), HF_QUEST_4(x, i + 8), HF_QUEST_4(x, i + 12)
#define HF_QUEST_4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define HF_QUEST_SUMS                                                                             \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "  \
    "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "  \
    "%56, %57, %58, %59, %60, %61, %62, %63}, "

// sums[64 x 128] = or += left[64 x 16] * right[128 x 16]^T, both in shared memory. Of `sums` a thread holds, for each 8
// columns, four: the rows group_idx and group_idx + 8 of its warp's 16, columns 2 * quad_idx and the next, as in
// multiply_add() of warps.
template <typename T>
__device__ void multiply(float (&sums)[64], uint64_t left, uint64_t right, bool adds) {
#define HF_QUEST_MULTIPLY(type)                                                        \
    asm volatile(                                                                      \
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, %66, 0;\n"                             \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " HF_QUEST_SUMS \
        "%64, %65, adds, 1, 1, 0, 0;\n}"                                               \
        : HF_QUEST_64(sums)                                                            \
        : "l"(left), "l"(right), "r"(int(adds)))
    if constexpr (std::is_same_v<T, __half>) {
        HF_QUEST_MULTIPLY("f16");
    } else {
        HF_QUEST_MULTIPLY("bf16");
    }
#undef HF_QUEST_MULTIPLY
}

// logits[64 x 128] = queries[64 x 128] * keys[128 x 128]^T, begun; panels are so many bytes apart.
template <typename T, int kQueryPanelBytes, int kKeyPanelBytes>
__device__ void begin_logits(float (&logits)[64], uint64_t queries, uint64_t keys) {
    constexpr int kSteps = kPanel / 16;  // of a panel
    begin_products();
#pragma unroll
    for (int step = 0; step < 2 * kSteps; ++step) {
        const int panel = step / kSteps, offset = step % kSteps * 32;
        multiply<T>(logits, advance(queries, panel * kQueryPanelBytes + offset),
                    advance(keys, panel * kKeyPanelBytes + offset), step > 0);
    }
    commit_products();
}

// sums[64 x 128] += left[64 x 16] * right[16 x 128], left in registers, right in shared memory, read across its rows.
template <typename T>
__device__ void multiply_add_across(float (&sums)[64], const uint32_t (&left)[4], uint64_t right) {
#define HF_QUEST_MULTIPLY(type)                                                                 \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " HF_QUEST_SUMS \
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                       \
                 : HF_QUEST_64(sums)                                                            \
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right))
    if constexpr (std::is_same_v<T, __half>) {
        HF_QUEST_MULTIPLY("f16");
    } else {
        HF_QUEST_MULTIPLY("bf16");
    }
#undef HF_QUEST_MULTIPLY
}

#undef HF_QUEST_SUMS
#undef HF_QUEST_4
#undef HF_QUEST_16
#undef HF_QUEST_64

#endif  // HF_QUEST_HAS_WARPGROUPS

}  // namespace hf_quest
