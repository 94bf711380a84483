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

// Two integers of 8 bits, at the bottom of the halves of a word, as a pair of the type. All of them are exact in it.
template <typename T>
__device__ uint32_t widen(uint32_t integers) {
    if constexpr (std::is_same_v<T, __half>) {
        const uint32_t shifted = (integers ^ 0x00800080u) | 0x64006400u;  // 1024 + 128 + the integer
        return as_bits(__hsub2(as_pair<T>(shifted), as_pair<T>(0x64806480u)));
    } else {  // 128 + the lower 7 bits, less 128 or, of a negative one, 256
        const uint32_t lower = (integers & 0x007f007fu) | 0x43004300u, offset = (integers & 0x00800080u) | 0x43004300u;
        return as_bits(__hsub2(as_pair<T>(lower), as_pair<T>(offset)));
    }
}

// The bounds of a row's KV head in the dtype of its keys. A lane loads 8 channels at a time.
template <typename T, int kHeadDim>
struct WideBounds {
    using Vector = uint4;
    struct Scales {};
    static constexpr int kTiles = 1;  // of 16 pages, that take the same registers
    static constexpr bool kHasScales = false;
    const T* extremes;  // [pages, 2, D]

    __device__ WideBounds(const Storage& storage, int64_t first_page)
        : extremes(static_cast<const T*>(storage.bounds) + first_page * 2 * kHeadDim) {}
    static __device__ uint4 as_operand(const Vector& vector) { return vector; }
};

// The same in 8 bits.
template <typename T, int kHeadDim>
struct NarrowBounds {
    using Vector = uint2;
    static constexpr int kBlocks = kHeadDim / kChunk;  // of channels that share a scale
    struct Scales {  // bytes, in the largest words that they fill
        using Word = std::conditional_t<kBlocks % 4 == 0, uint32_t, std::conditional_t<kBlocks % 2 == 0, uint16_t, uint8_t>>;
        Word words[kBlocks / sizeof(Word)];
        __device__ float of(int block_idx) const {
            const unsigned word = words[block_idx / sizeof(Word)];
            return __uint_as_float((word >> block_idx % sizeof(Word) * 8 & 0xff) << 23);
        }
    };
    static constexpr int kTiles = kHeadDim > 128 ? 1 : 2;
    static constexpr bool kHasScales = true;
    const int8_t* extremes;  // [pages, 2, D]
    const Scales* scales;    // [pages]

    __device__ NarrowBounds(const Storage& storage, int64_t first_page)
        : extremes(static_cast<const int8_t*>(storage.bounds) + first_page * 2 * kHeadDim),
          scales(reinterpret_cast<const Scales*>(storage.scales) + first_page) {}
    static __device__ uint4 as_operand(const Vector& vector) {
        const auto pair = [](uint32_t word, unsigned selector) { return widen<T>(__byte_perm(word, 0, selector)); };
        return {pair(vector.x, 0x4140), pair(vector.x, 0x4342), pair(vector.y, 0x4140), pair(vector.y, 0x4342)};
    }
};

// Scores 16 pages at a time, from `first_page` on in steps of `step` up to `end_page`, and calls store(page, score) in
// the four lanes of a quad for each. All threads call it: with the first pages in flight it calls prepare(), which
// makes the block's signed query. A warp has `kTilesInFlight` times 16 pages on their way, or what takes as many bytes.
template <typename T, int kHeadDim, int kTilesInFlight, typename Bounds, typename Prepare, typename Store>
__device__ void score_pages(const uint4* signed_query, int num_head_tiles, Bounds bounds, int first_page, int step,
                            int end_page, Prepare prepare, Store store) {
    constexpr int kBlocks = kHeadDim / kChunk, kNumChunks = 2 * kBlocks, kSets = kTilesInFlight * Bounds::kTiles;
    const int lane_idx = threadIdx.x % kWarpSize, group_idx = lane_idx / 4, quad_idx = lane_idx % 4;
    using Vector = typename Bounds::Vector;
    Vector low[kSets][kNumChunks], high[kSets][kNumChunks];  // pages group_idx and group_idx + 8 of 16
    typename Bounds::Scales low_scales[kSets], high_scales[kSets];
    const auto load_pages = [&](int set, int page_idx) {
        // Past the last page the last one is read again; its scores are not stored twice.
        const int64_t low_idx = min(page_idx + group_idx, end_page - 1);
        const int64_t high_idx = min(page_idx + group_idx + 8, end_page - 1);
#pragma unroll
        for (int chunk_idx = 0; chunk_idx < kNumChunks; ++chunk_idx) {
            const auto* chunk = bounds.extremes + chunk_idx * kChunk + quad_idx * 8;
            low[set][chunk_idx] = load_once(reinterpret_cast<const Vector*>(chunk + low_idx * 2 * kHeadDim));
            high[set][chunk_idx] = load_once(reinterpret_cast<const Vector*>(chunk + high_idx * 2 * kHeadDim));
        }
        if constexpr (Bounds::kHasScales) {
            low_scales[set] = bounds.scales[low_idx];
            high_scales[set] = bounds.scales[high_idx];
        }
    };
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
        if (first_page + set * step < end_page) load_pages(set, first_page + set * step);
    }
    prepare();
    __syncthreads();
    while (first_page < end_page) {
#pragma unroll
        for (int set = 0; set < kSets; ++set, first_page += step) {
            if (set > 0 && first_page >= end_page) break;
            float low_score = -INFINITY, high_score = -INFINITY;
            for (int tile_idx = 0; tile_idx < num_head_tiles; ++tile_idx) {
                // Operands of all chunks, kept from the first tile on, would not fit into the registers.
                if (Bounds::kHasScales && tile_idx > 0) load_pages(set, first_page);
                float even[4] = {}, odd[4] = {};  // two sums, so that products wait less for each other
                float scaled[4] = {};
#pragma unroll
                for (int block_idx = 0; block_idx < kBlocks; ++block_idx) {
#pragma unroll
                    for (int chunk_idx = block_idx; chunk_idx < kNumChunks; chunk_idx += kBlocks) {  // minimum, maximum
                        const uint4 a = Bounds::as_operand(low[set][chunk_idx]);
                        const uint4 b = Bounds::as_operand(high[set][chunk_idx]);
                        const uint4 q = signed_query[(tile_idx * kNumChunks + chunk_idx) * kWarpSize + lane_idx];
                        multiply_add<T>(even, a.x, b.x, a.y, b.y, q.x, q.y);
                        multiply_add<T>(odd, a.z, b.z, a.w, b.w, q.z, q.w);
                    }
                    if constexpr (Bounds::kHasScales) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            scaled[i] = fmaf(even[i] + odd[i], (i < 2 ? low_scales : high_scales)[set].of(block_idx), scaled[i]);
                            even[i] = odd[i] = 0.0f;
                        }
                    }
                }
                const auto& sums = Bounds::kHasScales ? scaled : even;
                low_score = fmaxf(low_score, fmaxf(sums[0] + odd[0], sums[1] + odd[1]));
                high_score = fmaxf(high_score, fmaxf(sums[2] + odd[2], sums[3] + odd[3]));
            }
            const int next_page = first_page + kSets * step;
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
