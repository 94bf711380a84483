// What the kernels share: loads, tensor core products, and the overlap of one kernel with the next.
//
// A lane of a warp has two coordinates in a product: group_idx = lane / 4 and quad_idx = lane % 4. Both operands of a
// 16x8x16 product hold 4 consecutive channels per lane where the instruction wants 2 and 2 that lie 8 apart. Channels
// are summed over, so their order is free, as long as it is the same in both. That makes 16 bytes straight from memory
// (8 channels of a row) one operand of two products, without a shuffle. 8-bit integers come by shared memory, whose
// loads deal them out as their product wants them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "params.h"

namespace hf_quest {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kChunk = 32;  // channels that the four lanes of a quad have together, and that share a scale

template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <typename T>
__device__ Pair<T> as_pair(uint32_t bits) {
    return *reinterpret_cast<Pair<T>*>(&bits);
}

template <typename P>
__device__ uint32_t as_bits(P pair) {
    return *reinterpret_cast<uint32_t*>(&pair);
}

template <typename T>
__device__ Pair<T> round_to_pair(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) {
        return __floats2half2_rn(low, high);
    } else {
        return __floats2bfloat162_rn(low, high);
    }
}

__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

constexpr float kLog2E = 1.44269504f;

// 2^exponent, and 0 where that is below 2^-126.
__device__ inline float power_of_two(float exponent) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
    return power;
}

// 16 or 8 bytes that this kernel reads once. Without a condition: a load that may be left out is waited for at once.
__device__ inline uint4 load_once(const uint4* source) {
    uint4 data;
    asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(data.x), "=r"(data.y), "=r"(data.z), "=r"(data.w)
                 : "l"(source));
    return data;
}

__device__ inline uint2 load_once(const uint2* source) {
    uint2 data;
    asm volatile("ld.global.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(data.x), "=r"(data.y) : "l"(source));
    return data;
}

// sums[16 x 8] += left[16 x 16] * right[16 x 8]. Of `sums` a lane holds row group_idx in 0 and 1, row group_idx + 8 in
// 2 and 3, both in the columns 2 * quad_idx and 2 * quad_idx + 1.
template <typename T>
__device__ void multiply_add(float (&sums)[4], uint32_t left0, uint32_t left1, uint32_t left2, uint32_t left3,
                             uint32_t right0, uint32_t right1) {
    if constexpr (std::is_same_v<T, __half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(left0), "r"(left1), "r"(left2), "r"(left3), "r"(right0), "r"(right1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(left0), "r"(left1), "r"(left2), "r"(left3), "r"(right0), "r"(right1));
    }
}

// The same of 8-bit integers: sums[16 x 8] += left[16 x 32] * right[32 x 8]. Of column group_idx of `right` a lane has
// the rows from 4 * quad_idx and from 16 + 4 * quad_idx, 4 of each; `left` is what load_matrices() gives.
__device__ inline void multiply_add(int (&sums)[4], uint4 left, uint2 right) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(left.x), "r"(left.y), "r"(left.z), "r"(left.w), "r"(right.x), "r"(right.y));
}

// The signs of four 16-bit floats, each in all bits of a byte.
__device__ inline unsigned spread_signs(uint32_t low_pair, uint32_t high_pair) {
    unsigned signs;
    asm("prmt.b32 %0, %1, %2, 0xfdb9;" : "=r"(signs) : "r"(low_pair), "r"(high_pair));
    return signs;
}

__device__ inline unsigned address_of(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// 16 rows of 32 bytes in shared memory, of which a lane gives the address of 16: of row lane % 16 the first ones, or
// from lane 16 on the second ones.
__device__ inline uint4 load_matrices(unsigned address) {
    uint4 data;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(data.x), "=r"(data.y), "=r"(data.z), "=r"(data.w)
                 : "r"(address));
    return data;
}

// Has a line brought to L2.
__device__ inline void prefetch(const void* source) { asm volatile("prefetch.global.L2 [%0];" ::"l"(source)); }

// Begins to copy 16 bytes to shared memory.
__device__ inline void copy_async(unsigned target, const void* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

// The same of what this kernel reads once: it is the first to leave L2. If nothing is there, zeros, for which nothing
// is read.
__device__ inline void copy_async_once(unsigned target, const void* source, bool is_there) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(target), "l"(source),
                 "r"(is_there ? 16 : 0), "l"(policy)
                 : "memory");
}

// Has these numbers be ready before what comes after is begun.
__device__ inline void finish(float4& numbers) {
    asm volatile("" : "+f"(numbers.x), "+f"(numbers.y), "+f"(numbers.z), "+f"(numbers.w));
}

// Makes a group of the copies that this thread began since the last one.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until no more than the last `kNumGroups` are on their way.
template <int kNumGroups>
__device__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kNumGroups) : "memory");
}

// Every thread of every kernel calls this before it touches global memory. Then no kernel ends, or changes anything,
// before all that came earlier in the stream has ended.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline Storage find(const Storage& storage) {
    const int64_t* addresses = storage.addresses;
    if (addresses == nullptr) return storage;
    return {reinterpret_cast<void*>(addresses[0]),    reinterpret_cast<void*>(addresses[1]),
            reinterpret_cast<void*>(addresses[2]),    reinterpret_cast<uint8_t*>(addresses[3]),
            reinterpret_cast<float*>(addresses[4]),   addresses[5],
            reinterpret_cast<uint8_t*>(addresses[6]), addresses};
}

// That of the storage.
__device__ inline Pool find_pool(const AttendParams& params) {
    const int64_t* addresses = params.storage.addresses;
    if (addresses == nullptr) return params.pool;
    return {reinterpret_cast<void*>(addresses[7]), reinterpret_cast<void*>(addresses[8]),
            reinterpret_cast<uint64_t*>(addresses[9]), reinterpret_cast<uint64_t*>(addresses[10]), addresses[11]};
}

__device__ inline int64_t count_pages(const Storage& storage, int page_size) {
    return (storage.capacity + page_size - 1) >> (__ffs(page_size) - 1);
}

// Tokens of a row, its padding left out.
__device__ inline int64_t count_tokens(const int64_t* length, const int64_t* padding, int row_idx, int64_t capacity) {
    const int64_t len = *length;
    return (len < capacity ? len : capacity) - padding[row_idx];
}

// Unsigned numbers, 1 or more, in the order of the scores; 0.0 and -0.0 are equal scores.
__device__ inline unsigned order_of(float score) {
    const unsigned bits = score == 0.0f ? 0u : __float_as_uint(score);
    return max(bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u), 1u);
}

// The sum of the values of the lanes up to this one.
__device__ inline int scan_warp(int value) {
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const int before = __shfl_up_sync(kWholeWarp, value, distance);
        if (threadIdx.x % kWarpSize >= distance) value += before;
    }
    return value;
}

template <typename N>
__host__ __device__ constexpr N ceil_div(N dividend, N divisor) {
    return (dividend + divisor - 1) / divisor;
}

template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int num_threads, size_t shared_bytes, const Params& params) {
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(num_threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = params.launch.stream;
    config.attrs = &overlap;
    config.numAttrs = params.launch.overlaps ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, params);
}

// Calls run(element, head_dim) with an element of the data type and the head dim as a constant.
template <typename Run>
cudaError_t for_head_dim(DataType data_type, int head_dim, Run run) {
    const auto with = [&](auto constant) {
        return data_type == DataType::kHalf ? run(__half(), constant) : run(__nv_bfloat16(), constant);
    };
    switch (head_dim) {
        case 64: return with(std::integral_constant<int, 64>());
        case 96: return with(std::integral_constant<int, 96>());
        case 128: return with(std::integral_constant<int, 128>());
        case 256: return with(std::integral_constant<int, 256>());
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace hf_quest
