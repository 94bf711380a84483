// How a warp scores pages: what estimate.cu and chain.cu share.
#pragma once

#include <cmath>

#include "common.cuh"

namespace hf_quest {

constexpr int kPagesPerWarp = 16;
constexpr int kChunk = 32;  // channels that the four lanes of a quad load together

// 16-byte vectors of the signed query of a group: [head tiles, chunks, lanes].
__host__ __device__ constexpr int count_query_vectors(int group_size, int head_dim) {
    return (group_size + kHeadTile - 1) / kHeadTile * (2 * head_dim / kChunk) * kWarpSize;
}

// [min(q, 0), max(q, 0)] of a group's query heads, `head_stride` apart, in the order in which lanes read it. A tile's
// spare columns repeat the last head, which leaves the maximum over heads as it is.
template <typename T, int kHeadDim>
__device__ void sign_query(uint4* signed_query, const T* query, int64_t head_stride, int group_size) {
    constexpr int kNumChunks = 2 * kHeadDim / kChunk;
    const int num_vectors = count_query_vectors(group_size, kHeadDim);
    for (int idx = threadIdx.x; idx < num_vectors; idx += blockDim.x) {
        const int chunk_idx = idx / kWarpSize % kNumChunks, tile_idx = idx / kWarpSize / kNumChunks;
        const int head_idx = min(tile_idx * kHeadTile + idx % kWarpSize / 4, group_size - 1);
        const int channel = chunk_idx * kChunk % kHeadDim + idx % 4 * 8;
        const uint4 vector = load_once(reinterpret_cast<const uint4*>(query + head_idx * head_stride + channel));
        const auto signed_part = [&](uint32_t bits) {
            const Pair<T> pair = as_pair<T>(bits), zero = as_pair<T>(0);
            return as_bits(chunk_idx * kChunk < kHeadDim ? __hmin2(pair, zero) : __hmax2(pair, zero));
        };
        signed_query[idx] = {signed_part(vector.x), signed_part(vector.y), signed_part(vector.z),
                             signed_part(vector.w)};
    }
}

// Scores 16 pages at a time, from `first_page` on in steps of `step` up to `end_page`, and calls store(page, score) in
// the four lanes of a quad for each. All threads call it: with the first pages in flight it calls prepare(), which
// makes the block's signed query. A warp has `kTilesInFlight` times 16 pages on their way.
template <typename T, int kHeadDim, int kTilesInFlight, typename Prepare, typename Store>
__device__ void score_pages(const uint4* signed_query, int num_head_tiles, const T* bounds, int first_page, int step,
                            int end_page, Prepare prepare, Store store) {
    constexpr int kNumChunks = 2 * kHeadDim / kChunk;
    const int lane_idx = threadIdx.x % kWarpSize, group_idx = lane_idx / 4, quad_idx = lane_idx % 4;
    bounds += quad_idx * 8;
    uint4 low[kTilesInFlight][kNumChunks], high[kTilesInFlight][kNumChunks];  // pages group_idx and group_idx + 8 of 16
    const auto load_pages = [&](int set, int page_idx) {
        // Past the last page the last one is read again; its scores are not stored twice.
        const T* low_page = bounds + int64_t(min(page_idx + group_idx, end_page - 1)) * 2 * kHeadDim;
        const T* high_page = bounds + int64_t(min(page_idx + group_idx + 8, end_page - 1)) * 2 * kHeadDim;
#pragma unroll
        for (int chunk_idx = 0; chunk_idx < kNumChunks; ++chunk_idx) {
            low[set][chunk_idx] = load_once(reinterpret_cast<const uint4*>(low_page + chunk_idx * kChunk));
            high[set][chunk_idx] = load_once(reinterpret_cast<const uint4*>(high_page + chunk_idx * kChunk));
        }
    };
#pragma unroll
    for (int set = 0; set < kTilesInFlight; ++set) {
        if (first_page + set * step < end_page) load_pages(set, first_page + set * step);
    }
    prepare();
    __syncthreads();
    while (first_page < end_page) {
#pragma unroll
        for (int set = 0; set < kTilesInFlight; ++set, first_page += step) {
            if (set > 0 && first_page >= end_page) break;
            float low_score = -INFINITY, high_score = -INFINITY;
            for (int tile_idx = 0; tile_idx < num_head_tiles; ++tile_idx) {
                float even[4] = {}, odd[4] = {};  // two sums, so that products wait less for each other
#pragma unroll
                for (int chunk_idx = 0; chunk_idx < kNumChunks; ++chunk_idx) {
                    const uint4 a = low[set][chunk_idx], b = high[set][chunk_idx];
                    const uint4 q = signed_query[(tile_idx * kNumChunks + chunk_idx) * kWarpSize + lane_idx];
                    multiply_add<T>(even, a.x, b.x, a.y, b.y, q.x, q.y);
                    multiply_add<T>(odd, a.z, b.z, a.w, b.w, q.z, q.w);
                }
                low_score = fmaxf(low_score, fmaxf(even[0] + odd[0], even[1] + odd[1]));
                high_score = fmaxf(high_score, fmaxf(even[2] + odd[2], even[3] + odd[3]));
            }
            const int next_page = first_page + kTilesInFlight * step;
            if (next_page < end_page) load_pages(set, next_page);
#pragma unroll
            for (int distance = 1; distance < 4; distance *= 2) {
                low_score = fmaxf(low_score, __shfl_xor_sync(kWholeWarp, low_score, distance));
                high_score = fmaxf(high_score, __shfl_xor_sync(kWholeWarp, high_score, distance));
            }
            const int low_page = first_page + group_idx, high_page = low_page + 8;
            if (low_page < end_page) store(low_page, low_score);
            if (high_page < end_page) store(high_page, high_score);
        }
    }
}

}  // namespace hf_quest
