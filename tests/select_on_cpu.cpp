// select.cuh with the threads of a block as threads of the CPU: `select_on_cpu THREADS NUM_WANTED NUM_KEPT` reads the
// scores of pages, float32, and writes the pages that it selects, int32, none of the first NUM_KEPT (0 or 1). Built
// with -fsanitize=thread,bounds it ends at a race, and at an index that is too large, which a GPU may well get away
// with.

#include <vector_types.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <thread>
#include <vector>

using std::max, std::min;

// What CUDA has built in, as far as select.cuh uses it.

thread_local uint3 threadIdx;
std::optional<std::barrier<>> block_barrier;

struct Warp {
    std::barrier<> barrier{32};
    std::array<std::atomic<unsigned>, 32> values;
};
std::array<Warp, 32> warps;

void __syncthreads() { block_barrier->arrive_and_wait(); }

std::array<unsigned, 32> exchange(unsigned value) {
    Warp& warp = warps[threadIdx.x / 32];
    warp.values[threadIdx.x % 32] = value;
    warp.barrier.arrive_and_wait();
    std::array<unsigned, 32> values;
    std::copy(warp.values.begin(), warp.values.end(), values.begin());
    warp.barrier.arrive_and_wait();
    return values;
}

int __shfl_sync(unsigned, int value, int lane_idx) { return int(exchange(value).at(lane_idx)); }

int __shfl_up_sync(unsigned, int value, int distance) {
    const int lane_idx = threadIdx.x % 32;
    return int(exchange(value)[lane_idx < distance ? lane_idx : lane_idx - distance]);
}

unsigned __ballot_sync(unsigned, bool is_set) {
    unsigned ballot = 0;
    const auto are_set = exchange(is_set);
    for (int i = 0; i < 32; ++i) ballot |= are_set[i] << i;
    return ballot;
}

unsigned __reduce_min_sync(unsigned, unsigned value) { return std::ranges::min(exchange(value)); }
unsigned __reduce_max_sync(unsigned, unsigned value) { return std::ranges::max(exchange(value)); }

template <typename Value>
Value atomicAdd(Value* target, Value value) {
    return std::atomic_ref(*target).fetch_add(value, std::memory_order_relaxed);
}

template <typename Change>
void change(unsigned* target, Change change) {
    std::atomic_ref atomic(*target);
    unsigned before = atomic.load(std::memory_order_relaxed);
    while (!atomic.compare_exchange_weak(before, change(before), std::memory_order_relaxed)) {
    }
}

void atomicMin(unsigned* target, unsigned value) {
    change(target, [=](unsigned before) { return min(before, value); });
}

void atomicMax(unsigned* target, unsigned value) {
    change(target, [=](unsigned before) { return max(before, value); });
}

int __clz(unsigned value) { return std::countl_zero(value); }
int __clzll(uint64_t value) { return std::countl_zero(value); }
int __ffs(unsigned value) { return value == 0 ? 0 : std::countr_zero(value) + 1; }
int __popc(unsigned value) { return std::popcount(value); }
unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
size_t __cvta_generic_to_shared(const void*);  // which common.cuh mentions

#include "select.cuh"

using namespace hf_quest;

constexpr int kMaxListed = 64;  // few, so that a list is too short in some of the tests

template <int kThreads>
std::vector<int> select(const std::vector<float>& scores, int num_wanted, int num_kept) {
    static SharedSelection<kThreads> selection;
    static uint64_t listed[kMaxListed];
    std::vector<int> page_ids(num_wanted, -1);
    block_barrier.emplace(kThreads);
    std::vector<std::thread> threads;
    for (unsigned thread_idx = 0; thread_idx < kThreads; ++thread_idx) {
        threads.emplace_back([&, thread_idx] {
            threadIdx.x = thread_idx;
            selection.clear();
            __syncthreads();
            const int num_keys = int(scores.size());
            const auto when_listed = [](int) {};
            const auto tell = [&](int page_idx, int place) { page_ids.at(place) = page_idx; };
            const auto key_of = [&](int idx) { return idx < num_kept ? 0 : order_of(scores.at(idx)); };
            const DistantKeys keys(key_of, num_keys);
            select_pages(selection, listed, num_keys, num_wanted, keys, when_listed, tell);
        });
    }
    for (std::thread& thread : threads) thread.join();
    return page_ids;
}

int main(int, char** arguments) {
    const int num_threads = std::atoi(arguments[1]), num_wanted = std::atoi(arguments[2]);
    const int num_kept = std::atoi(arguments[3]);
    std::vector<float> scores;
    for (float score; std::fread(&score, sizeof(score), 1, stdin) == 1;) scores.push_back(score);
    const auto select_by = num_threads == 256 ? select<256> : select<512>;
    const std::vector<int> page_ids = select_by(scores, num_wanted, num_kept);
    std::fwrite(page_ids.data(), sizeof(int), page_ids.size(), stdout);
}
