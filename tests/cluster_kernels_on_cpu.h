// What the programs of kernels by clusters share: the kernels' head dims, how they are launched, and what main() reads.
// Each defines `dynamic` for the kernels' files that it includes, and takes that back.
#pragma once

#include "cluster_on_cpu.h"

// The functions that are assembly, and what asks for them.
#define address_at address_at_in_assembly
#define arrive arrive_in_assembly
#define arrive_at_cluster arrive_at_cluster_in_assembly
#define arrive_expecting arrive_expecting_in_assembly
#define make_barrier make_barrier_in_assembly
#define publish_barriers publish_barriers_in_assembly
#define send send_in_assembly
#define synchronize_cluster synchronize_cluster_in_assembly
#define wait_for_cluster wait_for_cluster_in_assembly
#define wait_for_first_phase wait_for_first_phase_in_assembly
#include "barrier.cuh"
#undef address_at
#undef arrive
#undef arrive_at_cluster
#undef arrive_expecting
#undef make_barrier
#undef publish_barriers
#undef send
#undef synchronize_cluster
#undef wait_for_cluster
#undef wait_for_first_phase

#define for_head_dim for_few_head_dims
#define __CUDA_ARCH__ 900
#undef __shared__
#define __shared__

namespace hf_quest {
namespace {

uint4* shared_of_block[1];  // of the one whose turn it is

UNWATCHED void become_one_of_a_cluster(const Fiber& fiber) {
    become(fiber);
    shared_of_block[0] = reinterpret_cast<uint4*>(shared_of(fiber.block_idx));
}

}  // namespace

// Fewer than there are: each takes a while to compile.
template <typename Run>
cudaError_t for_head_dim(DataType data_type, int head_dim, Run run) {
    switch (head_dim) {
        case 64:
            return data_type == DataType::kHalf ? run(__half(), std::integral_constant<int, 64>())
                                                : run(__nv_bfloat16(), std::integral_constant<int, 64>());
        case 96: return run(__nv_bfloat16(), std::integral_constant<int, 96>());
        case 128: return run(__nv_bfloat16(), std::integral_constant<int, 128>());
        case 256: return run(__nv_bfloat16(), std::integral_constant<int, 256>());
        default: return cudaErrorInvalidValue;
    }
}

inline cudaError_t launch_one(const cudaLaunchConfig_t* config, void (*kernel)(AttendParams),
                              const AttendParams& params) {
    launch_clusters(*config, kernel, params);
    return cudaSuccess;
}
template <typename Kernel>
cudaError_t set_attribute(Kernel, cudaFuncAttribute, int) {
    return cudaSuccess;
}
template <typename Kernel>
cudaError_t count_clusters(int*, Kernel, const cudaLaunchConfig_t*) {
    return cudaErrorInvalidValue;
}

}  // namespace hf_quest

#define cudaFuncSetAttribute set_attribute
#define cudaGetLastError() cudaSuccess
#define cudaLaunchKernelEx launch_one
#define cudaOccupancyMaxActiveClusters count_clusters
template <typename Value>
Value read_one() {
    Value value;
    if (std::fread(&value, sizeof(value), 1, stdin) != 1) std::abort();
    return value;
}

inline bool is_at_end;  // of memory, where tensors end; or they begin where it does

template <typename Value>
struct Stored : Guarded<Value> {
    explicit Stored(size_t count) : Guarded<Value>(count, is_at_end) {
        if (std::fread(this->data(), sizeof(Value), count, stdin) != count) std::abort();
    }
};

// Has threads take turns in the order that a Case decides, and memory end where it says.
template <typename Case>
void begin_case(const Case& given) {
    is_at_end = given.at_end;
    do_exchanges_publish = false;
    fibers.random = given.seed;
    fibers.when_switched = hf_quest::become_one_of_a_cluster;
}

// What both kernels are told of a Case, but for storage and what is chosen.
template <typename Case>
hf_quest::AttendParams params_of(const Case& given) {
    using namespace hf_quest;
    AttendParams params = {.data_type = given.is_half ? DataType::kHalf : DataType::kBFloat16};
    params.num_rows = given.num_rows;
    params.num_kv_heads = given.num_kv_heads;
    params.group_size = given.group_size;
    params.head_dim = given.head_dim;
    params.page_size = given.page_size;
    params.scaling = given.scaling;
    params.score = {given.width, given.keeps_first != 0, Agreement::kMax};
    params.query_strides[0] = int64_t(given.num_kv_heads) * given.group_size * given.head_dim;
    params.query_strides[1] = given.head_dim;
    return params;
}

template <typename Value>
void write(Guarded<Value>& values) {
    std::fwrite(values.data(), sizeof(Value), values.size(), stdout);
}
