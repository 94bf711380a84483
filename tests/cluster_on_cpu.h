// What kernels by clusters of thread blocks use of CUDA beside tests/cuda_on_cpu.h: shared memory of several blocks,
// copies that are on their way until they are waited for, and barriers that count what arrives. An address in shared
// memory is that of the block, kSharedBytes each, and what lies behind a block's own cannot be touched.
#pragma once

#include <sys/mman.h>

#include <deque>

#include "cuda_on_cpu.h"

constexpr size_t kSharedBytes = 1 << 18, kPageBytes = 4096;
inline char* shared_memory = nullptr;  // of all blocks of a cluster
inline size_t num_shared_bytes = 0;    // of a block

UNWATCHED inline char* shared_of(int block_idx) {
    return shared_memory + (block_idx + 1) * kSharedBytes - kPageBytes - (num_shared_bytes + 127) / 128 * 128;
}

// Memory that ends, or begins, where none may be touched; what has not been written is of anything.
template <typename Value>
struct Guarded {
    static constexpr size_t kPage = kPageBytes;
    size_t count;
    Value* values;

    Guarded(size_t count, bool at_end) : count(count) {
        const size_t bytes = count * sizeof(Value), mapped = (bytes + kPage - 1) / kPage * kPage;
        void* const all = mmap(nullptr, mapped + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        char* const first = static_cast<char*>(all) + kPage;
        if (all == MAP_FAILED || (mapped > 0 && mprotect(first, mapped, PROT_READ | PROT_WRITE) != 0)) std::abort();
        if (mapped > 0) std::memset(first, 0xff, mapped);
        values = reinterpret_cast<Value*>(at_end ? first + mapped - bytes : first);
    }
    Guarded(const Guarded&) = delete;
    Value* data() { return values; }
    size_t size() const { return count; }
};

inline size_t __cvta_generic_to_shared(const void* shared) {
    const size_t offset = static_cast<const char*>(shared) - shared_memory;
    if (offset / kSharedBytes != size_t(fibers.current->block_idx)) fail("not in this block's shared memory");
    return offset;
}

namespace hf_quest {

inline char* find_shared(unsigned address, int alignment) {
    if (address % alignment != 0) fail("an address in shared memory is not aligned");
    return shared_memory + address;
}

struct Copy {
    char* target;
    const void* source;  // null for zeros
    std::array<char, 16> content;
};
// Of each thread, in groups; the last one is still open. A copy may read at any time until it is waited for, so the
// sanitizer sees it read at both ends.
using CopyGroups = std::deque<std::vector<Copy>>;
inline std::vector<CopyGroups> copies;
UNWATCHED inline CopyGroups& own_copies() {
    return copies.data()[fibers.current->block_idx * blockDim.x + threadIdx.x];
}

void copy_async_once(unsigned target, const void* source, bool is_there) {
    if (size_t(source) % 16 != 0) fail("a copy's source is not aligned");
    Copy copy = {find_shared(target, 16), is_there ? source : nullptr, {}};
    std::memset(copy.target, 0xff, 16);
    if (is_there) std::memcpy(copy.content.data(), source, 16);
    own_copies().back().push_back(copy);
}
void copy_async(unsigned target, const void* source) { copy_async_once(target, source, true); }
void commit_copies() { own_copies().emplace_back(); }

template <int kNumGroups>
void wait_for_copies() {
    CopyGroups& groups = own_copies();
    while (groups.size() > kNumGroups + 1) {
        for (const Copy& copy : groups.front()) {
            const bool is_other = copy.source != nullptr && std::memcmp(copy.content.data(), copy.source, 16) != 0;
            if (is_other) fail("what a copy reads is written while it is on its way");
            std::memcpy(copy.target, copy.content.data(), 16);
        }
        groups.pop_front();
    }
}

// Barriers that count arrivals and bytes, by where they lie. Nothing else may write there.
struct CountingBarrier {
    const void* place = nullptr;
    int num_arrivals = 0, num_bytes = 0;  // that are still expected
    bool is_done = false;
    FiberQueue waiting;

    UNWATCHED void check_end() {
        if (num_arrivals < 0 || (num_arrivals == 0 && num_bytes < 0)) fail("more has arrived than was expected");
        if (is_done || num_arrivals > 0 || num_bytes != 0) return;
        is_done = true;
        while (Fiber* fiber = waiting.pop()) fibers.wake(fiber);
    }
};
constexpr uint64_t kBarrier = 0x5eba221e25eba221;
inline CountingBarrier counting_barriers[64];
inline int num_counting_barriers = 0;

UNWATCHED inline CountingBarrier& find_barrier(const void* place) {
    if (*static_cast<const uint64_t*>(place) != kBarrier) fail("there is no barrier, or something is written over it");
    for (int i = 0; i < num_counting_barriers; ++i) {
        if (counting_barriers[i].place == place) return counting_barriers[i];
    }
    fail("there is no barrier");
}

UNWATCHED inline void add_barrier(const void* place, int num_arrivals) {
    if (num_counting_barriers == 64) fail("too many barriers");
    CountingBarrier& added = counting_barriers[num_counting_barriers++];
    added.place = place;
    added.num_arrivals = num_arrivals;
    added.num_bytes = 0;
    added.is_done = false;
    added.waiting.first = nullptr;
}

inline void make_barrier(uint64_t& barrier, int num_arrivals) {
    barrier = kBarrier;
    add_barrier(&barrier, num_arrivals);
}
inline void publish_barriers() {}

UNWATCHED inline void arrive_expecting(uint64_t& barrier, int num_bytes) {
    CountingBarrier& found = find_barrier(&barrier);
    found.num_bytes += num_bytes;
    --found.num_arrivals;
    __tsan_release(&barrier);
    found.check_end();
}
inline void arrive(uint64_t& barrier) { arrive_expecting(barrier, 0); }

inline unsigned address_at(unsigned address, int rank) {
    if (unsigned(rank) >= blocks.size()) fail("the cluster has no such block");
    return address % kSharedBytes + rank * kSharedBytes;
}

UNWATCHED inline void count_in(char* place, int num_bytes) {
    CountingBarrier& found = find_barrier(place);
    if (found.is_done) fail("something is sent when nothing is expected any more");
    found.num_bytes -= num_bytes;
    __tsan_release(place);
    found.check_end();
}

template <typename Value>
void send(unsigned target, unsigned barrier, Value value) {
    std::memcpy(find_shared(target, sizeof(Value)), &value, sizeof(Value));
    count_in(find_shared(barrier, 8), sizeof(Value));
}

UNWATCHED inline void wait_for_first_phase(uint64_t& barrier) {
    CountingBarrier& found = find_barrier(&barrier);
    if (!found.is_done) {
        found.waiting.push(fibers.current);
        fibers.rest();
    }
    __tsan_acquire(&barrier);
}

// The barrier of the cluster: a thread arrives, and waits later.
struct ClusterBarrier {
    int num_expected = 0, num_arrived = 0;
    unsigned phase = 0;
    FiberQueue waiting;
    std::vector<unsigned> own;  // of each thread, the phase that it has arrived at, and one
};
inline ClusterBarrier cluster_barrier;
UNWATCHED inline unsigned& own_phase() {
    return cluster_barrier.own.data()[fibers.current->block_idx * blockDim.x + threadIdx.x];
}

inline void arrive_at_cluster() {
    __syncwarp();
    [] UNWATCHED {
        if (own_phase() > cluster_barrier.phase) fail("a thread arrives at the cluster's barrier again");
        own_phase() = cluster_barrier.phase + 1;
        if (++cluster_barrier.num_arrived < cluster_barrier.num_expected) return;
        cluster_barrier.num_arrived = 0;
        ++cluster_barrier.phase;
        while (Fiber* fiber = cluster_barrier.waiting.pop()) fibers.wake(fiber);
    }();
}

inline void wait_for_cluster() {
    __syncwarp();
    [] UNWATCHED {
        if (own_phase() == 0) fail("a thread waits for the cluster without having arrived");
        if (own_phase() > cluster_barrier.phase) {
            cluster_barrier.waiting.push(fibers.current);
            fibers.rest();
        }
        own_phase() = 0;
    }();
}

uint4 load_matrices(unsigned address) {
    const auto addresses = exchange(address);
    uint4 data;
    for (int i = 0; i < 4; ++i) {  // matrix by matrix, of 8 rows
        const unsigned row = addresses[i * 8 + threadIdx.x % 32 / 4];
        std::memcpy(&(&data.x)[i], find_shared(row, 16) + threadIdx.x % 4 * 4, 4);
    }
    __syncwarp();
    return data;
}

UNWATCHED void multiply_add(int (&sums)[4], uint4 left, uint2 right) {
    const auto& words = own_warp().exchange<6>({left.x, left.y, left.z, left.w, right.x, right.y});
    const int group_idx = threadIdx.x % 32 / 4, quad_idx = threadIdx.x % 4;
    for (int i = 0; i < 4; ++i) {  // of row group_idx + i / 2 * 8 and column 2 * quad_idx + i % 2
        for (int k = 0; k < 32; ++k) {
            const unsigned of_row = words[k / 16 * 2 + i / 2][group_idx * 4 + k % 16 / 4];
            const unsigned of_column = words[4 + k / 16][(2 * quad_idx + i % 2) * 4 + k % 16 / 4];
            sums[i] += int(int8_t(of_row >> k % 4 * 8)) * int(int8_t(of_column >> k % 4 * 8));
        }
    }
}

unsigned spread_signs(uint32_t low_pair, uint32_t high_pair) {
    const uint64_t both = uint64_t(high_pair) << 32 | low_pair;
    unsigned signs = 0;
    for (int i = 0; i < 4; ++i) signs |= (both >> (16 * i + 15) & 1 ? 0xffu : 0u) << 8 * i;
    return signs;
}

inline void (*when_prefetched)(const void*) = nullptr;
void prefetch(const void* source) { when_prefetched(source); }

}  // namespace hf_quest

inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    const auto value = [](__half half) { return double(__half2float(half)); };
    return {__double2half(value(a.x) * value(b.x) + value(c.x)), __double2half(value(a.y) * value(b.y) + value(c.y))};
}

// Runs a kernel, cluster after cluster. Its blocks' shared memory is of anything.
template <typename Params>
void launch_clusters(const cudaLaunchConfig_t& config, void (*kernel)(Params), const Params& params) {
    using namespace hf_quest;
    gridDim = config.gridDim;
    blockDim = config.blockDim;
    const int num_blocks = gridDim.x, num_threads = blockDim.x;
    num_shared_bytes = config.dynamicSmemBytes;
    if (num_shared_bytes > 227 * 1024) fail("more shared memory than a block has");
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
            Guarded<char> memory(num_blocks * kSharedBytes, false);
            shared_memory = memory.data();
            for (int i = 0; i < num_blocks; ++i) {
                const size_t guard = (i + 1) * kSharedBytes - kPageBytes;
                if (mprotect(shared_memory + guard, kPageBytes, PROT_NONE) != 0) std::abort();
            }
            copies.assign(num_blocks * num_threads, CopyGroups(1));
            num_counting_barriers = 0;
            cluster_barrier = {.num_expected = num_blocks * num_threads};
            cluster_barrier.own.assign(num_blocks * num_threads, 0);
            run_cluster(num_blocks, num_threads, [&] { kernel(params); });
            for (const CopyGroups& groups : copies) {
                for (const auto& group : groups) {
                    if (!group.empty()) fail("a copy has not been waited for");
                }
            }
            for (int i = 0; i < num_blocks; ++i) {
                const char* const end = shared_of(i) + num_shared_bytes;
                const char* const guard = shared_memory + (i + 1) * kSharedBytes - kPageBytes;
                for (const char* place = end; place < guard; ++place) {
                    if (*place != char(0xff)) fail("something is written behind a block's shared memory");
                }
                const char* const first = shared_memory + i * kSharedBytes;
                for (const char* place = first; place < shared_of(i); ++place) {
                    if (*place != char(0xff)) fail("something is written before a block's shared memory");
                }
            }
            munmap(shared_memory - kPageBytes, num_blocks * kSharedBytes + 2 * kPageBytes);
        }
    }
}
