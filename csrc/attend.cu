// attend: exact softmax attention of up to 8 query heads over the chosen pages or tokens, or all, of their KV head.
//
// A warp takes 16 tokens at a time, their keys and values in flight together. Logits are heads x tokens on tensor
// cores, with keys straight from memory as the right operand (common.cuh). Their layout is that of the right operand of
// the product values^T x weights, so weights stay in registers, and two byte permutes of two tokens' values make the
// left operand. Softmax is online, in float32. The pages are split over as many blocks as fill the GPU; a block sums up
// its warps in shared memory, and the last block of a KV head to finish sums up the splits and resets their counter.
// Slots that hold no visible token are not read.

#include "attend.cuh"

namespace hf_quest {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTilesPerWarp = 2;  // or more, where there are as many: every split makes the last block's sum longer
constexpr int kMergeBatch = 8;  // partial sums in flight at once

constexpr int blocks_per_sm(int head_dim) { return head_dim > 128 ? 2 : head_dim > 64 ? 3 : 4; }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int least_blocks_per_sm(int) { return 2; }  // three leave a few registers too little there
#else
constexpr int least_blocks_per_sm(int head_dim) { return blocks_per_sm(head_dim); }
#endif

enum class Chosen { kAll, kPages, kTokens };

// How much of a list of pages counts: all of it, or where it is longer than the row, up to its last page.
__device__ void count_listed(int& num_listed, const int64_t* page_ids, int num_selected, int num_tokens,
                             int page_size) {
    const bool is_longer = int64_t(num_selected - 1) * page_size >= num_tokens;
    if (threadIdx.x == 0) num_listed = is_longer ? 0 : num_selected;
    __syncthreads();
    if (!is_longer) return;
    int own_end = 0;
    for (int idx = threadIdx.x; idx < num_selected; idx += kThreads) {
        if (page_ids[idx] >= 0) own_end = idx + 1;
    }
    atomicMax(&num_listed, own_end);
    __syncthreads();
}

template <typename T, int kHeadDim, Chosen kChosen>
__global__ void __launch_bounds__(kThreads, least_blocks_per_sm(kHeadDim)) attend_kernel(const AttendParams params) {
    constexpr int kQuads = kHeadDim / 4;  // of channels
    constexpr bool kIsDense = kChosen == Chosen::kAll;
    using Tile = std::conditional_t<kChosen == Chosen::kTokens, Singles, Runs>;
    __shared__ WarpSums<kHeadDim, kWarps> warp_sums;
    __shared__ bool is_last;
    wait_for_previous_kernel();
    let_next_kernel_begin();

    const int num_head_tiles = ceil_div(params.group_size, kHeadTile);
    const int kv_head_idx = blockIdx.y / num_head_tiles, tile_of_group = blockIdx.y % num_head_tiles;
    const int row_idx = blockIdx.z, split_idx = blockIdx.x;
    const int num_heads = min(params.group_size - tile_of_group * kHeadTile, kHeadTile);
    const int first_head = kv_head_idx * params.group_size + tile_of_group * kHeadTile;

    const Storage storage = find(params.storage);
    const int64_t padding = params.padding[row_idx];
    const int num_tokens = int(count_tokens(params.length, params.padding, row_idx, storage.capacity));
    if (num_tokens <= 0) return;  // a row of padding alone has no attention
    const int64_t kv_idx = int64_t(row_idx) * params.num_kv_heads + kv_head_idx;
    const int64_t* page_ids = params.page_ids + kv_idx * params.num_selected;
    __shared__ int num_listed;
    if constexpr (!kIsDense) count_listed(num_listed, page_ids, params.num_selected, num_tokens, params.page_size);
    const int num_chosen = kIsDense ? num_tokens : num_listed * params.page_size;
    const int num_tiles = max(ceil_div(num_chosen, kTile), 1);
    const int tiles_per_split = ceil_div(num_tiles, int(gridDim.x));
    const int num_splits = ceil_div(num_tiles, tiles_per_split);
    if (split_idx >= num_splits) return;
    const int first_tile = split_idx * tiles_per_split, end_tile = min(first_tile + tiles_per_split, num_tiles);

    const int64_t row_start = (kv_idx * storage.capacity + padding) * kHeadDim;
    const int page_shift = __ffs(params.page_size) - 1;
    const auto find_token = [&](int chosen) {
        if constexpr (kIsDense) return chosen;
        if (chosen >= end_tile * kTile || chosen >> page_shift >= num_listed) return kNoToken;
        const int page_idx = int(page_ids[chosen >> page_shift]);
        return page_idx < 0 ? kNoToken : (page_idx << page_shift) + (chosen & (params.page_size - 1));
    };
    const int own_head = first_head + min(int(threadIdx.x % kWarpSize / 4), num_heads - 1);
    const T* query = static_cast<const T*>(params.query) + row_idx * params.query_strides[0];
    const HeadQuery<T, kHeadDim> head_query(query + own_head * params.query_strides[1]);
    const T* keys = static_cast<const T*>(storage.keys) + row_start;
    const T* values = static_cast<const T*>(storage.values) + row_start;
    attend_tiles<T, kHeadDim, kWarps, Tile>(warp_sums, RegisterTokens<T, kHeadDim>(keys, values, num_tokens),
                                            head_query, num_heads, first_tile, end_tile, params.page_size,
                                            params.scaling, params.softcap, find_token);

    T* output = static_cast<T*>(params.output);
    output += (int64_t(row_idx) * params.num_kv_heads * params.group_size + first_head) * kHeadDim;
    const int heads_per_tile = min(params.group_size, kHeadTile);
    const int64_t merge_idx = int64_t(row_idx) * gridDim.y + blockIdx.y;
    const int64_t first_partial = merge_idx * gridDim.x * heads_per_tile;  // of split 0
    const int64_t own_partial = first_partial + int64_t(split_idx) * heads_per_tile;
    for (int idx = threadIdx.x; idx < num_heads * kQuads; idx += kThreads) {
        const int head_idx = idx / kQuads, quad_of_head = idx % kQuads;
        // A sum of 1 at kLowest, if there is no sink, has no weight beside tokens.
        float block_maximum = num_splits == 1 ? sink_of<T>(params, first_head + head_idx) : kLowest, block_sum = 1.0f;
        const float4 sums = warp_sums.merge(head_idx, quad_of_head, block_maximum, block_sum);
        if (num_splits == 1) {
            store_quad<T, kHeadDim>(output, head_idx, quad_of_head, sums, block_sum);
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
        float maximum = sink_of<T>(params, first_head + head_idx), sum = 1.0f;
        const float4 sums = merge_parts<kMergeBatch>(
            num_splits, maximum, sum,
            [&](int part_idx) { return __ldcg(partial_softmax + int64_t(part_idx) * heads_per_tile); },
            [&](int part_idx) { return __ldcg(partial_output + int64_t(part_idx) * heads_per_tile * kQuads); });
        store_quad<T, kHeadDim>(output, head_idx, quad_of_head, sums, sum);
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
        const auto kernel = params.page_ids == nullptr ? attend_kernel<decltype(element), kHeadDim, Chosen::kAll>
                            : params.page_size == 1    ? attend_kernel<decltype(element), kHeadDim, Chosen::kTokens>
                                                       : attend_kernel<decltype(element), kHeadDim, Chosen::kPages>;
        return launch(kernel, grid, kThreads, 0, params);
    });
}

}  // namespace hf_quest
