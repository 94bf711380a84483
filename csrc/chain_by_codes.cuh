// chain by codes: append, estimate, find_candidates, refine and attend in one kernel, by a cluster of thread blocks for
// each row and KV head (cluster.cuh).
//
// Each block looks after some of the stripes of pages (stripes.cuh): it scores their pages, finds the best of each,
// scores the tokens of those by their codes (integer_keys.cuh), chooses the best of each stripe and attends them. So
// blocks need no word of each other but the sums of each head's softmax over all candidates, where heads agree by
// shares, and in the end what they have attended. A warp chooses in a stripe, without a barrier of its block. Where no
// more tokens are stored than may be attended, they all are, without a look at their bounds.
//
// The newest token may come beside the storage. The block that attends it stores it, as append does, and in the end
// writes its page's codes, if that is full: no block looks at bounds and codes of the newest page, and no other block
// reads the token's slot.
//
// What lies in the host's memory may have a pool on the device (pool.cuh): then the tokens that a block has chosen are
// looked up there before it attends them.
#pragma once

#include "cluster.cuh"
#include "integer_keys.cuh"
#include "pool.cuh"
#include "shares.cuh"
#include "stripes.cuh"

namespace hf_quest {
namespace {

constexpr int kThreads = kClusterThreads, kWarps = kClusterWarps;
constexpr int kMaxKeys = 15360;  // of pages in shared memory; more lie in global memory

template <typename T, int kHeadDim, int kBits>
struct Shared : ClusterShared<kHeadDim> {
    using Tokens = SharedTokens<T, kHeadDim, 1>;  // a warp has one tile or two

    static constexpr int kTileBytes = kWarps * count_tiles(kHeadDim) * count_tile_bytes(kHeadDim);
    static constexpr int kRowsBytes = kWarps * Tokens::kTileBytes;
    static constexpr int kKeysBytes = kMaxKeys * int(sizeof(unsigned)) + kTileBytes;
    static constexpr int kLogitsBytes = kKeysBytes > kRowsBytes ? kKeysBytes : kRowsBytes;
    union {
        struct {
            alignas(16) unsigned keys[kMaxKeys];  // of this block's pages, stripe by stripe; 0 for none
            alignas(16) char tiles[kTileBytes];  // of bounds
        };
        float logits[kLogitsBytes / sizeof(float)];  // [heads, slots], once candidates are found; keys in the end
        alignas(16) char rows[kRowsBytes];  // of keys and values, once tokens are chosen
        WarpSums<kHeadDim, kWarps> warp_sums;  // once they are attended
    };
    IntegerQuery<kHeadDim, kBits> integer_query;
    SharedGrid<kHeadDim, kBits> grids[kWarps];
    StripeList lists[kWarps];
    // Of each head's softmax over the candidates' tokens, of warps and of blocks: maximum and sum.
    float2 warp_logits[kWarps][kHeadTile], block_logits[kMaxClusterSize][kHeadTile];
    float2 head_logits[kHeadTile];  // of all: maximum and the inverse of the sum
    int first_candidate[kMaxStripes + 1], first_chosen[kMaxStripes + 1];  // of this block's stripes, in its lists
};

// What blocks need of shared memory for lists, after `Shared` and the query for scores.
struct ListSizes {
    int num_pages, num_tokens, num_logits;

    __host__ __device__ ListSizes(const AttendParams& params, int cluster_size) {
        const TokenChoice& choice = params.choice;
        const int num_stripes = (choice.num_stripes + cluster_size - 1) / cluster_size;
        const int num_best = choice.num_tokens - params.page_size;
        num_pages = num_stripes * most_pages(choice.num_candidates - 1, choice.num_stripes);
        // A stripe has no more than its share, and that of one page more (hf_quest/stripes.py).
        const int share = (num_best + choice.num_stripes - 1) / choice.num_stripes;
        num_tokens = num_stripes * (share + params.page_size) + params.page_size;
        num_logits = num_pages * params.page_size * params.group_size;
    }
};

#if __CUDA_ARCH__ >= 900  // clusters

// The pages of a block, numbered stripe by stripe, each filled up to `length`.
struct PagesInStripes {
    int first_stripe, cluster_size, num_stripes, length, last_page;

    __device__ int stripe_of(int idx) const { return int(__fdividef(idx + 0.5f, float(length))); }  // of this block
    __device__ int page_of(int idx) const {
        const int stripe = stripe_of(idx);
        return first_stripe + stripe * cluster_size + (idx - stripe * length) * num_stripes;
    }
    __device__ int find(int idx) const { return min(page_of(idx), last_page); }
    __device__ int find(int first, int i) const { return min(page_of(first) + i * num_stripes, last_page); }
};

template <typename T, int kHeadDim, int kBits, bool kIsPooled>
struct CodesBlock : ClusterBlock<T, kHeadDim, Shared<T, kHeadDim, kBits>> {
    using Block = ClusterBlock<T, kHeadDim, Shared<T, kHeadDim, kBits>>;
    using Block::has_newest;
    using Block::kv_idx, Block::storage, Block::num_tokens, Block::num_pages, Block::row_start, Block::score_input;
    using Block::params, Block::shared, Block::rank, Block::cluster_size, Block::warp_idx, Block::page_shift;
    using Layout = CodeLayout<kHeadDim, kBits>;
    static constexpr int kTokensOfUnit = 2 * kCodeTile;
    const int lane_idx = threadIdx.x % kWarpSize;
    const int num_stripes = ceil_div(Block::params.choice.num_stripes - rank, cluster_size);  // of this block
    const bool has_shares = Block::params.group_size > 1 && Block::params.choice.agreement != Agreement::kMax;
    int* page_ids;  // candidates
    int* token_ids;  // that this block attends
    int num_own;  // how many these are

    __device__ CodesBlock(const AttendParams& params, Shared<T, kHeadDim, kBits>& shared, char* score_query,
                          int* page_ids, int* token_ids)
        : Block(params, shared, score_query), page_ids(page_ids), token_ids(token_ids) {}

    __device__ void begin() {
        if constexpr (8 * Layout::kPairs > kHeadDim) shared.integer_query.clear();
        Block::begin(1);
        if constexpr (kIsPooled) begin_pool();
        if (warp_idx == kWarps - 1 && !is_all_attended()) plan();
        wait_for_cluster();
    }

    // Of the tokens that this block attends, their places in the pool; behind them the pool itself, which would be in
    // the way in registers.
    __device__ int* places() const { return token_ids + ListSizes(params, cluster_size).num_tokens; }
    __device__ Pool& pool() const {
        const uintptr_t end = reinterpret_cast<uintptr_t>(places() + ListSizes(params, cluster_size).num_tokens);
        return *reinterpret_cast<Pool*>((end + 7) / 8 * 8);
    }
    __device__ HeadPool<T, kHeadDim> head_pool(const Pool& pool) const {
        return {pool, kv_idx, params.choice.num_stripes, page_shift, num_tokens};
    }

    __device__ void begin_pool() {
        const Pool found = find_pool(params);
        if (threadIdx.x == 0) pool() = found;
        for (int own = warp_idx; own < num_stripes; own += kWarps) head_pool(found).fetch_tags(stripe_of(own));
    }

    __device__ int num_earlier() const { return num_pages - 1; }
    __device__ int num_wanted() const { return params.choice.num_tokens - params.page_size; }
    __device__ bool is_all_attended() const {
        return num_pages <= 1 || int64_t(num_earlier()) << page_shift <= num_wanted();
    }
    __device__ int stripe_of(int own) const { return rank + own * cluster_size; }
    __device__ int stripe_of_newest() const { return num_earlier() & (params.choice.num_stripes - 1); }
    __device__ Stripes stripes() const { return {num_earlier(), params.choice.num_stripes}; }

    // Scores this block's pages. Returns where their keys are, stripe by stripe.
    __device__ int score(unsigned* distant_keys) {
        const int length = ceil_div(stripes().count(0), kPagesPerTile) * kPagesPerTile;
        const PagesInStripes pages = {rank, cluster_size, params.choice.num_stripes, length, num_earlier() - 1};
        const int num_keys = num_stripes * length;
        const auto store = [&](int, int, int idx, float score) {
            if (idx >= num_keys) return;
            const int page_idx = pages.page_of(idx);
            if (page_idx >= num_earlier()) return;
            const bool is_kept = page_idx == 0 && params.score.keeps_first;
            const unsigned key = is_kept ? ~0u : order_of(score * params.scaling);
            if (distant_keys != nullptr) {
                distant_keys[page_idx] = key;
            } else {
                shared.keys[idx] = key;
            }
        };
        const auto wait_for_query = [&] {
            wait_for_copies<1>();  // pages are copied after it
            __syncthreads();
        };
        LargestScore agree;
        const NarrowBounds<T, kHeadDim, PagesInStripes> bounds(storage, kv_idx * count_pages(storage, params.page_size),
                                                               pages);
        score_pages<count_tiles(kHeadDim)>(bounds, score_input(), wait_for_query, warp_idx * kPagesPerTile,
                                           kWarps * kPagesPerTile, num_keys, agree, store);
        return length;
    }

    // Where the candidates and the chosen tokens of each stripe begin in this block's lists, by a warp.
    __device__ void plan() {
        const Stripes stripes = this->stripes();
        const int num_candidates = min(params.choice.num_candidates - 1, stripes.num_pages);
        int candidates = 0, chosen = 0;
        if (lane_idx < num_stripes) {
            const int stripe = stripe_of(lane_idx);
            candidates = stripes.count_chosen(num_candidates, stripe);
            chosen = stripes.first_token(num_wanted(), stripe + 1) - stripes.first_token(num_wanted(), stripe);
        }
        const int end_candidate = scan_warp(candidates), end_chosen = scan_warp(chosen);
        if (lane_idx > num_stripes) return;
        shared.first_candidate[lane_idx] = end_candidate - candidates;
        shared.first_chosen[lane_idx] = end_chosen - chosen;
    }

    __device__ void find_candidates(int length, const unsigned* distant_keys) {
        const Stripes stripes = this->stripes();
#pragma unroll 1
        for (int own = warp_idx; own < num_stripes; own += kWarps) {
            const int stripe = stripe_of(own), first = shared.first_candidate[own];
            const auto choose = [&](auto key_of) {
                choose_in_stripe(
                    shared.lists[warp_idx], stripes.count(stripe), shared.first_candidate[own + 1] - first, key_of,
                    [&](int idx, int place) { page_ids[first + place] = stripe + idx * params.choice.num_stripes; });
            };
            if (distant_keys == nullptr) {
                choose([&](int idx) { return shared.keys[own * length + idx]; });
            } else {
                choose([&](int idx) { return distant_keys[stripe + idx * params.choice.num_stripes]; });
            }
        }
    }

    // Has the candidates' codes brought to L2: more than is on its way while they are scored.
    __device__ void fetch_codes() const {
        constexpr int kLine = 128;
        const int lines_of_page = params.page_size * Layout::kRowBytes / kLine;
        const int num_lines = shared.first_candidate[num_stripes] * lines_of_page;
        const uint8_t* codes = storage.codes + Block::row_slot * Layout::kRowBytes;
        for (int idx = threadIdx.x; idx < num_lines; idx += kThreads) {
            const int place = idx / lines_of_page, line = idx - place * lines_of_page;
            prefetch(codes + (unsigned(page_ids[place]) << page_shift) * Layout::kRowBytes + line * kLine);
        }
    }

    // What a lane needs of up to 32 tokens of a page.
    template <int kTiles>
    struct Unit {
        LaneGrid<kHeadDim, kBits> grid;
        LaneCodes<kHeadDim, kBits> codes[kTiles];
    };

    // The logits of all candidates' tokens, by their codes; pages of more than 16 tokens have two tiles at a time. Of
    // pages of 8 the second half of a tile is the first again, and counts for nothing.
    template <int kTiles>
    __device__ void score_tokens(int num_slots) {
        const int unit_shift = max(page_shift - 5, 0), num_units = shared.first_candidate[num_stripes] << unit_shift;
        const bool has_second = params.page_size > 8;
        const int64_t first_page = kv_idx * count_pages(storage, params.page_size);
        const uint8_t* own_codes =
            storage.codes + Block::row_slot * Layout::kRowBytes + LaneCodes<kHeadDim, kBits>::find_own();
        const auto load = [&](Unit<kTiles>& unit, int idx) {
            const int page_idx = page_ids[idx >> unit_shift], part = idx & ((1 << unit_shift) - 1);
            const unsigned first_token = (unsigned(page_idx) << page_shift) + part * kTokensOfUnit;
            unit.grid.load(storage, first_page + page_idx);
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
                const unsigned first_byte = (first_token + i * kCodeTile) * Layout::kRowBytes;  // MAX_SLOTS of ops.py
                unit.codes[i].load_from(own_codes + first_byte, has_second ? 8 * Layout::kRowBytes : 0);
            }
        };
        const int first_head = lane_idx % 4 * 2, num_heads = params.group_size;
        const bool has_head[2] = {first_head < num_heads, first_head + 1 < num_heads};
        float factors[2], *logits[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            factors[i] = shared.integer_query.factors[min(first_head + i, num_heads - 1)];
            logits[i] = shared.logits + (first_head + i) * num_slots + lane_idx / 4;
        }
        LogitSum sums[2];  // over this lane's tokens
        Unit<kTiles> next;
        int idx = warp_idx;
        if (idx < num_units) load(next, idx);
        for (; idx < num_units; idx += kWarps) {
            shared.grids[warp_idx].make(next.grid);
            const IntegerPage<kHeadDim, kBits> page(next.grid, shared.grids[warp_idx], shared.integer_query, num_heads);
            const int first_slot =
                ((idx >> unit_shift) << page_shift) + (idx & ((1 << unit_shift) - 1)) * kTokensOfUnit;
            LaneCodes<kHeadDim, kBits> codes[kTiles];
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) codes[tile] = next.codes[tile];
            load(next, min(idx + kWarps, num_units - 1));
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                const float4 products = page.multiply(codes[tile]);
                const int slot = first_slot + tile * kCodeTile;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float factor = page.unit * factors[i];
                    const float low = (&products.x)[i] * factor, high = (&products.x)[i + 2] * factor;
                    if (has_head[i]) logits[i][slot] = low;
                    if (has_head[i] && has_second) logits[i][slot + 8] = high;
                    if (!has_shares) continue;
                    const float low_logit = logit_of(low), high_logit = has_second ? logit_of(high) : kNoLogit;
                    const float maximum = fmaxf(sums[i].maximum, fmaxf(low_logit, high_logit));
                    sums[i].sum = sums[i].sum * power_of_two(sums[i].maximum - maximum) +
                                  power_of_two(low_logit - maximum) + power_of_two(high_logit - maximum);
                    sums[i].maximum = maximum;
                }
            }
        }
        if (!has_shares) return;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int distance = 4; distance < kWarpSize; distance *= 2) sums[i].add_lanes(distance);
            if (lane_idx < 4) shared.warp_logits[warp_idx][lane_idx * 2 + i] = {sums[i].maximum, sums[i].sum};
        }
    }

    // Each head's softmax over the candidates of all blocks.
    __device__ void exchange_sums() {
        const int num_heads = params.group_size;
        const unsigned barrier = address_of(&shared.choice_barrier);
        for (int idx = threadIdx.x; idx < num_heads * cluster_size; idx += kThreads) {
            const int head_idx = idx % num_heads, other = idx / num_heads;
            LogitSum total;
#pragma unroll
            for (int i = 0; i < kWarps; ++i) {
                const float2 of_warp = shared.warp_logits[i][head_idx];
                total.add({of_warp.x, of_warp.y});
            }
            const unsigned target = address_of(&shared.block_logits[rank][head_idx]);
            send(address_at(target, other), address_at(barrier, other),
                 uint2{__float_as_uint(total.maximum), __float_as_uint(total.sum)});
        }
        if (threadIdx.x == 0) {
            arrive_expecting(shared.choice_barrier, cluster_size * num_heads * int(sizeof(float2)));
        }
        wait_for_first_phase(shared.choice_barrier);
        if (warp_idx < num_heads) {
            LogitSum total;
            if (lane_idx < cluster_size) {
                const float2 of_block = shared.block_logits[lane_idx][warp_idx];
                total = {of_block.x, of_block.y};
            }
#pragma unroll
            for (int distance = 1; distance < kMaxClusterSize; distance *= 2) total.add_lanes(distance);
            if (lane_idx == 0) shared.head_logits[warp_idx] = {total.maximum, 1.0f / total.sum};
        }
        __syncthreads();
    }

    // Makes keys of the logits, in the place of the first head's.
    __device__ void agree(int num_slots) {
        unsigned* keys = reinterpret_cast<unsigned*>(shared.logits);
        const int num_keys = shared.first_candidate[num_stripes] << page_shift;
        const bool is_added = has_shares && params.choice.agreement == Agreement::kSum;
#pragma unroll 2
        for (int slot = threadIdx.x; slot < num_keys; slot += kThreads) {
            float agreed = is_added ? 0.0f : -INFINITY;
#pragma unroll 4
            for (int head_idx = 0; head_idx < params.group_size; ++head_idx) {
                float value = shared.logits[head_idx * num_slots + slot];
                if (has_shares) {
                    const float2 sums = shared.head_logits[head_idx];
                    value = power_of_two(logit_of(value) - sums.x) * sums.y;
                }
                agreed = is_added ? agreed + value : fmaxf(agreed, value);
            }
            keys[slot] = order_of(agreed);
        }
    }

    __device__ void choose_tokens() {
        const unsigned* keys = reinterpret_cast<const unsigned*>(shared.logits);
        const Stripes stripes = this->stripes();
        int64_t* told = params.told_ids == nullptr ? nullptr : params.told_ids + kv_idx * params.choice.num_tokens;
#pragma unroll 1
        for (int own = warp_idx; own < num_stripes; own += kWarps) {
            const int first_page = shared.first_candidate[own], first = shared.first_chosen[own];
            const int num_keys = (shared.first_candidate[own + 1] - first_page) << page_shift;
            const int num_chosen = shared.first_chosen[own + 1] - first;
            const int first_told = told == nullptr ? 0 : stripes.first_token(num_wanted(), stripe_of(own));
            const unsigned* of_stripe = keys + (first_page << page_shift);
            const auto tell = [&](int idx, int place) {
                const int page_idx = page_ids[first_page + (idx >> page_shift)];
                const int token_idx = (page_idx << page_shift) + (idx & (params.page_size - 1));
                token_ids[first + place] = token_idx;
                if (told != nullptr) told[first_told + place] = token_idx;
            };
            choose_in_stripe(
                shared.lists[warp_idx], num_keys, num_chosen, [&](int idx) { return of_stripe[idx]; }, tell);
        }
        // The newest page's own tokens are those of the block whose stripe comes next.
        num_own = shared.first_chosen[num_stripes];
        if (!has_newest) return;
        const int newest_start = num_earlier() << page_shift, num_newest = num_tokens - newest_start;
        for (int idx = threadIdx.x; idx < params.page_size; idx += kThreads) {
            if (idx < num_newest) token_ids[num_own + idx] = newest_start + idx;
            if (told != nullptr) told[num_wanted() + idx] = idx < num_newest ? newest_start + idx : -1;
        }
        num_own += num_newest;
    }

    // Looks up the places of what this block attends, each stripe's by a warp. The newest page's tokens are among those
    // of its stripe, which is one of this block's, too.
    __device__ void find_places() {
        const HeadPool<T, kHeadDim> own_pool = head_pool(pool());
#pragma unroll 1
        for (int own = warp_idx; own < num_stripes; own += kWarps) {
            const int first = shared.first_chosen[own], num_chosen = shared.first_chosen[own + 1] - first;
            const int end = shared.first_chosen[num_stripes];
            const int num_newest = stripe_of_newest() == stripe_of(own) ? num_own - end : 0;
            own_pool.look_up(stripe_of(own), num_chosen + num_newest, token_ids, places(),
                             [&](int idx) { return idx < num_chosen ? first + idx : end + idx - num_chosen; });
        }
    }

    __device__ void choose() {
        const int64_t first_page = kv_idx * count_pages(storage, params.page_size);
        const int most_keys = num_stripes * ceil_div(stripes().count(0), kPagesPerTile) * kPagesPerTile;
        unsigned* distant_keys =
            most_keys <= kMaxKeys ? nullptr : reinterpret_cast<unsigned*>(storage.scores + first_page);
        const int length = score(distant_keys);
        __syncthreads();
        const auto input = score_input();  // by warps that have no stripe, where there are some
        shared.integer_query.load(input.query, input.head_stride, params.group_size, params.scaling);
        find_candidates(length, distant_keys);
        has_newest = stripe_of_newest() % cluster_size == rank;
        if (has_newest) Block::store_new_token();
        __syncthreads();
        fetch_codes();
        const int num_slots = shared.first_candidate[num_stripes] << page_shift;
        if (params.page_size > kCodeTile) {
            score_tokens<2>(num_slots);
        } else {
            score_tokens<1>(num_slots);
        }
        __syncthreads();
        if (has_shares) exchange_sums();
        agree(num_slots);
        __syncthreads();
        choose_tokens();
        if constexpr (kIsPooled) {
            __syncthreads();
            find_places();
        }
    }

    // Tells of all tokens, which this block attends a part of.
    __device__ void take_all() {
        const int num_tiles = ceil_div(max(num_tokens, 0), kTile), share = ceil_div(num_tiles, cluster_size) * kTile;
        first_token = rank * share;
        num_own = max(min(num_tokens - first_token, share), 0);
        has_newest = num_tokens > 0 ? num_own > 0 && first_token + num_own == num_tokens : rank == 0;
        if (has_newest) Block::store_new_token();
        if (params.told_ids == nullptr || rank > 0) return;
        int64_t* told = params.told_ids + kv_idx * params.choice.num_tokens;
        for (int idx = threadIdx.x; idx < params.choice.num_tokens; idx += kThreads) {
            told[idx] = idx < num_tokens ? idx : -1;
        }
    }

    int first_token = -1;  // of those that this block attends where all are

    __device__ void attend() {
        wait_for_copies<0>();  // of the query, if nothing has waited for it
        __syncthreads();
        const auto find_token = [&](int chosen) {
            if (chosen >= num_own) return kNoToken;
            return first_token < 0 ? token_ids[chosen] : first_token + chosen;
        };
        using Tokens = typename Shared<T, kHeadDim, kBits>::Tokens;
        const Tokens tokens(static_cast<const T*>(storage.keys) + row_start,
                            static_cast<const T*>(storage.values) + row_start, num_tokens, shared.rows);
        const HeadQuery<T, kHeadDim> query(score_input().own_head(0));
        if constexpr (kIsPooled) {
            const int* own_places = places();
            const auto find_pooled = [&](int chosen) {
                const bool has_place = chosen < num_own && first_token < 0;
                return PooledSingles{find_token(chosen), has_place ? own_places[chosen] : kNoPlace};
            };
            attend_tiles<T, kHeadDim, kWarps, PooledSingles>(
                shared.warp_sums, PooledTokens<T, kHeadDim>(tokens, head_pool(pool())), query, params.group_size, 0,
                ceil_div(num_own, kTile), 1, params.scaling, params.softcap, find_pooled);
        } else {
            attend_tiles<T, kHeadDim, kWarps, Singles>(shared.warp_sums, tokens, query, params.group_size, 0,
                                                       ceil_div(num_own, kTile), 1, params.scaling, params.softcap,
                                                       find_token);
        }
    }

    // Writes the codes of the newest page, which the newest token has filled.
    __device__ void encode_newest_page() const {
        constexpr int kVectors = kHeadDim / kVector, kSharing = kThreads / kVectors;  // threads for a vector's keys
        const int vector_idx = threadIdx.x % kVectors, first_key = threadIdx.x / kVectors;
        if (first_key >= min(kSharing, params.page_size)) return;
        const int64_t page_idx = kv_idx * count_pages(storage, params.page_size) + num_pages - 1;
        const uint2* bounds = static_cast<const uint2*>(storage.bounds) + page_idx * 2 * kVectors + vector_idx;
        const Bounds8 own = {bounds[0], bounds[kVectors], storage.scales[(page_idx * kVectors + vector_idx) / 4]};
        float lowest[kVector], highest[kVector];
        own.to_floats(lowest, highest);
        const int64_t first_slot = Block::row_slot + num_tokens - params.page_size + first_key;
        encode<T, kBits>(static_cast<const uint4*>(storage.keys) + first_slot * kVectors + vector_idx,
                         kSharing * kVectors, ceil_div(params.page_size - first_key, kSharing), lowest, highest,
                         storage.codes + first_slot * Layout::kRowBytes + vector_idx * kBits,
                         kSharing * Layout::kRowBytes);
    }
};

#endif  // __CUDA_ARCH__ >= 900

template <typename T, int kHeadDim, int kBits, bool kIsPooled>
__global__ void __launch_bounds__(kThreads, 1) chain_by_codes_kernel(const __grid_constant__ AttendParams params) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ uint4 dynamic[];
    auto& shared = *reinterpret_cast<Shared<T, kHeadDim, kBits>*>(dynamic);
    char* score_query = reinterpret_cast<char*>(dynamic) + sizeof(shared);
    int* page_ids = reinterpret_cast<int*>(score_query + count_query_bytes(params.group_size, kHeadDim));
    int* token_ids = page_ids + ListSizes(params, gridDim.x).num_pages;
    CodesBlock<T, kHeadDim, kBits, kIsPooled> block(params, shared, score_query, page_ids, token_ids);
    block.begin();
    if (block.is_all_attended()) {
        block.take_all();
    } else {
        block.choose();
    }
    block.attend();
    block.send_sums();
    block.write_output();
    const bool is_full = block.num_tokens > 0 && (block.num_tokens & (params.page_size - 1)) == 0;
    if (params.new_token.key != nullptr && block.has_newest && is_full) block.encode_newest_page();
    wait_for_cluster();  // no block ends while what it has sent is on its way
#endif
}

template <typename T, int kHeadDim, int kBits>
size_t count_shared_bytes(const AttendParams& params, int cluster_size, bool is_pooled) {
    const ListSizes sizes(params, cluster_size);
    if (sizes.num_logits * sizeof(float) > Shared<T, kHeadDim, kBits>::kLogitsBytes) return SIZE_MAX;
    return sizeof(Shared<T, kHeadDim, kBits>) + count_query_bytes(params.group_size, kHeadDim) +
           (sizes.num_pages + sizes.num_tokens * (is_pooled ? 2 : 1)) * sizeof(int) +
           (is_pooled ? sizeof(Pool) + 8 : 0);
}

template <typename Run>
cudaError_t for_shape(const AttendParams& params, Run run) {
    return for_head_dim(params.data_type, params.head_dim, [&](auto element, auto head_dim) {
        return params.choice.code_bits == 2 ? run(element, head_dim, std::integral_constant<int, 2>())
                                            : run(element, head_dim, std::integral_constant<int, 4>());
    });
}

template <bool kIsPooled>
cudaError_t launch_by_codes(const AttendParams& params, int cluster_size) {
    return for_shape(params, [&](auto element, auto head_dim, auto bits) {
        using T = decltype(element);
        constexpr int kHeadDim = decltype(head_dim)::value, kBits = decltype(bits)::value;
        const size_t num_bytes = count_shared_bytes<T, kHeadDim, kBits>(params, cluster_size, kIsPooled);
        cudaLaunchAttribute attributes[2];
        const cudaLaunchConfig_t config = configure_cluster(params, cluster_size, num_bytes, attributes);
        return cudaLaunchKernelEx(&config, chain_by_codes_kernel<T, kHeadDim, kBits, kIsPooled>, params);
    });
}

}  // namespace
}  // namespace hf_quest
