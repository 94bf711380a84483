// Barriers in shared memory that count what arrives, and how the blocks of a cluster send to each other. For code of
// sm_90 and later, which its caller guards.
#pragma once

#include "common.cuh"

namespace hf_quest {

// A barrier in shared memory whose phases end when `num_arrivals` have come, and all bytes that were expected.
__device__ inline void make_barrier(uint64_t& barrier, int num_arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address_of(&barrier)), "r"(num_arrivals) : "memory");
}

// After barriers are made, before the block's or cluster's next barrier lets others use them.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Publishes what this thread wrote, and its warp before __syncwarp().
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
    send(target, barrier,
         uint4{__float_as_uint(value.x), __float_as_uint(value.y), __float_as_uint(value.z), __float_as_uint(value.w)});
}

// Until the barrier's first phase has ended, and what was sent, or written before arrive(), can be read.
__device__ inline void wait_for_first_phase(uint64_t& barrier) {
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

// Every thread of the cluster arrives, and some time later waits for the others to have arrived, which does not publish
// what it wrote. `.aligned` wants whole warps.
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
