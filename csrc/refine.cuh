// How a warp finds the logits of a page's tokens by their codes.
//
// A key is its page's minimum and, of each channel, a level times a step, so a logit is q·minimum and the sum of levels
// times weights, q·step, which are made once for a page. Levels are the low bits of 16-bit floats: as such they are
// subnormal, times 2^-24, so a mask is all that it takes to unpack them. NVIDIA does not promise that tensor cores keep
// subnormal factors; they do on every GPU that was looked at, and the tests would see it if one did not. Weights are
// the sum of two 16-bit floats; what they lose is 2^-21 of the largest at most, beside what the products' sums lose.
#pragma once

#include "common.cuh"

namespace hf_quest {

constexpr int kCodeTile = 16;  // tokens, of one page

// How the four lanes of a quad share the code of a token, and the weights of a head: a lane has a quarter of the
// channels, in words; pair i of a word of n channels are its channels i and i + n / 2.
template <int kHeadDim, int kBits>
struct CodeLayout {
    static constexpr int kRowBytes = kHeadDim * kBits / 8;  // of a token's code
    static constexpr int kOwnChannels = kHeadDim / 4, kOwnBytes = kRowBytes / 4;
    static constexpr int kWords = ceil_div(kOwnBytes, 4);
    static constexpr int kPairsOfWord = 16 / kBits, kPairs = kWords * kPairsOfWord;
    // Of a lane's weights in shared memory, an odd number of 16 bytes against bank conflicts.
    static constexpr int kQuads = kPairs / 4, kStride = kQuads | 1;
    static constexpr int kWeights = kHeadTile * 4 * kStride * 8;  // 16-bit floats, of all heads and lanes
    static_assert(kOwnBytes * 4 == kRowBytes && kPairs % 4 == 0);

    // Where the weight of a head's channel lies.
    static __device__ int find(int head_idx, int channel) {
        const int own = channel % kOwnChannels, in_word = own % (2 * kPairsOfWord);
        const int pair = own / (2 * kPairsOfWord) * kPairsOfWord + in_word % kPairsOfWord;
        return ((head_idx * 4 + channel / kOwnChannels) * kStride * 4 + pair) * 2 + in_word / kPairsOfWord;
    }
};

// The largest of 32-bit floats that are 0 or more, of all lanes.
__device__ inline float reduce_max(float value) {
    return __uint_as_float(__reduce_max_sync(kWholeWarp, __float_as_uint(value)));
}

// The power of two in a float, which is 0 or more: of 0 the lowest, of what is no number or infinite the highest.
__device__ inline float power_in(float value) {
    return __uint_as_float(min(max(__float_as_uint(value) >> 23, 1u), 254u) << 23);
}
__device__ inline float inverse_of(float power) {  // whose exponent is not the highest
    return __uint_as_float((254u << 23) - min(__float_as_uint(power), 253u << 23));
}

// The query of up to 8 heads in shared memory, each over a power of two that leaves it below 2.
template <int kHeadDim>
struct SharedQuery {
    float channels[kHeadTile][kHeadDim];
    float powers[kHeadTile];

    // By all warps of the block, with a barrier after it. `query` is that of the first of `num_heads`.
    template <typename T>
    __device__ void load(const T* query, int64_t head_stride, int num_heads) {
        for (int head_idx = threadIdx.x / kWarpSize; head_idx < num_heads; head_idx += blockDim.x / kWarpSize) {
            float largest = 0.0f, channel[kHeadDim / kWarpSize];
#pragma unroll
            for (int i = 0; i < kHeadDim / kWarpSize; ++i) {
                channel[i] = to_float(query[head_idx * head_stride + i * kWarpSize + threadIdx.x % kWarpSize]);
                largest = fmaxf(largest, fabsf(channel[i]));
            }
            const float power = power_in(reduce_max(largest)), inverse = inverse_of(power);
#pragma unroll
            for (int i = 0; i < kHeadDim / kWarpSize; ++i) {
                channels[head_idx][i * kWarpSize + threadIdx.x % kWarpSize] = channel[i] * inverse;
            }
            if (threadIdx.x % kWarpSize == 0) powers[head_idx] = power;
        }
    }
};

// What a lane has of the bounds of a page as they are stored: of every chunk of channels its own.
template <typename T, int kHeadDim>
struct LaneBounds {
    static constexpr int kChunks = kHeadDim / kWarpSize;
    uint32_t lowest[kChunks], highest[kChunks], scales[kChunks];
    bool has_scales;

    // `page_idx` counts from the storage's first page on.
    __device__ void load(const Storage& storage, int64_t page_idx) {
        static_assert(kWarpSize == kChunk);
        has_scales = storage.scales != nullptr;
        const int64_t first = page_idx * 2 * kHeadDim + threadIdx.x % kWarpSize;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            if (has_scales) {
                const uint8_t* bounds = static_cast<const uint8_t*>(storage.bounds) + first + i * kWarpSize;
                lowest[i] = bounds[0];
                highest[i] = bounds[kHeadDim];
                scales[i] = storage.scales[page_idx * kChunks + i];
            } else {
                const uint16_t* bounds = static_cast<const uint16_t*>(storage.bounds) + first + i * kWarpSize;
                lowest[i] = bounds[0];
                highest[i] = bounds[kHeadDim];
            }
        }
    }

    __device__ float2 of(int chunk) const {  // the lowest and the highest key of its channel
        if (has_scales) {
            const float scale = __uint_as_float(scales[chunk] << 23);
            return {float(int8_t(lowest[chunk])) * scale, float(int8_t(highest[chunk])) * scale};
        }
        const auto value = [](uint32_t bits) {
            const uint16_t half = uint16_t(bits);
            return to_float(*reinterpret_cast<const T*>(&half));
        };
        return {value(lowest[chunk]), value(highest[chunk])};
    }
};

// A lane's quarter of the codes of tokens group_idx and group_idx + 8 of a tile.
template <int kHeadDim, int kBits>
struct LaneCodes {
    using L = CodeLayout<kHeadDim, kBits>;
    alignas(16) uint32_t words[2][L::kWords];

    // Where a lane's are, from those of the tile's first token on.
    static __device__ int find_own() {
        return threadIdx.x % kWarpSize / 4 * L::kRowBytes + threadIdx.x % 4 * L::kOwnBytes;
    }

    // `codes` are those of the tile's first token, of `num_tokens`, 8 or 16.
    __device__ void load(const uint8_t* codes, int num_tokens) {
        load_from(codes + find_own(), num_tokens > 8 ? 8 * L::kRowBytes : 0);
    }

    // From find_own() on, and `bytes_to_second` further on.
    __device__ void load_from(const uint8_t* first, int bytes_to_second) {
#pragma unroll
        for (int half_idx = 0; half_idx < 2; ++half_idx) {
            const uint8_t* own = first + half_idx * bytes_to_second;
            if constexpr (L::kOwnBytes % 16 == 0) {
#pragma unroll
                for (int i = 0; i < L::kWords / 4; ++i) {
                    reinterpret_cast<uint4*>(words[half_idx])[i] = reinterpret_cast<const uint4*>(own)[i];
                }
            } else if constexpr (L::kOwnBytes % 8 == 0) {
                reinterpret_cast<uint2&>(words[half_idx]) = *reinterpret_cast<const uint2*>(own);
            } else if constexpr (L::kOwnBytes % 4 == 0) {
#pragma unroll
                for (int i = 0; i < L::kWords; ++i) words[half_idx][i] = reinterpret_cast<const uint32_t*>(own)[i];
            } else {
                static_assert(L::kOwnBytes % 2 == 0);
                const uint16_t* halves = reinterpret_cast<const uint16_t*>(own);
#pragma unroll
                for (int i = 0; i < L::kWords; ++i) {
                    const uint32_t high = 4 * i + 2 < L::kOwnBytes ? halves[2 * i + 1] : 0;
                    words[half_idx][i] = halves[2 * i] | high << 16;
                }
            }
        }
    }

    // The levels of a pair of channels of a token, as subnormal 16-bit floats.
    __device__ uint32_t pair(int half_idx, int idx) const {
        constexpr uint32_t kLevels = ((1u << kBits) - 1) * 0x10001u;
        return words[half_idx][idx / L::kPairsOfWord] >> idx % L::kPairsOfWord * kBits & kLevels;
    }
};

// The weights of a page in shared memory, of one warp: their larger and their smaller part.
template <int kHeadDim, int kBits>
struct PageWeights {
    using L = CodeLayout<kHeadDim, kBits>;
    static constexpr float kScale = 4096.0f;  // of weights: both parts are as exact as they can be
    alignas(16) __half large[L::kWeights], small[L::kWeights];
    float minima[kHeadTile];  // q·minimum

    // Once, before all pages: some weights may be of no channel.
    __device__ void clear() {
        for (int idx = threadIdx.x % kWarpSize; idx < L::kWeights; idx += kWarpSize) {
            large[idx] = __float2half_rn(0.0f);
            small[idx] = __float2half_rn(0.0f);
        }
    }

    // Makes those of a page, and returns what turns a sum of levels times weights into a part of a logit, up to the
    // query's power; it is infinite or not a number if a bound is.
    template <typename T>
    __device__ float make(const LaneBounds<T, kHeadDim>& bounds, const SharedQuery<kHeadDim>& query, int num_heads) {
        constexpr int kChunks = kHeadDim / kWarpSize;
        const int lane_idx = threadIdx.x % kWarpSize;
        float lowest[kChunks], range[kChunks], largest = 0.0f;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            const float2 both = bounds.of(i);
            lowest[i] = both.x;
            range[i] = fabsf(both.y - both.x);  // whose sign only what is no number could have
            largest = __uint_as_float(max(__float_as_uint(largest), __float_as_uint(range[i])));
        }
        largest = reduce_max(largest);
        const float power = power_in(largest), inverse = inverse_of(power);
#pragma unroll
        for (int i = 0; i < kChunks; ++i) range[i] = range[i] * inverse * kScale;
        __syncwarp();  // until all lanes have used those of the last page
#pragma unroll 1
        for (int head_idx = 0; head_idx < num_heads; ++head_idx) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kChunks; ++i) {
                const int channel = i * kWarpSize + lane_idx, place = L::find(head_idx, channel);
                const float of_query = query.channels[head_idx][channel];
                const float weight = of_query * range[i];
                const __half rounded = __float2half_rn(weight);
                large[place] = rounded;
                small[place] = __float2half_rn(weight - __half2float(rounded));
                sum += of_query * lowest[i];
            }
#pragma unroll
            for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
                sum += __shfl_xor_sync(kWholeWarp, sum, distance);
            }
            if (lane_idx == 0) minima[head_idx] = sum;
        }
        __syncwarp();
        const bool is_finite = __float_as_uint(largest) < 0x7f800000u;
        constexpr float kUnit = 16777216.0f / (kScale * ((1 << kBits) - 1));  // 2^24: levels are subnormal
        return is_finite ? power * kUnit : largest;
    }

    // Logits of a tile: of token group_idx in x and y, of token group_idx + 8 in z and w, of heads 2 * quad_idx and the
    // next, or the last where there are fewer. `unit` is what make() returned.
    __device__ float4 multiply(const LaneCodes<kHeadDim, kBits>& codes, const SharedQuery<kHeadDim>& query,
                               int num_heads, float unit) const {
        const int lane_idx = threadIdx.x % kWarpSize, quad_idx = lane_idx % 4;
        const int own = (min(lane_idx / 4, num_heads - 1) * 4 + quad_idx) * L::kStride;
        float sums[4] = {};
#pragma unroll
        for (int i = 0; i < L::kQuads; ++i) {
            const uint4 large_weights = reinterpret_cast<const uint4*>(large)[own + i];
            const uint4 small_weights = reinterpret_cast<const uint4*>(small)[own + i];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int pair = 4 * i + 2 * j;
                const uint32_t first = codes.pair(0, pair), second = codes.pair(1, pair);
                const uint32_t third = codes.pair(0, pair + 1), fourth = codes.pair(1, pair + 1);
                multiply_add<__half>(sums, first, second, third, fourth, (&small_weights.x)[2 * j],
                                     (&small_weights.x)[2 * j + 1]);
                multiply_add<__half>(sums, first, second, third, fourth, (&large_weights.x)[2 * j],
                                     (&large_weights.x)[2 * j + 1]);
            }
        }
        const int even = min(2 * quad_idx, num_heads - 1), odd = min(2 * quad_idx + 1, num_heads - 1);
        const float even_power = query.powers[even], odd_power = query.powers[odd];
        return {(minima[even] + sums[0] * unit) * even_power, (minima[odd] + sums[1] * unit) * odd_power,
                (minima[even] + sums[2] * unit) * even_power, (minima[odd] + sums[3] * unit) * odd_power};
    }
};

// For bounds in 8 bits there is a way with fewer steps, that of chain_by_codes.cu: keys as integers. In a block of
// channels that share a scale a key is the scale over 3, the highest level of 2 bits, times the integer 3 minimum +
// level (maximum - minimum); of 4 bits 15 stands for 3. These are below 2^11, so 16-bit floats hold them: a mask, an
// addition and a product make two of them. The query is in 16-bit floats, too, which hold its 8 or 11 bits, in a power
// of two that leaves the lowest of them to channels 2^28 times smaller than the largest.

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

    static __device__ int pair_of(int i) { return min(int(threadIdx.x % kWarpSize) + i * kWarpSize, 4 * L::kPairs - 1); }

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
            const __half2 low = biased_pair(grid.lowest[i]), high = biased_pair(grid.highest[i]);
            const __half2 range = __hsub2(high, low);
            // kTop * minimum, and for 2 bits less what levels from 4 on add to it.
            __half2 start = __hfma2(low, __float2half2_rn(kTop), __float2half2_rn(-kTop * 1152.0f));
            if constexpr (kBits == 2) start = __hfma2(range, __float2half2_rn(-4.0f), start);
            const int idx = grid.pair_of(i);
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
