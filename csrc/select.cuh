// How a block selects pages: what select.cu and chain.cu share.
#pragma once

#include <climits>

#include "common.cuh"

namespace hf_quest {

constexpr int kDigitBits = 8;
constexpr int kNumDigits = 1 << kDigitBits;
constexpr int kMaxInDigit = 256;  // candidates that are ranked, each by a thread

struct Digit {
    int digit, num_above, num_in;  // what is counted above it and in it
};

// The digit at which `num_wanted` of what has been counted, from the highest digit down, are reached. By each warp for
// itself.
__device__ inline Digit find_digit(const unsigned (&counts)[kNumDigits], int num_wanted) {
    constexpr int kEach = kNumDigits / kWarpSize;
    const int highest = kNumDigits - 1 - kEach * int(threadIdx.x % kWarpSize);
    const uint4* quads = reinterpret_cast<const uint4*>(counts) + (highest + 1 - kEach) / 4;
    const uint4 low = quads[0], high = quads[1];
    static_assert(kEach == 8);
    const int in_each[kEach] = {int(high.w), int(high.z), int(high.y), int(high.x),
                                int(low.w),  int(low.z),  int(low.y),  int(low.x)};
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum += in_each[i];
    const int end = scan_warp(sum);
    Digit found = {highest, end - sum, in_each[0]};
#pragma unroll
    for (int i = 1; i < kEach; ++i) {
        if (found.num_above + found.num_in < num_wanted) {
            found = {highest - i, found.num_above + found.num_in, in_each[i]};
        }
    }
    const int lane_of_digit = __ffs(__ballot_sync(kWholeWarp, end >= num_wanted)) - 1;
    return {__shfl_sync(kWholeWarp, found.digit, lane_of_digit),
            __shfl_sync(kWholeWarp, found.num_above, lane_of_digit),
            __shfl_sync(kWholeWarp, found.num_in, lane_of_digit)};
}

// The shared memory that a block selects in.
template <int kThreads>
struct SharedSelection {
    static constexpr int kWarps = kThreads / kWarpSize;
    alignas(16) unsigned counts[2][kNumDigits];  // of the highest keys of groups, and of candidates
    alignas(16) int warp_totals[2][kWarps];
    uint64_t in_digit[kMaxInDigit], last;        // candidates
    unsigned lowest_less_one, highest;           // of the highest keys of groups
    int num_in_digit;

    // Before select_pages(), with a barrier between them.
    __device__ void clear() {
        for (int idx = threadIdx.x; idx < kNumDigits; idx += kThreads) counts[0][idx] = counts[1][idx] = 0;
        if (threadIdx.x > 0) return;
        lowest_less_one = UINT_MAX;
        highest = 0;
        num_in_digit = 0;
    }

    // The sum of all values of warps before this one, and of all, by the total of each. Calls without a barrier between
    // them take turns at `which`, 0 or 1.
    __device__ int2 scan_warps(int which, int warp_total) {
        const int warp_idx = threadIdx.x / kWarpSize;
        if (threadIdx.x % kWarpSize == 0) warp_totals[which][warp_idx] = warp_total;
        __syncthreads();
        int start = 0, total = 0;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
            if (i == warp_idx) start = total;
            total += warp_totals[which][i];
        }
        return {start, total};
    }

    // The sum of the values of the threads before this one, and of all.
    __device__ int2 scan(int value) {
        const int end = scan_warp(value);
        const int2 sums = scan_warps(0, __shfl_sync(kWholeWarp, end, kWarpSize - 1));
        return {sums.x + end - value, sums.y};
    }
};

struct SharedKeys {
    const unsigned* keys;  // to a whole quad

    __device__ unsigned of_page(int idx) const { return keys[idx]; }
    __device__ uint4 quad(int idx) const { return reinterpret_cast<const uint4*>(keys)[idx]; }
};

// Keys that lie elsewhere, and are read again each time.
template <typename KeyOf>
struct DistantKeys {
    KeyOf key_of;  // of a page
    int num_keys;

    __device__ DistantKeys(KeyOf key_of, int num_keys) : key_of(key_of), num_keys(num_keys) {}
    __device__ unsigned of_page(int idx) const { return idx < num_keys ? key_of(idx) : 0; }
    __device__ uint4 quad(int idx) const {
        return {of_page(4 * idx), of_page(4 * idx + 1), of_page(4 * idx + 2), of_page(4 * idx + 3)};
    }
};

// A page and its key, which is 1 or more, as one number. The higher one is taken first: that with the higher key, and
// of equal keys the first page.
__device__ inline uint64_t candidate_of(unsigned key, int page_idx) {
    return uint64_t(key) << 32 | ~unsigned(page_idx);
}
__device__ inline int page_of(uint64_t candidate) { return int(~unsigned(candidate)); }

struct KeyRange {
    unsigned lowest, highest;
};

// The steps of select_pages(), which every thread of the block takes.
template <int kThreads, int kMaxListed, typename Keys>
struct Selector {
    SharedSelection<kThreads>& shared;
    uint64_t (&listed)[kMaxListed];
    const Keys keys;
    const int num_keys;
    // This thread's quads of keys:
    const int num_quads = ceil_div(num_keys, 4);
    const int num_each = ceil_div(num_quads, kThreads) | 1;  // odd against bank conflicts
    const int begin = min(int(threadIdx.x) * num_each, num_quads), end = min(begin + num_each, num_quads);
    // The pages of the list; all pages before there is one, and where they are too many for it:
    bool is_listed = false;
    int num_candidates = num_keys;

    // A few at a time, or zeros past the end.
    template <typename Visit>
    __device__ void for_each_quad(Visit visit) const {
        constexpr int kAtOnce = 3;
#pragma unroll 1
        for (int first = begin; first < end; first += kAtOnce) {
            uint4 quads[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                quads[i] = keys.quad(min(first + i, end - 1));
                if (first + i >= end) quads[i] = {};
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) visit(quads[i], first + i);
        }
    }

    __device__ uint64_t candidate(int idx) const {
        return is_listed ? listed[idx] : candidate_of(keys.of_page(idx), idx);
    }

    // A lower bound of the keys that are taken, and the highest key. Each thread counts the highest keys of four groups
    // of pages. If that makes as many groups as pages are wanted, so many pages are no lower than the digit found, and
    // what is taken isn't either. Otherwise the bound is 1.
    __device__ KeyRange find_range(int num_wanted) const {
        uint4 tops = {};
        for_each_quad([&](uint4 quad, int) {
            tops = {max(tops.x, quad.x), max(tops.y, quad.y), max(tops.z, quad.z), max(tops.w, quad.w)};
        });
        // Less one, so that 0, which stands for no pages, has no part in it.
        const unsigned lowest_top = min(min(tops.x - 1, tops.y - 1), min(tops.z - 1, tops.w - 1));
        const unsigned lowest_of_warp = __reduce_min_sync(kWholeWarp, lowest_top);
        const unsigned highest_of_warp = __reduce_max_sync(kWholeWarp, max(max(tops.x, tops.y), max(tops.z, tops.w)));
        if (threadIdx.x % kWarpSize == 0) {
            atomicMin(&shared.lowest_less_one, lowest_of_warp);
            atomicMax(&shared.highest, highest_of_warp);
        }
        __syncthreads();
        const unsigned lowest = shared.lowest_less_one + 1, highest = shared.highest;
        if (num_wanted > (num_keys - 1) / num_each) return {1, highest};
        const int shift = max(32 - __clz(highest - lowest) - kDigitBits, 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if ((&tops.x)[i] != 0) atomicAdd(&shared.counts[0][((&tops.x)[i] - lowest) >> shift], 1u);
        }
        __syncthreads();
        return {lowest + (unsigned(find_digit(shared.counts[0], num_wanted).digit) << shift), highest};
    }

    // Pages with that key or a higher one go into a list, if they are few enough.
    __device__ void list(unsigned lowest) {
        int num_high = 0;
        for_each_quad([&](uint4 quad, int) {
            num_high += (quad.x >= lowest) + (quad.y >= lowest) + (quad.z >= lowest) + (quad.w >= lowest);
        });
        const int2 places = shared.scan(num_high);
        is_listed = places.y <= kMaxListed;
        if (is_listed) {
            num_candidates = places.y;
            int place = places.x;
            for_each_quad([&](uint4 quad, int idx) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if ((&quad.x)[i] >= lowest) listed[place++] = candidate_of((&quad.x)[i], 4 * idx + i);
                }
            });
        }
        __syncthreads();
    }

    // The last candidate that is taken, or a number between it and the next one. `last` is a lower bound of it, raised
    // digit by digit: it is one of the `num_in` that are less than 2^shift above `last`, of which `num_wanted` are
    // taken. When they are few they are ranked.
    __device__ uint64_t find_last(KeyRange range, int num_wanted) const {
        uint64_t last = candidate_of(range.lowest, num_keys - 1);
        int shift = max(64 - __clzll(candidate_of(range.highest, 0) - last) - kDigitBits, 0);
        unsigned num_digits = kNumDigits;
        int num_in;
        while (true) {
#pragma unroll 1
            for (int idx = threadIdx.x; idx < num_candidates; idx += kThreads) {
                const uint64_t own = candidate(idx), digit = (own - last) >> shift;
                if (own >= last && digit < num_digits) atomicAdd(&shared.counts[1][digit], 1u);
            }
            __syncthreads();
            const Digit found = find_digit(shared.counts[1], num_wanted);
            last += uint64_t(found.digit) << shift;
            num_wanted -= found.num_above;
            num_in = found.num_in;
            if (num_in == num_wanted) return last;
            if (num_in <= kMaxInDigit) break;
            num_digits = 1u << min(shift, kDigitBits);
            shift = max(shift - kDigitBits, 0);
            __syncthreads();
            for (int idx = threadIdx.x; idx < kNumDigits; idx += kThreads) shared.counts[1][idx] = 0;
            __syncthreads();
        }
#pragma unroll 1
        for (int idx = threadIdx.x; idx < num_candidates; idx += kThreads) {
            const uint64_t own = candidate(idx);
            const bool is_in_digit = own >= last && (own - last) >> shift == 0;
            if (is_in_digit) shared.in_digit[atomicAdd(&shared.num_in_digit, 1)] = own;
        }
        __syncthreads();
        if (threadIdx.x < num_in) {
            const uint64_t own = shared.in_digit[threadIdx.x];
            int num_before = 0;
#pragma unroll 1
            for (int i = 0; i < num_in; ++i) num_before += shared.in_digit[i] > own;
            if (num_before == num_wanted - 1) shared.last = own;
        }
        __syncthreads();
        return shared.last;
    }

    template <typename Tell>
    __device__ void tell_taken(uint64_t last, Tell tell) const {
        int num_before = 0;  // that are taken
#pragma unroll 1
        for (int first = 0; first < num_candidates; first += kThreads) {
            const int idx = first + threadIdx.x;
            const uint64_t own = idx < num_candidates ? candidate(idx) : 0;  // lower than any page's
            const bool is_taken = own >= last;
            const unsigned taken = __ballot_sync(kWholeWarp, is_taken);
            const int2 sums = shared.scan_warps(first / kThreads % 2, __popc(taken));
            const unsigned lower_lanes = (1u << threadIdx.x % kWarpSize) - 1;
            if (is_taken) tell(page_of(own), num_before + sums.x + __popc(taken & lower_lanes));
            num_before += sums.y;
        }
    }
};

// Finds the `num_wanted` pages with the highest keys, of equal ones the first, and calls tell(page, place) for each in
// one thread, places in ascending order of pages. keys.quad(i) are those of pages 4 i to 4 i + 3, or 0 for those past
// the last. The first page's may be 0, too: then it is not taken. Every thread of the block calls it. On the way, once
// `listed` holds the n pages that may still be taken, every thread calls when_listed(n), unless they are too many for a
// list.
template <int kThreads, int kMaxListed, typename Keys, typename WhenListed, typename Tell>
__device__ void select_pages(SharedSelection<kThreads>& shared, uint64_t (&listed)[kMaxListed], int num_keys,
                             int num_wanted, Keys keys, WhenListed when_listed, Tell tell) {
    static_assert(kMaxInDigit <= kThreads);
    if (num_wanted == 0) return;
    Selector<kThreads, kMaxListed, Keys> selector = {shared, listed, keys, num_keys};
    const KeyRange range = selector.find_range(num_wanted);
    selector.list(range.lowest);
    if (selector.is_listed) when_listed(selector.num_candidates);
    selector.tell_taken(selector.find_last(range, num_wanted), tell);
}

}  // namespace hf_quest
