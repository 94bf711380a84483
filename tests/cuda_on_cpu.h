// What kernels use of CUDA, with the threads of a block as fibers, which take turns on the CPU. Built with
// -fsanitize=thread,bounds a program ends at a race, and at an index that is too large, which a GPU may well get away
// with.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "fibers.h"

using std::max, std::min;

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// A GPU does not publish, with the values that go from lane to lane, what lanes wrote; but what depends on those values
// comes after what the lanes read, which the sanitizer would have to know.
inline bool do_exchanges_publish = true;

template <int kLanes>
struct Lanes {
    FiberBarrier barrier;
    unsigned num_exchanges[kLanes] = {}, values[2][6][kLanes] = {};  // in turn

    template <int kNum>
    UNWATCHED const unsigned (&exchange(const std::array<unsigned, kNum>& own))[6][kLanes] {
        const int lane_idx = threadIdx.x % kLanes, turn = num_exchanges[lane_idx]++ % 2;
        for (int i = 0; i < kNum; ++i) values[turn][i][lane_idx] = own._M_elems[i];
        barrier.arrive_and_wait(do_exchanges_publish);
        return values[turn];
    }
};

struct Block {
    FiberBarrier barrier;
    std::array<Lanes<32>, 32> warps;
    std::array<Lanes<4>, 256> quads;
};
inline std::vector<Block> blocks;  // of a cluster
inline bool is_cluster = false;

UNWATCHED inline Block& own_block() { return blocks.data()[fibers.current->block_idx]; }
UNWATCHED inline Lanes<32>& own_warp() { return (&own_block().warps._M_elems)[0][threadIdx.x / 32]; }
UNWATCHED inline Lanes<4>& own_quad() { return (&own_block().quads._M_elems)[0][threadIdx.x / 4]; }

inline void __syncthreads() { own_block().barrier.arrive_and_wait(); }
inline void __syncwarp() { own_warp().barrier.arrive_and_wait(); }

// The values of all lanes, or of the four of a quad, as `lanes` says.
UNWATCHED inline std::array<unsigned, 32> exchange(unsigned value, unsigned lanes = ~0u) {
    std::array<unsigned, 32> values = {};
    if (lanes == ~0u) {
        const auto& of_lanes = own_warp().exchange<1>({value});
        for (int i = 0; i < 32; ++i) values._M_elems[i] = of_lanes[0][i];
    } else {
        const auto& of_lanes = own_quad().exchange<1>({value});
        const int first = threadIdx.x % 32 / 4 * 4;
        for (int i = 0; i < 4; ++i) values._M_elems[first + i] = of_lanes[0][i];
    }
    return values;
}

template <typename Value>
Value __shfl_sync(unsigned lanes, Value value, int lane_idx) {
    if constexpr (std::is_integral_v<Value>) {
        return Value(exchange(unsigned(value), lanes).at(lane_idx));
    } else {
        return std::bit_cast<Value>(exchange(std::bit_cast<unsigned>(value), lanes).at(lane_idx));
    }
}

template <typename Value>
Value __shfl_xor_sync(unsigned lanes, Value value, int mask) {
    return std::bit_cast<Value>(exchange(std::bit_cast<unsigned>(value), lanes)[threadIdx.x % 32 ^ mask]);
}

inline int __shfl_up_sync(unsigned, int value, int distance) {
    const int lane_idx = threadIdx.x % 32;
    return int(exchange(value)[lane_idx < distance ? lane_idx : lane_idx - distance]);
}

inline unsigned __ballot_sync(unsigned, bool is_set) {
    unsigned ballot = 0;
    const auto are_set = exchange(is_set);
    for (int i = 0; i < 32; ++i) ballot |= are_set[i] << i;
    return ballot;
}

inline unsigned __match_any_sync(unsigned, int value) {
    unsigned alike = 0;
    const auto values = exchange(unsigned(value));
    for (int i = 0; i < 32; ++i) alike |= unsigned(values[i] == unsigned(value)) << i;
    return alike;
}

inline unsigned __reduce_min_sync(unsigned, unsigned value) { return std::ranges::min(exchange(value)); }
inline unsigned __reduce_max_sync(unsigned, unsigned value) { return std::ranges::max(exchange(value)); }

inline unsigned __reduce_add_sync(unsigned, unsigned value) {
    unsigned sum = 0;
    for (const unsigned each : exchange(value)) sum += each;
    return sum;
}

template <typename Value>
Value atomicAdd(Value* target, Value value) {
    return std::atomic_ref(*target).fetch_add(value, std::memory_order_relaxed);
}

template <typename Value, typename Change>
void change(Value* target, Change change) {
    std::atomic_ref atomic(*target);
    Value before = atomic.load(std::memory_order_relaxed);
    while (!atomic.compare_exchange_weak(before, change(before), std::memory_order_relaxed)) {
    }
}

inline void atomicMin(unsigned* target, unsigned value) {
    change(target, [=](unsigned before) { return min(before, value); });
}

template <typename Value>
void atomicMax(Value* target, Value value) {
    change(target, [=](Value before) { return max(before, value); });
}

inline int __clz(unsigned value) { return std::countl_zero(value); }
inline int __clzll(uint64_t value) { return std::countl_zero(value); }
inline int __ffs(unsigned value) { return value == 0 ? 0 : std::countr_zero(value) + 1; }
inline int __popc(unsigned value) { return std::popcount(value); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
size_t __cvta_generic_to_shared(const void*);  // which common.cuh mentions

template <typename Value>
Value __ldcg(const Value* source) {
    return *source;
}

UNWATCHED inline void become(const Fiber& fiber) {
    threadIdx.x = fiber.thread_idx;
    if (is_cluster) blockIdx.x = fiber.block_idx;
}

// Runs what a thread does in all threads of the blocks of a cluster.
template <typename Run>
void run_cluster(int num_blocks, int num_threads, Run run) {
    blocks = std::vector<Block>(num_blocks);
    is_cluster = num_blocks > 1;
    for (Block& block : blocks) {
        block.barrier.count = num_threads;
        for (auto& warp : block.warps) warp.barrier.count = 32;
        for (auto& quad : block.quads) quad.barrier.count = 4;
    }
    if (fibers.when_switched == nullptr) fibers.when_switched = become;
    fibers.run_all(num_blocks, num_threads, [](void* told) { (*static_cast<Run*>(told))(); }, &run);
}

template <typename Run>
void run_block(int num_threads, Run run) {
    run_cluster(1, num_threads, run);
}

// Runs a kernel, whose shared memory is static, block after block.
template <typename Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), const Params& params) {
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
                run_block(int(blockDim.x), [&] { kernel(params); });
            }
        }
    }
    return cudaSuccess;
}

inline float __fdiv_rn(float dividend, float divisor) { return dividend / divisor; }
inline float __fdividef(float dividend, float divisor) { return dividend / divisor; }
inline float __frcp_rn(float value) { return 1.0f / value; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __float2int_rd(float value) { return int(std::floor(value)); }
inline int __float2int_ru(float value) { return int(std::ceil(value)); }
inline void __threadfence() {}  // blocks run one after the other

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t both = uint64_t(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= unsigned(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}

// Some inline functions of common.cuh are assembly.
#define commit_copies commit_copies_in_assembly
#define copy_async copy_async_in_assembly
#define copy_async_once copy_async_once_in_assembly
#define finish finish_in_assembly
#define let_next_kernel_begin let_next_kernel_begin_in_assembly
#define load_matrices load_matrices_in_assembly
#define load_once load_once_in_assembly
#define multiply_add multiply_add_in_assembly
#define power_of_two power_of_two_in_assembly
#define prefetch prefetch_in_assembly
#define spread_signs spread_signs_in_assembly
#define wait_for_copies wait_for_copies_in_assembly
#define wait_for_previous_kernel wait_for_previous_kernel_in_assembly
#include "common.cuh"
#undef commit_copies
#undef copy_async
#undef copy_async_once
#undef finish
#undef let_next_kernel_begin
#undef load_matrices
#undef load_once
#undef multiply_add
#undef power_of_two
#undef prefetch
#undef spread_signs
#undef wait_for_copies
#undef wait_for_previous_kernel
#undef __shared__
#define __shared__ static
#define __launch_bounds__(...)

namespace hf_quest {

// In cluster_on_cpu.h.
void commit_copies();
void copy_async(unsigned target, const void* source);
void copy_async_once(unsigned target, const void* source, bool is_there);
uint4 load_matrices(unsigned address);
void multiply_add(int (&sums)[4], uint4 left, uint2 right);
void prefetch(const void* source);
unsigned spread_signs(uint32_t low_pair, uint32_t high_pair);
template <int kNumGroups>
void wait_for_copies();

inline void finish(float4&) {}
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_begin() {}

inline float power_of_two(float exponent) { return exponent < -126.0f ? 0.0f : std::exp2(exponent); }

inline uint4 load_once(const uint4* source) { return *source; }
inline uint2 load_once(const uint2* source) { return *source; }

// A product of tensor cores, of which value_of(pair, i) is a factor.
template <typename ValueOf>
UNWATCHED void multiply_in_warp(float (&sums)[4], std::array<uint32_t, 4> own_left, std::array<uint32_t, 2> own_right,
                                ValueOf value_of) {
    const auto& [left0, left1, left2, left3, right0, right1] =
        own_warp().exchange<6>({own_left[0], own_left[1], own_left[2], own_left[3], own_right[0], own_right[1]});
    const unsigned* const left[4] = {left0, left1, left2, left3};
    const unsigned* const right[2] = {right0, right1};
    const int group_idx = threadIdx.x % 32 / 4, quad_idx = threadIdx.x % 4;
    for (int i = 0; i < 4; ++i) {  // of row group_idx + i / 2 * 8 and column 2 * quad_idx + i % 2
        double sum = sums[i];
        for (int k = 0; k < 16; ++k) {  // which lane k / 2 % 4 of a quad has, in pair k / 8
            const unsigned of_row = left[k / 8 * 2 + i / 2][group_idx * 4 + k / 2 % 4];
            const unsigned of_column = right[k / 8][(2 * quad_idx + i % 2) * 4 + k / 2 % 4];
            sum += value_of(of_row, k % 2) * value_of(of_column, k % 2);
        }
        sums[i] = float(sum);
    }
}

template <typename T>
void multiply_add(float (&sums)[4], uint32_t left0, uint32_t left1, uint32_t left2, uint32_t left3, uint32_t right0,
                  uint32_t right1);

template <>
inline void multiply_add<__half>(float (&sums)[4], uint32_t left0, uint32_t left1, uint32_t left2, uint32_t left3,
                                 uint32_t right0, uint32_t right1) {
    multiply_in_warp(sums, {left0, left1, left2, left3}, {right0, right1}, [](unsigned pair, int idx) {
        const __half_raw half = {static_cast<unsigned short>(pair >> 16 * idx)};
        return double(__half2float(half));
    });
}

template <>
inline void multiply_add<__nv_bfloat16>(float (&sums)[4], uint32_t left0, uint32_t left1, uint32_t left2,
                                        uint32_t left3, uint32_t right0, uint32_t right1) {
    multiply_in_warp(sums, {left0, left1, left2, left3}, {right0, right1},
                     [](unsigned pair, int idx) { return double(std::bit_cast<float>(pair >> 16 * idx << 16)); });
}

}  // namespace hf_quest
