// select: the newest page and the highest-scoring earlier ones of one row and KV head, ascending, by one block.
//
// Scores become unsigned keys of the same order. A radix select finds the last key that is taken, 11 bits at a time
// from the top: count the keys that agree so far by their next digit in shared memory (in four copies, so that lanes
// with equal digits collide less), scan the counts from the highest digit down, and keep the digit in which the number
// wanted falls, until every key with that digit is taken. If equal keys are left to choose from, their inverted page
// indices are selected from in the same way. One pass compacts: ballots, and a scan over the warps, give each taken
// page its place. The first 8192 keys stay in registers; more are read again, from L2, in every pass.

#include <climits>

#include "common.cuh"

namespace hf_quest {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kKeysPerThread = 8;
constexpr int kKeysPerBlock = kThreads * kKeysPerThread;
constexpr int kDigitBits = 11;
constexpr int kNumDigits = 1 << kDigitBits;
constexpr int kDigitsPerThread = kNumDigits / kThreads;
constexpr int kPageBits = 2 * kDigitBits;
constexpr unsigned kLastPage = (1u << kPageBits) - 1;

struct Shared {
    union {
        uint4 copies[kNumDigits];
        unsigned counts[kNumDigits][4];
    };
    int warp_totals[kWarps];
    unsigned digit;
    int num_wanted, num_found;
    alignas(16) int places[kKeysPerThread * kWarps];
    int num_placed;
};

// Finds the digit at which `num_wanted` keys, counted from the highest digit down, are reached, and clears the counts.
__device__ void find_digit(Shared& shared, int num_wanted) {
    const int lane_idx = threadIdx.x % kWarpSize, warp_idx = threadIdx.x / kWarpSize;
    const int highest_digit = kNumDigits - 1 - kDigitsPerThread * threadIdx.x;  // of this thread's digits
    int num_keys[kDigitsPerThread], sum = 0;
#pragma unroll
    for (int i = 0; i < kDigitsPerThread; ++i) {
        const uint4 copies = shared.copies[highest_digit - i];
        shared.copies[highest_digit - i] = {0, 0, 0, 0};
        sum += num_keys[i] = copies.x + copies.y + copies.z + copies.w;
    }
    const int end = scan_warp(sum);
    if (lane_idx == kWarpSize - 1) shared.warp_totals[warp_idx] = end;
    __syncthreads();
    const int warp_ends = scan_warp(lane_idx < kWarps ? shared.warp_totals[lane_idx] : 0);
    const int warp_start = __shfl_sync(kWholeWarp, warp_ends, max(warp_idx - 1, 0));
    int start = end - sum + (warp_idx > 0 ? warp_start : 0);
#pragma unroll
    for (int i = 0; i < kDigitsPerThread; ++i) {
        if (start < num_wanted && num_wanted <= start + num_keys[i]) {
            shared.digit = highest_digit - i;
            shared.num_wanted = num_wanted - start;
            shared.num_found = num_keys[i];
        }
        start += num_keys[i];
    }
    __syncthreads();
}

__global__ void __launch_bounds__(kThreads) select_kernel(const SelectParams params) {
    __shared__ Shared shared;
    const int lane_idx = threadIdx.x % kWarpSize, warp_idx = threadIdx.x / kWarpSize;
    for (int i = threadIdx.x; i < kNumDigits; i += kThreads) shared.copies[i] = {0, 0, 0, 0};
    wait_for_previous_kernel();
    let_next_kernel_begin();

    const int64_t head_idx = blockIdx.x;
    const Storage storage = find(params.storage);
    const float* scores = storage.scores + head_idx * count_pages(storage, params.page_size);
    int64_t* page_ids = params.page_ids + head_idx * params.num_selected;
    const int row_idx = blockIdx.x / params.num_kv_heads;
    const int64_t num_tokens = count_tokens(params.length, params.padding, row_idx, storage.capacity);
    const int page_shift = __ffs(params.page_size) - 1;
    const int newest_page = num_tokens > 0 ? int((num_tokens - 1) >> page_shift) : -1;
    int num_wanted = params.num_selected - 1;  // of the pages before the newest
    if (newest_page <= num_wanted || num_wanted == 0) {
        for (int idx = threadIdx.x; idx < params.num_selected; idx += kThreads) {
            page_ids[idx] = num_wanted == 0 ? newest_page : idx <= newest_page ? idx : -1;
        }
        return;
    }

    unsigned first_keys[kKeysPerThread];
    // Without a branch, so that all loads are in flight at once: past the last page the last one is read again.
    const auto load_key = [&](int page_idx) { return order_of(__ldcg(scores + min(page_idx, newest_page - 1))); };
#pragma unroll
    for (int i = 0; i < kKeysPerThread; ++i) first_keys[i] = load_key(i * kThreads + threadIdx.x);
    // The first keys are visited with constant indices, so that they can stay in registers.
    const auto for_each_key = [&](auto visit) {
#pragma unroll
        for (int i = 0; i < kKeysPerThread; ++i) {
            if (i * kThreads >= newest_page) break;
            const int page_idx = i * kThreads + threadIdx.x;
            if (page_idx < newest_page) visit(first_keys[i], page_idx);
        }
#pragma unroll 1
        for (int page_idx = kKeysPerBlock + threadIdx.x; page_idx < newest_page; page_idx += kThreads) {
            visit(load_key(page_idx), page_idx);
        }
    };
    __syncthreads();

    // One digit of the numbers that agree with `prefix` in all bits above it: its value is appended to `prefix`.
    const auto narrow = [&](unsigned& prefix, int& shift, auto number_of) {
        const int num_bits = min(kDigitBits, shift);
        const int above = shift;
        shift -= num_bits;
        for_each_key([&](unsigned key, int page_idx) {
            unsigned number;
            if (!number_of(key, page_idx, number)) return;
            if (above == 32 || number >> above == prefix) {
                atomicAdd(&shared.counts[number >> shift & ((1u << num_bits) - 1)][lane_idx % 4], 1u);
            }
        });
        __syncthreads();
        find_digit(shared, num_wanted);
        prefix = (above == 32 ? 0u : prefix << num_bits) | shared.digit;
        num_wanted = shared.num_wanted;
        return num_wanted < shared.num_found;
    };
    unsigned last_key = 0;  // the last key that is taken, its lowest `shift` bits left out
    int shift = 32;
    bool has_choice = true;
    while (has_choice && shift > 0) {
        has_choice = narrow(last_key, shift, [](unsigned key, int, unsigned& number) {
            number = key;
            return true;
        });
    }
    int last_page = INT_MAX;  // the last page that is taken among those of the last key
    if (has_choice) {
        unsigned inverted = 0;
        int page_bits_left = kPageBits;
        while (has_choice && page_bits_left > 0) {
            has_choice = narrow(inverted, page_bits_left, [&](unsigned key, int page_idx, unsigned& number) {
                number = kLastPage - page_idx;
                return key == last_key;
            });
        }
        last_page = kLastPage - (inverted << page_bits_left);
    }

    int num_placed = 0;
    const auto compact = [&](int first_page, auto key_of) {
        unsigned taken[kKeysPerThread];
#pragma unroll
        for (int i = 0; i < kKeysPerThread; ++i) {
            const int page_idx = first_page + i * kThreads + threadIdx.x;
            const unsigned key = key_of(i) >> shift;
            const bool is_taken = key > last_key || (key == last_key && page_idx <= last_page);
            taken[i] = __ballot_sync(kWholeWarp, is_taken && page_idx < newest_page);
            if (lane_idx == 0) shared.places[i * kWarps + warp_idx] = __popc(taken[i]);
        }
        __syncthreads();
        if (warp_idx == 0) {
            constexpr int kPlacesPerLane = kKeysPerThread * kWarps / kWarpSize;
            int* places = shared.places + lane_idx * kPlacesPerLane;
            int starts[kPlacesPerLane], sum = 0;
#pragma unroll
            for (int i = 0; i < kPlacesPerLane; ++i) {
                starts[i] = sum;
                sum += places[i];
            }
            const int end = scan_warp(sum);
#pragma unroll
            for (int i = 0; i < kPlacesPerLane; ++i) places[i] = end - sum + starts[i];
            if (lane_idx == kWarpSize - 1) shared.num_placed = end;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kKeysPerThread; ++i) {
            if (taken[i] >> lane_idx & 1) {
                const int place = shared.places[i * kWarps + warp_idx] + __popc(taken[i] & ((1u << lane_idx) - 1));
                page_ids[num_placed + place] = first_page + i * kThreads + threadIdx.x;
            }
        }
        num_placed += shared.num_placed;
    };
    compact(0, [&](int i) { return first_keys[i]; });
    for (int first_page = kKeysPerBlock; first_page < newest_page; first_page += kKeysPerBlock) {
        __syncthreads();
        compact(first_page, [&](int i) { return load_key(first_page + i * kThreads + threadIdx.x); });
    }
    if (threadIdx.x == 0) page_ids[params.num_selected - 1] = newest_page;
}

}  // namespace

cudaError_t launch_select(const SelectParams& params) {
    return launch(select_kernel, dim3(params.num_rows * params.num_kv_heads), kThreads, 0, params);
}

}  // namespace hf_quest
