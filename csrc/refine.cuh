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

}  // namespace hf_quest
