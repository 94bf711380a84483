// chain by codes, of tokens that lie where keys and values do: chain_by_codes.cuh says how.

#include "chain_by_codes.cuh"

namespace hf_quest {

int find_cluster_size_by_codes(const AttendParams& params) {
    const bool is_served = params.choice.code_bits == 2 || params.choice.code_bits == 4;
    if (!params.launch.has_clusters || params.group_size > kHeadTile || !is_served) return 0;
    int cluster_size = 0;
    for_shape(params, [&](auto element, auto head_dim, auto bits) {
        using T = decltype(element);
        constexpr int kHeadDim = decltype(head_dim)::value, kBits = decltype(bits)::value;
        cluster_size = find_largest_cluster(chain_by_codes_kernel<T, kHeadDim, kBits, false>, params, [&](int size) {
            return count_shared_bytes<T, kHeadDim, kBits>(params, size, false);
        });
        return cudaSuccess;
    });
    cudaGetLastError();  // a size that does not fit is no error
    if (cluster_size == 0) return 0;
    // Stripes of the busiest block, which fewer blocks may have, too.
    const int num_stripes = ceil_div(params.choice.num_stripes, cluster_size);
    return ceil_div(params.choice.num_stripes, num_stripes);
}

bool needs_scores_by_codes(const AttendParams& params, int cluster_size) {
    const int64_t num_pages = ceil_div<int64_t>(params.storage.capacity, params.page_size);
    const int64_t length = ceil_div<int64_t>(num_pages, params.choice.num_stripes) + kPagesPerTile;
    return length * ceil_div(params.choice.num_stripes, cluster_size) > kMaxKeys;
}

cudaError_t launch_chain_by_codes(const AttendParams& params, int cluster_size) {
    return launch_by_codes<false>(params, cluster_size);
}

}  // namespace hf_quest
