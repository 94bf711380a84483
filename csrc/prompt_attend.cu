// attend of a prompt: of each segment, 128 queries of one head at a time, over the segment itself, causally, and over
// the blocks that were selected for it.
//
// A block of three warpgroups stays on each multiprocessor. One has the copy engine bring queries, and blocks of keys
// and values from where they lie, 128 tokens to a tile, into two stages of shared memory. The other two take 64 queries
// each: the products with the next keys and the sums with the last values are begun together, and the softmax of the
// former goes on beneath the latter. They take turns, so that one has the tensor cores while the other takes exponents.
#include "hopper.cuh"

namespace hf_quest {
namespace {

constexpr int kTile = 128;  // queries, and tokens that they attend at a time
constexpr int kStages = 2;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kPanelBytes = kTile * kPanel * 2;

struct Arguments {
    PromptAttendParams params;
    CUtensorMap query, keys, values;
};

struct alignas(1024) Shared {
    uint8_t query[kPanels][kPanelBytes];
    uint8_t keys[kStages][kPanels][kPanelBytes];
    uint8_t values[kStages][kPanels][kPanelBytes];
    uint64_t has_query, needs_query;
    uint64_t has_keys[kStages], needs_keys[kStages];
    uint64_t has_values[kStages], needs_values[kStages];
};

#ifdef HF_QUEST_HAS_WARPGROUPS

constexpr int kTileBytes = kPanels * kPanelBytes;
constexpr int kSteps = kTile / 16;  // of a product over a tile's tokens

// 128 queries of one head and what they attend: first the tiles of their own segment up to them, the newest first.
struct Work {
    int segment_idx, tile_idx, head_idx;  // tile_idx in the segment

    __device__ static Work at(const PromptAttendParams& params, int work_idx) {
        // Heads are neighbours in time, so that those of a group find their blocks in L2. Of a segment's tiles, the one
        // with most to attend comes first.
        const int num_tiles = params.segment_size / kTile, num_heads = params.num_kv_heads * params.group_size;
        const int rest = work_idx / num_heads;
        return {rest / num_tiles, num_tiles - 1 - rest % num_tiles, work_idx % num_heads};
    }

    __device__ static int count(const PromptAttendParams& params) {
        return params.num_segments * (params.segment_size / kTile) * params.num_kv_heads * params.group_size;
    }

    __device__ int first_query(const PromptAttendParams& params) const {  // of those given
        return segment_idx * params.segment_size + tile_idx * kTile;
    }

    __device__ int num_own_tiles() const { return tile_idx + 1; }

    __device__ int num_tiles(const PromptAttendParams& params) const {
        return num_own_tiles() + ceil_div(params.num_selected * params.block_size, kTile);
    }
};

// One warp brings the queries and keys, another the values; a lane brings a block of each tile.
__device__ void bring(const Arguments& arguments, Shared& shared, bool brings_values) {
    const PromptAttendParams& params = arguments.params;
    const int lane_idx = threadIdx.x % kWarpSize;
    const int blocks_per_tile = kTile / params.block_size;
    const int block_bytes = params.block_size * kPanel * 2;  // of one panel
    const CUtensorMap& map = brings_values ? arguments.values : arguments.keys;
    auto& tiles = brings_values ? shared.values : shared.keys;
    auto& has = brings_values ? shared.has_values : shared.has_keys;
    auto& needs = brings_values ? shared.needs_values : shared.needs_keys;
    Place<kStages> place;
    int query_parity = 0;
    for (int work_idx = blockIdx.x; work_idx < Work::count(params); work_idx += gridDim.x) {
        const Work work = Work::at(params, work_idx);
        const int first_query = work.first_query(params), kv_head_idx = work.head_idx / params.group_size;
        const int64_t* chosen =
            params.block_ids + (int64_t(kv_head_idx) * params.num_segments + work.segment_idx) * params.num_selected;
        const int num_tiles = work.num_tiles(params);
        for (int tile_idx = 0; tile_idx < num_tiles; ++tile_idx, place.advance()) {
            int first_token = 0;
            if (lane_idx < blocks_per_tile) {
                if (tile_idx < work.num_own_tiles()) {
                    first_token = params.first_position + first_query - tile_idx * kTile + lane_idx * params.block_size;
                } else {
                    // What fills the last tile up is a block again: finite numbers, which are masked.
                    const int choice = (tile_idx - work.num_own_tiles()) * blocks_per_tile + lane_idx;
                    first_token = int(chosen[choice < params.num_selected ? choice : 0]) * params.block_size;
                }
            }
            const int stage = place.stage;
            wait_for(needs[stage], place.parity ^ 1);
            if (lane_idx == 0) arrive_expecting(has[stage], kTileBytes);
            __syncwarp();
            if (lane_idx < blocks_per_tile) {
                for (int panel = 0; panel < kPanels; ++panel)
                    copy_panel(tiles[stage][panel] + lane_idx * block_bytes, map, panel * kPanel, first_token,
                               kv_head_idx, has[stage]);
            }
            if (tile_idx > 0 || brings_values) continue;
            // The first keys do not wait until the last output has left.
            if (lane_idx == 0) {
                wait_for(shared.needs_query, query_parity ^ 1);
                arrive_expecting(shared.has_query, kTileBytes);
                for (int panel = 0; panel < kPanels; ++panel)
                    copy_panel(shared.query[panel], arguments.query, panel * kPanel, first_query, work.head_idx,
                               shared.has_query);
            }
            __syncwarp();
            query_parity ^= 1;
        }
    }
}

// The softmax of 64 queries as it goes on, of which a thread has two, group_idx and group_idx + 8 of its warp's. What
// is subtracted from logits stays until weights would come above 2^kSlack, so that sums are seldom to be scaled.
struct Softmax {
    static constexpr float kSlack = 8.0f;
    float highest[2] = {-INFINITY, -INFINITY}, sums[2] = {0.0f, 0.0f};

    // Turns logits into weights, and returns by what those of before, and their sums, are to be multiplied.
    __device__ float2 weigh(float (&logits)[64], float scale) {
        float factors[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float most = highest[row];
#pragma unroll
            for (int i = 2 * row; i < 64; i += 4) most = fmaxf(most, fmaxf(logits[i], logits[i + 1]));
            most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 1));
            most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 2));
            if ((most - highest[row]) * scale <= kSlack) most = highest[row];
            factors[row] = power_of_two((highest[row] - most) * scale);
            highest[row] = most;
            const float offset = most * scale;
            float sum = 0.0f;
#pragma unroll
            for (int i = 2 * row; i < 64; i += 4) {
                logits[i] = power_of_two(fmaf(logits[i], scale, -offset));
                logits[i + 1] = power_of_two(fmaf(logits[i + 1], scale, -offset));
                sum += logits[i] + logits[i + 1];
            }
            sums[row] = fmaf(sums[row], factors[row], sum);
        }
        return {factors[0], factors[1]};
    }

    // What the sums are to be multiplied by at the end, with one more logit that has no value.
    __device__ float2 finish(float scale, float sink_logit) {
        float factors[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float sum = sums[row];
            sum += __shfl_xor_sync(kWholeWarp, sum, 1);
            sum += __shfl_xor_sync(kWholeWarp, sum, 2);
            sum += power_of_two(sink_logit - highest[row] * scale);
            factors[row] = 1.0f / sum;
        }
        return {factors[0], factors[1]};
    }
};

// sums[64 x 128] += weights * values, begun.
template <typename T>
__device__ void begin_sums(float (&sums)[64], const uint32_t (&weights)[kSteps][4], uint64_t values) {
    begin_products();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
        multiply_add_across<T>(sums, weights[step], advance(values, step * 16 * 128));
    commit_products();
}

template <typename T>
__device__ void pack(uint32_t (&weights)[kSteps][4], const float (&logits)[64]) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            weights[step][i] = as_bits(round_to_pair<T>(logits[8 * step + 2 * i], logits[8 * step + 2 * i + 1]));
}

// Hides a tile's tokens from a row's limit on.
__device__ void mask(float (&logits)[64], int limit, int limit_8_below) {
    const int quad_idx = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
        const int column = i / 4 * 8 + 2 * quad_idx + i % 2;
        if (column >= (i % 4 < 2 ? limit : limit_8_below)) logits[i] = -INFINITY;
    }
}

__device__ void scale_rows(float (&sums)[64], float2 factors) {
    if (!__any_sync(kWholeWarp, factors.x != 1.0f || factors.y != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[i] *= i % 4 < 2 ? factors.x : factors.y;
    pin(sums);
}

template <typename T>
__device__ void attend(const Arguments& arguments, Shared& shared) {
    const PromptAttendParams& params = arguments.params;
    const int consumer_idx = warpgroup_idx() - 1, thread_idx = threadIdx.x % kWarpgroup;
    const int lane_idx = thread_idx % kWarpSize, warp_idx = thread_idx / kWarpSize;
    const int row_idx = warp_idx * 16 + lane_idx / 4;  // of this warpgroup's queries; and the one 8 below
    uint8_t* query = shared.query[0] + consumer_idx * 64 * 128;
    const auto keys_at = [&](int stage) { return describe_matrix(shared.keys[stage][0]); };
    const auto values_at = [&](int stage) { return describe_matrix(shared.values[stage][0], kPanelBytes); };
    const uint64_t queries = describe_matrix(query);
    const float scale = params.scaling * kLog2E;
    const int num_tokens = params.num_selected * params.block_size;  // selected
    const int in_last_tile = num_tokens - (ceil_div(num_tokens, kTile) - 1) * kTile;
    const auto take_turn = [&] { synchronize(1 + consumer_idx, kConsumers * kWarpgroup); };
    const auto give_turn = [&] { arrive(2 - consumer_idx, kConsumers * kWarpgroup); };
    const auto release = [&](uint64_t& barrier) {
        if (lane_idx == 0) arrive(barrier);
    };
    if (consumer_idx == 1) give_turn();

    Place<kStages> place;  // of the next keys
    int query_parity = 0;
    for (int work_idx = blockIdx.x; work_idx < Work::count(params); work_idx += gridDim.x) {
        const Work work = Work::at(params, work_idx);
        const int num_tiles = work.num_tiles(params);
        float logits[64], sums[64];
        uint32_t weights[kSteps][4];
        Softmax softmax;
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[i] = 0.0f;

        wait_for(shared.has_query, query_parity);
        query_parity ^= 1;
        wait_for(shared.has_keys[place.stage], place.parity);
        take_turn();
        begin_logits<T, kPanelBytes, kPanelBytes>(logits, queries, keys_at(place.stage));
        give_turn();
        wait_for_products<0>();
        pin(logits);
        release(shared.needs_keys[place.stage]);
        mask(logits, consumer_idx * 64 + row_idx + 1, consumer_idx * 64 + row_idx + 9);
        float2 factors = softmax.weigh(logits, scale);  // of the sums, before more is added to them
        pack<T>(weights, logits);

        Place<kStages> before = place;  // of the values that the weights are for
        place.advance();
        for (int tile_idx = 1; tile_idx < num_tiles; ++tile_idx) {
            wait_for(shared.has_keys[place.stage], place.parity);
            take_turn();
            begin_logits<T, kPanelBytes, kPanelBytes>(logits, queries, keys_at(place.stage));
            scale_rows(sums, factors);
            wait_for(shared.has_values[before.stage], before.parity);
            begin_sums<T>(sums, weights, values_at(before.stage));
            give_turn();
            wait_for_products<1>();
            pin(logits);
            release(shared.needs_keys[place.stage]);
            if (tile_idx == num_tiles - 1 && in_last_tile < kTile) mask(logits, in_last_tile, in_last_tile);
            factors = softmax.weigh(logits, scale);
            finish_first(softmax.sums[0] + softmax.sums[1]);
            wait_for_products<0>();
            pin(sums);
            release(shared.needs_values[before.stage]);
            pack<T>(weights, logits);
            before = place;
            place.advance();
        }
        scale_rows(sums, factors);
        wait_for(shared.has_values[before.stage], before.parity);
        begin_sums<T>(sums, weights, values_at(before.stage));
        const T* sinks = static_cast<const T*>(params.sinks);
        const float sink_logit = sinks ? to_float(sinks[work.head_idx]) * kLog2E : -INFINITY;
        factors = softmax.finish(scale, sink_logit);
        wait_for_products<0>();
        pin(sums);
        release(shared.needs_values[before.stage]);
        scale_rows(sums, factors);

        // The output takes the place of the warpgroup's queries on its way, to leave in whole rows.
        synchronize(3 + consumer_idx, kWarpgroup);
#pragma unroll
        for (int i = 0; i < 64; i += 2) {
            const int piece = i / 4 % 8, row = row_idx + i / 2 % 2 * 8;
            uint8_t* panel = query + i / 32 * kPanelBytes;
            *reinterpret_cast<uint32_t*>(panel + row * 128 + (piece ^ row % 8) * 16 + lane_idx % 4 * 4) =
                as_bits(round_to_pair<T>(sums[i], sums[i + 1]));
        }
        synchronize(3 + consumer_idx, kWarpgroup);
        const int first_query = work.first_query(params) + consumer_idx * 64;
#pragma unroll
        for (int i = 0; i < kPanels * 64 * 8 / kWarpgroup; ++i) {
            const int item = i * kWarpgroup + thread_idx;
            const int piece = item % 8, panel = item / 8 % kPanels, row = item / 8 / kPanels;
            const uint4 data =
                *reinterpret_cast<const uint4*>(query + panel * kPanelBytes + row * 128 + (piece ^ row % 8) * 16);
            T* target = static_cast<T*>(params.output) + (first_query + row) * params.output_strides[0] +
                        work.head_idx * params.output_strides[1];
            *reinterpret_cast<uint4*>(target + panel * kPanel + piece * 8) = data;
        }
        fence_for_copies();
        __syncwarp();
        release(shared.needs_query);
    }
}

#endif  // HF_QUEST_HAS_WARPGROUPS

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) prompt_attend_kernel(const __grid_constant__ Arguments arguments) {
#ifdef HF_QUEST_HAS_WARPGROUPS
    extern __shared__ uint8_t shared_bytes[];
    Shared& shared = shared_as<Shared>(shared_bytes);
    if (threadIdx.x == 0) {
        constexpr int kWarps = kConsumers * kWarpgroup / kWarpSize;  // that say when they have read something
        make_barrier(shared.has_query, 1);
        make_barrier(shared.needs_query, kWarps);
        for (int stage = 0; stage < kStages; ++stage) {
            make_barrier(shared.has_keys[stage], 1);
            make_barrier(shared.needs_keys[stage], kWarps);
            make_barrier(shared.has_values[stage], 1);
            make_barrier(shared.needs_values[stage], kWarps);
        }
        publish_barriers();
    }
    __syncthreads();
    wait_for_previous_kernel();
    if (threadIdx.x < kWarpgroup) {
        give_registers<40>();
        if (threadIdx.x < 2 * kWarpSize) bring(arguments, shared, threadIdx.x >= kWarpSize);
    } else {
        take_registers<232>();
        attend<T>(arguments, shared);
    }
#endif
}

}  // namespace

cudaError_t launch_prompt_attend(const PromptAttendParams& params) {
    Arguments arguments = {params};
    const auto describe = [&](CUtensorMap& map, const void* tokens, int64_t num_tokens, int num_heads,
                              const int64_t (&strides)[2], int num_rows) {
        return describe_tokens(map, params.data_type, tokens,
                               {{num_tokens, strides[1], num_rows}, {num_heads, strides[0]}});
    };
    const int num_heads = params.num_kv_heads * params.group_size;
    const int64_t num_queries = int64_t(params.num_segments) * params.segment_size;
    const int64_t num_tokens = params.first_position + num_queries;
    cudaError_t error = describe(arguments.query, params.query, num_queries, num_heads, params.query_strides, kTile);
    if (error != cudaSuccess) return error;
    error =
        describe(arguments.keys, params.keys, num_tokens, params.num_kv_heads, params.key_strides, params.block_size);
    if (error != cudaSuccess) return error;
    error = describe(arguments.values, params.values, num_tokens, params.num_kv_heads, params.value_strides,
                     params.block_size);
    if (error != cudaSuccess) return error;

    const auto kernel =
        params.data_type == DataType::kHalf ? prompt_attend_kernel<__half> : prompt_attend_kernel<__nv_bfloat16>;
    return launch_with_shared<Shared>(kernel, params.launch.num_sms, kThreads, params.launch.stream, arguments);
}

}  // namespace hf_quest
