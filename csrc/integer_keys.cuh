// Logits of a page's tokens by their codes, as refine.cuh has them, with fewer steps, for bounds in 8 bits: of keys as
// integers. In a block of channels that share a scale a key is the scale over 3, the highest level of 2 bits, times the
// integer 3 minimum + level (maximum - minimum); of 4 bits 15 stands for 3. These are below 2^11, so 16-bit floats hold
// them: a mask, an addition and a product make two of them. The query is in 16-bit floats, too, which hold its 8 or 11
// bits, in a power of two that leaves the lowest of them to channels 2^28 times smaller than the largest.
#pragma once

#include "refine.cuh"

namespace hf_quest {

// The query of up to 8 heads, and what turns a sum of its products with keys into a logit, up to the scale of the page.
template <int kHeadDim, int kBits>
struct IntegerQuery {
    using L = CodeLayout<kHeadDim, kBits>;
    alignas(16) __half channels[L::kWeights];
    float factors[kHeadTile];

    // By all warps of the block, the last ones first, with a barrier before and after it. `query` is that of the first
    // of `num_heads`.
    template <typename T>
    __device__ void load(const T* query, int64_t head_stride, int num_heads, float scaling) {
        constexpr float kLargest = 16384.0f;
        const int num_warps = blockDim.x / kWarpSize;
#pragma unroll 1
        for (int head_idx = num_warps - 1 - threadIdx.x / kWarpSize; head_idx < num_heads; head_idx += num_warps) {
            float largest = 0.0f, channel[kHeadDim / kWarpSize];
#pragma unroll
            for (int i = 0; i < kHeadDim / kWarpSize; ++i) {
                channel[i] = to_float(query[head_idx * head_stride + i * kWarpSize + threadIdx.x % kWarpSize]);
                largest = fmaxf(largest, fabsf(channel[i]));
            }
            const float power = power_in(reduce_max(largest)), inverse = inverse_of(power);
#pragma unroll
            for (int i = 0; i < kHeadDim / kWarpSize; ++i) {
                const int place = L::find(head_idx, i * kWarpSize + threadIdx.x % kWarpSize);
                channels[place] = __float2half_rn(channel[i] * inverse * kLargest);
            }
            if (threadIdx.x % kWarpSize == 0) {
                factors[head_idx] = power * (scaling / (kLargest * float((1 << kBits) - 1)));
            }
        }
    }

    // Before load(), with a barrier between them: some channels are of no head.
    __device__ void clear() {
        for (int idx = threadIdx.x; idx < L::kWeights; idx += blockDim.x) channels[idx] = __float2half_rn(0.0f);
    }
};

// What a lane has of a page's bounds as they are stored: of some pairs of channels the bytes, and all scales.
template <int kHeadDim, int kBits>
struct LaneGrid {
    using L = CodeLayout<kHeadDim, kBits>;
    static constexpr int kEach = ceil_div(4 * L::kPairs, kWarpSize), kScales = kHeadDim / kChunk;
    using Scales = std::conditional_t<(kScales > 4), uint64_t, uint32_t>;  // bytes
    uint32_t lowest[kEach][2], highest[kEach][2];
    Scales scales;

    __device__ unsigned scale(int block_idx) const { return unsigned(scales >> 8 * block_idx) & 0xffu; }

    static __device__ int pair_of(int i) {
        return min(int(threadIdx.x % kWarpSize) + i * kWarpSize, 4 * L::kPairs - 1);
    }

    // `page_idx` counts from the storage's first page on.
    __device__ void load(const Storage& storage, int64_t page_idx) {
        const uint8_t* page = static_cast<const uint8_t*>(storage.bounds) + page_idx * 2 * kHeadDim;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int quad_idx = pair_of(i) / L::kPairs, pair_idx = pair_of(i) % L::kPairs;
            const int first = pair_idx / L::kPairsOfWord * 2 * L::kPairsOfWord + pair_idx % L::kPairsOfWord;
            const int second = min(first + L::kPairsOfWord, L::kOwnChannels - 1);  // or there is none
            const uint8_t* own = page + quad_idx * L::kOwnChannels;
            lowest[i][0] = own[first];
            lowest[i][1] = own[second];
            highest[i][0] = own[kHeadDim + first];
            highest[i][1] = own[kHeadDim + second];
        }
        const uint8_t* bytes = storage.scales + page_idx * kScales;
        if constexpr (kScales == 4 || kScales == 8) {
            scales = *reinterpret_cast<const Scales*>(bytes);
        } else {
            scales = 0;
#pragma unroll
            for (int i = 0; i < kScales; ++i) scales |= Scales(bytes[i]) << 8 * i;
        }
    }
};

// A page's grid in shared memory, of one warp: what levels are multiplied with and added to, in 16-bit floats.
template <int kHeadDim, int kBits>
struct SharedGrid {
    using L = CodeLayout<kHeadDim, kBits>;
    static constexpr int kStride = L::kPairs + 4;  // against bank conflicts
    alignas(16) uint32_t ranges[4][kStride], lowest[4][kStride];

    __device__ void make(const LaneGrid<kHeadDim, kBits>& grid) {
        constexpr float kTop = (1 << kBits) - 1;
        __syncwarp();  // until all lanes have taken that of the last page
#pragma unroll
        for (int i = 0; i < grid.kEach; ++i) {
            const int idx = grid.pair_of(i);
            // The last pair is one lane's, where some have none.
            if (4 * L::kPairs % kWarpSize > 0 && threadIdx.x % kWarpSize + i * kWarpSize > idx) continue;
            const __half2 low = biased_pair(grid.lowest[i]), high = biased_pair(grid.highest[i]);
            const __half2 range = __hsub2(high, low);
            // kTop * minimum, and for 2 bits less what levels from 4 on add to it.
            __half2 start = __hfma2(low, __float2half2_rn(kTop), __float2half2_rn(-kTop * 1152.0f));
            if constexpr (kBits == 2) start = __hfma2(range, __float2half2_rn(-4.0f), start);
            ranges[idx / L::kPairs][idx % L::kPairs] = as_bits(range);
            lowest[idx / L::kPairs][idx % L::kPairs] = as_bits(start);
        }
        __syncwarp();
    }

    // Two bytes as signed integers above 1152.
    static __device__ __half2 biased_pair(const uint32_t (&bytes)[2]) {
        return as_pair<__half>(((bytes[0] | bytes[1] << 16) ^ 0x00800080u) | 0x64006400u);
    }
};

// A page as a lane multiplies its tokens: pairs of channels in the order of CodeLayout.
template <int kHeadDim, int kBits>
struct IntegerPage {
    using L = CodeLayout<kHeadDim, kBits>;
    static constexpr int kShift = 10 - kBits;  // where a level lies in a float's fraction
    __half2 ranges[L::kPairs], lowest[L::kPairs], query[L::kPairs];
    float unit;  // the largest scale, infinite if a bound is

    // `shared` is what make() made of `grid`.
    __device__ IntegerPage(const LaneGrid<kHeadDim, kBits>& grid, const SharedGrid<kHeadDim, kBits>& shared,
                           const IntegerQuery<kHeadDim, kBits>& all, int num_heads) {
        unsigned largest = 0;
#pragma unroll
        for (int i = 0; i < grid.kScales; ++i) largest = max(largest, grid.scale(i));
        unit = __uint_as_float(largest << 23);
        const int quad_idx = threadIdx.x % 4, head_idx = min(int(threadIdx.x % kWarpSize / 4), num_heads - 1);
        const auto* own = reinterpret_cast<const uint4*>(all.channels) + (head_idx * 4 + quad_idx) * L::kStride;
        const auto* own_ranges = reinterpret_cast<const uint4*>(shared.ranges[quad_idx]);
        const auto* own_lowest = reinterpret_cast<const uint4*>(shared.lowest[quad_idx]);
#pragma unroll
        for (int word_idx = 0; word_idx < L::kWords; ++word_idx) {
            // 8 neighbouring channels share a scale; a pair's two channels lie less than 16 apart.
            const int channel = quad_idx * L::kOwnChannels + word_idx * 2 * L::kPairsOfWord;
            const auto shrink = [&](int channel) {  // the last pairs may have no second one
                return power_of(largest - grid.scale(min(channel / kChunk, grid.kScales - 1)));
            };
            const __half2 by_scale = __halves2half2(shrink(channel), shrink(channel + L::kPairsOfWord));
#pragma unroll
            for (int i = 0; i < L::kPairsOfWord; i += 4) {
                const int first = word_idx * L::kPairsOfWord + i;
                const uint4 of_query = own[first / 4], of_ranges = own_ranges[first / 4];
                const uint4 of_lowest = own_lowest[first / 4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    ranges[first + j] = as_pair<__half>((&of_ranges.x)[j]);
                    lowest[first + j] = as_pair<__half>((&of_lowest.x)[j]);
                    query[first + j] = __hmul2(as_pair<__half>((&of_query.x)[j]), by_scale);
                }
            }
        }
    }

    // 2^-exponent, 0 below the smallest float.
    static __device__ __half power_of(unsigned exponent) {
        const unsigned bits = exponent < 15 ? (15 - exponent) << 10 : exponent <= 24 ? 1u << (24 - exponent) : 0u;
        return __ushort_as_half(uint16_t(bits));
    }

    // The keys of a token in a pair of channels, of a word of its code.
    __device__ uint32_t key_pair(uint32_t word, int pair_idx) const {
        constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x10001u << kShift;
        constexpr uint32_t kFirst = kBits == 2 ? 0x44004400u : 0x4c004c00u;  // 4, 16: the first of those floats
        const int right = pair_idx % L::kPairsOfWord * kBits - kShift;
        const uint32_t moved = right > 0 ? word >> right : word << -right;
        __half2 level = as_pair<__half>((moved & kMask) | kFirst);
        if constexpr (kBits == 4) level = __hsub2(level, __float2half2_rn(16.0f));
        return as_bits(__hfma2(level, ranges[pair_idx], lowest[pair_idx]));
    }

    // What are logits up to `unit` and a head's factor: of token group_idx in x and y, of token group_idx + 8 in z and
    // w, of heads 2 * quad_idx and the next, or the last where there are fewer.
    __device__ float4 multiply(const LaneCodes<kHeadDim, kBits>& codes) const {
        float even[4] = {}, odd[4] = {};  // two sums, so that products wait less for each other
#pragma unroll
        for (int pair = 0; pair < L::kPairs; pair += 2) {
            const uint32_t low = codes.words[0][pair / L::kPairsOfWord], high = codes.words[1][pair / L::kPairsOfWord];
            multiply_add<__half>(pair % 4 == 0 ? even : odd, key_pair(low, pair), key_pair(high, pair),
                                 key_pair(low, pair + 1), key_pair(high, pair + 1), as_bits(query[pair]),
                                 as_bits(query[pair + 1]));
        }
        return {even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3]};
    }
};

}  // namespace hf_quest
