// A cluster of thread blocks that serves one row and KV head: what chain.cu and chain_by_codes.cu share. They differ in
// how they find what each block attends; how a cluster begins, stores the newest token, and merges what its blocks have
// summed up, is here. What is sent counts itself in at a barrier of the block that gets it.
#pragma once

#include "append.cuh"
#include "attend.cuh"
#include "barrier.cuh"
#include "estimate.cuh"

namespace hf_quest {

constexpr int kClusterThreads = 256;
constexpr int kClusterWarps = kClusterThreads / kWarpSize;
constexpr int kMaxClusterSize = 16;

// On their way for each warp, of pages and of tokens.
__host__ __device__ constexpr int count_tiles(int head_dim) { return head_dim > 128 ? 1 : 2; }

// What the blocks of a cluster send to each of them when they have attended, and the query. Of whole lines, so that
// what follows it in shared memory begins with one: rows that don't take 0.6 us more.
template <int kHeadDim>
struct alignas(128) ClusterShared {
    static constexpr int kQuads = kHeadDim / 4;  // of channels
    float4 sums[kHeadTile * kQuads + kMaxClusterSize];  // [blocks, parts]
    float2 softmax[kMaxClusterSize][kHeadTile];  // of all blocks: maximum and sum
    uint4 query[kHeadTile][kHeadDim / 8 + 2];  // of the group, padded against bank conflicts
    uint64_t choice_barrier, sums_barrier;
};

#if __CUDA_ARCH__ >= 900  // clusters

// A quotient of numbers below 1024, faster than by integers; the half keeps it clear of the next one.
__device__ inline int divide(int dividend, int divisor) { return int(__fdividef(dividend + 0.5f, float(divisor))); }

// A block of a cluster, which serves one row and KV head. `Shared` is a ClusterShared with `tiles`, of bounds, and
// `warp_sums`.
template <typename T, int kHeadDim, typename Shared>
struct ClusterBlock {
    static constexpr int kQuads = kHeadDim / 4;  // of channels
    const AttendParams& params;
    Shared& shared;
    char* score_query;  // the group's query as scores want it, count_query_bytes()
    const int rank = blockIdx.x, cluster_size = gridDim.x;
    const int row_idx = blockIdx.z, first_head = blockIdx.y * params.group_size;
    const int warp_idx = threadIdx.x / kWarpSize, page_shift = __ffs(params.page_size) - 1;
    const int64_t kv_idx = int64_t(row_idx) * params.num_kv_heads + blockIdx.y;

    // From begin() on:
    Storage storage;
    int num_tokens, num_pages;
    int64_t row_slot, row_start;  // of a row's first token, and of its keys and values
    bool has_newest;  // among the tokens that it attends, as the block finds out: then it stores it

    __device__ ClusterBlock(const AttendParams& params, Shared& shared, char* score_query)
        : params(params), shared(shared), score_query(score_query) {}

    // Makes barriers, begins to copy the query, and finds what is the block's own. wait_for_cluster() must follow: then
    // the others have begun, too.
    __device__ void begin(int num_choice_arrivals) {
        if (threadIdx.x == 0) {
            make_barrier(shared.choice_barrier, num_choice_arrivals);
            make_barrier(shared.sums_barrier, 1);
            publish_barriers();
        }
        arrive_at_cluster();
        const T* query = static_cast<const T*>(params.query) + row_idx * params.query_strides[0];
        query += first_head * params.query_strides[1];
        wait_for_previous_kernel();
        let_next_kernel_begin();

        // Registers that wait for the query would hold up those that wait for the length, which comes sooner.
        constexpr int kVectors = kHeadDim / 8;
#pragma unroll 1
        for (int idx = threadIdx.x; idx < params.group_size * kVectors; idx += kClusterThreads) {
            const T* vector = query + idx / kVectors * params.query_strides[1] + idx % kVectors * 8;
            copy_async(address_of(&shared.query[idx / kVectors][idx % kVectors]), vector);
        }
        commit_copies();
        storage = find(params.storage);
        const int64_t padding = params.padding[row_idx];
        num_tokens = int(count_tokens(params.length, params.padding, row_idx, storage.capacity));
        num_pages = (max(num_tokens, 0) + params.page_size - 1) >> page_shift;
        row_slot = kv_idx * storage.capacity + padding;
        row_start = row_slot * kHeadDim;
    }

    // What append does with one new token, but for codes, if it has come beside the storage: by the last warp of the
    // block that attends it, which must meet before it does.
    __device__ void store_new_token() const {
        constexpr int kVectors = kHeadDim / kVector;
        const int64_t end = *params.length, slot = end - 1;
        const bool has_room = slot >= 0 && end <= storage.capacity;
        if (params.new_token.key == nullptr || warp_idx < kClusterWarps - 1 || !has_room) return;
        const int lane_idx = threadIdx.x % kWarpSize, vector_idx = min(lane_idx, kVectors - 1);
        const auto load = [&](const void* tokens, const int64_t (&strides)[2]) {
            const T* token = static_cast<const T*>(tokens) + row_idx * strides[0] + blockIdx.y * strides[1];
            return load_once(reinterpret_cast<const uint4*>(token) + vector_idx);
        };
        const uint4 key = load(params.new_token.key, params.new_token.key_strides);
        const uint4 value = load(params.new_token.value, params.new_token.value_strides);
        const int64_t page = kv_idx * count_pages(storage, params.page_size) + num_pages - 1;
        const int64_t first = page * 2 * kVectors + vector_idx;
        const int64_t stored = (kv_idx * storage.capacity + slot) * kVectors + vector_idx;
        const bool has_bounds = num_tokens > 0 && storage.bounds != nullptr;
        const bool is_first = ((num_tokens - 1) & (params.page_size - 1)) == 0;  // of its page
        if (has_bounds && storage.scales != nullptr) {
            uint2* bounds = static_cast<uint2*>(storage.bounds) + first;
            uint8_t* scale = storage.scales + (page * kVectors + vector_idx) / 4;
            Bounds8 widest = {};
            if (!is_first) widest = {bounds[0], bounds[kVectors], *scale};
            widen<T>(widest, key, key);
            __syncwarp();  // until all have read the scale
            if (lane_idx < kVectors) {
                bounds[0] = widest.lowest;
                bounds[kVectors] = widest.highest;
                if (lane_idx % 4 == 0) *scale = uint8_t(widest.exponent);
            }
        } else if (has_bounds && lane_idx < kVectors) {
            uint4* bounds = static_cast<uint4*>(storage.bounds) + first;
            uint4 lowest = key, highest = key;
            if (!is_first) {
                lowest = bounds[0];
                highest = bounds[kVectors];
                widen<T>(lowest, highest, key);
            }
            bounds[0] = lowest;
            bounds[kVectors] = highest;
        }
        if (lane_idx >= kVectors) return;
        static_cast<uint4*>(storage.keys)[stored] = key;
        static_cast<uint4*>(storage.values)[stored] = value;
    }

    __device__ ScoreInput<T> score_input() const {
        return {reinterpret_cast<const T*>(shared.query),
                sizeof(shared.query[0]) / sizeof(T),
                params.group_size,
                1,
                params.score.width,
                score_query,
                shared.tiles};
    }

    // The sum of a quad of channels of a head is dealt to a block, which gets its part from each: it is one of the
    // block's parts.
    __device__ int count_quads() const { return params.group_size * kQuads; }
    __device__ int count_parts() const { return divide(count_quads() + cluster_size - 1, cluster_size); }  // at most
    __device__ int count_own_parts() const { return divide(count_quads() - rank + cluster_size - 1, cluster_size); }

    __device__ void send_sums() {
        const unsigned barrier = address_of(&shared.sums_barrier);
        for (int idx = threadIdx.x; idx < count_quads(); idx += kClusterThreads) {
            const int head_idx = idx / kQuads, quad_of_head = idx % kQuads, part_idx = divide(idx, cluster_size);
            const int owner = idx - part_idx * cluster_size;
            float maximum = kLowest, sum = 0.0f;
            const float4 sums = shared.warp_sums.merge(head_idx, quad_of_head, maximum, sum);
            const unsigned target = address_of(&shared.sums[rank * count_parts() + part_idx]);
            send(address_at(target, owner), address_at(barrier, owner), sums);
            if (quad_of_head < cluster_size) {
                const uint2 softmax = {__float_as_uint(maximum), __float_as_uint(sum)};
                const unsigned target = address_of(&shared.softmax[rank][head_idx]);
                send(address_at(target, quad_of_head), address_at(barrier, quad_of_head), softmax);
            }
        }
        if (threadIdx.x == 0) {
            const int num_bytes = count_own_parts() * int(sizeof(float4)) + params.group_size * int(sizeof(float2));
            arrive_expecting(shared.sums_barrier, cluster_size * num_bytes);
        }
        wait_for_first_phase(shared.sums_barrier);
        arrive_at_cluster();  // nothing more is sent
    }

    __device__ void write_output() const {
        constexpr int kAtOnce = 5;  // blocks
        T* output = static_cast<T*>(params.output) + kv_idx * params.group_size * kHeadDim;
        for (int part_idx = threadIdx.x; part_idx < count_own_parts(); part_idx += kClusterThreads) {
            const int idx = part_idx * cluster_size + rank, head_idx = idx / kQuads;
            float maximum = sink_of<T>(params, first_head + head_idx), sum = 1.0f;
            const float4 sums = merge_parts<kAtOnce>(
                cluster_size, maximum, sum, [&](int block_idx) { return shared.softmax[block_idx][head_idx]; },
                [&](int block_idx) { return shared.sums[block_idx * count_parts() + part_idx]; });
            store_quad<T, kHeadDim>(output, head_idx, idx % kQuads, sums, sum);
        }
    }
};

#endif  // __CUDA_ARCH__ >= 900

inline cudaLaunchConfig_t configure_cluster(const AttendParams& params, int cluster_size, size_t shared_bytes,
                                            cudaLaunchAttribute (&attributes)[2]) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {unsigned(cluster_size), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(cluster_size, params.num_kv_heads, params.num_rows);
    config.blockDim = dim3(kClusterThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = params.launch.stream;
    config.attrs = attributes;
    config.numAttrs = params.launch.overlaps ? 2 : 1;
    return config;
}

// Readies a kernel for clusters of any size, whatever the shapes, so that launches of several threads do not disturb
// each other. Returns whether it can be.
inline bool allow_clusters(void (*kernel)(AttendParams), const AttendParams& params) {
    const int most_bytes = params.launch.most_shared_bytes;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) return false;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes) == cudaSuccess;
}

// Whether clusters of a size run at the same time for all rows' heads, where a block needs so much shared memory.
inline bool run_at_once(void (*kernel)(AttendParams), const AttendParams& params, int size, size_t num_bytes) {
    const int num_heads = params.num_kv_heads * params.num_rows;
    if (size * num_heads > params.launch.num_sms || num_bytes > size_t(params.launch.most_shared_bytes)) return false;
    cudaLaunchAttribute attributes[2];
    const cudaLaunchConfig_t config = configure_cluster(params, size, num_bytes, attributes);
    int num_clusters = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&num_clusters, kernel, &config);
    return error == cudaSuccess && num_clusters >= num_heads;
}

// The largest cluster with which all rows' heads run at the same time, or 0, where a block of one of that size needs
// count_bytes(size) of shared memory. Readies the kernel for launches.
template <typename CountBytes>
int find_largest_cluster(void (*kernel)(AttendParams), const AttendParams& params, CountBytes count_bytes) {
    if (!allow_clusters(kernel, params)) return 0;
    for (int size = kMaxClusterSize; size >= 2; --size) {  // st.async wants two
        if (run_at_once(kernel, params, size, count_bytes(size))) return size;
    }
    return 0;
}

}  // namespace hf_quest
