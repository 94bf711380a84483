// chain by codes, of tokens that have a pool: chain_by_codes.cuh and pool.cuh say how.

#include "chain_by_codes.cuh"

namespace hf_quest {

bool has_pool_by_codes(const AttendParams& params, int cluster_size) {
    bool has_pool = false;
    for_shape(params, [&](auto element, auto head_dim, auto bits) {
        using T = decltype(element);
        constexpr int kHeadDim = decltype(head_dim)::value, kBits = decltype(bits)::value;
        const auto kernel = chain_by_codes_kernel<T, kHeadDim, kBits, true>;
        const size_t num_bytes = count_shared_bytes<T, kHeadDim, kBits>(params, cluster_size, true);
        has_pool = allow_clusters(kernel, params) && run_at_once(kernel, params, cluster_size, num_bytes);
        return cudaSuccess;
    });
    cudaGetLastError();  // a size that does not fit is no error
    return has_pool;
}

cudaError_t launch_pooled_chain_by_codes(const AttendParams& params, int cluster_size) {
    return launch_by_codes<true>(params, cluster_size);
}

}  // namespace hf_quest
