// find_candidates: of each stripe the pages with the highest scores. refine: the tokens of the newest page, and of each
// stripe the best of its candidates' tokens, by the logits of their codes.
//
// For refine there are two kernels. In the first a warp takes a page at a time: it makes the page's weights
// (refine.cuh), and tensor cores give the logits of 16 tokens and 8 heads; the blocks also sum up each head's softmax,
// if heads agree by shares. In the second a block chooses for a row and KV head, a warp in a stripe (stripes.cuh).
// Tokens of candidates are numbered as they come, so equal scores resolve to the earlier token.

#include <algorithm>

#include "refine.cuh"
#include "shares.cuh"
#include "stripes.cuh"

namespace hf_quest {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerSm = 4;

constexpr int kMaxThreads = kMaxStripes * kWarpSize;  // of a block that chooses, a warp for each stripe
constexpr int kMaxKeys = 4864;  // in shared memory; more lie in L2

__device__ inline bool has_shares(const RefineParams& params) {
    return params.agreement != Agreement::kMax && params.group_size > 1;
}

// Of a row's pages those before the newest one.
__device__ inline int count_earlier_pages(int64_t num_tokens, int page_size) {
    return num_tokens > 0 ? int((num_tokens - 1) / page_size) : 0;
}

__global__ void __launch_bounds__(kMaxThreads) find_candidates_kernel(const CandidatesParams params) {
    __shared__ StripeList lists[kMaxStripes];
    wait_for_previous_kernel();
    let_next_kernel_begin();

    const int64_t kv_idx = blockIdx.x;
    const int row_idx = blockIdx.x / params.num_kv_heads, stripe = threadIdx.x / kWarpSize;
    const Storage storage = find(params.storage);
    const float* scores = storage.scores + kv_idx * count_pages(storage, params.page_size);
    const int64_t num_tokens = count_tokens(params.length, params.padding, row_idx, storage.capacity);
    const Stripes stripes(count_earlier_pages(num_tokens, params.page_size), params.num_stripes);
    const int num_earlier = params.num_candidates - 1, most = most_pages(num_earlier, params.num_stripes);
    const int num_chosen = stripes.count_chosen(min(num_earlier, stripes.num_pages), stripe);
    int64_t* page_ids = params.page_ids + (kv_idx * params.num_stripes + stripe) * most;
    const auto key_of = [&](int idx) {
        const bool is_kept = params.keeps_first && idx == 0 && stripe == 0;
        return is_kept ? ~0u : order_of(__ldcg(scores + idx * params.num_stripes + stripe));
    };
    const auto tell = [&](int idx, int place) { page_ids[place] = idx * params.num_stripes + stripe; };
    choose_in_stripe(lists[stripe], stripes.count(stripe), num_chosen, key_of, tell);
    for (int place = num_chosen + threadIdx.x % kWarpSize; place < most; place += kWarpSize) page_ids[place] = -1;
}

// What a warp needs of a candidate first, on its way while the one before it is scored.
template <typename T, int kHeadDim, int kBits>
struct Candidate {
    bool is_page;
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
    const int num_scored = params.num_stripes * params.most_in_stripe;

    const int first_head = kv_head_idx * params.group_size + head_tile * kHeadTile;
    const T* first_query = static_cast<const T*>(params.query) + row_idx * params.query_strides[0];
    query.load(first_query + first_head * params.query_strides[1], params.query_strides[1], num_heads);
    auto& weights = all_weights[warp_idx];
    weights.clear();
    __syncthreads();

    const int64_t* page_ids = params.page_ids + kv_idx * num_scored;
    const int64_t first_page = kv_idx * count_pages(storage, params.page_size);
    const int64_t num_slots = int64_t(num_scored) * params.page_size;
    float* logits = params.logits + (kv_idx * params.group_size + head_tile * kHeadTile) * num_slots;
    const int tile_size = min(params.page_size, kCodeTile);
    const auto load = [&](Candidate<T, kHeadDim, kBits>& candidate, int idx) {
        const int64_t page_idx = page_ids[idx];
        candidate.is_page = page_idx >= 0;
        if (!candidate.is_page) return;
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
        if (!candidate.is_page) continue;
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
    const float* logits;  // of the first head
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

__global__ void __launch_bounds__(kMaxThreads) choose_tokens_kernel(const RefineParams params) {
    __shared__ StripeList lists[kMaxStripes];
    __shared__ unsigned near_keys[kMaxKeys];
    __shared__ float2 head_sums[4 * kHeadTile];
    wait_for_previous_kernel();
    let_next_kernel_begin();

    const int64_t kv_idx = blockIdx.x;
    const int row_idx = blockIdx.x / params.num_kv_heads, page_shift = __ffs(params.page_size) - 1;
    const int stripe = threadIdx.x / kWarpSize, lane_idx = threadIdx.x % kWarpSize;
    const Storage storage = find(params.storage);
    const int64_t num_tokens = count_tokens(params.length, params.padding, row_idx, storage.capacity);
    const Stripes stripes(count_earlier_pages(num_tokens, params.page_size), params.num_stripes);
    const int64_t newest_start = int64_t(stripes.num_pages) << page_shift;
    const int num_wanted = int(min(int64_t(params.num_tokens - params.page_size), newest_start));
    int64_t* token_ids = params.token_ids + kv_idx * params.num_tokens;
    // The newest page's own, and what fills up.
    for (int place = num_wanted + threadIdx.x; place < params.num_tokens; place += blockDim.x) {
        const int64_t token_idx = newest_start + place - num_wanted;
        token_ids[place] = token_idx < num_tokens ? token_idx : -1;
    }

    const int num_head_tiles = ceil_div(params.group_size, kHeadTile), num_blocks = params.num_blocks;
    if (has_shares(params)) {
        for (int head_idx = stripe; head_idx < params.group_size; head_idx += params.num_stripes) {
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
    const int64_t num_slots = int64_t(params.num_stripes * params.most_in_stripe) << page_shift;
    const TokenAgreement agree = {params.logits + kv_idx * params.group_size * num_slots,
                                  head_sums,
                                  num_slots,
                                  params.group_size,
                                  params.agreement,
                                  has_shares(params)};
    const int64_t* page_ids = params.page_ids + (kv_idx * params.num_stripes + stripe) * params.most_in_stripe;
    int num_pages = 0;  // of the stripe
    for (int idx = lane_idx; idx < params.most_in_stripe; idx += kWarpSize) num_pages += page_ids[idx] >= 0;
    const int num_keys = int(__reduce_add_sync(kWholeWarp, unsigned(num_pages))) << page_shift;
    const int64_t first_slot = int64_t(stripe * params.most_in_stripe) << page_shift;
    unsigned* keys = (num_slots <= kMaxKeys ? near_keys : params.keys + kv_idx * num_slots) + first_slot;
    for (int idx = lane_idx; idx < num_keys; idx += kWarpSize) keys[idx] = agree.key_of(int(first_slot) + idx);
    __syncwarp();
    const int first_place = stripes.first_token(num_wanted, stripe);
    const int num_chosen = stripes.first_token(num_wanted, stripe + 1) - first_place;
    const auto tell = [&](int idx, int place) {
        token_ids[first_place + place] = (page_ids[idx >> page_shift] << page_shift) + (idx & (params.page_size - 1));
    };
    choose_in_stripe(lists[stripe], num_keys, num_chosen, [&](int idx) { return keys[idx]; }, tell);
    for (int place = num_keys + lane_idx; place < num_chosen; place += kWarpSize) token_ids[first_place + place] = -1;
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
    return std::max(std::min(ceil_div(params.num_stripes * params.most_in_stripe, kWarps), most), 1);
}

int count_most_in_stripe(int num_candidates, int num_stripes) { return most_pages(num_candidates - 1, num_stripes); }

cudaError_t launch_find_candidates(const CandidatesParams& params) {
    const dim3 grid(params.num_rows * params.num_kv_heads);
    return launch(find_candidates_kernel, grid, params.num_stripes * kWarpSize, 0, params);
}

cudaError_t launch_refine(const RefineParams& params) {
    const cudaError_t error = params.code_bits == 2   ? launch_scores<2>(params)
                              : params.code_bits == 4 ? launch_scores<4>(params)
                                                      : cudaErrorInvalidValue;
    if (error != cudaSuccess) return error;
    const dim3 grid(params.num_rows * params.num_kv_heads);
    return launch(choose_tokens_kernel, grid, params.num_stripes * kWarpSize, 0, params);
}

}  // namespace hf_quest
