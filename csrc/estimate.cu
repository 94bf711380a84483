// estimate: page scores, [min(q, 0), max(q, 0)] * [min, max] on tensor cores, the largest over a group's query heads.
//
// A warp scores 16 pages at a time. The 16 x 2D matrix of their bounds goes from memory straight into the registers of
// the product (common.cuh), all of it in flight at once; in 8 bits it goes by shared memory. The signed query waits in
// shared memory in the order in which lanes read it, 8 heads to a tile, of which those to spare repeat the last head.
// Products are exact and sums are float32, so a score is an upper bound of q·k up to float32 rounding. Bounds of 8 bits
// are multiplied as integers; a block of channels has a sum of its own, exact too, which its scale multiplies. There q
// is rounded as well, by 2^-22 of its largest channel at most.
// The pages of a KV head are dealt to as many blocks as fill the GPU, and each stops at the row's last page.

#include "estimate.cuh"

namespace hf_quest {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;

constexpr int kStaticBytes = 128;  // of shared memory, at most

// Of pages on their way, with bounds of 8 bits.
__host__ __device__ constexpr int count_stages(int head_dim) { return head_dim > 128 ? 1 : 2; }

constexpr int blocks_per_sm(int head_dim) { return head_dim > 128 ? 2 : head_dim > 64 ? 3 : 5; }

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(kHeadDim)) estimate_kernel(const EstimateParams params) {
    extern __shared__ uint4 dynamic[];
    char* signed_query = reinterpret_cast<char*>(dynamic);
    __shared__ struct {
        Storage storage;
        int64_t first_page;
        int num_pages;
    } own;  // of this row and head: registers are short
    static_assert(sizeof(own) <= kStaticBytes);
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
    const auto store = [&](int page_idx, float low_score, float high_score) {
        // Two lanes of each quad, the first for its low page, the second for its high one.
        page_idx += threadIdx.x % kWarpSize / 4 + threadIdx.x % 4 * 8;
        if (threadIdx.x % 4 > 1 || page_idx >= own.num_pages) return;
        const float score = threadIdx.x % 4 == 0 ? low_score : high_score;
        own.storage.scores[own.first_page + page_idx] = score * params.scaling;
    };
    using Narrow = NarrowBounds<T, kHeadDim>;
    const ScoreInput<T> input = {
        query,        params.query_strides[1], params.group_size, ceil_div(params.group_size, kHeadTile),
        signed_query, signed_query + count_query_bytes(params.group_size, kHeadDim)};
    const auto score = [&](auto bounds) {
        score_pages<std::is_same_v<decltype(bounds), Narrow> ? count_stages(kHeadDim) : 1>(
            bounds, input, first_page, gridDim.x * kWarps * kPagesPerWarp, own.num_pages, store);
    };
    if (own.storage.scales == nullptr) {
        score(WideBounds<T, kHeadDim>(own.storage, own.first_page));
    } else {
        score(Narrow(own.storage, own.first_page));
    }
}

}  // namespace

cudaError_t launch_estimate(const EstimateParams& params) {
    const int num_heads = params.num_rows * params.num_kv_heads;
    const int most = max(blocks_per_sm(params.head_dim) * params.launch.num_sms / num_heads, 1);
    const int64_t num_pages = ceil_div<int64_t>(params.storage.capacity, params.page_size);
    const int num_blocks = int(min(ceil_div<int64_t>(num_pages, kWarps * kPagesPerWarp), int64_t(most)));
    const dim3 grid(num_blocks, params.num_kv_heads, params.num_rows);
    const int tile_bytes = params.storage.scales == nullptr && params.storage.addresses == nullptr
                               ? 0
                               : kWarps * count_stages(params.head_dim) * count_tile_bytes(params.head_dim);
    const int num_bytes = count_query_bytes(params.group_size, params.head_dim) + tile_bytes;
    return for_head_dim(params.data_type, params.head_dim, [&](auto element, auto head_dim) {
        const auto kernel = estimate_kernel<decltype(element), decltype(head_dim)::value>;
        // Whatever the shapes, so that launches of several threads do not disturb each other.
        const int most_bytes = params.launch.most_shared_bytes - kStaticBytes;
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes);
        return error == cudaSuccess ? launch(kernel, grid, kThreads, num_bytes, params) : error;
    });
}

}  // namespace hf_quest
