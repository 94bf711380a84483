// attend: exact softmax attention of up to 8 query heads over the chosen pages, or all pages, of their KV head.
//
// A warp takes 16 tokens at a time, their keys and values in flight together. Logits are heads x tokens on tensor
// cores, with keys straight from memory as the right operand (common.cuh). Their layout is that of the right operand of
// the product values^T x weights, so weights stay in registers, and two byte permutes of two tokens' values make the
// left operand. Softmax is online, in float32. The pages are split over as many blocks as fill the GPU; a block sums up
// its warps in shared memory, and the last block of a KV head to finish sums up the splits and resets their counter.
// Slots that hold no visible token are not read.

#include <cmath>

#include "common.cuh"

namespace hf_quest {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTile = 16;  // tokens
constexpr int kHalf = 8;   // tokens that lie together, whatever the page size
constexpr int kChunk = 32;  // channels of a key that the four lanes of a quad load together
constexpr int kTilesPerWarp = 2;  // or more, where there are as many: every split makes the last block's sum longer
constexpr int kMergeBatch = 8;  // partial sums in flight at once
constexpr int kNoToken = 1 << 30;
constexpr float kLog2E = 1.44269504f;

constexpr int blocks_per_sm(int head_dim) { return head_dim > 128 ? 2 : head_dim > 64 ? 3 : 4; }

// 2^(value - maximum), and 0 where nothing was seen, whatever the maximum.
__device__ float weight_of(float value, float maximum) { return value == -INFINITY ? 0.0f : exp2f(value - maximum); }

__device__ void add_scaled(float4& sum, float4 term, float factor) {
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

template <typename T, int kHeadDim, bool kIsDense>
__global__ void __launch_bounds__(kThreads, 2) attend_kernel(const AttendParams params) {
    using L = Layout<kHeadDim>;
    constexpr int kNumChunks = kHeadDim / kChunk;
    constexpr int kQuads = kHeadDim / 4;                 // of channels
    constexpr bool kLoadsAhead = kHeadDim <= 128;        // more would not fit into the registers
    __shared__ alignas(16) float warp_output[kWarps][kHeadTile][kHeadDim + 4];  // padded against bank conflicts
    __shared__ float2 warp_softmax[kWarps][kHeadTile];
    __shared__ bool is_last;
    wait_for_previous_kernel();
    let_next_kernel_begin();

    const int lane_idx = threadIdx.x % kWarpSize, warp_idx = threadIdx.x / kWarpSize;
    const int group_idx = lane_idx / 4, quad_idx = lane_idx % 4;
    const int num_head_tiles = ceil_div(params.group_size, kHeadTile);
    const int kv_head_idx = blockIdx.y / num_head_tiles, tile_of_group = blockIdx.y % num_head_tiles;
    const int row_idx = blockIdx.z, split_idx = blockIdx.x;
    const int num_heads = min(params.group_size - tile_of_group * kHeadTile, kHeadTile);
    const int first_head = kv_head_idx * params.group_size + tile_of_group * kHeadTile;

    const Storage storage = find(params.storage);
    const int64_t padding = params.padding[row_idx];
    const int num_tokens = int(count_tokens(params.length, params.padding, row_idx, storage.capacity));
    const int num_chosen = kIsDense ? num_tokens : params.num_selected * params.page_size;
    const int num_tiles = max(ceil_div(num_chosen, kTile), 1);
    const int tiles_per_split = ceil_div(num_tiles, int(gridDim.x));
    const int num_splits = ceil_div(num_tiles, tiles_per_split);
    if (split_idx >= num_splits) return;
    const int end_tile = min((split_idx + 1) * tiles_per_split, num_tiles);

    const T* query = static_cast<const T*>(params.query) + row_idx * params.query_strides[0];
    query += (first_head + group_idx) * params.query_strides[1] + quad_idx * 8;
    uint4 q[kNumChunks];
#pragma unroll
    for (int chunk_idx = 0; chunk_idx < kNumChunks; ++chunk_idx) {
        q[chunk_idx] = load_once(reinterpret_cast<const uint4*>(query + chunk_idx * kChunk), group_idx < num_heads);
    }

    const int64_t kv_idx = int64_t(row_idx) * params.num_kv_heads + kv_head_idx;
    const int64_t row_start = (kv_idx * storage.capacity + padding) * kHeadDim;
    const T* keys = static_cast<const T*>(storage.keys) + row_start + quad_idx * 8;
    const T* values = static_cast<const T*>(storage.values) + row_start + group_idx * L::kVector;
    const int64_t* page_ids = params.page_ids + kv_idx * params.num_selected;
    const int page_shift = __ffs(params.page_size) - 1;
    // The first of the 8 tokens that begin at a multiple of 8 among the chosen ones.
    const auto find_token = [&](int chosen) {
        if constexpr (kIsDense) return chosen;
        if (chosen >= min(end_tile * kTile, num_chosen)) return kNoToken;
        const int page_idx = int(page_ids[chosen >> page_shift]);
        return page_idx < 0 ? kNoToken : (page_idx << page_shift) + (chosen & (params.page_size - 1));
    };

    float output[L::kBlocks][L::kPairs][4] = {};  // channels x heads
    float maximum = -INFINITY, sum = 0.0f;        // of head group_idx; the sum is of this lane's tokens alone
    int half_starts[2] = {kNoToken, kNoToken};    // lane i has those of the warp's i-th tile from here
    const int first_tile = split_idx * tiles_per_split + warp_idx;
    int start[2];
    uint4 key[2][kNumChunks];
    const auto load_keys = [&](int tile_idx) {
        const int round_idx = (tile_idx - first_tile) / kWarps;
        if (round_idx % kWarpSize == 0) {
            const int chosen = (tile_idx + lane_idx * kWarps) * kTile;
            half_starts[0] = find_token(chosen);
            half_starts[1] = params.page_size < kTile ? find_token(chosen + kHalf) : half_starts[0] + kHalf;
        }
#pragma unroll
        for (int half_idx = 0; half_idx < 2; ++half_idx) {
            start[half_idx] = __shfl_sync(kWholeWarp, half_starts[half_idx], round_idx % kWarpSize);
            const int token_idx = start[half_idx] + group_idx;
            const T* token = keys + int64_t(token_idx) * kHeadDim;
#pragma unroll
            for (int chunk_idx = 0; chunk_idx < kNumChunks; ++chunk_idx) {
                const auto* chunk = reinterpret_cast<const uint4*>(token + chunk_idx * kChunk);
                key[half_idx][chunk_idx] = load_once(chunk, token_idx < num_tokens);
            }
        }
    };
    typename L::Vector value[L::kBlocks][4];
    const auto load_values = [&](bool has_weight) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token_idx = start[i / 2] + 2 * quad_idx + i % 2;
            const T* token = values + int64_t(token_idx) * kHeadDim;
#pragma unroll
            for (int block_idx = 0; block_idx < L::kBlocks; ++block_idx) {
                const auto* vector = token + block_idx * 8 * L::kVector;
                const bool is_token = token_idx < num_tokens && has_weight;
                value[block_idx][i] = load_once(reinterpret_cast<const typename L::Vector*>(vector), is_token);
            }
        }
    };

    if (kLoadsAhead && first_tile < end_tile) {
        load_keys(first_tile);
        load_values(true);
    }
    for (int tile_idx = first_tile; tile_idx < end_tile; tile_idx += kWarps) {
        if constexpr (!kLoadsAhead) load_keys(tile_idx);
        float logit[4];  // of head group_idx, tokens 2 * quad_idx and the next, in both halves
#pragma unroll
        for (int half_idx = 0; half_idx < 2; ++half_idx) {
            float sums[4] = {};
#pragma unroll
            for (int chunk_idx = 0; chunk_idx < kNumChunks; ++chunk_idx) {
                const uint4 a = q[chunk_idx], b = key[half_idx][chunk_idx];
                multiply_add<T>(sums, a.x, 0, a.y, 0, b.x, b.y);
                multiply_add<T>(sums, a.z, 0, a.w, 0, b.z, b.w);
            }
            logit[2 * half_idx] = sums[0];
            logit[2 * half_idx + 1] = sums[1];
        }
        float new_maximum = maximum;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            logit[i] *= params.scaling;
            if (params.softcap > 0.0f) logit[i] = params.softcap * tanhf(logit[i] / params.softcap);
            const bool is_visible = start[i / 2] + 2 * quad_idx + i % 2 < num_tokens;
            logit[i] = is_visible ? logit[i] * kLog2E : -INFINITY;
            new_maximum = fmaxf(new_maximum, logit[i]);
        }
        const bool has_next = tile_idx + kWarps < end_tile;
        if (kLoadsAhead && has_next) load_keys(tile_idx + kWarps);
        new_maximum = fmaxf(new_maximum, __shfl_xor_sync(kWholeWarp, new_maximum, 1));
        new_maximum = fmaxf(new_maximum, __shfl_xor_sync(kWholeWarp, new_maximum, 2));
        // The condition keeps the compiler from loading values before the keys have left their registers.
        if constexpr (!kLoadsAhead) load_values(new_maximum > -INFINITY);
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
#pragma unroll
        for (int block_idx = 0; block_idx < L::kBlocks; ++block_idx) {
#pragma unroll
            for (int pair_idx = 0; pair_idx < L::kPairs; ++pair_idx) {
                float(&sums)[4] = output[block_idx][pair_idx];
                sums[0] *= even_correction;
                sums[1] *= odd_correction;
                sums[2] *= even_correction;
                sums[3] *= odd_correction;
                uint32_t pair[4];  // the same two channels of four tokens
#pragma unroll
                for (int i = 0; i < 4; ++i) pair[i] = L::word(value[block_idx][i], pair_idx);
                multiply_add<T>(sums, __byte_perm(pair[0], pair[1], 0x5410), __byte_perm(pair[0], pair[1], 0x7632),
                                __byte_perm(pair[2], pair[3], 0x5410), __byte_perm(pair[2], pair[3], 0x7632),
                                low_weights, high_weights);
            }
        }
        if (kLoadsAhead && has_next) load_values(true);
    }

    // The block's sum over its warps.
    sum += __shfl_xor_sync(kWholeWarp, sum, 1);
    sum += __shfl_xor_sync(kWholeWarp, sum, 2);
    if (quad_idx == 0) warp_softmax[warp_idx][group_idx] = {maximum, sum};
#pragma unroll
    for (int block_idx = 0; block_idx < L::kBlocks; ++block_idx) {
#pragma unroll
        for (int pair_idx = 0; pair_idx < L::kPairs; ++pair_idx) {
            const float(&sums)[4] = output[block_idx][pair_idx];
            const int offset = ((block_idx * L::kPairs + pair_idx) * 8 + group_idx) * 2;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int head_idx = 2 * quad_idx + i;
                if (head_idx < num_heads) {
                    *reinterpret_cast<float2*>(&warp_output[warp_idx][head_idx][offset]) = {sums[i], sums[i + 2]};
                }
            }
        }
    }
    __syncthreads();

    const auto sink_of = [&](int head_idx) {
        if (params.sinks == nullptr) return -INFINITY;
        return to_float(static_cast<const T*>(params.sinks)[first_head + head_idx]) * kLog2E;
    };
    const auto store_output = [&](int head_idx, int quad_of_head, float4 sums) {
        T* head = static_cast<T*>(params.output);
        head += (int64_t(row_idx) * params.num_kv_heads * params.group_size + first_head + head_idx) * kHeadDim;
        *reinterpret_cast<Pair<T>*>(head + L::channel_of(2 * quad_of_head)) = round_to_pair<T>(sums.x, sums.y);
        *reinterpret_cast<Pair<T>*>(head + L::channel_of(2 * quad_of_head + 1)) = round_to_pair<T>(sums.z, sums.w);
    };

    const int heads_per_tile = min(params.group_size, kHeadTile);
    const int64_t merge_idx = int64_t(row_idx) * gridDim.y + blockIdx.y;
    const int64_t first_partial = merge_idx * gridDim.x * heads_per_tile;  // of split 0
    const int64_t own_partial = first_partial + int64_t(split_idx) * heads_per_tile;
    for (int idx = threadIdx.x; idx < num_heads * kQuads; idx += kThreads) {
        const int head_idx = idx / kQuads, quad_of_head = idx % kQuads;
        const float sink = num_splits == 1 ? sink_of(head_idx) : -INFINITY;
        float block_maximum = sink;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) block_maximum = fmaxf(block_maximum, warp_softmax[i][head_idx].x);
        float block_sum = weight_of(sink, block_maximum);
        float4 sums = {};
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
            const float factor = weight_of(warp_softmax[i][head_idx].x, block_maximum);
            block_sum += warp_softmax[i][head_idx].y * factor;
            add_scaled(sums, *reinterpret_cast<const float4*>(&warp_output[i][head_idx][4 * quad_of_head]), factor);
        }
        if (num_splits == 1) {
            float4 scaled = {};
            add_scaled(scaled, sums, 1.0f / block_sum);
            store_output(head_idx, quad_of_head, scaled);
            continue;
        }
        const int64_t partial_idx = own_partial + head_idx;
        reinterpret_cast<float4*>(params.partial_output)[partial_idx * kQuads + quad_of_head] = sums;
        if (quad_of_head == 0) params.partial_softmax[partial_idx] = {block_maximum, block_sum};
    }
    if (num_splits == 1) return;

    // The last block to come here sums up all splits.
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(params.counters + merge_idx, 1) == num_splits - 1;
        __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    if (threadIdx.x == 0) params.counters[merge_idx] = 0;

    for (int idx = threadIdx.x; idx < num_heads * kQuads; idx += kThreads) {
        const int head_idx = idx / kQuads, quad_of_head = idx % kQuads;
        const float2* partial_softmax = params.partial_softmax + first_partial + head_idx;
        const float4* partial_output = reinterpret_cast<const float4*>(params.partial_output);
        partial_output += (first_partial + head_idx) * kQuads + quad_of_head;
        float whole_maximum = sink_of(head_idx);
        float whole_sum = weight_of(whole_maximum, whole_maximum);
        float4 sums = {};
        for (int first_split = 0; first_split < num_splits; first_split += kMergeBatch) {
            float2 softmax[kMergeBatch];
            float4 term[kMergeBatch];
            float new_maximum = whole_maximum;
#pragma unroll
            for (int i = 0; i < kMergeBatch; ++i) {
                const int64_t offset = int64_t(first_split + i) * heads_per_tile;
                const bool is_split = first_split + i < num_splits;
                softmax[i] = is_split ? __ldcg(partial_softmax + offset) : float2{-INFINITY, 0.0f};
                term[i] = is_split ? __ldcg(partial_output + offset * kQuads) : float4{};
            }
#pragma unroll
            for (int i = 0; i < kMergeBatch; ++i) new_maximum = fmaxf(new_maximum, softmax[i].x);
            float4 corrected = {};
            add_scaled(corrected, sums, weight_of(whole_maximum, new_maximum));
            sums = corrected;
            whole_sum *= weight_of(whole_maximum, new_maximum);
#pragma unroll
            for (int i = 0; i < kMergeBatch; ++i) {
                const float weight = weight_of(softmax[i].x, new_maximum);
                whole_sum += softmax[i].y * weight;
                add_scaled(sums, term[i], weight);
            }
            whole_maximum = new_maximum;
        }
        float4 scaled = {};
        add_scaled(scaled, sums, 1.0f / whole_sum);
        store_output(head_idx, quad_of_head, scaled);
    }
}

}  // namespace

int count_splits(const AttendParams& params) {
    const int64_t num_heads = int64_t(params.num_rows) * params.num_kv_heads * ceil_div(params.group_size, kHeadTile);
    const int64_t num_blocks = int64_t(blocks_per_sm(params.head_dim)) * params.launch.num_sms;
    const int64_t num_chosen =
        params.page_ids == nullptr ? params.storage.capacity : int64_t(params.num_selected) * params.page_size;
    const int64_t most = ceil_div(num_chosen, int64_t(kTilesPerWarp * kWarps * kTile));
    return int(max(min(num_blocks / num_heads, most), int64_t(1)));
}

cudaError_t launch_attend(const AttendParams& params) {
    const int num_tiles = params.num_kv_heads * ceil_div(params.group_size, kHeadTile);
    const dim3 grid(params.num_splits, num_tiles, params.num_rows);
    return for_head_dim(params.data_type, params.head_dim, [&](auto element, auto head_dim) {
        constexpr int kHeadDim = decltype(head_dim)::value;
        const auto kernel = params.page_ids == nullptr ? attend_kernel<decltype(element), kHeadDim, true>
                                                       : attend_kernel<decltype(element), kHeadDim, false>;
        return launch(kernel, grid, kThreads, 0, params);
    });
}

}  // namespace hf_quest
