// Stripes of a row's pages (hf_quest/stripes.py), and how a warp chooses in one.
#pragma once

#include "select.cuh"

namespace hf_quest {

// The largest share of `num` pages that a stripe has.
__host__ __device__ constexpr int most_pages(int num) { return (num + kStripes - 1) / kStripes + 1; }

// How the pages before a row's newest one are dealt to stripes: page p is one of stripe p % 18.
struct Stripes {
    int num_pages, each, num_longer;

    __device__ explicit Stripes(int num_pages)
        : num_pages(num_pages), each(num_pages / kStripes), num_longer(num_pages % kStripes) {}

    __device__ int count(int stripe) const { return each + (stripe < num_longer ? 1 : 0); }

    // Of `num` pages, which are all there are or fewer, those that are chosen in a stripe.
    __device__ int count_chosen(int num, int stripe) const {
        const int64_t own = count(stripe);
        return own == 0 ? 0 : int(min(own, (num * own + num_pages - 1) / num_pages));
    }

    // Of `num` tokens, those that are chosen in the stripes before one.
    __device__ int first_token(int num, int stripe) const {
        const int64_t before = stripe * each + min(stripe, num_longer);
        return num_pages == 0 ? 0 : int(num * before / num_pages);
    }
};

// Where a warp notes the candidates that may still be taken, as candidate_of() makes them.
constexpr int kMaxOfStripe = 192;
struct StripeList {
    uint64_t candidates[kMaxOfStripe];
};

__device__ inline unsigned lower_lanes() { return (1u << threadIdx.x % kWarpSize) - 1; }

// The steps of choose_in_stripe(), which a warp takes.
template <typename KeyOf>
struct StripeSelector {
    const int num_keys, num_wanted;
    const KeyOf key_of;
    const int lane_idx = threadIdx.x % kWarpSize;

    __device__ unsigned key(int idx) const { return idx < num_keys ? key_of(idx) : 0; }

    // A lower bound of the keys that are taken, where no more than 64 are: the highest keys of as many groups, of which
    // each lane has two, reach it.
    __device__ unsigned find_bound() const {
        unsigned tops[2] = {};
#pragma unroll 1
        for (int first = 0; first < num_keys; first += 2 * kWarpSize) {
            tops[0] = max(tops[0], key(first + lane_idx));
            tops[1] = max(tops[1], key(first + kWarpSize + lane_idx));
        }
        if (num_wanted <= kWarpSize) {  // of half as many groups, which takes half as long
            tops[0] = max(tops[0], tops[1]);
            tops[1] = 0;
        }
        int num_above[2] = {};
        const int num_each = num_wanted <= kWarpSize ? 1 : 2;
#pragma unroll 1
        for (int which = 0; which < num_each; ++which) {
#pragma unroll 8
            for (int lane = 0; lane < kWarpSize; ++lane) {
                const unsigned other = __shfl_sync(kWholeWarp, which == 0 ? tops[0] : tops[1], lane);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const bool is_earlier = which < i || (which == i && lane < lane_idx);
                    num_above[i] += other > tops[i] || (other == tops[i] && is_earlier);
                }
            }
        }
        unsigned bound = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (i < num_each && num_above[i] == num_wanted - 1) bound = tops[i];
        }
        return max(__reduce_max_sync(kWholeWarp, bound), 1u);
    }

    // Notes the keys that reach the bound, in their order, and returns how many there are, noted or not.
    __device__ int list(StripeList& list, unsigned bound) const {
        int num_listed = 0;
#pragma unroll 1
        for (int first = 0; first < num_keys; first += kWarpSize) {
            const unsigned own = key(first + lane_idx);
            const unsigned high = __ballot_sync(kWholeWarp, own >= bound);
            const int place = num_listed + __popc(high & lower_lanes());
            if (own >= bound && place < kMaxOfStripe) list.candidates[place] = candidate_of(own, first + lane_idx);
            num_listed += __popc(high);
        }
        __syncwarp();
        return num_listed;
    }

    template <typename Tell>
    __device__ void tell_best(const StripeList& list, int num_listed, Tell tell) const {
        int num_before = 0;  // that are taken
#pragma unroll 1
        for (int first = 0; first < num_listed; first += kWarpSize) {
            const uint64_t own = first + lane_idx < num_listed ? list.candidates[first + lane_idx] : 0;
            int num_above = 0;
#pragma unroll 4
            for (int i = 0; i < num_listed; ++i) num_above += list.candidates[i] > own;
            const bool is_taken = own != 0 && num_above < num_wanted;
            const unsigned taken = __ballot_sync(kWholeWarp, is_taken);
            if (is_taken) tell(page_of(own), num_before + __popc(taken & lower_lanes()));
            num_before += __popc(taken);
        }
        __syncwarp();  // before the list is another stripe's
    }

    // Without a list: the last key that is taken is found bit by bit.
    template <typename Tell>
    __device__ void tell_by_bits(Tell tell) const {
        const auto count = [&](unsigned lowest) {
            int num = 0;
#pragma unroll 1
            for (int idx = lane_idx; idx < num_keys; idx += kWarpSize) num += key_of(idx) >= lowest;
            return int(__reduce_add_sync(kWholeWarp, unsigned(num)));
        };
        unsigned last = 0;
#pragma unroll 1
        for (unsigned bit = 1u << 31; bit > 0; bit >>= 1) {
            if (count(last | bit) >= num_wanted) last |= bit;
        }
        const int num_equal = num_wanted - (last == ~0u ? 0 : count(last + 1));  // that are taken, the first ones
        int num_before = 0, num_equal_before = 0;
#pragma unroll 1
        for (int first = 0; first < num_keys; first += kWarpSize) {
            const unsigned own = key(first + lane_idx);
            const bool is_equal = first + lane_idx < num_keys && own == last;
            const unsigned equal = __ballot_sync(kWholeWarp, is_equal);
            const bool is_among = is_equal && num_equal_before + __popc(equal & lower_lanes()) < num_equal;
            const bool is_taken = is_among || own > last;
            const unsigned taken = __ballot_sync(kWholeWarp, is_taken);
            if (is_taken) tell(first + lane_idx, num_before + __popc(taken & lower_lanes()));
            num_before += __popc(taken);
            num_equal_before += __popc(equal);
        }
    }
};

// Finds the `num_wanted` highest keys, of equal ones the first, and calls tell(idx, place) for each in one lane, places
// in ascending order. Keys are 1 or more; key_of(idx) is asked for more than once. By a warp.
template <typename KeyOf, typename Tell>
__device__ void choose_in_stripe(StripeList& list, int num_keys, int num_wanted, KeyOf key_of, Tell tell) {
    const StripeSelector<KeyOf> selector = {num_keys, num_wanted, key_of};
    if (num_wanted >= num_keys) {
        for (int idx = selector.lane_idx; idx < num_keys; idx += kWarpSize) tell(idx, idx);
        return;
    }
    if (num_wanted <= 0) return;
    if (num_wanted <= 2 * kWarpSize) {
        const int num_listed = selector.list(list, selector.find_bound());
        if (num_listed <= kMaxOfStripe) {
            selector.tell_best(list, num_listed, tell);
            return;
        }
    }
    selector.tell_by_bits(tell);
}

}  // namespace hf_quest
