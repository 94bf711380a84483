// chain: estimate, select and attend in one kernel, by a cluster of thread blocks for each row and KV head.
//
// Each block scores its share of the pages into shared memory. The cluster finds the last score that is taken by a radix
// select over the range of its scores, whose counts the blocks read from each other's shared memory. Each block tells
// the others which of its pages are taken, in equal shares for all, attends its share, and merges a part of the output.
// Where no more pages are stored than may be taken, they are all attended without a look at their bounds.
// What the blocks of one head wait for is a cluster barrier, where separate kernels would wait for the whole GPU.

#include <cooperative_groups.h>

#include <climits>

#include "attend.cuh"
#include "estimate.cuh"

namespace hf_quest {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kDigitBits = 8;  // a digit for each thread
constexpr int kMaxScores = 24 * 1024;  // of one block in shared memory; more lie in global memory
constexpr int kMaxClusterSize = 16;

template <int kHeadDim>
struct alignas(16) Shared {
    WarpSums<kHeadDim, kWarps> warp_sums;
    alignas(16) float output[kHeadTile][kHeadDim];  // of this block
    float2 softmax[kHeadTile];
    unsigned counts[2][kThreads];  // of digits; one is counted while the others still read the other
    unsigned lowest, highest;      // keys of this block
    int num_equal, num_taken;      // pages of this block
    int warp_totals[kWarps];
    int digit, num_before, num_in_digit;
};

#ifdef _CG_HAS_CLUSTER_GROUP  // sm_90 and later

// Unsigned numbers in the order of the scores; 0.0 and -0.0 are equal scores.
__device__ unsigned key_of(float score) {
    const unsigned bits = score == 0.0f ? 0u : __float_as_uint(score);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// The sum of the values of the threads before this one, and in `total` that of all.
__device__ int scan_block(int value, int* warp_totals, int& total) {
    const int lane_idx = threadIdx.x % kWarpSize, warp_idx = threadIdx.x / kWarpSize;
    int end = value;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const int before = __shfl_up_sync(kWholeWarp, end, distance);
        if (lane_idx >= distance) end += before;
    }
    __syncthreads();
    if (lane_idx == kWarpSize - 1) warp_totals[warp_idx] = end;
    __syncthreads();
    int start = 0;
    total = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
        if (i == warp_idx) start = total;
        total += warp_totals[i];
    }
    return start + end - value;
}

// Puts the chosen pages, ascending, into the lists `page_ids` of the cluster's blocks, `share` for each.
template <typename S>
__device__ void select_pages(cg::cluster_group cluster, S& shared, const float* scores, int num_scores, int first_page,
                             int newest_page, int num_selected, int share, int* page_ids, int64_t* told_ids) {
    const int rank = cluster.block_rank(), cluster_size = cluster.num_blocks();
    unsigned lowest = UINT_MAX, highest = 0;
    for (int idx = threadIdx.x; idx < num_scores; idx += kThreads) {
        const unsigned key = key_of(scores[idx]);
        lowest = min(lowest, key);
        highest = max(highest, key);
    }
    atomicMin(&shared.lowest, __reduce_min_sync(kWholeWarp, lowest));
    atomicMax(&shared.highest, __reduce_max_sync(kWholeWarp, highest));
    cluster.sync();
    lowest = UINT_MAX, highest = 0;
    for (int i = 0; i < cluster_size; ++i) {
        lowest = min(lowest, *cluster.map_shared_rank(&shared.lowest, i));
        highest = max(highest, *cluster.map_shared_rank(&shared.highest, i));
    }

    // The last key that is taken begins with `lowest`, but for its lowest `shift` bits.
    int num_wanted = num_selected - 1, shift = max(32 - __clz(highest - lowest) - kDigitBits, 0);
    int num_digits = kThreads;
    bool has_choice = true;
    for (int round = 0; num_selected > 1; ++round) {
        unsigned(&counts)[kThreads] = shared.counts[round % 2];
        for (int idx = threadIdx.x; idx < num_scores; idx += kThreads) {
            const unsigned key = key_of(scores[idx]);
            const unsigned digit = (key - lowest) >> shift;
            if (key >= lowest && digit < num_digits) atomicAdd(&counts[digit], 1u);
        }
        cluster.sync();
        const int digit = kThreads - 1 - threadIdx.x;  // from the highest down
        int num_keys = 0, num_all;
        for (int i = 0; i < cluster_size; ++i) num_keys += *cluster.map_shared_rank(&counts[digit], i);
        shared.counts[(round + 1) % 2][threadIdx.x] = 0;
        const int num_before = scan_block(num_keys, shared.warp_totals, num_all);
        if (num_before < num_wanted && num_wanted <= num_before + num_keys) {
            shared.digit = digit;
            shared.num_before = num_before;
            shared.num_in_digit = num_keys;
        }
        __syncthreads();
        lowest += unsigned(shared.digit) << shift;
        num_wanted -= shared.num_before;
        has_choice = num_wanted < shared.num_in_digit;
        if (!has_choice || shift == 0) break;
        num_digits = 1 << min(shift, kDigitBits);
        shift = max(shift - kDigitBits, 0);
    }
    if (num_selected == 1) lowest = UINT_MAX;

    // Each thread takes neighbouring pages, so that one scan gives all of them their places.
    const int num_each = ceil_div(num_scores, kThreads), begin = min(int(threadIdx.x) * num_each, num_scores);
    const int end = min(begin + num_each, num_scores);
    int last_equal = num_selected > 1 ? INT_MAX : 0;  // how many of this thread's pages with the last key are taken
    int num_all;
    if (has_choice && num_selected > 1) {
        int num_equal = 0;
        for (int idx = begin; idx < end; ++idx) num_equal += key_of(scores[idx]) == lowest;
        last_equal = num_wanted - scan_block(num_equal, shared.warp_totals, num_all);
        if (threadIdx.x == 0) shared.num_equal = num_all;
        cluster.sync();
        for (int i = 0; i < rank; ++i) last_equal -= *cluster.map_shared_rank(&shared.num_equal, i);
    }
    const auto for_each_taken = [&](auto visit) {
        int num_equal = 0;
        for (int idx = begin; idx < end; ++idx) {
            const unsigned key = key_of(scores[idx]);
            if (key > lowest || (key == lowest && num_equal++ < last_equal)) visit(first_page + idx);
        }
    };
    int num_taken = 0;
    for_each_taken([&](int) { ++num_taken; });
    int place = scan_block(num_taken, shared.warp_totals, num_all);
    if (threadIdx.x == 0) shared.num_taken = num_all;
    cluster.sync();
    for (int i = 0; i < rank; ++i) place += *cluster.map_shared_rank(&shared.num_taken, i);
    const auto tell = [&](int page_idx, int at) {
        *cluster.map_shared_rank(page_ids + at % share, at / share) = page_idx;
        if (told_ids != nullptr) told_ids[at] = page_idx;
    };
    for_each_taken([&](int page_idx) { tell(page_idx, place++); });
    if (rank == 0 && threadIdx.x == 0) tell(newest_page, num_selected - 1);
    cluster.sync();
}

#endif  // _CG_HAS_CLUSTER_GROUP

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1) chain_kernel(const AttendParams params) {
#ifdef _CG_HAS_CLUSTER_GROUP
    constexpr int kQuads = kHeadDim / 4;  // of channels
    extern __shared__ uint4 dynamic[];
    auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(dynamic);
    uint4* signed_query = dynamic + sizeof(shared) / sizeof(uint4);
    const cg::cluster_group cluster = cg::this_cluster();
    const int rank = cluster.block_rank(), cluster_size = cluster.num_blocks();
    shared.counts[0][threadIdx.x] = shared.counts[1][threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        shared.lowest = UINT_MAX;
        shared.highest = 0;
    }
    wait_for_previous_kernel();
    let_next_kernel_begin();

    const int kv_head_idx = blockIdx.y, row_idx = blockIdx.z, page_size = params.page_size;
    const int warp_idx = threadIdx.x / kWarpSize, page_shift = __ffs(page_size) - 1;
    const Storage storage = find(params.storage);
    const int64_t padding = params.padding[row_idx];
    const int num_tokens = int(count_tokens(params.length, params.padding, row_idx, storage.capacity));
    const int num_pages = (max(num_tokens, 0) + page_size - 1) >> page_shift;
    const int num_chosen = min(num_pages, params.num_selected), share = ceil_div(num_chosen, cluster_size);
    const int num_own = max(min(num_chosen - rank * share, share), 0);
    // After the query, this block's list of pages, and then its scores.
    int* page_ids = reinterpret_cast<int*>(signed_query + count_query_vectors(params.group_size, kHeadDim));
    const int64_t kv_idx = int64_t(row_idx) * params.num_kv_heads + kv_head_idx;
    const int first_head = kv_head_idx * params.group_size;
    const T* query = static_cast<const T*>(params.query) + row_idx * params.query_strides[0];
    query += first_head * params.query_strides[1];
    int64_t* told_ids = params.told_ids == nullptr ? nullptr : params.told_ids + kv_idx * params.num_selected;

    if (num_pages > params.num_selected) {
        const int newest_page = num_pages - 1;
        const int num_each = ceil_div(newest_page, cluster_size * kPagesPerWarp) * kPagesPerWarp;
        const int begin = min(rank * num_each, newest_page), end = min(begin + num_each, newest_page);
        const int64_t head_start = kv_idx * count_pages(storage, page_size);
        float* scores = reinterpret_cast<float*>(page_ids + ceil_div(params.num_selected, cluster_size));
        if (num_each > kMaxScores) scores = storage.scores + head_start + begin;
        sign_query<T, kHeadDim>(signed_query, query, params.query_strides[1], params.group_size);
        const T* bounds = static_cast<const T*>(storage.bounds) + head_start * 2 * kHeadDim;
        score_pages<T, kHeadDim>(signed_query, 1, bounds, begin + warp_idx * kPagesPerWarp, kWarps * kPagesPerWarp, end,
                                 [&](int page_idx, float score) { scores[page_idx - begin] = score * params.scaling; });
        __syncthreads();
        select_pages(cluster, shared, scores, end - begin, begin, newest_page, params.num_selected, share, page_ids,
                     told_ids);
    } else {
        for (int idx = threadIdx.x; idx < share; idx += kThreads) page_ids[idx] = rank * share + idx;
        if (told_ids != nullptr) {
            for (int idx = rank * kThreads + threadIdx.x; idx < params.num_selected; idx += cluster_size * kThreads) {
                told_ids[idx] = idx < num_pages ? idx : -1;
            }
        }
        __syncthreads();
    }

    const auto find_token = [&](int chosen) {
        if (chosen >= num_own << page_shift) return kNoToken;
        return (page_ids[chosen >> page_shift] << page_shift) + (chosen & (page_size - 1));
    };
    const int64_t row_start = (kv_idx * storage.capacity + padding) * kHeadDim;
    attend_tiles<T, kHeadDim, kWarps>(shared.warp_sums, query, params.query_strides[1], params.group_size,
                                      static_cast<const T*>(storage.keys) + row_start,
                                      static_cast<const T*>(storage.values) + row_start, num_tokens, 0,
                                      ceil_div(num_own << page_shift, kTile), page_size, params.scaling,
                                      params.softcap, find_token);
    for (int idx = threadIdx.x; idx < params.group_size * kQuads; idx += kThreads) {
        const int head_idx = idx / kQuads, quad_of_head = idx % kQuads;
        float maximum = -INFINITY, sum = 0.0f;
        const float4 sums = shared.warp_sums.merge(head_idx, quad_of_head, maximum, sum);
        *reinterpret_cast<float4*>(&shared.output[head_idx][4 * quad_of_head]) = sums;
        if (quad_of_head == 0) shared.softmax[head_idx] = {maximum, sum};
    }
    cluster.sync();

    T* output = static_cast<T*>(params.output) + kv_idx * params.group_size * kHeadDim;
    for (int idx = threadIdx.x * cluster_size + rank; idx < params.group_size * kQuads; idx += kThreads * cluster_size) {
        const int head_idx = idx / kQuads, quad_of_head = idx % kQuads;
        float2 softmax[kMaxClusterSize];
        float4 terms[kMaxClusterSize];
        float maximum = sink_of<T>(params, first_head + head_idx);
        float sum = maximum == -INFINITY ? 0.0f : 1.0f;
        const float first = maximum;
#pragma unroll
        for (int i = 0; i < kMaxClusterSize; ++i) {
            softmax[i] = {-INFINITY, 0.0f};
            if (i < cluster_size) {
                softmax[i] = *cluster.map_shared_rank(&shared.softmax[head_idx], i);
                const float* quad = cluster.map_shared_rank(&shared.output[head_idx][4 * quad_of_head], i);
                terms[i] = *reinterpret_cast<const float4*>(quad);
            }
            maximum = fmaxf(maximum, softmax[i].x);
        }
        sum *= weight_of(first, maximum);
        float4 sums = {};
#pragma unroll
        for (int i = 0; i < kMaxClusterSize; ++i) {
            if (i >= cluster_size) break;
            const float factor = weight_of(softmax[i].x, maximum);
            sum += softmax[i].y * factor;
            add_scaled(sums, terms[i], factor);
        }
        float4 scaled = {};
        add_scaled(scaled, sums, 1.0f / sum);
        store_quad<T, kHeadDim>(output, head_idx, quad_of_head, scaled);
    }
    cluster.sync();  // no block ends while others read its shared memory
#endif  // _CG_HAS_CLUSTER_GROUP
}

template <int kHeadDim>
size_t count_shared_bytes(const AttendParams& params, int cluster_size) {
    const int share = ceil_div(params.num_selected, cluster_size);
    return sizeof(Shared<kHeadDim>) + count_query_vectors(params.group_size, kHeadDim) * sizeof(uint4) +
           share * sizeof(int) + kMaxScores * sizeof(float);
}

cudaLaunchConfig_t configure(const AttendParams& params, int cluster_size, size_t shared_bytes,
                             cudaLaunchAttribute (&attributes)[2]) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {unsigned(cluster_size), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(cluster_size, params.num_kv_heads, params.num_rows);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = params.launch.stream;
    config.attrs = attributes;
    config.numAttrs = params.launch.overlaps ? 2 : 1;
    return config;
}

// The largest cluster with which all row's heads run at the same time, or 0.
template <typename T, int kHeadDim>
int find_cluster_size(const AttendParams& params) {
    const auto kernel = chain_kernel<T, kHeadDim>;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) return 0;
    const int num_heads = params.num_kv_heads * params.num_rows;
    for (int size = kMaxClusterSize; size >= 1; size /= 2) {
        if (size * num_heads > params.launch.num_sms) continue;
        const size_t num_bytes = count_shared_bytes<kHeadDim>(params, size);
        // Fails where there is not as much shared memory.
        if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(num_bytes)) != cudaSuccess) {
            return 0;
        }
        cudaLaunchAttribute attributes[2];
        const cudaLaunchConfig_t config = configure(params, size, num_bytes, attributes);
        int num_clusters = 0;
        const cudaError_t error = cudaOccupancyMaxActiveClusters(&num_clusters, kernel, &config);
        if (error == cudaSuccess && num_clusters >= num_heads) return size;
    }
    return 0;
}

}  // namespace

int find_cluster_size(const AttendParams& params) {
    if (!params.launch.has_clusters || params.group_size > kHeadTile) return 0;
    int cluster_size = 0;
    for_head_dim(params.data_type, params.head_dim, [&](auto element, auto head_dim) {
        cluster_size = find_cluster_size<decltype(element), decltype(head_dim)::value>(params);
        return cudaSuccess;
    });
    cudaGetLastError();  // a size that does not fit is no error
    return cluster_size;
}

bool needs_scores(const AttendParams& params, int cluster_size) {
    return ceil_div<int64_t>(params.storage.capacity, params.page_size) > int64_t(kMaxScores) * cluster_size;
}

cudaError_t launch_chain(const AttendParams& params, int cluster_size) {
    return for_head_dim(params.data_type, params.head_dim, [&](auto element, auto head_dim) {
        constexpr int kHeadDim = decltype(head_dim)::value;
        const auto kernel = chain_kernel<decltype(element), kHeadDim>;
        const size_t num_bytes = count_shared_bytes<kHeadDim>(params, cluster_size);
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(num_bytes));
        if (error != cudaSuccess) return error;
        cudaLaunchAttribute attributes[2];
        const cudaLaunchConfig_t config = configure(params, cluster_size, num_bytes, attributes);
        return cudaLaunchKernelEx(&config, kernel, params);
    });
}

}  // namespace hf_quest
