// estimate: page scores, [min(q, 0), max(q, 0)] * [min, max] on tensor cores, the largest over a group's query heads.
//
// A warp scores 16 pages at a time. The 16 x 2D matrix of their bounds goes from memory straight into the registers of
// the product (common.cuh), all of it in flight at once. The signed query waits in shared memory in the order in which
// lanes read it, 8 heads to a tile; a tile's spare columns repeat the last head, which leaves the maximum as it is.
// Products are exact and sums are float32, so a score is an upper bound of q·k up to float32 rounding.
// The pages of a KV head are dealt to as many blocks as fill the GPU, and each stops at the row's last page.

#include <cmath>

#include "common.cuh"

namespace hf_quest {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPagesPerWarp = 16;
constexpr int kChunk = 32;  // channels that the four lanes of a quad load together

constexpr int blocks_per_sm(int head_dim) { return head_dim > 128 ? 2 : head_dim > 64 ? 3 : 5; }

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(kHeadDim)) estimate_kernel(const EstimateParams params) {
    constexpr int kNumChunks = 2 * kHeadDim / kChunk;
    extern __shared__ uint4 signed_query[];  // [head tiles, chunks, lanes]
    __shared__ struct {
        const T* bounds;
        float* scores;
        int num_pages;
    } own;  // of this row and head: registers are short
    wait_for_previous_kernel();
    let_next_kernel_begin();
    const int lane_idx = threadIdx.x % kWarpSize, warp_idx = threadIdx.x / kWarpSize;
    const int group_idx = lane_idx / 4, quad_idx = lane_idx % 4;
    const int kv_head_idx = blockIdx.y, row_idx = blockIdx.z;
    const int num_head_tiles = ceil_div(params.group_size, kHeadTile);
    if (threadIdx.x == 0) {
        const Storage storage = find(params.storage);
        const int64_t num_tokens = count_tokens(params.length, params.padding, row_idx, storage.capacity);
        const int64_t head_idx = int64_t(row_idx) * params.num_kv_heads + kv_head_idx;
        const int64_t first_page = head_idx * count_pages(storage, params.page_size);
        own.bounds = static_cast<const T*>(storage.bounds) + first_page * 2 * kHeadDim;
        own.scores = storage.scores + first_page;
        own.num_pages = int(max(num_tokens + params.page_size - 1, int64_t(0)) / params.page_size);
    }

    const T* query = static_cast<const T*>(params.query) + row_idx * params.query_strides[0];
    for (int idx = threadIdx.x; idx < num_head_tiles * kNumChunks * kWarpSize; idx += kThreads) {
        const int chunk_idx = idx / kWarpSize % kNumChunks, tile_idx = idx / kWarpSize / kNumChunks;
        const int head_idx = min(tile_idx * kHeadTile + idx % kWarpSize / 4, params.group_size - 1);
        const int channel = chunk_idx * kChunk % kHeadDim + idx % 4 * 8;
        const int64_t offset = (int64_t(kv_head_idx) * params.group_size + head_idx) * params.query_strides[1];
        const uint4 vector = load_once(reinterpret_cast<const uint4*>(query + offset + channel));
        const auto signed_part = [&](uint32_t bits) {
            const Pair<T> pair = as_pair<T>(bits), zero = as_pair<T>(0);
            return as_bits(chunk_idx * kChunk < kHeadDim ? __hmin2(pair, zero) : __hmax2(pair, zero));
        };
        signed_query[idx] = {signed_part(vector.x), signed_part(vector.y), signed_part(vector.z),
                             signed_part(vector.w)};
    }

    __syncthreads();
    const int num_pages = own.num_pages;
    const T* bounds = own.bounds + quad_idx * 8;
    uint4 low[kNumChunks], high[kNumChunks];  // pages group_idx and group_idx + 8 of the 16
    const auto load_pages = [&](int first_page) {
        // Past the last page the last one is read again; its scores are not stored twice.
        const T* low_page = bounds + int64_t(min(first_page + group_idx, num_pages - 1)) * 2 * kHeadDim;
        const T* high_page = bounds + int64_t(min(first_page + group_idx + 8, num_pages - 1)) * 2 * kHeadDim;
#pragma unroll
        for (int chunk_idx = 0; chunk_idx < kNumChunks; ++chunk_idx) {
            low[chunk_idx] = load_once(reinterpret_cast<const uint4*>(low_page + chunk_idx * kChunk));
            high[chunk_idx] = load_once(reinterpret_cast<const uint4*>(high_page + chunk_idx * kChunk));
        }
    };

    int first_page = (blockIdx.x * kWarps + warp_idx) * kPagesPerWarp;
    if (first_page < num_pages) load_pages(first_page);
    while (first_page < num_pages) {
        float low_score = -INFINITY, high_score = -INFINITY;
        for (int tile_idx = 0; tile_idx < num_head_tiles; ++tile_idx) {
            float even[4] = {}, odd[4] = {};  // two sums, so that products wait less for each other
#pragma unroll
            for (int chunk_idx = 0; chunk_idx < kNumChunks; ++chunk_idx) {
                const uint4 a = low[chunk_idx], b = high[chunk_idx];
                const uint4 q = signed_query[(tile_idx * kNumChunks + chunk_idx) * kWarpSize + lane_idx];
                multiply_add<T>(even, a.x, b.x, a.y, b.y, q.x, q.y);
                multiply_add<T>(odd, a.z, b.z, a.w, b.w, q.z, q.w);
            }
            low_score = fmaxf(low_score, fmaxf(even[0] + odd[0], even[1] + odd[1]));
            high_score = fmaxf(high_score, fmaxf(even[2] + odd[2], even[3] + odd[3]));
        }
        const int low_page = first_page + group_idx, high_page = low_page + 8;
        first_page += gridDim.x * kWarps * kPagesPerWarp;
        if (first_page < num_pages) load_pages(first_page);
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2) {
            low_score = fmaxf(low_score, __shfl_xor_sync(kWholeWarp, low_score, distance));
            high_score = fmaxf(high_score, __shfl_xor_sync(kWholeWarp, high_score, distance));
        }
        if (quad_idx == 0) {
            if (low_page < num_pages) own.scores[low_page] = low_score * params.scaling;
            if (high_page < num_pages) own.scores[high_page] = high_score * params.scaling;
        }
    }
}

}  // namespace

cudaError_t launch_estimate(const EstimateParams& params) {
    const int num_heads = params.num_rows * params.num_kv_heads;
    const int most = max(blocks_per_sm(params.head_dim) * params.launch.num_sms / num_heads, 1);
    const int64_t num_pages = ceil_div<int64_t>(params.storage.capacity, params.page_size);
    const int num_blocks = int(min(ceil_div<int64_t>(num_pages, kWarps * kPagesPerWarp), int64_t(most)));
    const dim3 grid(num_blocks, params.num_kv_heads, params.num_rows);
    const size_t num_vectors = ceil_div(params.group_size, kHeadTile) * 2 * params.head_dim / kChunk * kWarpSize;
    return for_head_dim(params.data_type, params.head_dim, [&](auto element, auto head_dim) {
        const auto kernel = estimate_kernel<decltype(element), decltype(head_dim)::value>;
        return launch(kernel, grid, kThreads, num_vectors * sizeof(uint4), params);
    });
}

}  // namespace hf_quest
