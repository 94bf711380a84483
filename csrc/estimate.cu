// estimate: page scores, by products of a query's weights with [min, max] on tensor cores, on which a group's query
// heads agree by the largest or by shares (softmax); these take a kernel before that sums up each head's.
//
// A warp scores 16 pages at a time. The 16 x 2D matrix of their bounds goes from memory straight into the registers of
// the product (common.cuh), all of it in flight at once; in 8 bits it goes by shared memory. The signed query waits in
// registers or in shared memory in the order in which lanes need it, 8 heads to a tile, of which those to spare repeat
// the last head. Products are exact and sums are float32, so a published score is an upper bound of q·k up to float32
// rounding. Bounds of 8 bits are multiplied as integers, summed up for each block of channels by itself, and multiplied
// by its scale. There weights are rounded as well, by 2^-22 of the largest channel of 8 heads at most.
// The pages of a KV head are dealt to as many blocks as fill the GPU, and each stops at the row's last page.

#include <algorithm>

#include "estimate.cuh"
#include "shares.cuh"

namespace hf_quest {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;

constexpr int kTiles = 1;  // of pages on their way, for each warp
constexpr int kStaticBytes = 128;  // of shared memory, at most
constexpr int kBytesAtHand = 48 << 10;  // of it, without being asked for

constexpr int blocks_per_sm(int head_dim) { return head_dim > 128 ? 2 : head_dim > 64 ? 3 : 5; }

constexpr int kMostHeadTiles = 4;  // of a group

// What a kernel gives: scores by which heads agree, or what they need for that.
enum class Gives { kLargest, kHeadSums, kShares };

// Sums up a lane's two heads of each tile of 8, in shared memory.
struct HeadSums {
    float4* own;  // [head tiles] of this lane: two LogitSums
    float scaling;
    int end_page;

    __device__ float2 of(float4 scores, int head_tile, int page_idx) {
        const auto add = [&](float& maximum, float& sum, float low, float high) {
            LogitSum total = {maximum, sum};
            if (page_idx < end_page) total.add({logit_of(low * scaling), 1.0f});
            if (page_idx + kPagesPerTile / 2 < end_page) total.add({logit_of(high * scaling), 1.0f});
            maximum = total.maximum;
            sum = total.sum;
        };
        float4 sums = own[head_tile * kThreads];
        add(sums.x, sums.y, scores.x, scores.z);
        add(sums.z, sums.w, scores.y, scores.w);
        own[head_tile * kThreads] = sums;
        return {};
    }
    __device__ float join(float, float) const { return 0.0f; }
};

// Has heads agree by the sum or the largest of their shares of the pages before the newest.
struct Shares {
    const float2*
        head_sums;  // [head tiles, 8]: of a LogitSum the maximum and the inverse of the sum, 0 for spare heads
    float scaling;
    bool is_sum;

    __device__ float2 of(float4 scores, int head_tile, int) const {
        const float2* own = head_sums + head_tile * kHeadTile + threadIdx.x % 4 * 2;
        const auto share = [&](float score, float2 sum) {
            return power_of_two(logit_of(score * scaling) - sum.x) * sum.y;
        };
        const float2 first = own[0], second = own[1];
        return {join(share(scores.x, first), share(scores.y, second)),
                join(share(scores.z, first), share(scores.w, second))};
    }
    __device__ float join(float a, float b) const { return is_sum ? a + b : fmaxf(a, b); }
};

template <typename T, int kHeadDim, Gives kGives>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(kHeadDim)) estimate_kernel(const EstimateParams params) {
    extern __shared__ uint4 dynamic[];
    char* queries = reinterpret_cast<char*>(dynamic);
    __shared__ struct {
        Storage storage;
        int64_t first_page, first_sum;
        int num_pages;
    } own;  // of this row and head: registers are short
    static_assert(sizeof(own) <= kStaticBytes);
    wait_for_previous_kernel();
    let_next_kernel_begin();
    const int kv_head_idx = blockIdx.y, row_idx = blockIdx.z;
    const int num_head_tiles = ceil_div(params.group_size, kHeadTile);
    if (threadIdx.x == 0) {
        own.storage = find(params.storage);
        const int64_t num_tokens = count_tokens(params.length, params.padding, row_idx, own.storage.capacity);
        const int64_t head_idx = int64_t(row_idx) * params.num_kv_heads + kv_head_idx;
        own.first_page = head_idx * count_pages(own.storage, params.page_size);
        own.first_sum = head_idx * gridDim.x * num_head_tiles * kHeadTile;
        own.num_pages = int(max(num_tokens + params.page_size - 1, int64_t(0)) / params.page_size);
    }
    const T* query = static_cast<const T*>(params.query) + row_idx * params.query_strides[0];
    query += int64_t(kv_head_idx) * params.group_size * params.query_strides[1];
    char* tiles = queries + count_query_bytes(params.group_size, kHeadDim);
    const ScoreInput<T> input = {
        query, params.query_strides[1], params.group_size, num_head_tiles, params.score.width, queries, tiles};
    __syncthreads();
    if (own.num_pages == 0) return;  // a row of padding alone has no scores
    const auto score = [&](auto& agree, auto store) {
        const auto score_with = [&](auto bounds) {
            const int first_page = (blockIdx.x * kWarps + threadIdx.x / kWarpSize) * kPagesPerTile;
            const int step = gridDim.x * kWarps * kPagesPerTile;
            score_pages<kTiles>(bounds, input, QueryIsThere(), first_page, step, own.num_pages, agree, store);
        };
        if (own.storage.scales == nullptr) {
            score_with(WideBounds<T, kHeadDim>(own.storage, own.first_page));
        } else {
            score_with(NarrowBounds<T, kHeadDim>(own.storage, own.first_page));
        }
    };
    const auto store = [&](int own_page, float score) {
        if (own_page < own.num_pages) own.storage.scores[own.first_page + own_page] = score;
    };
    if constexpr (kGives == Gives::kLargest) {
        LargestScore largest;
        score(largest, [&](int, int, int own_page, float score) { store(own_page, score * params.scaling); });
    } else if constexpr (kGives == Gives::kHeadSums) {
        __shared__ float4 sums[kMostHeadTiles][kThreads];
        HeadSums head_sums = {&sums[0][threadIdx.x], params.scaling, own.num_pages - 1};
        for (int i = 0; i < num_head_tiles; ++i) sums[i][threadIdx.x] = {kNoLogit, 0.0f, kNoLogit, 0.0f};
        score(head_sums, [](int, int, int, float) {});
        __syncthreads();
        // A thread for each head, over the lanes that have it in all warps.
        float2* given = params.head_sums + own.first_sum + blockIdx.x * num_head_tiles * kHeadTile;
        for (int idx = threadIdx.x; idx < num_head_tiles * kHeadTile; idx += kThreads) {
            LogitSum total;
            for (int lane = idx % kHeadTile / 2; lane < kThreads; lane += 4) {
                const float4 of_lane = sums[idx / kHeadTile][lane];
                total.add(idx % 2 == 0 ? LogitSum{of_lane.x, of_lane.y} : LogitSum{of_lane.z, of_lane.w});
            }
            given[idx] = {total.maximum, total.sum};
        }
    } else {
        __shared__ float2 head_sums[kMostHeadTiles * kHeadTile];
        const float2* given = params.head_sums + own.first_sum;
        const int num_heads = num_head_tiles * kHeadTile, lane_idx = threadIdx.x % kWarpSize;
        for (int head_idx = threadIdx.x / kWarpSize; head_idx < num_heads; head_idx += kWarps) {
            LogitSum total;
            for (int i = lane_idx; i < int(gridDim.x); i += kWarpSize) {
                const float2 of_block = __ldcg(&given[i * num_heads + head_idx]);
                total.add({of_block.x, of_block.y});
            }
#pragma unroll
            for (int distance = 1; distance < kWarpSize; distance *= 2) total.add_lanes(distance);
            const bool is_spare = head_idx >= params.group_size;
            if (lane_idx == 0) head_sums[head_idx] = {total.maximum, is_spare ? 0.0f : 1.0f / total.sum};
        }
        __syncthreads();
        Shares shares = {head_sums, params.scaling, params.score.agreement == Agreement::kSum};
        score(shares, [&](int, int, int own_page, float score) { store(own_page, score); });
    }
}

// Blocks that a row's KV head has.
int count_blocks(const EstimateParams& params) {
    const int num_heads = params.num_rows * params.num_kv_heads;
    const int most = std::max(blocks_per_sm(params.head_dim) * params.launch.num_sms / num_heads, 1);
    const int64_t num_pages = ceil_div<int64_t>(params.storage.capacity, params.page_size);
    return int(std::min(ceil_div<int64_t>(num_pages, kWarps * kPagesPerTile), int64_t(most)));
}

template <Gives kGives>
cudaError_t launch(const EstimateParams& params) {
    const dim3 grid(count_blocks(params), params.num_kv_heads, params.num_rows);
    const bool is_wide = params.storage.scales == nullptr && params.storage.addresses == nullptr;
    const int tile_bytes = is_wide ? 0 : kWarps * kTiles * count_tile_bytes(params.head_dim);
    const int num_bytes = count_query_bytes(params.group_size, params.head_dim) + tile_bytes;
    constexpr int kOwnBytes = kStaticBytes + (kGives == Gives::kLargest ? 0 : kMostHeadTiles * kThreads * 16);
    return for_head_dim(params.data_type, params.head_dim, [&](auto element, auto head_dim) {
        const auto kernel = estimate_kernel<decltype(element), decltype(head_dim)::value, kGives>;
        if (num_bytes + kOwnBytes > kBytesAtHand) {
            // Whatever the shapes, so that launches of several threads do not disturb each other.
            const int most_bytes = params.launch.most_shared_bytes - kOwnBytes;
            const cudaError_t error =
                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes);
            if (error != cudaSuccess) return error;
        }
        return hf_quest::launch(kernel, grid, kThreads, num_bytes, params);
    });
}

}  // namespace

int64_t count_head_sums(const EstimateParams& params) {
    if (params.score.agreement == Agreement::kMax || params.group_size == 1) return 0;
    const int num_head_tiles = ceil_div(params.group_size, kHeadTile);
    return int64_t(params.num_rows) * params.num_kv_heads * count_blocks(params) * num_head_tiles * kHeadTile;
}

cudaError_t launch_estimate(const EstimateParams& params) {
    if (count_head_sums(params) == 0) return launch<Gives::kLargest>(params);
    const cudaError_t error = launch<Gives::kHeadSums>(params);
    return error == cudaSuccess ? launch<Gives::kShares>(params) : error;
}

}  // namespace hf_quest
