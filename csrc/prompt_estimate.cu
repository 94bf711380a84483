// estimate of a prompt: how much each block before a segment matters to the segment's queries, per KV head.
//
// Some queries of each segment are looked at. Their products with all keys before the segment are exact; of each block
// the largest stays, and the softmax of a query is over these. A first kernel writes them, in 16 bits, and the sums of
// the softmax, by chunks of keys: one warpgroup has the copy engine bring keys, two take 128 queries each, in halves,
// and reduce the logits of one half while the tensor cores make the other's. A second kernel makes weights of them,
// squares these, and takes the mean over the queries and heads that choose together.
#include <climits>

#include "hopper.cuh"

namespace hf_quest {
namespace {

constexpr int kConsumers = 2;                         // warpgroups
constexpr int kProductRows = 64;                      // queries of a product
constexpr int kRows = kConsumers * 2 * kProductRows;  // queries of a thread block, of all heads of a group
constexpr int kTile = 128;                            // keys of a product
constexpr int kStages = 4;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kQueryPanelBytes = kRows * kPanel * 2, kPanelBytes = kTile * kPanel * 2;
constexpr int kChunkTiles = kEstimateChunk / kTile;

struct Arguments {
    PromptEstimateParams params;
    int num_chunks, chunks_per_thread_block;
    CUtensorMap query, keys;
};

struct alignas(1024) Shared {
    uint8_t query[kPanels][kQueryPanelBytes];
    uint8_t keys[kStages][kPanels][kPanelBytes];
    uint64_t has_query, has_keys[kStages], needs_keys[kStages];
};

// Queries of a head that a thread block has: a power of two, so that few cross the edge of a segment.
__host__ __device__ int queries_per_head(int group_size) {
    int num_queries = kRows;
    while (num_queries * group_size > kRows) num_queries /= 2;
    return num_queries;
}

// Blocks before the segment of a query.
__device__ int count_blocks(const PromptEstimateParams& params, int query_idx) {
    return (params.first_position + query_idx / params.num_samples * params.segment_size) / params.block_size;
}

#ifdef HF_QUEST_HAS_WARPGROUPS

// What a warpgroup finds in its products of 64 queries: the largest logits of blocks, and their softmax so far. A
// thread has two queries, group_idx and group_idx + 8 of its warp's, and the quarter of a tile's keys of its quad_idx.
template <int kBlockSize>
struct Reduction {
    static constexpr int kOwn = kTile / 4 / kBlockSize;  // blocks
    static constexpr float kHighest = 65504.0f;          // of 16 bits
    int num_blocks[2];                                   // before the segments of its queries
    __half* maxima[2];                                   // null where there is no query
    float2* softmax[2];
    float highest[2] = {-kHighest, -kHighest}, sums[2] = {0.0f, 0.0f};

    // Of `own_row` and the one 8 below, each a head of the group and a query.
    __device__ Reduction(const Arguments& arguments, int first_query, int own_row) {
        const PromptEstimateParams& params = arguments.params;
        const int per_head = queries_per_head(params.group_size);
        const int num_queries = params.num_segments * params.num_samples;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int row_idx = own_row + 8 * row, of_group = row_idx / per_head;
            const int query_idx = first_query + row_idx % per_head;
            const bool is_there = of_group < params.group_size && query_idx < num_queries;
            const int64_t query_row = int64_t(blockIdx.z * params.group_size + of_group) * num_queries + query_idx;
            num_blocks[row] = is_there ? count_blocks(params, query_idx) : 0;
            maxima[row] = is_there ? params.maxima + query_row * params.num_blocks : nullptr;
            softmax[row] = params.softmax + query_row * arguments.num_chunks;
        }
    }

    // Takes and writes the blocks of a tile, `first_block` and the next.
    __device__ void add(const float (&logits)[64], float scale, int first_block) {
        const int own_block = first_block + threadIdx.x % 4 * kOwn;
        float own[2][kOwn];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
#pragma unroll
            for (int block = 0; block < kOwn; ++block) {
                float most = -INFINITY;
#pragma unroll
                for (int i = block; i < 32; i += kOwn) most = fmaxf(most, logits[i / 2 * 4 + 2 * row + i % 2]);
                most = fminf(fmaxf(most * scale, -kHighest), kHighest);
                own[row][block] = own_block + block < num_blocks[row] ? most : -INFINITY;
            }
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float most = highest[row];
#pragma unroll
            for (int block = 0; block < kOwn; ++block) most = fmaxf(most, own[row][block]);
            sums[row] *= power_of_two(highest[row] - most);
#pragma unroll
            for (int block = 0; block < kOwn; ++block) sums[row] += power_of_two(own[row][block] - most);
            highest[row] = most;
            if (maxima[row] == nullptr) continue;
            if constexpr (kOwn == 2) {
                *reinterpret_cast<__half2*>(maxima[row] + own_block) = __floats2half2_rn(own[row][0], own[row][1]);
            } else {
                maxima[row][own_block] = __float2half_rn(own[row][0]);
            }
        }
    }

    // Writes the softmax of all four lanes, and begins that of the next chunk.
    __device__ void finish(int chunk_idx) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float most = highest[row];
            most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 1));
            most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 2));
            float sum = sums[row] * power_of_two(highest[row] - most);
            sum += __shfl_xor_sync(kWholeWarp, sum, 1);
            sum += __shfl_xor_sync(kWholeWarp, sum, 2);
            if (threadIdx.x % 4 == 0 && maxima[row] != nullptr) softmax[row][chunk_idx] = {most, sum};
            highest[row] = -kHighest;
            sums[row] = 0.0f;
        }
    }
};

template <typename T, int kBlockSize>
__device__ void reduce(const Arguments& arguments, Shared& shared, int first_query, int first_tile, int end_tile) {
    const int consumer_idx = warpgroup_idx() - 1, lane_idx = threadIdx.x % kWarpSize;
    const int first_row = 2 * consumer_idx * kProductRows;
    const int own_row = first_row + threadIdx.x % kWarpgroup / kWarpSize * 16 + lane_idx / 4;
    const float scale = arguments.params.scaling * kLog2E;
    const uint64_t upper = describe_matrix(shared.query[0] + first_row * 128);
    const uint64_t lower = advance(upper, kProductRows * 128);
    Reduction<kBlockSize> of_upper(arguments, first_query, own_row);
    Reduction<kBlockSize> of_lower(arguments, first_query, own_row + kProductRows);
    Place<kStages> place;
    wait_for(shared.has_query, 0);
    for (int tile_idx = first_tile; tile_idx < end_tile; ++tile_idx, place.advance()) {
        float upper_logits[64], lower_logits[64];
        const int first_block = tile_idx * (kTile / kBlockSize);
        wait_for(shared.has_keys[place.stage], place.parity);
        const uint64_t keys = describe_matrix(shared.keys[place.stage][0]);
        begin_logits<T, kQueryPanelBytes, kPanelBytes>(upper_logits, upper, keys);
        begin_logits<T, kQueryPanelBytes, kPanelBytes>(lower_logits, lower, keys);
        wait_for_products<1>();
        pin(upper_logits);
        of_upper.add(upper_logits, scale, first_block);
        wait_for_products<0>();
        pin(lower_logits);
        if (lane_idx == 0) arrive(shared.needs_keys[place.stage]);
        of_lower.add(lower_logits, scale, first_block);
        if (tile_idx + 1 == end_tile || (tile_idx + 1) % kChunkTiles == 0) {
            of_upper.finish(tile_idx / kChunkTiles);
            of_lower.finish(tile_idx / kChunkTiles);
        }
    }
}

#endif  // HF_QUEST_HAS_WARPGROUPS

// Up to 256 queries of one KV head and some chunks of its keys.
template <typename T, int kBlockSize>
__global__ void __launch_bounds__(kThreads, 1) prompt_maxima_kernel(const __grid_constant__ Arguments arguments) {
#ifdef HF_QUEST_HAS_WARPGROUPS
    extern __shared__ uint8_t shared_bytes[];
    Shared& shared = shared_as<Shared>(shared_bytes);
    const PromptEstimateParams& params = arguments.params;
    const int per_head = queries_per_head(params.group_size), first_query = blockIdx.x * per_head;
    const int last_query = min(first_query + per_head, params.num_segments * params.num_samples) - 1;
    const int end_tile = ceil_div(count_blocks(params, last_query) * params.block_size, kTile);
    const int most_tiles = arguments.chunks_per_thread_block * kChunkTiles, first_tile = blockIdx.y * most_tiles;
    const int num_tiles = min(end_tile - first_tile, most_tiles);
    if (num_tiles <= 0) return;
    if (threadIdx.x == 0) {
        make_barrier(shared.has_query, 1);
        for (int stage = 0; stage < kStages; ++stage) {
            make_barrier(shared.has_keys[stage], 1);
            make_barrier(shared.needs_keys[stage], kConsumers * kWarpgroup / kWarpSize);
        }
        publish_barriers();
    }
    __syncthreads();
    wait_for_previous_kernel();
    if (threadIdx.x < kWarpgroup) {
        give_registers<40>();
        if (threadIdx.x != 0) return;
        const int kv_head_idx = blockIdx.z;
        arrive_expecting(shared.has_query, params.group_size * per_head * kHeadDim * 2);
        for (int panel = 0; panel < kPanels; ++panel)
            copy_panel(shared.query[panel], arguments.query, panel * kPanel, first_query,
                       kv_head_idx * params.group_size, shared.has_query);
        Place<kStages> place;
        for (int tile_idx = first_tile; tile_idx < first_tile + num_tiles; ++tile_idx, place.advance()) {
            uint64_t& has_keys = shared.has_keys[place.stage];
            wait_for(shared.needs_keys[place.stage], place.parity ^ 1);
            arrive_expecting(has_keys, kPanels * kPanelBytes);
            for (int panel = 0; panel < kPanels; ++panel)
                copy_dealt_panel(shared.keys[place.stage][panel], arguments.keys, panel * kPanel, tile_idx * kTile,
                                 kv_head_idx, has_keys);
        }
    } else {
        take_registers<232>();
        reduce<T, kBlockSize>(arguments, shared, first_query, first_tile, first_tile + num_tiles);
    }
#endif
}

constexpr int kBlocksPerThread = 4;  // of a tile's 4 or 8: all of them are before the segment, or none
constexpr int kWeighThreads = 512;
constexpr int kMaxRows = 1024;  // queries that choose together
constexpr int kBatch = 8;       // of them that a thread loads at a time

// The mean of squared weights: some blocks of one segment and KV head.
__global__ void __launch_bounds__(kWeighThreads)
    prompt_weigh_kernel(const PromptEstimateParams params, int num_chunks) {
    struct Row {
        int query_row;  // among all heads' queries
        float offset;   // log2 of the sum of its softmax over all chunks
    };
    __shared__ Row rows[kMaxRows];
    wait_for_previous_kernel();
    const int segment_idx = blockIdx.x, kv_head_idx = blockIdx.y, lane_idx = threadIdx.x % kWarpSize;
    const int num_queries = params.num_segments * params.num_samples;
    const int num_rows = params.group_size * params.num_samples;
    const int num_blocks = count_blocks(params, segment_idx * params.num_samples);
    const int own_chunks = ceil_div(num_blocks * params.block_size, kEstimateChunk);
    for (int row_idx = threadIdx.x / kWarpSize; row_idx < num_rows; row_idx += kWeighThreads / kWarpSize) {
        const int head_idx = kv_head_idx * params.group_size + row_idx / params.num_samples;
        const int query_row = head_idx * num_queries + segment_idx * params.num_samples + row_idx % params.num_samples;
        const float2* parts = params.softmax + int64_t(query_row) * num_chunks;
        float most = -INFINITY, sum = 0.0f;
        for (int chunk = lane_idx; chunk < own_chunks; chunk += kWarpSize) most = fmaxf(most, parts[chunk].x);
        for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2)
            most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, lanes));
        for (int chunk = lane_idx; chunk < own_chunks; chunk += kWarpSize)
            sum += parts[chunk].y * power_of_two(parts[chunk].x - most);
        for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, lanes);
        if (lane_idx == 0) rows[row_idx] = {query_row, most + log2f(sum)};
    }
    __syncthreads();
    const int first_block = (blockIdx.z * kWeighThreads + threadIdx.x) * kBlocksPerThread;
    if (first_block >= params.num_blocks) return;
    float4 mean = {-1.0f, -1.0f, -1.0f, -1.0f};
    if (first_block < num_blocks) {
        float sums[kBlocksPerThread] = {};
        for (int first_row = 0; first_row < num_rows; first_row += kBatch) {
            uint2 data[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int64_t query_row = rows[min(first_row + i, num_rows - 1)].query_row;
                data[i] = load_once(
                    reinterpret_cast<const uint2*>(params.maxima + query_row * params.num_blocks + first_block));
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (first_row + i >= num_rows) break;
                const float offset = 2.0f * rows[first_row + i].offset;
#pragma unroll
                for (int block = 0; block < kBlocksPerThread; ++block) {
                    const float2 pair = __half22float2(as_pair<__half>(block < 2 ? data[i].x : data[i].y));
                    sums[block] += power_of_two(fmaf(2.0f, block % 2 ? pair.y : pair.x, -offset));
                }
            }
        }
        mean = {sums[0] / num_rows, sums[1] / num_rows, sums[2] / num_rows, sums[3] / num_rows};
    }
    const int64_t row_idx = int64_t(kv_head_idx) * params.num_segments + segment_idx;
    *reinterpret_cast<float4*>(params.scores + row_idx * params.num_blocks + first_block) = mean;
}

}  // namespace

// Chunks of keys for a thread block, of which each multiprocessor has one at a time, so that all end together.
static int choose_chunks(const PromptEstimateParams& params, int thread_blocks_per_chunk, int num_chunks) {
    constexpr int kStartTiles = 2;  // that a thread block could take while it starts
    int chosen = 1, least = INT_MAX;
    for (int chunks = 1; chunks <= num_chunks; ++chunks) {
        const int num_waves = ceil_div(thread_blocks_per_chunk * ceil_div(num_chunks, chunks), params.launch.num_sms);
        const int time = num_waves * (chunks * kChunkTiles + kStartTiles);
        if (time < least) least = time, chosen = chunks;
    }
    return chosen;
}

cudaError_t launch_prompt_estimate(const PromptEstimateParams& params) {
    if (params.group_size * params.num_samples > kMaxRows) return cudaErrorInvalidValue;
    const int num_queries = params.num_segments * params.num_samples, per_head = queries_per_head(params.group_size);
    const int num_chunks = ceil_div(params.num_blocks * params.block_size, kEstimateChunk);
    const int thread_blocks_per_chunk = ceil_div(num_queries, per_head) * params.num_kv_heads;
    Arguments arguments = {params, num_chunks, choose_chunks(params, thread_blocks_per_chunk, num_chunks)};
    cudaError_t error =
        describe_tokens(arguments.query, params.data_type, params.query,
                        {{num_queries, params.query_strides[1], per_head},
                         {params.num_kv_heads * params.group_size, params.query_strides[0], params.group_size}});
    if (error != cudaSuccess) return error;
    // Of every 8 rows of a tile in shared memory, each lane of a quad gets the sums of two. So the keys are dealt out,
    // and a block's are one lane's: key 32 * lane + 16 * i + j comes to row 8 * j + 2 * lane + i, and j counts on from
    // tile to tile. All are before the last segment, in whole tiles.
    const int64_t stride = params.key_strides[1], num_keys = int64_t(params.num_blocks) * params.block_size;
    error = describe_tokens(arguments.keys, params.data_type, params.keys,
                            {{2, 16 * stride, 2},
                             {4, 32 * stride, 4},
                             {num_keys - kTile + 16, stride, 16},
                             {params.num_kv_heads, params.key_strides[0]}});
    if (error != cudaSuccess) return error;

    const bool is_half = params.data_type == DataType::kHalf;
    const auto kernel = params.block_size == 16
                            ? (is_half ? prompt_maxima_kernel<__half, 16> : prompt_maxima_kernel<__nv_bfloat16, 16>)
                            : (is_half ? prompt_maxima_kernel<__half, 32> : prompt_maxima_kernel<__nv_bfloat16, 32>);
    const dim3 grid(ceil_div(num_queries, per_head), ceil_div(num_chunks, arguments.chunks_per_thread_block),
                    params.num_kv_heads);
    error = launch_with_shared<Shared>(kernel, grid, kThreads, params.launch.stream, arguments);
    if (error != cudaSuccess) return error;
    const dim3 by_segment(params.num_segments, params.num_kv_heads,
                          ceil_div(params.num_blocks, kBlocksPerThread * kWeighThreads));
    prompt_weigh_kernel<<<by_segment, kWeighThreads, 0, params.launch.stream>>>(params, num_chunks);
    return cudaGetLastError();
}

}  // namespace hf_quest
