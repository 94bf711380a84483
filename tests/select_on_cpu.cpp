// select.cuh with the threads of a block as threads of the CPU: `select_on_cpu THREADS NUM_WANTED NUM_KEPT` reads the
// scores of pages, float32, and writes the pages that it selects, int32, none of the first NUM_KEPT (0 or 1).

#include <cstdio>
#include <cstdlib>

#include "cuda_on_cpu.h"
#include "select.cuh"

using namespace hf_quest;

constexpr int kMaxListed = 64;  // few, so that a list is too short in some of the tests

template <int kThreads>
std::vector<int> select(const std::vector<float>& scores, int num_wanted, int num_kept) {
    static SharedSelection<kThreads> selection;
    static uint64_t listed[kMaxListed];
    std::vector<int> page_ids(num_wanted, -1);
    run_block(kThreads, [&] {
        selection.clear();
        __syncthreads();
        const int num_keys = int(scores.size());
        const auto when_listed = [](int) {};
        const auto tell = [&](int page_idx, int place) { page_ids.at(place) = page_idx; };
        const auto key_of = [&](int idx) { return idx < num_kept ? 0 : order_of(scores.at(idx)); };
        const DistantKeys keys(key_of, num_keys);
        select_pages(selection, listed, num_keys, num_wanted, keys, when_listed, tell);
    });
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
