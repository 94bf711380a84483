// What becomes of a page's bounds and codes when tokens are new: what append.cu and the chains share. A thread has
// kVector channels.
#pragma once

#include "common.cuh"

namespace hf_quest {

constexpr int kVector = 8;        // channels, in 16 bytes
constexpr int kKeysInFlight = 4;  // whose codes are made; more would be too many registers
constexpr float kTiny = 1.17549435e-38f;  // the lowest normal number

template <typename T>
__device__ void widen(uint4& lowest, uint4& highest, uint4 key) {
    const auto low = [](uint32_t a, uint32_t b) { return as_bits(__hmin2_nan(as_pair<T>(a), as_pair<T>(b))); };
    const auto high = [](uint32_t a, uint32_t b) { return as_bits(__hmax2_nan(as_pair<T>(a), as_pair<T>(b))); };
    lowest = {low(lowest.x, key.x), low(lowest.y, key.y), low(lowest.z, key.z), low(lowest.w, key.w)};
    highest = {high(highest.x, key.x), high(highest.y, key.y), high(highest.z, key.z), high(highest.w, key.w)};
}

struct Bounds8 {  // of kVector channels
    uint2 lowest, highest;
    int exponent;  // of the scale, and 0 where there are no bounds

    __device__ void to_floats(float (&low)[kVector], float (&high)[kVector]) const {
        const float scale = __uint_as_float(exponent << 23);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            low[i] = float(reinterpret_cast<const int8_t*>(&lowest)[i]) * scale;
            high[i] = float(reinterpret_cast<const int8_t*>(&highest)[i]) * scale;
        }
    }
};

// Widens bounds in 8 bits. Four neighbouring lanes have the channels of one scale, which becomes the smallest power of
// two with which none of their bounds exceeds 127. What is infinite or not a number is unbounded.
template <typename T>
__device__ void widen(Bounds8& bounds, uint4 lowest, uint4 highest) {
    constexpr unsigned kInfinity = 0x7f800000u;
    float values[2][kVector];
    unsigned largest = 0;  // as bits, which have the order of what they stand for
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        values[0][i] = to_float(reinterpret_cast<const T*>(&lowest)[i]);
        values[1][i] = to_float(reinterpret_cast<const T*>(&highest)[i]);
        largest = max(largest, max(__float_as_uint(fabsf(values[0][i])), __float_as_uint(fabsf(values[1][i]))));
    }
    const int lane_idx = threadIdx.x % kWarpSize;
    const unsigned lanes = 0xfu << (lane_idx & ~3);  // the others may have left
    largest = max(largest, __shfl_xor_sync(lanes, largest, 1));
    largest = max(largest, __shfl_xor_sync(lanes, largest, 2));
    // One more than the exponent bits, if the mantissa is above that of 127.
    const int exponent = max(max(int((min(largest, kInfinity) + 0x1ffff) >> 23) - 6, 1), bounds.exponent);
    const int shift = min(exponent - bounds.exponent, 31);
    const float inverse = __uint_as_float((254 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        auto& lowest8 = reinterpret_cast<int8_t*>(&bounds.lowest)[i];
        auto& highest8 = reinterpret_cast<int8_t*>(&bounds.highest)[i];
        int low = __float2int_rd(fminf(fmaxf(values[0][i] * inverse, -128.0f), 127.0f));
        int high = __float2int_ru(fmaxf(fminf(values[1][i] * inverse, 127.0f), -128.0f));
        if (bounds.exponent > 0) {
            low = min(low, lowest8 >> shift);
            high = max(high, -(-highest8 >> shift));
        }
        lowest8 = int8_t(low);
        highest8 = int8_t(high);
    }
    bounds.exponent = exponent;
}

// Writes the codes of the kVector channels of `num_keys` keys that stand `stride` apart, each channel's nearest of
// 2^bits levels between its bounds: reference arithmetic, so that codes are the same wherever they are made. Codes
// stand `code_stride` bytes apart.
template <typename T, int kBits>
__device__ void encode(const uint4* keys, int64_t stride, int num_keys, const float (&lowest)[kVector],
                       const float (&highest)[kVector], uint8_t* codes, int64_t code_stride) {
    constexpr float kMost = (1 << kBits) - 1;
    float inverse[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        const float step = __fmul_rn(__fsub_rn(highest[i], lowest[i]), 1.0f / kMost);
        inverse[i] = __frcp_rn(step < kTiny ? kTiny : step);  // of what is no number as well, like the reference
    }
#pragma unroll 1
    for (int first = 0; first < num_keys; first += kKeysInFlight) {
        uint4 key[kKeysInFlight];
#pragma unroll
        for (int i = 0; i < kKeysInFlight; ++i) key[i] = keys[min(first + i, num_keys - 1) * stride];
#pragma unroll
        for (int i = 0; i < kKeysInFlight; ++i) {
            if (first + i >= num_keys) break;
            unsigned code = 0;
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                const float channel = to_float(reinterpret_cast<const T*>(&key[i])[j]);
                const float level = rintf(__fmul_rn(__fsub_rn(channel, lowest[j]), inverse[j]));
                code |= unsigned(fminf(fmaxf(level, 0.0f), kMost)) << kBits * j;
            }
            uint8_t* own = codes + (first + i) * code_stride;
            if constexpr (kBits == 2) {
                *reinterpret_cast<uint16_t*>(own) = uint16_t(code);
            } else {
                *reinterpret_cast<uint32_t*>(own) = code;
            }
        }
    }
}

}  // namespace hf_quest
