// Barriers in shared memory that count what arrives, and how the blocks of a cluster send to each other: of sm_90 and
// later.
#pragma once

#include "common.cuh"

namespace hf_quest {

// A barrier in shared memory whose phases end when `num_arrivals` have come, and all bytes that were expected.
__device__ inline void make_barrier(uint64_t& barrier, int num_arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address_of(&barrier)), "r"(num_arrivals) : "memory");
}

__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive(uint64_t& barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(address_of(&barrier)) : "memory");
}

__device__ inline void arrive_expecting(uint64_t& barrier, int num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address_of(&barrier)), "r"(num_bytes)
                 : "memory");
}

// Where what lies in this block's shared memory lies in that of another block of the cluster.
__device__ inline unsigned address_at(unsigned address, int rank) {
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
    return address;
}

// Sends to an address of a block's shared memory, and counts the bytes in at a barrier there.
__device__ inline void send(unsigned target, unsigned barrier, uint4 value) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(target),
        "r"(barrier), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
        : "memory");
}

__device__ inline void send(unsigned target, unsigned barrier, uint2 value) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%2, %3}, [%1];" ::"r"(target),
                 "r"(barrier), "r"(value.x), "r"(value.y)
                 : "memory");
}

__device__ inline void send(unsigned target, unsigned barrier, float4 value) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(target),
        "r"(barrier), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
        : "memory");
}

// Until all that others send in the barrier's first phase is there.
__device__ inline void wait_for_sent(uint64_t& barrier) {
    unsigned is_done = 0;
    while (!is_done) {
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
            "selp.b32 %0, 1, 0, p; }"
            : "=r"(is_done)
            : "r"(address_of(&barrier))
            : "memory");
    }
}

// Every thread of the cluster arrives, and waits some time later. Says nothing of what it wrote before.
__device__ inline void arrive_at_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ inline void wait_for_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Until all threads of the cluster have come here, and see what the others wrote before.
__device__ inline void synchronize_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    wait_for_cluster();
}

}  // namespace hf_quest
