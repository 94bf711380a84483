// select: the newest page, the first one where it is kept, and the highest-scoring others of one row and KV head,
// ascending, by one block.
//
// Scores become unsigned keys of the same order, in shared memory if they fit there, and select.cuh does the rest. The
// highest keys of groups of pages tell how high a page must be to be taken at all; the few that are so high go into a
// list. A radix select of the list, by digits of 8 bits of key and page together, finds the last one that is taken;
// when few are left they are ranked. Ballots, and a scan over the warps, give each taken page its place.

#include "select.cuh"

namespace hf_quest {
namespace {

constexpr int kThreads = 512;
constexpr int kMaxKeys = 8192;    // in shared memory; more are read again each time, from L2
constexpr int kMaxListed = 1024;  // pages that may still be taken
static_assert(kMaxKeys % 4 == 0);

__global__ void __launch_bounds__(kThreads, 1) select_kernel(const SelectParams params) {
    __shared__ struct {
        alignas(16) unsigned keys[kMaxKeys];
        uint64_t listed[kMaxListed];
        SharedSelection<kThreads> selection;
    } shared;
    shared.selection.clear();
    wait_for_previous_kernel();
    let_next_kernel_begin();

    const int64_t head_idx = blockIdx.x;
    const Storage storage = find(params.storage);
    const float* scores = storage.scores + head_idx * count_pages(storage, params.page_size);
    int64_t* page_ids = params.page_ids + head_idx * params.num_selected;
    const int row_idx = blockIdx.x / params.num_kv_heads;
    const int64_t num_tokens = count_tokens(params.length, params.padding, row_idx, storage.capacity);
    const int page_shift = __ffs(params.page_size) - 1;
    const int newest_page = num_tokens > 0 ? int((num_tokens - 1) >> page_shift) : -1;
    if (newest_page < params.num_selected) {
        for (int idx = threadIdx.x; idx < params.num_selected; idx += kThreads) {
            page_ids[idx] = idx <= newest_page ? idx : -1;
        }
        return;
    }

    const int num_kept = params.keeps_first && params.num_selected > 1 ? 1 : 0;  // of the first pages
    const auto key_of = [&](int page_idx) { return order_of(__ldcg(scores + page_idx)); };
    const auto select = [&](auto keys) {
        __syncthreads();
        const auto when_listed = [](int) {};
        const auto tell = [&](int page_idx, int place) { page_ids[num_kept + place] = page_idx; };
        const int num_wanted = params.num_selected - 1 - num_kept;
        select_pages(shared.selection, shared.listed, newest_page, num_wanted, keys, when_listed, tell);
    };
    if (newest_page <= kMaxKeys) {
        // Many loads in flight at once, none of them left out: past the last page the last one is read again.
        constexpr int kAtOnce = 8;
        const int num_keys = ceil_div(newest_page, 4) * 4;  // to a whole quad
#pragma unroll 1
        for (int first = threadIdx.x; first < num_keys; first += kAtOnce * kThreads) {
            unsigned keys[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) keys[i] = key_of(min(first + i * kThreads, newest_page - 1));
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int idx = first + i * kThreads;
                if (idx < num_keys) shared.keys[idx] = idx >= num_kept && idx < newest_page ? keys[i] : 0;
            }
        }
        select(SharedKeys{shared.keys});
    } else {
        select(DistantKeys([&](int idx) { return idx < num_kept ? 0 : key_of(idx); }, newest_page));
    }
    if (threadIdx.x > 0) return;
    if (num_kept > 0) page_ids[0] = 0;
    page_ids[params.num_selected - 1] = newest_page;
}

}  // namespace

cudaError_t launch_select(const SelectParams& params) {
    return launch(select_kernel, dim3(params.num_rows * params.num_kv_heads), kThreads, 0, params);
}

}  // namespace hf_quest
