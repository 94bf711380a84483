// estimate: page scores, [min(q, 0), max(q, 0)] * [min, max] on tensor cores, the largest over a group's query heads.
//
// A warp scores 16 pages at a time. The 16 x 2D matrix of their bounds goes from memory straight into the registers of
// the product (common.cuh), all of it in flight at once; in 8 bits it goes by shared memory. The signed query waits in
// registers or in shared memory in the order in which lanes need it, 8 heads to a tile, of which those to spare repeat
// the last head. Products are exact and sums are float32, so a score is an upper bound of q·k up to float32 rounding.
// Bounds of 8 bits are multiplied as integers, summed up for each block of channels by itself, and multiplied by its
// scale. There q is rounded as well, by 2^-22 of the largest channel of 8 heads at most.
// The pages of a KV head are dealt to as many blocks as fill the GPU, and each stops at the row's last page.

#include "estimate.cuh"

namespace hf_quest {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;

constexpr int kTiles = 1;              // of pages on their way, for each warp
constexpr int kStaticBytes = 128;      // of shared memory, at most
constexpr int kBytesAtHand = 48 << 10;  // of it, without being asked for

constexpr int blocks_per_sm(int head_dim) { return head_dim > 128 ? 2 : head_dim > 64 ? 3 : 5; }

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(kHeadDim)) estimate_kernel(const EstimateParams params) {
    extern __shared__ uint4 dynamic[];
    char* queries = reinterpret_cast<char*>(dynamic);
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
    const int num_head_tiles = ceil_div(params.group_size, kHeadTile);
    char* tiles = queries + count_query_bytes(params.group_size, kHeadDim);
    const ScoreInput<T> input = {query, params.query_strides[1], params.group_size, num_head_tiles, queries, tiles};
    __syncthreads();
    if (own.num_pages == 0) return;  // a row of padding alone has no scores
    const auto store = [&](int, int, int own_page, float score) {
        if (own_page < own.num_pages) own.storage.scores[own.first_page + own_page] = score * params.scaling;
    };
    const auto score = [&](auto bounds) {
        const auto wait_for_query = [] {};
        const int first_page = (blockIdx.x * kWarps + threadIdx.x / kWarpSize) * kPagesPerTile;
        const int step = gridDim.x * kWarps * kPagesPerTile;
        score_pages<kTiles>(bounds, input, wait_for_query, first_page, step, own.num_pages, store);
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
    const int num_blocks = int(min(ceil_div<int64_t>(num_pages, kWarps * kPagesPerTile), int64_t(most)));
    const dim3 grid(num_blocks, params.num_kv_heads, params.num_rows);
    const bool is_wide = params.storage.scales == nullptr && params.storage.addresses == nullptr;
    const int tile_bytes = is_wide ? 0 : kWarps * kTiles * count_tile_bytes(params.head_dim);
    const int num_bytes = count_query_bytes(params.group_size, params.head_dim) + tile_bytes;
    return for_head_dim(params.data_type, params.head_dim, [&](auto element, auto head_dim) {
        const auto kernel = estimate_kernel<decltype(element), decltype(head_dim)::value>;
        if (num_bytes + kStaticBytes > kBytesAtHand) {
            // Whatever the shapes, so that launches of several threads do not disturb each other.
            const int most_bytes = params.launch.most_shared_bytes - kStaticBytes;
            const cudaError_t error =
                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes);
            if (error != cudaSuccess) return error;
        }
        return launch(kernel, grid, kThreads, num_bytes, params);
    });
}

}  // namespace hf_quest
