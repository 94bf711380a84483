// The cluster kernels of chain_by_codes.cuh with their threads as fibers of the CPU. Reads the members of Case below
// and what main() reads after them; writes what main() writes in the end. `chain_by_codes_on_cpu sizes` checks the
// sizes of lists instead.

#include "cluster_kernels_on_cpu.h"

#define dynamic *shared_of_block
#include "chain_by_codes.cu"
#include "chain_by_codes_pooled.cu"
#undef dynamic

using namespace hf_quest;

struct Case {
    int is_half, num_rows, num_kv_heads, group_size, head_dim, page_size, code_bits, num_candidates, num_tokens,
        capacity, agreement, keeps_first, cluster_size, is_told, at_end, is_found, seed, pool_size, has_new;
    float scaling, width;
};

const char *first_code, *end_code, *first_tag, *end_tag;

int run_case() {
    const Case given = read_one<Case>();
    begin_case(given);
    const size_t heads = size_t(given.num_rows) * given.num_kv_heads, query_heads = heads * given.group_size;
    const size_t head_dim = given.head_dim, num_pages = (given.capacity + given.page_size - 1) / given.page_size;
    Stored<int64_t> length(1), padding(given.num_rows);
    Stored<uint16_t> keys(heads * given.capacity * head_dim), values(keys.size());
    Stored<int8_t> bounds(heads * num_pages * 2 * head_dim);
    Stored<uint8_t> scales(heads * num_pages * head_dim / 32);
    Stored<uint8_t> codes(heads * given.capacity * head_dim * given.code_bits / 8);
    Stored<uint16_t> query(query_heads * head_dim);
    const size_t num_pooled = heads * given.pool_size;
    Stored<uint16_t> pool_keys(num_pooled * head_dim), pool_values(num_pooled * head_dim);
    Stored<uint64_t> pool_tags(num_pooled), pool_counts(num_pooled > 0 ? heads * 2 : 0);
    const size_t num_new = given.has_new ? heads * head_dim : 0;
    Stored<uint16_t> new_key(num_new), new_value(num_new);
    Guarded<float> scores(heads * num_pages, is_at_end);
    Guarded<int64_t> told(heads * given.num_tokens, is_at_end);
    Guarded<uint16_t> output(query_heads * head_dim, is_at_end);
    std::fill_n(told.data(), told.size(), -7);
    first_code = reinterpret_cast<const char*>(codes.data());
    end_code = first_code + codes.size();
    first_tag = reinterpret_cast<const char*>(pool_tags.data());
    end_tag = first_tag + pool_tags.size() * sizeof(uint64_t);
    when_prefetched = [](const void* source) {
        const bool is_code = source >= first_code && source < end_code;
        if (!is_code && (source < first_tag || source >= end_tag)) fail("a prefetch of what is no code and no tag");
    };

    AttendParams params = params_of(given);
    params.num_selected = given.num_candidates;
    params.choice = {given.code_bits, given.num_candidates, given.num_tokens,
                     count_stripes(given.num_tokens, given.page_size), Agreement(given.agreement)};
    params.query = query.data();
    params.storage = {.keys = keys.data(), .values = values.data(), .bounds = bounds.data()};
    params.storage.scales = scales.data();
    params.storage.capacity = given.capacity;
    params.storage.scores = needs_scores_by_codes(params, given.cluster_size) ? scores.data() : nullptr;
    params.storage.codes = codes.data();
    const auto address = [](const void* memory) { return reinterpret_cast<int64_t>(memory); };
    const int64_t addresses[12] = {address(keys.data()),      address(values.data()),      address(bounds.data()),
                                   address(scales.data()),    address(scores.data()),      given.capacity,
                                   address(codes.data()),     address(pool_keys.data()),   address(pool_values.data()),
                                   address(pool_tags.data()), address(pool_counts.data()), given.pool_size};
    params.pool = {pool_keys.data(), pool_values.data(), pool_tags.data(), pool_counts.data(), given.pool_size};
    if (given.is_found) params.storage = {.addresses = addresses};
    params.told_ids = given.is_told ? told.data() : nullptr;
    if (given.has_new) {
        const int64_t of_row = int64_t(given.num_kv_heads) * given.head_dim;
        params.new_token = {new_key.data(), new_value.data(), {of_row, given.head_dim}, {of_row, given.head_dim}};
    }
    params.length = length.data();
    params.padding = padding.data();
    params.output = output.data();
    const auto launch = given.pool_size > 0 ? launch_pooled_chain_by_codes : launch_chain_by_codes;
    if (launch(params, given.cluster_size) != cudaSuccess) return 1;
    write(told);
    write(output);
    write(pool_keys);
    write(pool_values);
    write(pool_tags);
    write(pool_counts);
    if (!given.has_new) return 0;
    write(keys);
    write(values);
    write(bounds);
    write(scales);
    write(codes);
    return 0;
}

// Whether lists hold what stripes may get, whatever the number of pages.
int check_sizes() {
    for (const int page_size : {8, 16, 32, 64}) {
        for (const int num_candidates : {1, 2, 3, 16, 17, 18, 33, 40, 100}) {
            for (int num_tokens = page_size; num_tokens <= num_candidates * page_size; num_tokens += page_size / 8) {
                for (int cluster_size = 2; cluster_size <= 16; ++cluster_size) {
                    AttendParams params = {.page_size = page_size};
                    const int num_stripes = count_stripes(num_tokens, page_size);
                    params.choice = {2, num_candidates, num_tokens, num_stripes, Agreement::kMax};
                    const ListSizes sizes(params, cluster_size);
                    for (int num_earlier = 1; num_earlier < 130; ++num_earlier) {
                        const int num_wanted = num_tokens - page_size;
                        if (num_earlier * page_size <= num_wanted) continue;  // all are attended
                        const Stripes stripes(num_earlier, num_stripes);
                        const int num_found = std::min(num_candidates - 1, num_earlier);
                        for (int rank = 0; rank < cluster_size; ++rank) {
                            int num_pages = 0, num_chosen = 0;
                            for (int stripe = rank; stripe < num_stripes; stripe += cluster_size) {
                                const int found = stripes.count_chosen(num_found, stripe);
                                const int chosen = stripes.first_token(num_wanted, stripe + 1) -
                                                   stripes.first_token(num_wanted, stripe);
                                if (chosen > found * page_size) fail("more tokens are wanted than candidates have");
                                num_pages += found;
                                num_chosen += chosen;
                            }
                            if (num_earlier % num_stripes % cluster_size == rank) num_chosen += page_size;
                            if (num_pages > sizes.num_pages) fail("more candidates than their list holds");
                            if (num_chosen > sizes.num_tokens) fail("more tokens than their list holds");
                        }
                    }
                }
            }
        }
    }
    return 0;
}

int main(int num_arguments, char**) { return num_arguments > 1 ? check_sizes() : run_case(); }
