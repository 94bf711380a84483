// How the bounds of a page widen by a key: kVector channels of a thread.
#pragma once

#include "common.cuh"

namespace hf_quest {

constexpr int kVector = 8;  // channels, in 16 bytes

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

}  // namespace hf_quest
