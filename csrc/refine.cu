// refine: the tokens of the newest page, and the best others of the candidate pages, by the logits of their codes.
//
// Two kernels. In the first a warp takes a page at a time: it makes the page's weights (refine.cuh), and tensor cores
// give the logits of 16 tokens and 8 heads; the blocks also sum up each head's softmax, if heads agree by shares. In
// the second a block chooses for a row and KV head, as select.cu chooses pages: tokens of candidates are numbered as
// they come, so equal scores resolve to the earlier token.

#include <algorithm>

#include "refine.cuh"
#include "select.cuh"
#include "shares.cuh"

namespace hf_quest {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerSm = 4;

constexpr int kChooseThreads = 512;
constexpr int kMaxKeys = 8192;    // in shared memory; more are read again each time, from L2
constexpr int kMaxListed = 1024;  // tokens that may still be taken

// Candidates before the newest page, which is the last of those that there are.
__device__ inline int count_scored(const RefineParams& params, int64_t num_tokens) {
    const int64_t num_pages = (max(num_tokens, int64_t(0)) + params.page_size - 1) / params.page_size;
    return int(max(min(num_pages, int64_t(params.num_candidates)) - 1, int64_t(0)));
}

__device__ inline bool has_shares(const RefineParams& params) {
    return params.agreement != Agreement::kMax && params.group_size > 1;
}

// What a warp needs of a candidate first, on its way while the one before it is scored.
template <typename T, int kHeadDim, int kBits>
struct Candidate {
    int64_t first_slot;  // counted from the storage's first one on
    LaneBounds<T, kHeadDim> bounds;
    LaneCodes<kHeadDim, kBits> codes;  // of its first tile
};

template <typename T, int kHeadDim, int kBits>
__global__ void __launch_bounds__(kThreads) score_tokens_kernel(const RefineParams params) {
    using Layout = CodeLayout<kHeadDim, kBits>;
    __shared__ SharedQuery<kHeadDim> query;
    __shared__ PageWeights<kHeadDim, kBits> all_weights[kWarps];
    __shared__ float2 warp_sums[kWarps][kHeadTile];
    wait_for_previous_kernel();
    let_next_kernel_begin();

    const int num_head_tiles = ceil_div(params.group_size, kHeadTile);
    const int kv_head_idx = blockIdx.y / num_head_tiles, head_tile = blockIdx.y % num_head_tiles;
    const int row_idx = blockIdx.z, warp_idx = threadIdx.x / kWarpSize, lane_idx = threadIdx.x % kWarpSize;
    const int num_heads = min(params.group_size - head_tile * kHeadTile, kHeadTile);
    const int64_t kv_idx = int64_t(row_idx) * params.num_kv_heads + kv_head_idx;
    const Storage storage = find(params.storage);
    const int64_t padding = params.padding[row_idx];
    const int num_scored = count_scored(params, count_tokens(params.length, params.padding, row_idx, storage.capacity));

    const int first_head = kv_head_idx * params.group_size + head_tile * kHeadTile;
    const T* first_query = static_cast<const T*>(params.query) + row_idx * params.query_strides[0];
    query.load(first_query + first_head * params.query_strides[1], params.query_strides[1], num_heads);
    auto& weights = all_weights[warp_idx];
    weights.clear();
    __syncthreads();

    const int64_t* page_ids = params.page_ids + kv_idx * params.num_candidates;
    const int64_t first_page = kv_idx * count_pages(storage, params.page_size);
    const int64_t num_slots = int64_t(params.num_candidates) * params.page_size;
    float* logits = params.logits + (kv_idx * params.group_size + head_tile * kHeadTile) * num_slots;
    const int tile_size = min(params.page_size, kCodeTile);
    const auto load = [&](Candidate<T, kHeadDim, kBits>& candidate, int idx) {
        const int64_t page_idx = page_ids[idx];
        candidate.first_slot = kv_idx * storage.capacity + padding + page_idx * params.page_size;
        candidate.bounds.load(storage, first_page + page_idx);
        candidate.codes.load(storage.codes + candidate.first_slot * Layout::kRowBytes, tile_size);
    };

    const int step = gridDim.x * kWarps;
    LogitSum sums[2];  // of heads 2 * quad_idx and the next, over this lane's tokens
    Candidate<T, kHeadDim, kBits> next;
    int idx = blockIdx.x * kWarps + warp_idx;
    if (idx < num_scored) load(next, idx);
    for (; idx < num_scored; idx += step) {
        const Candidate<T, kHeadDim, kBits> candidate = next;
        if (idx + step < num_scored) load(next, idx + step);
        const float unit = weights.make(candidate.bounds, query, num_heads);
        LaneCodes<kHeadDim, kBits> codes = candidate.codes;
#pragma unroll 1
        for (int first = 0; first < params.page_size; first += kCodeTile) {
            if (first > 0) {
                codes.load(storage.codes + (candidate.first_slot + first) * Layout::kRowBytes, tile_size);
            }
            const float4 both = weights.multiply(codes, query, num_heads, unit);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int head_idx = lane_idx % 4 * 2 + i % 2, token_idx = i / 2 * 8 + lane_idx / 4;
                const float logit = (&both.x)[i] * params.scaling;
                if (head_idx >= num_heads || token_idx >= tile_size) continue;
                logits[head_idx * num_slots + idx * params.page_size + first + token_idx] = logit;
                if (has_shares(params)) sums[i % 2].add({logit_of(logit), 1.0f});
            }
        }
    }
    if (!has_shares(params)) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int distance = 4; distance < kWarpSize; distance *= 2) sums[i].add_lanes(distance);
        if (lane_idx < 4) warp_sums[warp_idx][lane_idx * 2 + i] = {sums[i].maximum, sums[i].sum};
    }
    __syncthreads();
    if (threadIdx.x >= kHeadTile) return;
    LogitSum total;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) total.add({warp_sums[i][threadIdx.x].x, warp_sums[i][threadIdx.x].y});
    const int64_t tile_idx = kv_idx * num_head_tiles + head_tile;
    params.head_sums[(tile_idx * gridDim.x + blockIdx.x) * kHeadTile + threadIdx.x] = {total.maximum, total.sum};
}

// How the heads of a group agree on a token.
struct TokenAgreement {
    const float* logits;      // of the first head
    const float2*
        head_sums;  // of each head the maximum of a LogitSum and the inverse of the sum, where there are shares
    int64_t num_slots;
    int group_size;
    Agreement agreement;
    bool has_shares;

    __device__ unsigned key_of(int token_idx) const {
        float agreed = 0.0f;
#pragma unroll 4
        for (int head_idx = 0; head_idx < group_size; ++head_idx) {
            float value = __ldcg(logits + head_idx * num_slots + token_idx);
            if (has_shares) {
                const float2 sums = head_sums[head_idx];
                value = power_of_two(logit_of(value) - sums.x) * sums.y;
            }
            const bool is_added = has_shares && agreement == Agreement::kSum;
            agreed = head_idx == 0 ? value : is_added ? agreed + value : fmaxf(agreed, value);
        }
        return order_of(agreed);
    }
};

__global__ void __launch_bounds__(kChooseThreads, 1) choose_tokens_kernel(const RefineParams params) {
    __shared__ struct {
        alignas(16) unsigned keys[kMaxKeys];
        uint64_t listed[kMaxListed];
        SharedSelection<kChooseThreads> selection;
    } shared;
    __shared__ float2 head_sums[4 * kHeadTile];
    shared.selection.clear();
    wait_for_previous_kernel();
    let_next_kernel_begin();

    const int64_t kv_idx = blockIdx.x;
    const int row_idx = blockIdx.x / params.num_kv_heads, page_shift = __ffs(params.page_size) - 1;
    const Storage storage = find(params.storage);
    const int64_t num_tokens = count_tokens(params.length, params.padding, row_idx, storage.capacity);
    const int num_scored = count_scored(params, num_tokens), num_keys = num_scored << page_shift;
    const int num_wanted = min(params.num_tokens - params.page_size, num_keys);
    const int64_t* page_ids = params.page_ids + kv_idx * params.num_candidates;
    int64_t* token_ids = params.token_ids + kv_idx * params.num_tokens;
    const auto token_of = [&](int idx) {
        return (page_ids[idx >> page_shift] << page_shift) + (idx & (params.page_size - 1));
    };
    // The newest page's own, and what fills up.
    const int64_t newest_start = num_tokens > 0 ? (num_tokens - 1) >> page_shift << page_shift : 0;
    for (int place = num_wanted + threadIdx.x; place < params.num_tokens; place += kChooseThreads) {
        const int64_t token_idx = newest_start + place - num_wanted;
        token_ids[place] = token_idx < num_tokens ? token_idx : -1;
    }
    if (num_wanted == num_keys) {
        for (int idx = threadIdx.x; idx < num_keys; idx += kChooseThreads) token_ids[idx] = token_of(idx);
        return;
    }

    const int num_head_tiles = ceil_div(params.group_size, kHeadTile), num_blocks = params.num_blocks;
    if (has_shares(params)) {
        const int lane_idx = threadIdx.x % kWarpSize;
        for (int head_idx = threadIdx.x / kWarpSize; head_idx < params.group_size;
             head_idx += kChooseThreads / kWarpSize) {
            const int64_t tile_idx = kv_idx * num_head_tiles + head_idx / kHeadTile;
            LogitSum total;
            for (int i = lane_idx; i < num_blocks; i += kWarpSize) {
                const float2 of_block =
                    __ldcg(&params.head_sums[(tile_idx * num_blocks + i) * kHeadTile + head_idx % kHeadTile]);
                total.add({of_block.x, of_block.y});
            }
#pragma unroll
            for (int distance = 1; distance < kWarpSize; distance *= 2) total.add_lanes(distance);
            if (lane_idx == 0) head_sums[head_idx] = {total.maximum, 1.0f / total.sum};
        }
    }
    __syncthreads();
    const int64_t num_slots = int64_t(params.num_candidates) << page_shift;
    const TokenAgreement agree = {params.logits + kv_idx * params.group_size * num_slots,
                                  head_sums,
                                  num_slots,
                                  params.group_size,
                                  params.agreement,
                                  has_shares(params)};
    const auto tell = [&](int idx, int place) { token_ids[place] = token_of(idx); };
    const auto choose = [&](auto keys) {
        select_pages(shared.selection, shared.listed, num_keys, num_wanted, keys, [](int) {}, tell);
    };
    unsigned* keys = num_keys <= kMaxKeys ? shared.keys : params.keys + kv_idx * num_slots;
    for (int idx = threadIdx.x; idx < ceil_div(num_keys, 4) * 4; idx += kChooseThreads) {
        keys[idx] = idx < num_keys ? agree.key_of(idx) : 0;
    }
    __syncthreads();
    if (num_keys <= kMaxKeys) {
        choose(SharedKeys{shared.keys});
    } else {
        choose(DistantKeys([=](int idx) { return keys[idx]; }, num_keys));
    }
}

template <int kBits>
cudaError_t launch_scores(const RefineParams& params) {
    const int num_tiles = params.num_kv_heads * ceil_div(params.group_size, kHeadTile);
    const dim3 grid(params.num_blocks, num_tiles, params.num_rows);
    return for_head_dim(params.data_type, params.head_dim, [&](auto element, auto head_dim) {
        const auto kernel = score_tokens_kernel<decltype(element), decltype(head_dim)::value, kBits>;
        return launch(kernel, grid, kThreads, 0, params);
    });
}

}  // namespace

int count_refine_blocks(const RefineParams& params) {
    const int num_heads = params.num_rows * params.num_kv_heads * ceil_div(params.group_size, kHeadTile);
    const int most = std::max(kBlocksPerSm * params.launch.num_sms / num_heads, 1);
    return std::max(std::min(ceil_div(params.num_candidates, kWarps), most), 1);
}

cudaError_t launch_refine(const RefineParams& params) {
    const cudaError_t error = params.code_bits == 2   ? launch_scores<2>(params)
                              : params.code_bits == 4 ? launch_scores<4>(params)
                                                      : cudaErrorInvalidValue;
    if (error != cudaSuccess) return error;
    return launch(choose_tokens_kernel, dim3(params.num_rows * params.num_kv_heads), kChooseThreads, 0, params);
}

}  // namespace hf_quest
