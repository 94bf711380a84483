// estimate: page scores, [min(q, 0), max(q, 0)] * [min, max] on tensor cores, the largest over a group's query heads.
//
// A warp scores 16 pages at a time. The 16 x 2D matrix of their bounds goes from memory straight into the registers of
// the product (common.cuh), all of it in flight at once. The signed query waits in shared memory in the order in which
// lanes read it, 8 heads to a tile; a tile's spare columns repeat the last head, which leaves the maximum as it is.
// Products are exact and sums are float32, so a score is an upper bound of q·k up to float32 rounding. Bounds of 8 bits
// become pairs of the query's type in registers; a block of channels has a sum of its own, which its scale multiplies.
// The pages of a KV head are dealt to as many blocks as fill the GPU, and each stops at the row's last page.

#include "estimate.cuh"

namespace hf_quest {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;

constexpr int blocks_per_sm(int head_dim) { return head_dim > 128 ? 2 : head_dim > 64 ? 3 : 4; }

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(kHeadDim)) estimate_kernel(const EstimateParams params) {
    extern __shared__ uint4 signed_query[];
    __shared__ struct {
        Storage storage;
        int64_t first_page;
        int num_pages;
    } own;  // of this row and head: registers are short
    wait_for_previous_kernel();
    let_next_kernel_begin();
    const int kv_head_idx = blockIdx.y, row_idx = blockIdx.z;
    if (threadIdx.x == 0) {
        own.storage = find(params.storage);
        const int64_t num_tokens = count_tokens(params.length, params.padding, row_idx, own.storage.capacity);
        const int64_t head_idx = int64_t(row_idx) * params.num_kv_heads + kv_head_idx;
        own.first_page = head_idx * count_pages(own.storage, params.page_size);
        own.num_pages = int(max(num_tokens + params.page_size - 1, int64_t(0)) / params.page_size);
    }
    const T* query = static_cast<const T*>(params.query) + row_idx * params.query_strides[0];
    query += int64_t(kv_head_idx) * params.group_size * params.query_strides[1];
    __syncthreads();
    const int first_page = (blockIdx.x * kWarps + threadIdx.x / kWarpSize) * kPagesPerWarp;
    const auto prepare = [&] {
        sign_query<T, kHeadDim>(signed_query, query, params.query_strides[1], params.group_size);
    };
    const auto store = [&](int page_idx, float score) {
        if (threadIdx.x % 4 == 0) own.storage.scores[own.first_page + page_idx] = score * params.scaling;
    };
    const auto score = [&](auto bounds) {
        score_pages<T, kHeadDim, 1>(signed_query, ceil_div(params.group_size, kHeadTile), bounds, first_page,
                                    gridDim.x * kWarps * kPagesPerWarp, own.num_pages, prepare, store);
    };
    if (own.storage.scales == nullptr) {
        score(WideBounds<T, kHeadDim>(own.storage, own.first_page));
    } else {
        score(NarrowBounds<T, kHeadDim>(own.storage, own.first_page));
    }
}

}  // namespace

cudaError_t launch_estimate(const EstimateParams& params) {
    const int num_heads = params.num_rows * params.num_kv_heads;
    const int most = max(blocks_per_sm(params.head_dim) * params.launch.num_sms / num_heads, 1);
    const int64_t num_pages = ceil_div<int64_t>(params.storage.capacity, params.page_size);
    const int num_blocks = int(min(ceil_div<int64_t>(num_pages, kWarps * kPagesPerWarp), int64_t(most)));
    const dim3 grid(num_blocks, params.num_kv_heads, params.num_rows);
    const size_t num_vectors = count_query_vectors(params.group_size, params.head_dim);
    return for_head_dim(params.data_type, params.head_dim, [&](auto element, auto head_dim) {
        const auto kernel = estimate_kernel<decltype(element), decltype(head_dim)::value>;
        return launch(kernel, grid, kThreads, num_vectors * sizeof(uint4), params);
    });
}

}  // namespace hf_quest
