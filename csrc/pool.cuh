// A pool of tokens on the device, where keys and values lie in the host's memory. It has the tokens that a row and KV
// head attended lately, of which most are attended again by the next token.
//
// Each stripe (stripes.cuh) has its share of the slots, in sets of 16. Its tokens are dealt to its sets, and a token
// may be in any slot of its set. A slot's tag tells which token is there, when it was attended last and how often. The
// warp that looks up a stripe's tokens marks those that are there, then gives slots to the others, of each set those
// that were not attended for longest, and none that this step attends. So no slot is read and written in one step. A
// token without a slot is read where it lies, and so is the newest, which a step that is done again may store anew.
#pragma once

#include "attend.cuh"
#include "stripes.cuh"

namespace hf_quest {

constexpr int kNoPlace = -1;
constexpr int kTokenBits = 24;  // MAX_SLOTS of ops.py
constexpr int kUseBits = 4;     // how often a token was attended, 15 for more

// A slot, and whether the token is there already, or is to be put there.
__device__ inline int place_of(int slot, bool is_there) { return slot * 2 + (is_there ? 1 : 0); }
__device__ inline bool is_in_pool(int place) { return place >= 0 && place % 2 == 1; }
__device__ inline bool is_for_pool(int place) { return place >= 0 && place % 2 == 0; }

// What a slot's tag tells; a tag of 0 is that of an empty slot.
struct Tag {
    uint64_t bits;

    __device__ static Tag of(int token, int num_uses, int time) {
        return {(uint64_t(time) << kUseBits | unsigned(num_uses)) << kTokenBits | unsigned(token)};
    }
    __device__ bool is_of(int token) const { return bits != 0 && (unsigned(bits) ^ token) << (32 - kTokenBits) == 0; }
    __device__ int num_uses() const { return int(bits >> kTokenBits) & ((1 << kUseBits) - 1); }
    __device__ int time() const { return int(bits >> (kTokenBits + kUseBits)); }
};

// The tags of a set.
struct PoolSet {
    Tag tags[kPoolWays];

    __device__ explicit PoolSet(const uint64_t* first) {
#pragma unroll
        for (int i = 0; i < kPoolWays; i += 2) {
            const ulonglong2 pair = reinterpret_cast<const ulonglong2*>(first)[i / 2];
            tags[i] = {pair.x};
            tags[i + 1] = {pair.y};
        }
    }

    // Of the slots that were not attended `now` the one which `rank` others come before, or -1. To have been attended
    // once more counts as a step later.
    __device__ int find_oldest(int rank, int now) const {
        unsigned order = 0;
        for (int i = 0; i <= rank; ++i) {
            unsigned next = ~0u;
#pragma unroll
            for (int way = 0; way < kPoolWays; ++way) {
                const int time = tags[way].time();
                const unsigned own = unsigned(time + tags[way].num_uses()) * kPoolWays + way + 1;
                if (time != now && own > order) next = min(next, own);
            }
            if (next == ~0u) return -1;
            order = next;
        }
        return int(order - 1) % kPoolWays;
    }
};

// The pool of a row and KV head.
template <typename T, int kHeadDim>
struct HeadPool {
    T *keys, *values;
    uint64_t *tags, *counts;
    int num_stripes, num_sets;  // sets are of a stripe, or 0 where there is no pool
    int page_shift, now;

    HeadPool() = default;

    // `now` are the row's tokens.
    __device__ HeadPool(const Pool& pool, int64_t kv_idx, int num_stripes, int page_shift, int now)
        : keys(static_cast<T*>(pool.keys) + kv_idx * pool.size * kHeadDim),
          values(static_cast<T*>(pool.values) + kv_idx * pool.size * kHeadDim),
          tags(pool.tags + kv_idx * pool.size),
          counts(pool.counts + kv_idx * 2),
          num_stripes(num_stripes),
          num_sets(int(pool.size) / (num_stripes * kPoolWays)),
          page_shift(page_shift),
          now(now) {}

    // Has a stripe's tags brought to L2, by a warp.
    __device__ void fetch_tags(int stripe) const {
        constexpr int kOfLine = 128 / sizeof(uint64_t);
        const int num_slots = num_sets * kPoolWays;
        for (int slot = threadIdx.x % kWarpSize * kOfLine; slot < num_slots; slot += kWarpSize * kOfLine) {
            prefetch(tags + stripe * num_slots + slot);
        }
    }

    // The first slot of a token's set.
    __device__ int first_slot(int stripe, int token) const {
        const int page_of_stripe = (token >> page_shift) >> (__ffs(num_stripes) - 1);
        const int token_of_stripe = (page_of_stripe << page_shift) + (token & ((1 << page_shift) - 1));
        return (stripe * num_sets + token_of_stripe % num_sets) * kPoolWays;
    }

    // Finds the places of `num` tokens of a stripe, of which find_idx(i) tells where in both lists they are. By a warp.
    template <typename FindIdx>
    __device__ void look_up(int stripe, int num, const int* token_ids, int* places, FindIdx find_idx) const {
        const int lane_idx = threadIdx.x % kWarpSize, newest = now - 1;
        unsigned num_asked = 0, num_found = 0;
#pragma unroll 1
        for (int i = lane_idx; i - lane_idx < num; i += kWarpSize) {
            const int idx = i < num ? find_idx(i) : 0, token = i < num ? token_ids[idx] : newest;
            const bool is_asked = num_sets > 0 && token != newest;
            int place = kNoPlace, num_uses = 0;
            if (is_asked) {
                const int first = first_slot(stripe, token);
                const PoolSet set(tags + first);
#pragma unroll
                for (int way = 0; way < kPoolWays; ++way) {
                    if (!set.tags[way].is_of(token)) continue;
                    place = place_of(first + way, true);
                    num_uses = set.tags[way].num_uses();
                }
            }
            __syncwarp();  // until all have looked
            const bool is_found = place != kNoPlace;
            if (is_found) tags[place / 2] = Tag::of(token, min(num_uses + 1, (1 << kUseBits) - 1), now).bits;
            if (i < num) places[idx] = place;
            num_asked += is_asked;
            num_found += is_found;
            __syncwarp();
        }
        if (num_sets == 0) return;
#pragma unroll 1
        for (int i = lane_idx; i - lane_idx < num; i += kWarpSize) {
            const int idx = i < num ? find_idx(i) : 0, token = i < num ? token_ids[idx] : newest;
            const bool is_missing = token != newest && places[idx] == kNoPlace;
            const int first = is_missing ? first_slot(stripe, token) : -1 - lane_idx;
            const int rank = __popc(__match_any_sync(kWholeWarp, first) & lower_lanes());
            const int way = is_missing ? PoolSet(tags + first).find_oldest(rank, now) : -1;
            __syncwarp();
            if (way >= 0) {
                tags[first + way] = Tag::of(token, 0, now).bits;
                places[idx] = place_of(first + way, false);
            }
            __syncwarp();
        }
        num_asked = __reduce_add_sync(kWholeWarp, num_asked);
        num_found = __reduce_add_sync(kWholeWarp, num_found);
        if (lane_idx == 0) {
            atomicAdd(reinterpret_cast<unsigned long long*>(counts), 0ull + num_asked);
            atomicAdd(reinterpret_cast<unsigned long long*>(counts + 1), 0ull + num_found);
        }
    }
};

// Tokens chosen one by one, and their places: lane i has those of token i % 16.
struct PooledSingles : Singles {
    int place;
};

// SharedTokens that come from the pool, where they are there, and are put there on their way, where they are to be.
template <typename T, int kHeadDim>
struct PooledTokens : SharedTokens<T, kHeadDim, 1> {
    using Base = SharedTokens<T, kHeadDim, 1>;
    using Base::kVectors;
    static constexpr int kRounds = kTile * kVectors / kWarpSize;
    T *pooled_keys, *pooled_values;
    int key_place, value_place;  // of the tile whose keys, and of that whose values are on their way

    __device__ PooledTokens(const Base& tokens, const HeadPool<T, kHeadDim>& pool)
        : Base(tokens), pooled_keys(pool.keys), pooled_values(pool.values) {}

    __device__ void load(const T* stored, const T* pooled, PooledSingles tile, unsigned first_row,
                         int row_bytes) const {
        __syncwarp();  // until all lanes have taken what was there
#pragma unroll 4
        for (int i = 0; i < kRounds; ++i) {
            const int idx = i * kWarpSize + threadIdx.x % kWarpSize, row_idx = idx / kVectors, vector = idx % kVectors;
            const int token = __shfl_sync(kWholeWarp, tile.own, row_idx);
            const int place = __shfl_sync(kWholeWarp, tile.place, row_idx);
            const T* row = is_in_pool(place) ? pooled + unsigned(place / 2) * kHeadDim
                                             : stored + unsigned(min(token, Base::newest)) * kHeadDim;
            copy_async_once(first_row + row_idx * row_bytes + vector * 16, row + vector * 8, token <= Base::newest);
        }
    }

    __device__ void put(T* pooled, int place, const char* rows, int row_bytes) const {
        if (__ballot_sync(kWholeWarp, is_for_pool(place)) == 0) return;
#pragma unroll 4
        for (int i = 0; i < kRounds; ++i) {
            const int idx = i * kWarpSize + threadIdx.x % kWarpSize, row_idx = idx / kVectors, vector = idx % kVectors;
            const int own = __shfl_sync(kWholeWarp, place, row_idx);
            if (!is_for_pool(own)) continue;
            const auto& content = *reinterpret_cast<const uint4*>(rows + row_idx * row_bytes + vector * 16);
            reinterpret_cast<uint4*>(pooled + unsigned(own / 2) * kHeadDim)[vector] = content;
        }
    }

    __device__ void load_keys(int, PooledSingles tile) {
        key_place = tile.place;
        load(Base::keys, pooled_keys, tile, Base::target, Base::kKeyBytes);
    }
    __device__ void load_values(int, PooledSingles tile) {
        value_place = tile.place;
        load(Base::values, pooled_values, tile, Base::target + kTile * Base::kKeyBytes, Base::kValueBytes);
    }
    __device__ LaneKeys<kHeadDim> take_keys(int set) const {
        Base::wait();
        put(pooled_keys, key_place, Base::key_rows(set), Base::kKeyBytes);
        return Base::take_keys(set);
    }
    __device__ LaneValues<kHeadDim> take_values(int set) const {
        Base::wait();
        put(pooled_values, value_place, Base::value_rows(set), Base::kValueBytes);
        return Base::take_values(set);
    }
};

}  // namespace hf_quest
