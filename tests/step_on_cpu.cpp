// A decode step by codes with the threads of a block as threads of the CPU: append.cu, refine.cu and attend.cu. Reads
// the members of Case below and what main() reads after them; writes bounds, scales, codes, page ids of candidates,
// token ids, logits and output.

#include <cstdio>

#include "cuda_on_cpu.h"

using namespace hf_quest;

struct Case {
    int is_half, num_rows, num_kv_heads, group_size, head_dim, page_size, code_bits, num_candidates, num_tokens,
        capacity, has_scales, agreement, num_sms, num_stored;
    float scaling;
};

template <typename Value>
std::vector<Value> read(size_t count) {
    std::vector<Value> values(count);
    if (std::fread(values.data(), sizeof(Value), count, stdin) != count) std::abort();
    return values;
}

template <typename Value>
void write(const std::vector<Value>& values) {
    std::fwrite(values.data(), sizeof(Value), values.size(), stdout);
}

void check(cudaError_t error) {
    if (error != cudaSuccess) std::abort();
}

int main() {
    const Case given = read<Case>(1)[0];
    const DataType data_type = given.is_half ? DataType::kHalf : DataType::kBFloat16;
    const size_t heads = size_t(given.num_rows) * given.num_kv_heads, num_pages = given.capacity / given.page_size;
    const size_t query_heads = heads * given.group_size, head_dim = given.head_dim;
    const Launch launch = {.num_sms = given.num_sms};

    // Tokens come in steps of so many.
    const auto steps = read<int>(read<int>(1)[0]);
    const auto padding = read<int64_t>(given.num_rows);
    auto new_keys = read<uint16_t>(heads * given.num_stored * head_dim);
    auto new_values = read<uint16_t>(heads * given.num_stored * head_dim);
    std::vector<uint16_t> keys(heads * given.capacity * head_dim), values(keys.size());
    std::vector<char> bounds(heads * num_pages * 2 * head_dim * (given.has_scales ? 1 : 2));
    std::vector<uint8_t> scales(given.has_scales ? heads * num_pages * head_dim / 32 : 0);
    std::vector<uint8_t> codes(heads * given.capacity * head_dim * given.code_bits / 8);
    int64_t length = 0;
    Storage storage = {.keys = keys.data(), .values = values.data(), .bounds = bounds.data()};
    storage.scales = given.has_scales ? scales.data() : nullptr;
    storage.capacity = given.capacity;
    storage.codes = codes.data();
    for (const int num_new : steps) {
        AppendParams params = {.launch = launch, .data_type = data_type};
        params.num_rows = given.num_rows;
        params.num_kv_heads = given.num_kv_heads;
        params.head_dim = given.head_dim;
        params.page_size = given.page_size;
        params.code_bits = given.code_bits;
        params.num_new = num_new;
        params.new_keys = new_keys.data() + length * head_dim;
        params.new_values = new_values.data() + length * head_dim;
        length += num_new;
        const int64_t strides[3] = {int64_t(given.num_kv_heads * given.num_stored * head_dim),
                                    int64_t(given.num_stored * head_dim), int64_t(head_dim)};
        std::copy(strides, strides + 3, params.key_strides);
        std::copy(strides, strides + 3, params.value_strides);
        params.length = &length;
        params.padding = padding.data();
        params.storage = storage;
        check(launch_append(params));
    }
    write(bounds);
    write(scales);
    write(codes);

    auto query = read<uint16_t>(query_heads * head_dim);
    auto page_scores = read<float>(heads * num_pages);
    const int num_stripes = count_stripes(given.num_tokens, given.page_size);
    const int most = count_most_in_stripe(given.num_candidates, num_stripes);
    std::vector<int64_t> page_ids(heads * num_stripes * most, -2);
    CandidatesParams find = {.launch = launch, .num_rows = given.num_rows, .num_kv_heads = given.num_kv_heads};
    find.page_size = given.page_size;
    find.num_candidates = given.num_candidates;
    find.num_stripes = num_stripes;
    find.keeps_first = true;
    find.length = &length;
    find.padding = padding.data();
    find.storage = {.scores = page_scores.data(), .capacity = given.capacity};
    find.page_ids = page_ids.data();
    check(launch_find_candidates(find));
    write(page_ids);

    RefineParams params = {.launch = launch, .data_type = data_type};
    params.num_rows = given.num_rows;
    params.num_kv_heads = given.num_kv_heads;
    params.group_size = given.group_size;
    params.head_dim = given.head_dim;
    params.page_size = given.page_size;
    params.code_bits = given.code_bits;
    params.num_stripes = num_stripes;
    params.most_in_stripe = most;
    params.num_tokens = given.num_tokens;
    params.scaling = given.scaling;
    params.agreement = Agreement(given.agreement);
    params.query = query.data();
    params.query_strides[0] = int64_t(given.num_kv_heads) * given.group_size * head_dim;
    params.query_strides[1] = head_dim;
    params.length = &length;
    params.padding = padding.data();
    params.storage = storage;
    params.page_ids = page_ids.data();
    params.num_blocks = count_refine_blocks(params);
    const size_t num_slots = size_t(num_stripes) * most * given.page_size;
    const size_t num_tiles = (given.group_size + kHeadTile - 1) / kHeadTile;
    std::vector<float> logits(query_heads * num_slots);
    std::vector<float2> head_sums(heads * num_tiles * params.num_blocks * kHeadTile);
    std::vector<unsigned> scores(heads * num_slots);
    std::vector<int64_t> token_ids(heads * given.num_tokens, -2);
    params.logits = logits.data();
    params.head_sums = head_sums.data();
    params.keys = scores.data();
    params.token_ids = token_ids.data();
    check(launch_refine(params));
    write(token_ids);
    write(logits);

    AttendParams attend = {.launch = launch, .data_type = data_type};
    attend.num_rows = given.num_rows;
    attend.num_kv_heads = given.num_kv_heads;
    attend.group_size = given.group_size;
    attend.head_dim = given.head_dim;
    attend.page_size = 1;
    attend.num_selected = given.num_tokens;
    attend.scaling = given.scaling;
    attend.query = query.data();
    std::copy(params.query_strides, params.query_strides + 2, attend.query_strides);
    attend.storage = storage;
    attend.page_ids = token_ids.data();
    attend.length = &length;
    attend.padding = padding.data();
    attend.num_splits = count_splits(attend);
    const size_t num_partials = heads * attend.num_splits * padded_group(given.group_size);
    std::vector<float> partial_output(num_partials * head_dim);
    std::vector<float2> partial_softmax(num_partials);
    std::vector<int> counters(heads * num_tiles);
    std::vector<uint16_t> output(query_heads * head_dim);
    attend.partial_output = partial_output.data();
    attend.partial_softmax = partial_softmax.data();
    attend.counters = counters.data();
    attend.output = output.data();
    check(launch_attend(attend));
    write(output);
}
