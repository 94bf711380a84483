// Stripes of a row's pages (hf_quest/stripes.py), and how a warp chooses in one.
#pragma once

#include "select.cuh"

namespace hf_quest {

// The largest share of `num` pages that a stripe has.
__host__ __device__ constexpr int most_pages(int num, int num_stripes) {
    return (num + num_stripes - 1) / num_stripes + 1;
}

// How the pages before a row's newest one are dealt to stripes, of which there are a power of two: page p is one of
// stripe p % num_stripes.
struct Stripes {
    int num_pages, each, num_longer;

    __device__ Stripes(int num_pages, int num_stripes)
        : num_pages(num_pages), each(num_pages), num_longer(num_pages & (num_stripes - 1)) {
        each >>= __ffs(num_stripes) - 1;  // not above, which nvcc leaves in what it has the host compile
    }

    __device__ int count(int stripe) const { return each + (stripe < num_longer ? 1 : 0); }

    // Of `num` pages, which are all there are or fewer, those that are chosen in a stripe.
    __device__ int count_chosen(int num, int stripe) const {
        const int own = count(stripe);
        return num_pages == 0 ? 0 : min(own, divide(int64_t(num) * own + num_pages - 1));
    }

    // Of `num` tokens, those that are chosen in the stripes before one.
    __device__ int first_token(int num, int stripe) const {
        return num_pages == 0 ? 0 : divide(int64_t(num) * (stripe * each + min(stripe, num_longer)));
    }

    // By the number of pages, of what has a quotient below 2^22: so a float is off by one at most.
    __device__ int divide(int64_t dividend) const {
        const int quotient = int(__fdividef(float(dividend), float(num_pages)));
        const int64_t rest = dividend - int64_t(quotient) * num_pages;
        return quotient + (rest >= num_pages ? 1 : 0) - (rest < 0 ? 1 : 0);
    }
};

// Where a warp notes the candidates that may still be taken, as candidate_of() makes them.
constexpr int kMaxOfStripe = 192;
struct alignas(16) StripeList {
    uint64_t candidates[kMaxOfStripe];
    unsigned tops[2 * kWarpSize];  // of groups of keys the highest
};

__device__ inline unsigned lower_lanes() { return (1u << threadIdx.x % kWarpSize) - 1; }

// The steps of choose_in_stripe(), which a warp takes.
template <typename KeyOf>
struct StripeSelector {
    const int num_keys, num_wanted;
    const KeyOf key_of;
    const int lane_idx = threadIdx.x % kWarpSize;

    __device__ unsigned key(int idx) const { return idx < num_keys ? key_of(idx) : 0; }

    // A lower bound of the keys that are taken, where no more than 64 are: the highest keys of as many groups reach it.
    // A lane's keys are a group, or two if more than 16 keys are taken: the list would be long.
    __device__ unsigned find_bound(StripeList& list) const {
        unsigned tops[2] = {};
#pragma unroll 2
        for (int first = 0; first < num_keys; first += 2 * kWarpSize) {
            tops[0] = max(tops[0], key(first + lane_idx));
            tops[1] = max(tops[1], key(first + kWarpSize + lane_idx));
        }
        const bool has_one = num_wanted <= kWarpSize / 2;
        if (has_one) tops[0] = max(tops[0], tops[1]);
        list.tops[lane_idx] = tops[0];
        list.tops[kWarpSize + lane_idx] = tops[1];
        __syncwarp();
        int num_reached[2] = {};  // by how many groups
#pragma unroll 4
        for (int i = 0; i < (has_one ? kWarpSize : 2 * kWarpSize) / 4; ++i) {
            const uint4 quad = reinterpret_cast<const uint4*>(list.tops)[i];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                num_reached[j] += (quad.x >= tops[j]) + (quad.y >= tops[j]) + (quad.z >= tops[j]) + (quad.w >= tops[j]);
            }
        }
        unsigned bound = num_reached[0] >= num_wanted ? tops[0] : 0;
        if (!has_one && num_reached[1] >= num_wanted) bound = max(bound, tops[1]);
        return max(__reduce_max_sync(kWholeWarp, bound), 1u);
    }

    // Notes the keys that reach the bound, in their order, and returns how many there are, noted or not.
    __device__ int note(StripeList& list, unsigned bound) const {
        int num_listed = 0;
#pragma unroll 4
        for (int first = 0; first < num_keys; first += kWarpSize) {
            const unsigned own = key(first + lane_idx);
            const unsigned high = __ballot_sync(kWholeWarp, own >= bound);
            const int place = num_listed + __popc(high & lower_lanes());
            if (own >= bound && place < kMaxOfStripe) list.candidates[place] = candidate_of(own, first + lane_idx);
            num_listed += __popc(high);
        }
        // To a multiple of 8, as many as are compared at once.
        if (num_listed + lane_idx < kMaxOfStripe && lane_idx < 8) list.candidates[num_listed + lane_idx] = 0;
        __syncwarp();
        return num_listed;
    }

    template <typename Tell>
    __device__ void tell_best(const StripeList& list, int num_listed, Tell tell) const {
        int num_before = 0;  // that are taken
#pragma unroll 1
        for (int first = 0; first < num_listed; first += 2 * kWarpSize) {
            uint64_t own[2];
            int num_above[2] = {};
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                own[j] = list.candidates[min(first + j * kWarpSize + lane_idx, num_listed - 1)];
            }
#pragma unroll 1
            for (int i = 0; i < num_listed; i += 8) {
                ulonglong2 pairs[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) pairs[k] = reinterpret_cast<const ulonglong2*>(&list.candidates[i])[k];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) num_above[j] += (pairs[k].x > own[j]) + (pairs[k].y > own[j]);
                }
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const bool is_there = first + j * kWarpSize + lane_idx < num_listed;
                const bool is_taken = is_there && num_above[j] < num_wanted;
                const unsigned taken = __ballot_sync(kWholeWarp, is_taken);
                if (is_taken) tell(page_of(own[j]), num_before + __popc(taken & lower_lanes()));
                num_before += __popc(taken);
            }
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
        const int num_listed = selector.note(list, selector.find_bound(list));
        if (num_listed <= kMaxOfStripe) {
            selector.tell_best(list, num_listed, tell);
            return;
        }
    }
    selector.tell_by_bits(tell);
}

}  // namespace hf_quest
