// How the warps of a block attend tokens: what attend.cu and chain.cu share.
#pragma once

#include <cmath>

#include "common.cuh"

namespace hf_quest {

constexpr int kTile = 16;  // tokens
constexpr int kHalf = 8;   // tokens that lie together, whatever the page size
constexpr int kNoToken = 1 << 30;
constexpr float kLowest = -3.402823466e38f;  // a maximum of nothing: finite, so that differences are numbers

__device__ inline float weight_of(float value, float maximum) { return power_of_two(value - maximum); }

// softcap * tanh(logit / softcap), up to a few roundings of softcap.
__device__ inline float cap(float logit, float softcap) {
    const float power = power_of_two(__fdividef(logit, softcap) * (2.0f * kLog2E));
    return softcap - softcap * __fdividef(2.0f, 1.0f + power);
}

__device__ inline void add_scaled(float4& sum, float4 term, float factor) {
    sum.x += term.x * factor;
    sum.y += term.y * factor;
    sum.z += term.z * factor;
    sum.w += term.w * factor;
}

// Where the values of a head lie in registers and in partial sums: a lane holds kVector neighbouring channels of every
// block of 8 * kVector, in pairs. Partial sums are stored pair by pair of all lanes: [blocks, kPairs, group_idx, 2].
template <int kHeadDim>
struct Layout {
    static constexpr int kVector = kHeadDim % 64 == 0 ? 8 : 4;  // channels that a lane loads of a value
    static constexpr int kPairs = kVector / 2;
    static constexpr int kBlocks = kHeadDim / (8 * kVector);
    using Vector = std::conditional_t<kVector == 8, uint4, uint2>;

    static __device__ uint32_t word(const Vector& vector, int idx) { return (&vector.x)[idx]; }

    static __device__ int channel_of(int pair_idx) {
        const int group_idx = pair_idx % 8, pair_of_lane = pair_idx / 8 % kPairs, block_idx = pair_idx / 8 / kPairs;
        return (block_idx * 8 + group_idx) * kVector + 2 * pair_of_lane;
    }
};

// What a lane sums up, of its channels and the heads 2 * quad_idx and the next: [blocks, pairs, (channel, head)].
template <int kHeadDim>
using LaneSums = float[Layout<kHeadDim>::kBlocks][Layout<kHeadDim>::kPairs][4];

// The logit, times log2 e, that a head's softmax counts beside its tokens, or kLowest, which has no weight beside them.
template <typename T>
__device__ float sink_of(const AttendParams& params, int head_idx) {
    if (params.sinks == nullptr) return kLowest;
    return to_float(static_cast<const T*>(params.sinks)[head_idx]) * kLog2E;
}

// Stores a quad of a head's channels: `sums`, of values times weights, over `sum`, that of the weights.
template <typename T, int kHeadDim>
__device__ void store_quad(T* output, int head_idx, int quad_of_head, float4 sums, float sum) {
    T* head = output + head_idx * kHeadDim;
    using L = Layout<kHeadDim>;
    const float factor = 1.0f / sum;
    const auto first = round_to_pair<T>(sums.x * factor, sums.y * factor);
    const auto second = round_to_pair<T>(sums.z * factor, sums.w * factor);
    *reinterpret_cast<Pair<T>*>(head + L::channel_of(2 * quad_of_head)) = first;
    *reinterpret_cast<Pair<T>*>(head + L::channel_of(2 * quad_of_head + 1)) = second;
}

// One quad of channels of one head over what `num_parts` warps, blocks or splits have summed up, kAtOnce at a time:
// quad_of(i) are values weighted by 2^(logit - maximum), softmax_of(i) is that maximum and the sum of those weights.
// `maximum` and `sum` begin with those of a sink, or of nothing, and end with those of all. Past the last part it is
// read again, without weight: if the loop over the terms ended there, each load would wait behind the branch that ends
// it.
template <int kAtOnce, typename SoftmaxOf, typename QuadOf>
__device__ float4 merge_parts(int num_parts, float& maximum, float& sum, SoftmaxOf softmax_of, QuadOf quad_of) {
    float4 merged = {};
#pragma unroll 1
    for (int first = 0; first < num_parts; first += kAtOnce) {
        float2 softmax[kAtOnce];
        float4 quad[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            softmax[i] = softmax_of(min(first + i, num_parts - 1));
            quad[i] = quad_of(min(first + i, num_parts - 1));
        }
        const float earlier_maximum = maximum;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) maximum = fmaxf(maximum, softmax[i].x);
        const float correction = weight_of(earlier_maximum, maximum);
        sum *= correction;
        merged = {merged.x * correction, merged.y * correction, merged.z * correction, merged.w * correction};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const float factor = first + i < num_parts ? weight_of(softmax[i].x, maximum) : 0.0f;
            sum += softmax[i].y * factor;
            add_scaled(merged, quad[i], factor);
        }
    }
    return merged;
}

// What each warp of a block has summed up for up to 8 query heads: values weighted by 2^(logit - maximum), in the order
// of Layout, and the maximum of the logits (times log2 e) and the sum of the weights.
template <int kHeadDim, int kWarps>
struct WarpSums {
    alignas(16) float output[kWarps][kHeadTile][kHeadDim + 4];  // padded against bank conflicts
    float2 softmax[kWarps][kHeadTile];

    // Stores the weighted values of a warp, by each of its lanes.
    __device__ void store(const LaneSums<kHeadDim>& lane_sums, int num_heads) {
        using L = Layout<kHeadDim>;
        const int warp_idx = threadIdx.x / kWarpSize, group_idx = threadIdx.x % kWarpSize / 4;
#pragma unroll
        for (int block_idx = 0; block_idx < L::kBlocks; ++block_idx) {
#pragma unroll
            for (int pair_idx = 0; pair_idx < L::kPairs; ++pair_idx) {
                const float (&sums)[4] = lane_sums[block_idx][pair_idx];
                const int offset = ((block_idx * L::kPairs + pair_idx) * 8 + group_idx) * 2;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int head_idx = threadIdx.x % 4 * 2 + i;
                    if (head_idx >= num_heads) continue;
                    *reinterpret_cast<float2*>(&output[warp_idx][head_idx][offset]) = {sums[i], sums[i + 2]};
                }
            }
        }
    }

    // One quad of channels of one head over all warps, as merge_parts() has it.
    __device__ float4 merge(int head_idx, int quad_of_head, float& maximum, float& sum) const {
        return merge_parts<kWarps>(
            kWarps, maximum, sum, [&](int warp_idx) { return softmax[warp_idx][head_idx]; },
            [&](int warp_idx) {
                return *reinterpret_cast<const float4*>(&output[warp_idx][head_idx][4 * quad_of_head]);
            });
    }
};

// What a lane needs of a head's query for logits: a quarter of each chunk of channels.
template <typename T, int kHeadDim>
struct HeadQuery {
    uint4 vectors[kHeadDim / kChunk];

    __device__ explicit HeadQuery(const T* head) {
#pragma unroll
        for (int i = 0; i < kHeadDim / kChunk; ++i) {
            vectors[i] = reinterpret_cast<const uint4*>(head + i * kChunk)[threadIdx.x % 4];
        }
    }
};

// What a lane needs of the keys of 8 tokens, twice: a quarter of each chunk of channels of token group_idx.
template <int kHeadDim>
struct LaneKeys {
    uint4 halves[2][kHeadDim / kChunk];
};

// What a lane needs of the values of the same: in each block of channels its own, of tokens 2 quad_idx and the next in
// both halves.
template <int kHeadDim>
struct LaneValues {
    typename Layout<kHeadDim>::Vector blocks[Layout<kHeadDim>::kBlocks][4];
};

// Logits of head group_idx and the tokens 2 * quad_idx and the next, in both halves.
template <typename T, int kHeadDim>
__device__ void multiply_keys(float (&logit)[4], const HeadQuery<T, kHeadDim>& query, const LaneKeys<kHeadDim>& keys) {
#pragma unroll
    for (int half_idx = 0; half_idx < 2; ++half_idx) {
        float sums[4] = {};
#pragma unroll
        for (int i = 0; i < kHeadDim / kChunk; ++i) {
            const uint4 a = query.vectors[i], b = keys.halves[half_idx][i];
            multiply_add<T>(sums, a.x, 0, a.y, 0, b.x, b.y);
            multiply_add<T>(sums, a.z, 0, a.w, 0, b.z, b.w);
        }
        logit[2 * half_idx] = sums[0];
        logit[2 * half_idx + 1] = sums[1];
    }
}

// output = output * correction + values^T x weights: corrections of the two heads, and weights, in pairs, of tokens
// 2 * quad_idx and the next in the low and the high half.
template <typename T, int kHeadDim>
__device__ void add_values(LaneSums<kHeadDim>& output, const LaneValues<kHeadDim>& values, float even_correction,
                           float odd_correction, uint32_t low_weights, uint32_t high_weights) {
    using L = Layout<kHeadDim>;
#pragma unroll
    for (int block_idx = 0; block_idx < L::kBlocks; ++block_idx) {
#pragma unroll
        for (int pair_idx = 0; pair_idx < L::kPairs; ++pair_idx) {
            float (&sums)[4] = output[block_idx][pair_idx];
            sums[0] *= even_correction;
            sums[1] *= odd_correction;
            sums[2] *= even_correction;
            sums[3] *= odd_correction;
            uint32_t pair[4];  // the same two channels of four tokens
#pragma unroll
            for (int i = 0; i < 4; ++i) pair[i] = L::word(values.blocks[block_idx][i], pair_idx);
            multiply_add<T>(sums, __byte_perm(pair[0], pair[1], 0x5410), __byte_perm(pair[0], pair[1], 0x7632),
                            __byte_perm(pair[2], pair[3], 0x5410), __byte_perm(pair[2], pair[3], 0x7632), low_weights,
                            high_weights);
        }
    }
}

// The tokens of a tile, of which token(half_idx, idx) is one, or kNoToken or more where there is none. In runs that lie
// together, as those of pages do:
struct Runs {
    int starts[2];

    __device__ int token(int half_idx, int idx) const { return starts[half_idx] + idx; }
};

// Or each chosen by itself: lane i has token i % 16. All lanes of a warp call token() at once.
struct Singles {
    int own;

    __device__ int token(int half_idx, int idx) const { return __shfl_sync(kWholeWarp, own, half_idx * kHalf + idx); }
};

// How a row's tokens come to the lanes of a warp, tile by tile: load_keys() and load_values() begin, each followed by
// end_load() even where there is nothing to load, and take_keys() and take_values() wait, in the same order. There are
// kSets tiles on their way, if kLoadsAhead.
//
// For attend.cu, where past the newest token that one is read again: straight to registers, of which more would be too
// many where the head dim is large.
template <typename T, int kHeadDim>
struct RegisterTokens {
    using L = Layout<kHeadDim>;
    static constexpr bool kLoadsAhead = kHeadDim <= 128;
    static constexpr int kSets = 1;
    const T *keys, *values;  // of the row's first token, from this lane's channels on
    int newest;
    LaneKeys<kHeadDim> lane_keys;
    LaneValues<kHeadDim> lane_values;

    __device__ RegisterTokens(const T* keys, const T* values, int num_tokens)
        : keys(keys + threadIdx.x % 4 * 8),
          values(values + threadIdx.x % kWarpSize / 4 * L::kVector),
          newest(num_tokens - 1) {}

    template <typename Tile>
    __device__ void load_keys(int, Tile tile) {
        int token_idx[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) token_idx[i] = min(tile.token(i, threadIdx.x % kWarpSize / 4), newest);
#pragma unroll
        for (int half_idx = 0; half_idx < 2; ++half_idx) {
            const T* token = keys + unsigned(token_idx[half_idx]) * kHeadDim;
#pragma unroll
            for (int i = 0; i < kHeadDim / kChunk; ++i) {
                lane_keys.halves[half_idx][i] = load_once(reinterpret_cast<const uint4*>(token + i * kChunk));
            }
        }
    }

    template <typename Tile>
    __device__ void load_values(int, Tile tile) {
        int token_idx[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) token_idx[i] = min(tile.token(i / 2, 2 * (threadIdx.x % 4) + i % 2), newest);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const T* token = values + unsigned(token_idx[i]) * kHeadDim;
#pragma unroll
            for (int block_idx = 0; block_idx < L::kBlocks; ++block_idx) {
                const auto* vector = reinterpret_cast<const typename L::Vector*>(token + block_idx * 8 * L::kVector);
                lane_values.blocks[block_idx][i] = load_once(vector);
            }
        }
    }

    __device__ void end_load() {}
    __device__ const LaneKeys<kHeadDim>& take_keys(int) { return lane_keys; }
    __device__ const LaneValues<kHeadDim>& take_values(int) { return lane_values; }
    __device__ void finish() {}
};

// The same for clusters: by rows of shared memory, padded against bank conflicts. So each request is for whole lines.
// Past the newest token nothing is read, and rows are of zeros: a block reads no other tokens than its own, one of
// which may be on its way to its slot from another block.
template <typename T, int kHeadDim, int kTiles>
struct SharedTokens {
    using L = Layout<kHeadDim>;
    static constexpr bool kLoadsAhead = true;
    static constexpr int kSets = kTiles;
    static constexpr int kVectors = kHeadDim / 8;  // of 16 bytes
    static constexpr int kKeyBytes = 2 * kHeadDim + (kHeadDim % 64 == 0 ? 64 : 0);
    static constexpr int kValueBytes = 2 * kHeadDim + 16;
    static constexpr int kTileBytes = kTile * (kKeyBytes + kValueBytes);
    const T *keys, *values;  // of the row's first token
    int newest;
    char* rows;       // kTileBytes for each warp and tile
    unsigned target;  // their address

    __device__ SharedTokens(const T* keys, const T* values, int num_tokens, char* rows)
        : keys(keys),
          values(values),
          newest(num_tokens - 1),
          rows(rows + threadIdx.x / kWarpSize * kTiles * kTileBytes),
          target(address_of(this->rows)) {
        // So that it is in a register of each thread: where nvcc 13.0 has the part that all threads share in a uniform
        // one, it makes copies that sm_90 calls an illegal instruction.
        asm volatile("" : "+r"(target));
    }

    __device__ char* key_rows(int set) const { return rows + set * kTileBytes; }
    __device__ char* value_rows(int set) const { return rows + set * kTileBytes + kTile * kKeyBytes; }

    template <typename Tile>
    __device__ void load(const T* tokens, Tile tile, unsigned first_row, int row_bytes) const {
        static_assert(kHalf * kVectors % kWarpSize == 0);  // so that a half is known where the loop is unrolled
        // Code that runs once is slow to fetch, and a token of its own takes more of it than one of a run.
        constexpr int kUnrolled = std::is_same_v<Tile, struct Singles> ? 4 : kTile * kVectors / kWarpSize;
        __syncwarp();  // until all lanes have taken what was there
#pragma unroll kUnrolled
        for (int i = 0; i < kTile * kVectors / kWarpSize; ++i) {
            const int idx = i * kWarpSize + threadIdx.x % kWarpSize, row_idx = idx / kVectors, vector = idx % kVectors;
            const int half_idx = i * kWarpSize / (kHalf * kVectors);
            const int token_idx = tile.token(half_idx, row_idx % kHalf);
            copy_async_once(first_row + row_idx * row_bytes + vector * 16,
                            tokens + unsigned(min(token_idx, newest)) * kHeadDim + vector * 8, token_idx <= newest);
        }
    }

    template <typename Tile>
    __device__ void load_keys(int set, Tile tile) {
        load(keys, tile, target + set * kTileBytes, kKeyBytes);
    }
    template <typename Tile>
    __device__ void load_values(int set, Tile tile) {
        load(values, tile, target + set * kTileBytes + kTile * kKeyBytes, kValueBytes);
    }
    __device__ void end_load() { commit_copies(); }

    // Until the oldest load has come, of the two for each tile on its way.
    __device__ void wait() const {
        wait_for_copies<2 * kSets - 1>();
        __syncwarp();
    }

    __device__ LaneKeys<kHeadDim> take_keys(int set) const {
        wait();
        const char* own = key_rows(set) + threadIdx.x % kWarpSize / 4 * kKeyBytes + threadIdx.x % 4 * 16;
        LaneKeys<kHeadDim> taken;
#pragma unroll
        for (int half_idx = 0; half_idx < 2; ++half_idx) {
#pragma unroll
            for (int i = 0; i < kHeadDim / kChunk; ++i) {
                const char* vector = own + half_idx * kHalf * kKeyBytes + i * kChunk * int(sizeof(T));
                taken.halves[half_idx][i] = *reinterpret_cast<const uint4*>(vector);
            }
        }
        return taken;
    }

    __device__ LaneValues<kHeadDim> take_values(int set) const {
        wait();
        const int channel = threadIdx.x % kWarpSize / 4 * L::kVector;
        const char* own = value_rows(set) + 2 * (threadIdx.x % 4) * kValueBytes + channel * int(sizeof(T));
        LaneValues<kHeadDim> taken;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int block_idx = 0; block_idx < L::kBlocks; ++block_idx) {
                const char* token = own + (i / 2 * kHalf + i % 2) * kValueBytes;
                const auto* vector = token + block_idx * 8 * L::kVector * int(sizeof(T));
                taken.blocks[block_idx][i] = *reinterpret_cast<const typename L::Vector*>(vector);
            }
        }
        return taken;
    }

    __device__ void finish() { __syncthreads(); }  // something else may lie where rows lay
};

// Attends the tiles of 16 tokens from `first_tile` to `end_tile`, dealt to the warps of the block. find_token(i) is the
// i-th token that is chosen, or kNoToken; if tiles are Runs it is asked for multiples of 8 and has 7 behind it. `query`
// is that of head group_idx of `num_heads`. Ends with all sums in `warp_sums`. Loads come after what shuffles, which
// would wait in the same queue until memory has taken them. What a tile has past the newest token gets no weight; spare
// heads are the last one again.
template <typename T, int kHeadDim, int kWarps, typename Tile, typename Tokens, typename FindToken>
__device__ void attend_tiles(WarpSums<kHeadDim, kWarps>& warp_sums, Tokens tokens, const HeadQuery<T, kHeadDim>& query,
                             int num_heads, int first_tile, int end_tile, int page_size, float scaling, float softcap,
                             FindToken find_token) {
    constexpr int kSets = Tokens::kSets;
    const int lane_idx = threadIdx.x % kWarpSize, warp_idx = threadIdx.x / kWarpSize;
    const int group_idx = lane_idx / 4, quad_idx = lane_idx % 4;

    LaneSums<kHeadDim> output = {};
    float maximum = kLowest, sum = 0.0f;        // of head group_idx; the sum is of this lane's tokens alone
    int half_starts[2] = {kNoToken, kNoToken};  // lane i has those of the warp's i-th tile from here
    first_tile += warp_idx;
    Tile tiles[kSets];
    const auto find_tokens = [&](int set, int tile_idx) {
        if constexpr (!std::is_same_v<Tile, Runs>) {
            tiles[set] = Tile{find_token(tile_idx * kTile + lane_idx % kTile)};
            return;
        } else {
            const int round_idx = (tile_idx - first_tile) / kWarps;
            if (round_idx % kWarpSize == 0) {
                const int chosen = (tile_idx + lane_idx * kWarps) * kTile;
                half_starts[0] = find_token(chosen);
                half_starts[1] = page_size < kTile ? find_token(chosen + kHalf) : half_starts[0] + kHalf;
            }
#pragma unroll
            for (int half_idx = 0; half_idx < 2; ++half_idx) {
                tiles[set].starts[half_idx] = __shfl_sync(kWholeWarp, half_starts[half_idx], round_idx % kWarpSize);
            }
        }
    };
    if constexpr (Tokens::kLoadsAhead) {
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
            if (first_tile + set * kWarps < end_tile) find_tokens(set, first_tile + set * kWarps);
        }
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
            const bool is_tile = first_tile + set * kWarps < end_tile;
            if (is_tile) tokens.load_keys(set, tiles[set]);
            tokens.end_load();
            if (is_tile) tokens.load_values(set, tiles[set]);
            tokens.end_load();
        }
    }
    for (int tile_idx = first_tile; tile_idx < end_tile;) {
#pragma unroll
        for (int set = 0; set < kSets; ++set, tile_idx += kWarps) {
            if (set > 0 && tile_idx >= end_tile) break;
            if constexpr (!Tokens::kLoadsAhead) {
                find_tokens(set, tile_idx);
                tokens.load_keys(set, tiles[set]);
            }
            float logit[4];
            multiply_keys<T>(logit, query, tokens.take_keys(set));
#pragma unroll
            for (int i = 0; i < 4; ++i) logit[i] *= scaling;
            if (softcap > 0.0f) {
#pragma unroll
                for (int i = 0; i < 4; ++i) logit[i] = cap(logit[i], softcap);
            }
            float new_maximum = maximum;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool is_visible = tiles[set].token(i / 2, 2 * quad_idx + i % 2) <= tokens.newest;
                logit[i] = is_visible ? logit[i] * kLog2E : -INFINITY;
                new_maximum = fmaxf(new_maximum, logit[i]);
            }
            new_maximum = fmaxf(new_maximum, __shfl_xor_sync(kWholeWarp, new_maximum, 1));
            new_maximum = fmaxf(new_maximum, __shfl_xor_sync(kWholeWarp, new_maximum, 2));
            if constexpr (!Tokens::kLoadsAhead) tokens.load_values(set, tiles[set]);
            const float correction = weight_of(maximum, new_maximum);
            maximum = new_maximum;
            sum *= correction;
            float weight[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                weight[i] = weight_of(logit[i], maximum);
                sum += weight[i];
            }
            const uint32_t low_weights = as_bits(round_to_pair<T>(weight[0], weight[1]));
            const uint32_t high_weights = as_bits(round_to_pair<T>(weight[2], weight[3]));

            // As columns of the output, heads lie in other lanes than as rows of the logits.
            const float even_correction = __shfl_sync(kWholeWarp, correction, 8 * quad_idx);
            const float odd_correction = __shfl_sync(kWholeWarp, correction, 8 * quad_idx + 4);
            const bool has_next = tile_idx + kSets * kWarps < end_tile;
            if (Tokens::kLoadsAhead && has_next) {
                find_tokens(set, tile_idx + kSets * kWarps);
                tokens.load_keys(set, tiles[set]);
            }
            tokens.end_load();
            add_values<T>(output, tokens.take_values(set), even_correction, odd_correction, low_weights, high_weights);
            if (Tokens::kLoadsAhead && has_next) tokens.load_values(set, tiles[set]);
            tokens.end_load();
        }
    }
    tokens.finish();

    sum += __shfl_xor_sync(kWholeWarp, sum, 1);
    sum += __shfl_xor_sync(kWholeWarp, sum, 2);
    if (quad_idx == 0) warp_sums.softmax[warp_idx][group_idx] = {maximum, sum};
    warp_sums.store(output, num_heads);
    __syncthreads();
}

}  // namespace hf_quest
