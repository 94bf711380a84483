// The cluster kernel of chain.cu with its threads as fibers of the CPU. Reads the members of Case below and what main()
// reads after them; writes what main() writes in the end.

#include "cluster_kernels_on_cpu.h"

namespace hf_quest {

inline char what_all_have_written;

inline void synchronize_cluster() {
    __tsan_release(&what_all_have_written);
    arrive_at_cluster();
    wait_for_cluster();
    __tsan_acquire(&what_all_have_written);
}

}  // namespace hf_quest

#define dynamic *shared_of_block
#include "chain.cu"
#undef dynamic

using namespace hf_quest;

struct Case {
    int is_half, num_rows, num_kv_heads, group_size, head_dim, page_size, num_selected, capacity, is_wide, keeps_first,
        cluster_size, at_end, is_found, seed, has_new;
    float scaling, width;
};

const char *first_key, *end_key, *first_value, *end_value;

int main() {
    const Case given = read_one<Case>();
    begin_case(given);
    const size_t heads = size_t(given.num_rows) * given.num_kv_heads, query_heads = heads * given.group_size;
    const size_t head_dim = given.head_dim, num_pages = (given.capacity + given.page_size - 1) / given.page_size;
    Stored<int64_t> length(1), padding(given.num_rows);
    Stored<uint16_t> keys(heads * given.capacity * head_dim), values(keys.size());
    Stored<int8_t> bounds(heads * num_pages * 2 * head_dim * (given.is_wide ? 2 : 1));
    Stored<uint8_t> scales(given.is_wide ? 0 : heads * num_pages * head_dim / 32);
    Stored<uint16_t> query(query_heads * head_dim);
    const size_t num_new = given.has_new ? heads * head_dim : 0;
    Stored<uint16_t> new_key(num_new), new_value(num_new);
    Guarded<float> scores(heads * num_pages, is_at_end);
    Guarded<int64_t> told(heads * given.num_selected, is_at_end);
    Guarded<uint16_t> output(query_heads * head_dim, is_at_end);
    std::fill_n(told.data(), told.size(), -7);
    first_key = reinterpret_cast<const char*>(keys.data());
    end_key = first_key + keys.size() * sizeof(uint16_t);
    first_value = reinterpret_cast<const char*>(values.data());
    end_value = first_value + values.size() * sizeof(uint16_t);
    when_prefetched = [](const void* source) {
        const bool is_key = source >= first_key && source < end_key;
        if (!is_key && (source < first_value || source >= end_value)) fail("a prefetch of what is no key and no value");
    };

    AttendParams params = params_of(given);
    params.num_selected = given.num_selected;
    params.query = query.data();
    params.storage = {.keys = keys.data(), .values = values.data(), .bounds = bounds.data()};
    params.storage.scales = given.is_wide ? nullptr : scales.data();
    params.storage.capacity = given.capacity;
    params.storage.scores = needs_scores(params) ? scores.data() : nullptr;
    const auto address = [](const void* memory) { return reinterpret_cast<int64_t>(memory); };
    const int64_t addresses[12] = {address(keys.data()),
                                   address(values.data()),
                                   address(bounds.data()),
                                   given.is_wide ? 0 : address(scales.data()),
                                   address(scores.data()),
                                   given.capacity,
                                   0,
                                   0,
                                   0,
                                   0,
                                   0,
                                   0};
    if (given.is_found) params.storage = {.addresses = addresses};
    params.told_ids = told.data();
    if (given.has_new) {
        const int64_t of_row = int64_t(given.num_kv_heads) * given.head_dim;
        params.new_token = {new_key.data(), new_value.data(), {of_row, given.head_dim}, {of_row, given.head_dim}};
    }
    params.length = length.data();
    params.padding = padding.data();
    params.output = output.data();
    if (launch_chain(params, given.cluster_size) != cudaSuccess) return 1;
    write(told);
    write(output);
    write(keys);
    write(values);
    write(bounds);
    write(scales);
    return 0;
}
