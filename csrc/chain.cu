// chain: append, estimate, select and attend in one kernel, by a cluster of thread blocks for each row and KV head.
//
// The pages are dealt to the blocks, and each sends the scores of its own to every other. From there each block selects
// by itself (select.cuh) and takes its share of the chosen pages, some of which are on their way to L2 already, since
// memory has nothing else to do meanwhile. It attends them, and sends the others their parts of what it has summed up.
// So the blocks of a head wait twice for what they send each other, for all scores and for all sums, where separate
// kernels would wait for the whole GPU. What is sent counts itself in at a barrier of the block that gets it. Where no
// more pages are stored than may be taken, they are all attended without a look at their bounds.
//
// The newest token may come beside the storage. The block that attends the newest page stores it, as append does, while
// the scores of others are on their way: that page is chosen whatever its bounds. No other block reads the token's
// slot.

#include "cluster.cuh"
#include "select.cuh"

namespace hf_quest {
namespace {

constexpr int kThreads = kClusterThreads, kWarps = kClusterWarps;
constexpr int kMaxKeys = 15360;  // of scores in shared memory; more lie in global memory
static_assert(kMaxKeys % kPagesPerTile == 0);
constexpr int kMaxListed = 4096;  // pages that may still be taken

template <typename T, int kHeadDim>
struct Shared : ClusterShared<kHeadDim> {
    using Tokens = SharedTokens<T, kHeadDim, count_tiles(kHeadDim)>;
    union {
        struct {
            alignas(16) unsigned keys[kMaxKeys];  // of all scores but the newest page's, and 0 to a whole quad
            union {
                alignas(16) char tiles[kWarps * count_tiles(kHeadDim) * count_tile_bytes(kHeadDim)];
                uint64_t listed[kMaxListed];  // once they have scores
            };
        };
        alignas(16) char rows[kWarps * count_tiles(kHeadDim) * Tokens::kTileBytes];  // once pages are chosen
        WarpSums<kHeadDim, kWarps> warp_sums;  // once they are attended
    };
    SharedSelection<kThreads> selection;
};

#if __CUDA_ARCH__ >= 900  // clusters

// Quads of keys that other blocks send: warps take turns at tiles of four.
__device__ inline int count_quads_of_others(int num_keys, int rank, int cluster_size) {
    constexpr int kOfBlock = 4 * kWarps;  // in a turn of all warps
    const int num_quads = ceil_div(num_keys, 4), num_turns = num_quads / (kOfBlock * cluster_size);
    const int num_left = num_quads - num_turns * kOfBlock * cluster_size;
    return num_quads - num_turns * kOfBlock - min(max(num_left - rank * kOfBlock, 0), kOfBlock);
}

template <typename T, int kHeadDim>
struct ChainBlock : ClusterBlock<T, kHeadDim, Shared<T, kHeadDim>> {
    using Block = ClusterBlock<T, kHeadDim, Shared<T, kHeadDim>>;
    using Block::has_newest;
    using Block::kv_idx, Block::storage, Block::num_tokens, Block::num_pages, Block::row_start, Block::score_input;
    using Block::params, Block::shared, Block::rank, Block::cluster_size, Block::warp_idx, Block::page_shift;
    int* page_ids;  // that this block attends
    int first_own, num_own;  // of the chosen pages those that this block attends

    __device__ ChainBlock(const AttendParams& params, Shared<T, kHeadDim>& shared, char* score_query, int* page_ids)
        : Block(params, shared, score_query), page_ids(page_ids) {}

    __device__ void begin() {
        shared.selection.clear();
        Block::begin(kWarps);
        const int num_chosen = min(num_pages, params.num_selected), share = ceil_div(num_chosen, cluster_size);
        first_own = rank * share;
        num_own = max(min(num_chosen - first_own, share), 0);
        has_newest = num_chosen > 0 ? num_own > 0 && first_own + num_own == num_chosen : rank == 0;
        wait_for_cluster();
    }

    // Notes the chosen page of a place, if it is one of this block's.
    __device__ void note_page(int page_idx, int place) const {
        if (place < first_own || place >= first_own + num_own) return;
        page_ids[place - first_own] = page_idx;
        if (params.told_ids != nullptr) params.told_ids[kv_idx * params.num_selected + place] = page_idx;
    }

    // Has a page brought to L2, by a warp. Two for each, the best of its own and one of the list, are about what memory
    // can bring while pages are selected; more would hold the warps up.
    __device__ void fetch_page(int page_idx) const {
        const int num_lines = params.page_size * kHeadDim * int(sizeof(T)) / 128;
        const int64_t first = row_start + (int64_t(page_idx) << page_shift) * kHeadDim;
#pragma unroll 1
        for (int i = threadIdx.x % kWarpSize; i < num_lines; i += kWarpSize) {
            prefetch(static_cast<const T*>(storage.keys) + first + i * 128 / int(sizeof(T)));
            prefetch(static_cast<const T*>(storage.values) + first + i * 128 / int(sizeof(T)));
        }
    }

    // Of the first pages those that are chosen whatever their score.
    __device__ int count_kept() const { return params.score.keeps_first && params.num_selected > 1 ? 1 : 0; }

    // Scores this block's pages before the newest. Their keys go to `distant_keys` or, where that is null, to the
    // shared memory of all blocks. Returns key and page of the best of this lane, or zeros.
    __device__ uint2 score(unsigned* distant_keys) {
        const int newest_page = num_pages - 1, step = cluster_size * kWarps * kPagesPerTile, num_kept = count_kept();
        const unsigned keys = address_of(shared.keys), barrier = address_of(&shared.choice_barrier);
        uint2 best = {};
        const auto store = [&](int first_of_tiles, int num_tiles, int own_page, float score) {
            if (own_page < newest_page) {
                const unsigned key = own_page < num_kept ? 0 : order_of(score * params.scaling);
                if (key > best.x) best = {key, unsigned(own_page)};
                (distant_keys == nullptr ? shared.keys : distant_keys)[own_page] = key;
            } else if (distant_keys == nullptr && own_page != kNoPage) {
                shared.keys[own_page] = 0;
            }
            if (distant_keys != nullptr) return;
            __syncwarp();
            // Four pages' keys at a time to the other blocks, where they lie as far from the barrier as here.
            const int lane_idx = threadIdx.x % kWarpSize, quads_here = 4 * num_tiles, quad_here = lane_idx % quads_here;
            const int quad_idx = (first_of_tiles + quad_here / 4 * step) / 4 + quad_here % 4;
            if (4 * quad_idx >= newest_page) return;
            const uint4 quad = reinterpret_cast<const uint4*>(shared.keys)[quad_idx];
#pragma unroll 1
            for (int i = lane_idx / quads_here; i < cluster_size - 1; i += kWarpSize / quads_here) {
                const unsigned barrier_there = address_at(barrier, i < rank ? i : i + 1);
                send(barrier_there - barrier + keys + quad_idx * sizeof(quad), barrier_there, quad);
            }
        };
        using Narrow = NarrowBounds<T, kHeadDim>;
        const auto score_with = [&](auto bounds) {
            constexpr bool kIsNarrow = std::is_same_v<decltype(bounds), Narrow>;
            const auto wait_for_query = [] {
                wait_for_copies<kIsNarrow ? 1 : 0>();  // pages in 8 bits are copied after it
                __syncthreads();
            };
            const int first_of_warp = (rank * kWarps + warp_idx) * kPagesPerTile;
            LargestScore agree;
            score_pages<count_tiles(kHeadDim)>(bounds, score_input(), wait_for_query, first_of_warp, step, newest_page,
                                               agree, store);
        };
        const int64_t first_page = kv_idx * count_pages(storage, params.page_size);
        if (storage.scales == nullptr) {
            score_with(WideBounds<T, kHeadDim>(storage, first_page));
        } else {
            score_with(Narrow(storage, first_page));
        }
        return best;
    }

    // Chooses the newest page, the first one where it is kept, and the best of the others.
    __device__ void select() {
        const int newest_page = num_pages - 1;
        const bool are_shared = newest_page <= kMaxKeys;
        const int64_t first_page = kv_idx * count_pages(storage, params.page_size);
        unsigned* distant_keys = are_shared ? nullptr : reinterpret_cast<unsigned*>(storage.scores + first_page);
        const uint2 best = score(distant_keys);
        if (threadIdx.x == 0) {
            const int num_quads = are_shared ? count_quads_of_others(newest_page, rank, cluster_size) : 0;
            arrive_expecting(shared.choice_barrier, num_quads * int(sizeof(uint4)));
        } else if (threadIdx.x % kWarpSize == 0) {
            arrive(shared.choice_barrier);  // this warp's own keys are there
        }
        if (has_newest) Block::store_new_token();
        if (const unsigned highest = __reduce_max_sync(kWholeWarp, best.x); highest > 0) {  // or this warp has no page
            const int lane_idx = __ffs(__ballot_sync(kWholeWarp, best.x == highest)) - 1;
            fetch_page(__shfl_sync(kWholeWarp, int(best.y), lane_idx));
        }
        wait_for_first_phase(shared.choice_barrier);
        const auto when_listed = [&](int num_listed) {
            const int idx = warp_idx * cluster_size + rank;
            if (idx < num_listed) fetch_page(page_of(shared.listed[idx]));
        };
        const auto select_from = [&](auto keys) {
            const int num_kept = count_kept();
            select_pages(shared.selection, shared.listed, newest_page, params.num_selected - 1 - num_kept, keys,
                         when_listed, [&](int page_idx, int place) { note_page(page_idx, num_kept + place); });
        };
        if (are_shared) {
            select_from(SharedKeys{shared.keys});
        } else {
            synchronize_cluster();
            select_from(DistantKeys([&](int page_idx) { return distant_keys[page_idx]; }, newest_page));
        }
        if (threadIdx.x > 0) return;
        if (count_kept() > 0) note_page(0, 0);
        note_page(newest_page, params.num_selected - 1);
    }

    // Chooses every page.
    __device__ void take_all() const {
        if (has_newest) Block::store_new_token();
        for (int idx = threadIdx.x; idx < num_own; idx += kThreads) note_page(first_own + idx, first_own + idx);
        if (params.told_ids == nullptr || rank > 0) return;
        for (int idx = num_pages + threadIdx.x; idx < params.num_selected; idx += kThreads) {
            params.told_ids[kv_idx * params.num_selected + idx] = -1;
        }
    }

    __device__ void attend() {
        wait_for_copies<0>();  // of the query, if nothing has waited for it
        __syncthreads();
        const auto find_token = [&](int chosen) {
            if (chosen >= num_own << page_shift) return kNoToken;
            return (page_ids[chosen >> page_shift] << page_shift) + (chosen & (params.page_size - 1));
        };
        using Tokens = typename Shared<T, kHeadDim>::Tokens;
        const Tokens tokens(static_cast<const T*>(storage.keys) + row_start,
                            static_cast<const T*>(storage.values) + row_start, num_tokens, shared.rows);
        attend_tiles<T, kHeadDim, kWarps, Runs>(
            shared.warp_sums, tokens, HeadQuery<T, kHeadDim>(score_input().own_head(0)), params.group_size, 0,
            ceil_div(num_own << page_shift, kTile), params.page_size, params.scaling, params.softcap, find_token);
    }
};

#endif  // __CUDA_ARCH__ >= 900

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1) chain_kernel(const __grid_constant__ AttendParams params) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ uint4 dynamic[];
    auto& shared = *reinterpret_cast<Shared<T, kHeadDim>*>(dynamic);
    char* score_query = reinterpret_cast<char*>(dynamic) + sizeof(shared);
    int* page_ids = reinterpret_cast<int*>(score_query + count_query_bytes(params.group_size, kHeadDim));
    ChainBlock<T, kHeadDim> block(params, shared, score_query, page_ids);
    block.begin();
    if (block.num_pages > params.num_selected) {
        block.select();
    } else {
        block.take_all();
    }
    block.attend();
    block.send_sums();
    block.write_output();
    wait_for_cluster();  // no block ends while what it has sent is on its way
#endif
}

template <typename T, int kHeadDim>
size_t count_shared_bytes(const AttendParams& params, int cluster_size) {
    return sizeof(Shared<T, kHeadDim>) + count_query_bytes(params.group_size, kHeadDim) +
           ceil_div(params.num_selected, cluster_size) * sizeof(int);
}

}  // namespace

int find_cluster_size(const AttendParams& params) {
    if (!params.launch.has_clusters || params.group_size > kHeadTile) return 0;
    int cluster_size = 0;
    for_head_dim(params.data_type, params.head_dim, [&](auto element, auto head_dim) {
        using T = decltype(element);
        constexpr int kHeadDim = decltype(head_dim)::value;
        cluster_size = find_largest_cluster(chain_kernel<T, kHeadDim>, params,
                                            [&](int size) { return count_shared_bytes<T, kHeadDim>(params, size); });
        return cudaSuccess;
    });
    cudaGetLastError();  // a size that does not fit is no error
    return cluster_size;
}

bool needs_scores(const AttendParams& params) {
    return ceil_div<int64_t>(params.storage.capacity, params.page_size) > kMaxKeys;
}

cudaError_t launch_chain(const AttendParams& params, int cluster_size) {
    return for_head_dim(params.data_type, params.head_dim, [&](auto element, auto head_dim) {
        using T = decltype(element);
        constexpr int kHeadDim = decltype(head_dim)::value;
        const auto kernel = chain_kernel<T, kHeadDim>;
        const size_t num_bytes = count_shared_bytes<T, kHeadDim>(params, cluster_size);
        cudaLaunchAttribute attributes[2];
        const cudaLaunchConfig_t config = configure_cluster(params, cluster_size, num_bytes, attributes);
        return cudaLaunchKernelEx(&config, kernel, params);
    });
}

}  // namespace hf_quest
