// The CUDA implementations of the operators whose schemas, fakes and checks stand in hf_quest/ops.py.

#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <array>
#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <string_view>

#include "params.h"

namespace hf_quest::operators {

using at::Tensor;

Launch launch_on_current_stream() {
    static const bool is_allowed = std::getenv("HF_QUEST_NO_OVERLAP") == nullptr;
    const cudaDeviceProp* gpu = at::cuda::getCurrentDeviceProperties();
    return {at::cuda::getCurrentCUDAStream(), gpu->multiProcessorCount, int(gpu->sharedMemPerBlockOptin),
            gpu->major >= 9, is_allowed && gpu->major >= 9};
}

DataType data_type_of(const Tensor& tensor) {
    return tensor.scalar_type() == at::kHalf ? DataType::kHalf : DataType::kBFloat16;
}

// Its address, of which torch.compile cannot see in Python that 16 bytes can be read at once from there.
void* address_of(const Tensor& tensor) {
    void* address = tensor.data_ptr();
    TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(address) % 16 == 0, "a tensor must begin at a multiple of 16 bytes");
    return address;
}

// The same of [B, H, T, D] tokens from a model, in whatever layout it made them.
void* rows_of(const Tensor& tokens, at::ScalarType type) {
    TORCH_CHECK_TYPE(tokens.scalar_type() == type, "tokens must be ", type, ", not ", tokens.scalar_type());
    bool is_aligned = tokens.dim() == 4 && tokens.stride(3) == 1;
    for (int dim = 0; is_aligned && dim < 3; ++dim) is_aligned = tokens.size(dim) == 1 || tokens.stride(dim) % 8 == 0;
    TORCH_CHECK_VALUE(is_aligned,
                      "tokens must have rows of neighbouring elements at multiples of 16 bytes; strides are ",
                      tokens.strides());
    return address_of(tokens);
}

// The bounds of pages, in 8 bits if they have scales, of which those of a page are read in the largest words they fill.
void set_bounds(Storage& storage, const Tensor& bounds, const std::optional<Tensor>& scales) {
    storage.bounds = address_of(bounds);
    if (!scales) return;
    storage.scales = scales->data_ptr<uint8_t>();
    const uintptr_t word = scales->size(-1) % 8 == 0   ? 8
                           : scales->size(-1) % 4 == 0 ? 4
                           : scales->size(-1) % 2 == 0 ? 2
                                                       : 1;
    TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(storage.scales) % word == 0, "scales must begin at a multiple of ",
                      word, " bytes");
}

// What ops.py has of reference.Score.
Agreement agreement_of(std::string_view group) {
    TORCH_CHECK_VALUE(group == "max" || group == "sum" || group == "share", "no such agreement of a group: ", group);
    return group == "max" ? Agreement::kMax : group == "sum" ? Agreement::kSum : Agreement::kShare;
}

Score score_of(double width, bool keeps_first, std::string_view group) {
    return {float(width), keeps_first, agreement_of(group)};
}

// Bits of a channel in codes of [..., D * bits / 8].
int64_t code_bits_of(const std::optional<Tensor>& codes, int64_t head_dim) {
    return codes ? codes->size(-1) * 8 / head_dim : 0;
}

// What a launch with storage of unknown capacity must be ready for.
constexpr int64_t kAnyCapacity = int64_t(1) << 40;

void append_to(const Storage& storage, at::ScalarType type, const Tensor& new_keys, const Tensor& new_values,
               const Tensor& length, const Tensor& padding, int64_t page_size, int64_t code_bits) {
    AppendParams params = {};
    params.launch = launch_on_current_stream();
    params.data_type = data_type_of(new_keys);
    params.num_rows = new_keys.size(0);
    params.num_kv_heads = new_keys.size(1);
    params.head_dim = new_keys.size(3);
    params.page_size = page_size;
    params.code_bits = code_bits;
    params.num_new = new_keys.size(2);
    params.new_keys = rows_of(new_keys, type);
    params.new_values = rows_of(new_values, type);
    for (int dim = 0; dim < 3; ++dim) {
        params.key_strides[dim] = new_keys.stride(dim);
        params.value_strides[dim] = new_values.stride(dim);
    }
    params.length = length.data_ptr<int64_t>();
    params.padding = padding.data_ptr<int64_t>();
    params.storage = storage;
    C10_CUDA_CHECK(launch_append(params));
}

// [B, Hkv, 1, D] each, which the chain stores.
NewToken token_of(at::ScalarType type, const Tensor& new_key, const Tensor& new_value) {
    return {rows_of(new_key, type),
            rows_of(new_value, type),
            {new_key.stride(0), new_key.stride(1)},
            {new_value.stride(0), new_value.stride(1)}};
}

// What every stage with a query is told.
template <typename Params>
void set_step(Params& params, const Storage& storage, at::ScalarType type, const Tensor& query, int64_t num_kv_heads,
              const Tensor& length, const Tensor& padding, int64_t page_size, double scaling) {
    params.launch = launch_on_current_stream();
    params.data_type = data_type_of(query);
    params.num_rows = query.size(0);
    params.num_kv_heads = num_kv_heads;
    params.group_size = query.size(1) / num_kv_heads;
    params.head_dim = query.size(3);
    params.page_size = page_size;
    params.scaling = scaling;
    params.query = rows_of(query, type);
    params.query_strides[0] = query.stride(0);
    params.query_strides[1] = query.stride(1);
    params.length = length.data_ptr<int64_t>();
    params.padding = padding.data_ptr<int64_t>();
    params.storage = storage;
}

void estimate_pages(const Storage& storage, at::ScalarType type, const Tensor& query, int64_t num_kv_heads,
                    const Tensor& length, const Tensor& padding, int64_t page_size, double scaling,
                    const Score& score) {
    EstimateParams params = {};
    set_step(params, storage, type, query, num_kv_heads, length, padding, page_size, scaling);
    params.score = score;
    Tensor head_sums;  // freed on return; the allocator keeps to the stream's order
    if (const int64_t num_sums = count_head_sums(params); num_sums > 0) {
        head_sums = at::empty({num_sums, 2}, query.options().dtype(at::kFloat));
        params.head_sums = reinterpret_cast<float2*>(head_sums.data_ptr<float>());
    }
    C10_CUDA_CHECK(launch_estimate(params));
}

Tensor select_pages(const Storage& storage, int64_t num_kv_heads, const Tensor& length, const Tensor& padding,
                    int64_t num_selected, int64_t page_size, bool keeps_first) {
    const Tensor page_ids = at::empty({padding.size(0), num_kv_heads, 1, num_selected}, padding.options());
    SelectParams params = {};
    params.launch = launch_on_current_stream();
    params.num_rows = padding.size(0);
    params.num_kv_heads = num_kv_heads;
    params.page_size = page_size;
    params.num_selected = num_selected;
    params.keeps_first = keeps_first;
    params.length = length.data_ptr<int64_t>();
    params.padding = padding.data_ptr<int64_t>();
    params.storage = storage;
    params.page_ids = page_ids.data_ptr<int64_t>();
    C10_CUDA_CHECK(launch_select(params));
    return page_ids;
}

Tensor find_candidate_pages(const Storage& storage, int64_t num_kv_heads, const Tensor& length, const Tensor& padding,
                            int64_t num_candidates, int64_t page_size, bool keeps_first, int64_t num_stripes) {
    const Tensor page_ids =
        at::empty({padding.size(0), num_kv_heads, 1, num_stripes, count_most_in_stripe(num_candidates, num_stripes)},
                  padding.options());
    CandidatesParams params = {};
    params.launch = launch_on_current_stream();
    params.num_rows = padding.size(0);
    params.num_kv_heads = num_kv_heads;
    params.page_size = page_size;
    params.num_candidates = num_candidates;
    params.num_stripes = num_stripes;
    params.keeps_first = keeps_first;
    params.length = length.data_ptr<int64_t>();
    params.padding = padding.data_ptr<int64_t>();
    params.storage = storage;
    params.page_ids = page_ids.data_ptr<int64_t>();
    C10_CUDA_CHECK(launch_find_candidates(params));
    return page_ids;
}

TokenChoice choice_of(int64_t code_bits, int64_t num_candidates, int64_t num_tokens, int64_t page_size,
                      std::string_view group) {
    return {int(code_bits), int(num_candidates), int(num_tokens), count_stripes(num_tokens, page_size),
            agreement_of(group)};
}

Tensor refine_tokens(const Storage& storage, const Tensor& query, int64_t num_kv_heads, const Tensor& page_ids,
                     const Tensor& length, const Tensor& padding, int64_t page_size, double scaling,
                     const TokenChoice& choice) {
    RefineParams params = {};
    set_step(params, storage, query.scalar_type(), query, num_kv_heads, length, padding, page_size, scaling);
    params.code_bits = choice.code_bits;
    params.num_stripes = page_ids.size(3);
    params.most_in_stripe = page_ids.size(4);
    params.num_tokens = choice.num_tokens;
    params.agreement = choice.agreement;
    params.page_ids = page_ids.data_ptr<int64_t>();
    params.num_blocks = count_refine_blocks(params);
    // Freed on return; the allocator keeps to the stream's order.
    const auto floats = query.options().dtype(at::kFloat);
    const int64_t num_heads = query.size(0) * num_kv_heads, num_slots = page_ids.size(3) * page_ids.size(4) * page_size;
    const Tensor logits = at::empty({num_heads, params.group_size, num_slots}, floats);
    const Tensor head_sums = at::empty(
        {num_heads, params.num_blocks, (params.group_size + kHeadTile - 1) / kHeadTile * kHeadTile, 2}, floats);
    const Tensor keys = at::empty({num_heads, num_slots}, query.options().dtype(at::kInt));
    const Tensor token_ids = at::empty({query.size(0), num_kv_heads, 1, choice.num_tokens}, page_ids.options());
    params.logits = logits.data_ptr<float>();
    params.head_sums = reinterpret_cast<float2*>(head_sums.data_ptr<float>());
    params.keys = reinterpret_cast<unsigned*>(keys.data_ptr<int>());
    params.token_ids = token_ids.data_ptr<int64_t>();
    C10_CUDA_CHECK(launch_refine(params));
    return token_ids;
}

// What `attend` and the chain are told, but for the pages.
AttendParams describe(const Storage& storage, at::ScalarType type, const Tensor& query, int64_t num_kv_heads,
                      const Tensor& length, const Tensor& padding, int64_t page_size, double scaling,
                      std::optional<double> softcap, const std::optional<Tensor>& sinks, const Tensor& output) {
    AttendParams params = {};
    set_step(params, storage, type, query, num_kv_heads, length, padding, page_size, scaling);
    params.softcap = softcap.value_or(0.0);
    params.sinks = sinks ? sinks->data_ptr() : nullptr;
    params.output = output.data_ptr();
    return params;
}

void attend_pages(AttendParams params, const std::optional<Tensor>& page_ids, const Tensor& counters) {
    params.num_selected = page_ids ? page_ids->size(3) : 0;
    params.page_ids = page_ids ? page_ids->data_ptr<int64_t>() : nullptr;
    params.counters = counters.data_ptr<int>();
    params.num_splits = count_splits(params);
    Tensor partial_output, partial_softmax;  // freed on return; the allocator keeps to the stream's order
    if (params.num_splits > 1) {
        const int64_t num_partials =
            int64_t(params.num_rows) * params.num_kv_heads * params.num_splits * padded_group(params.group_size);
        partial_output = at::empty({num_partials, params.head_dim}, counters.options().dtype(at::kFloat));
        partial_softmax = at::empty({num_partials, 2}, counters.options().dtype(at::kFloat));
        params.partial_output = partial_output.data_ptr<float>();
        params.partial_softmax = reinterpret_cast<float2*>(partial_softmax.data_ptr<float>());
    }
    C10_CUDA_CHECK(launch_attend(params));
}

// What `find` says of a launch with these shapes, of its `kind` the first time alone.
template <typename Find>
int find_once(int kind, const AttendParams& params, Find find) {
    using Shape = std::array<int, 11>;
    static std::map<Shape, int> known;
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    const TokenChoice& choice = params.choice;
    const Shape shape = {kind,
                         at::cuda::current_device(),
                         int(params.data_type),
                         params.head_dim,
                         params.page_size,
                         params.group_size,
                         params.num_kv_heads,
                         params.num_rows,
                         params.num_selected,
                         choice.code_bits,
                         choice.num_tokens};
    const auto found = known.find(shape);
    return found != known.end() ? found->second : known[shape] = find();
}

// The blocks of a cluster that does a whole choice, or 0.
int cluster_size_of(const AttendParams& params) {
    const bool is_by_codes = params.choice.code_bits > 0;
    // Shares take a normaliser over all pages, which clusters would have to exchange before their scores. Storage that
    // the device finds has bounds in 8 bits, if it has codes.
    const bool is_wide = params.storage.addresses == nullptr && params.storage.scales == nullptr;
    const bool is_fused = params.score.agreement == Agreement::kMax || params.group_size == 1;
    if (!is_fused || (is_by_codes && is_wide)) return 0;
    return find_once(0, params,
                     [&] { return is_by_codes ? find_cluster_size_by_codes(params) : find_cluster_size(params); });
}

// `num_selected` are pages that are attended, or candidates.
void set_choice(AttendParams& params, int64_t num_selected, const Score& score, const TokenChoice& choice) {
    params.num_selected = num_selected;
    params.score = score;
    params.choice = choice;
}

// Estimate, select and attend, or with codes find_candidates and refine in the place of select: fused where clusters
// serve, one by one otherwise. A pool is used where clusters serve by codes.
void attend_chosen(AttendParams params, const Tensor& query, const Tensor& length, const Tensor& padding, bool has_pool,
                   const std::optional<Tensor>& told_ids) {
    Storage& storage = params.storage;
    const TokenChoice& choice = params.choice;
    const bool is_by_codes = choice.code_bits > 0;
    const int cluster_size = cluster_size_of(params);
    const bool wants_scores = cluster_size == 0 ? true
                              : is_by_codes     ? needs_scores_by_codes(params, cluster_size)
                                                : needs_scores(params);
    Tensor scores;
    if (storage.scores == nullptr && storage.addresses == nullptr && wants_scores) {
        const int64_t num_pages = (storage.capacity + params.page_size - 1) / params.page_size;
        scores = at::empty({query.size(0), params.num_kv_heads, 1, num_pages}, query.options().dtype(at::kFloat));
        storage.scores = scores.data_ptr<float>();
    }
    if (cluster_size > 0) {
        params.told_ids = told_ids ? told_ids->data_ptr<int64_t>() : nullptr;
        const bool is_pooled =
            has_pool && is_by_codes && find_once(1, params, [&] { return has_pool_by_codes(params, cluster_size); });
        C10_CUDA_CHECK(is_pooled     ? launch_pooled_chain_by_codes(params, cluster_size)
                       : is_by_codes ? launch_chain_by_codes(params, cluster_size)
                                     : launch_chain(params, cluster_size));
        return;
    }
    estimate_pages(storage, query.scalar_type(), query, params.num_kv_heads, length, padding, params.page_size,
                   params.scaling, params.score);
    Tensor ids;
    if (is_by_codes) {
        const Tensor candidates =
            find_candidate_pages(storage, params.num_kv_heads, length, padding, params.num_selected, params.page_size,
                                 params.score.keeps_first, choice.num_stripes);
        ids = refine_tokens(storage, query, params.num_kv_heads, candidates, length, padding, params.page_size,
                            params.scaling, choice);
        params.page_size = 1;
    } else {
        ids = select_pages(storage, params.num_kv_heads, length, padding, params.num_selected, params.page_size,
                           params.score.keeps_first);
    }
    if (told_ids) told_ids->copy_(ids);
    const Tensor counters = at::zeros({query.size(0) * query.size(1)}, query.options().dtype(at::kInt));
    attend_pages(params, ids, counters);
}

void append(const Tensor& keys, const Tensor& values, const std::optional<Tensor>& bounds,
            const std::optional<Tensor>& scales, const Tensor& new_keys, const Tensor& new_values, const Tensor& length,
            const Tensor& padding, int64_t page_size, const std::optional<Tensor>& codes) {
    const c10::cuda::CUDAGuard guard(keys.device());
    Storage storage = {};
    storage.keys = address_of(keys);
    storage.values = address_of(values);
    if (bounds) set_bounds(storage, *bounds, scales);
    storage.capacity = keys.size(2);
    if (codes) storage.codes = static_cast<uint8_t*>(address_of(*codes));
    append_to(storage, keys.scalar_type(), new_keys, new_values, length, padding, page_size,
              code_bits_of(codes, keys.size(3)));
}

Tensor estimate(const Tensor& query, const Tensor& bounds, const std::optional<Tensor>& scales, const Tensor& length,
                const Tensor& padding, int64_t page_size, double scaling, double width, std::string_view group) {
    const c10::cuda::CUDAGuard guard(query.device());
    const Tensor scores =
        at::empty({bounds.size(0), bounds.size(1), 1, bounds.size(2)}, query.options().dtype(at::kFloat));
    Storage storage = {};
    set_bounds(storage, bounds, scales);
    storage.scores = scores.data_ptr<float>();
    storage.capacity = bounds.size(2) * page_size;
    const at::ScalarType type = scales ? query.scalar_type() : bounds.scalar_type();
    estimate_pages(storage, type, query, bounds.size(1), length, padding, page_size, scaling,
                   score_of(width, false, group));
    return scores;
}

Tensor select(const Tensor& scores, const Tensor& length, const Tensor& padding, int64_t num_selected,
              int64_t page_size, bool keeps_first) {
    const c10::cuda::CUDAGuard guard(scores.device());
    Storage storage = {};
    storage.scores = scores.data_ptr<float>();
    storage.capacity = scores.size(3) * page_size;
    return select_pages(storage, scores.size(1), length, padding, num_selected, page_size, keeps_first);
}

Tensor find_candidates(const Tensor& scores, const Tensor& length, const Tensor& padding, int64_t num_candidates,
                       int64_t page_size, bool keeps_first, int64_t num_stripes) {
    const c10::cuda::CUDAGuard guard(scores.device());
    Storage storage = {};
    storage.scores = scores.data_ptr<float>();
    storage.capacity = scores.size(3) * page_size;
    return find_candidate_pages(storage, scores.size(1), length, padding, num_candidates, page_size, keeps_first,
                                num_stripes);
}

Tensor refine(const Tensor& query, const Tensor& bounds, const std::optional<Tensor>& scales, const Tensor& codes,
              const Tensor& candidates, const Tensor& length, const Tensor& padding, int64_t page_size, double scaling,
              int64_t num_tokens, std::string_view group) {
    const c10::cuda::CUDAGuard guard(query.device());
    Storage storage = {};
    set_bounds(storage, bounds, scales);
    storage.codes = static_cast<uint8_t*>(address_of(codes));
    storage.capacity = codes.size(2);
    const TokenChoice choice = choice_of(code_bits_of(codes, query.size(3)), 0, num_tokens, page_size, group);
    return refine_tokens(storage, query, bounds.size(1), candidates, length, padding, page_size, scaling, choice);
}

Tensor attend(const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& page_ids,
              const Tensor& length, const Tensor& padding, const Tensor& counters, int64_t page_size, double scaling,
              std::optional<double> softcap, const std::optional<Tensor>& sinks) {
    const c10::cuda::CUDAGuard guard(query.device());
    Storage storage = {};
    storage.keys = address_of(keys);
    storage.values = address_of(values);
    storage.capacity = keys.size(2);
    const Tensor output = at::empty(query.sizes(), query.options());
    attend_pages(describe(storage, keys.scalar_type(), query, keys.size(1), length, padding, page_size, scaling,
                          softcap, sinks, output),
                 page_ids, counters);
    return output;
}

Tensor chain(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& bounds,
             const std::optional<Tensor>& scales, const Tensor& length, const Tensor& padding, int64_t num_selected,
             int64_t page_size, double scaling, std::optional<double> softcap, const std::optional<Tensor>& sinks,
             const std::optional<Tensor>& page_ids, double width, bool keeps_first, std::string_view group,
             const std::optional<Tensor>& codes, int64_t num_tokens, std::string_view token_group,
             const std::optional<Tensor>& pool_keys, const std::optional<Tensor>& pool_values,
             const std::optional<Tensor>& pool_tags, const std::optional<Tensor>& pool_counts) {
    const c10::cuda::CUDAGuard guard(query.device());
    Storage storage = {};
    storage.keys = address_of(keys);
    storage.values = address_of(values);
    set_bounds(storage, bounds, scales);
    storage.capacity = keys.size(2);
    if (codes) storage.codes = static_cast<uint8_t*>(address_of(*codes));
    const TokenChoice choice =
        choice_of(code_bits_of(codes, keys.size(3)), num_selected, num_tokens, page_size, token_group);
    const Tensor output = at::empty(query.sizes(), query.options());
    AttendParams params = describe(storage, keys.scalar_type(), query, keys.size(1), length, padding, page_size,
                                   scaling, softcap, sinks, output);
    if (pool_keys) {
        params.pool = {address_of(*pool_keys), address_of(*pool_values), static_cast<uint64_t*>(address_of(*pool_tags)),
                       static_cast<uint64_t*>(address_of(*pool_counts)), pool_keys->size(2)};
    }
    set_choice(params, num_selected, score_of(width, keeps_first, group), choice);
    attend_chosen(params, query, length, padding, pool_keys.has_value(), page_ids);
    return output;
}

// A whole decode step of one layer, whose storage the device finds in its row of `addresses`.
Tensor decode(const Tensor& query, const std::optional<Tensor>& new_keys, const std::optional<Tensor>& new_values,
              const Tensor& addresses, const Tensor& length, const Tensor& padding, int64_t layer_idx,
              int64_t num_kv_heads, int64_t num_selected, int64_t page_size, double scaling,
              std::optional<double> softcap, const std::optional<Tensor>& sinks, double width, bool keeps_first,
              std::string_view group, int64_t code_bits, int64_t num_tokens, std::string_view token_group,
              bool has_pool) {
    const c10::cuda::CUDAGuard guard(query.device());
    Storage storage = {};
    storage.capacity = kAnyCapacity;
    storage.addresses = addresses.data_ptr<int64_t>() + layer_idx * addresses.size(1);
    const Tensor output = at::empty(query.sizes(), query.options());
    AttendParams params = describe(storage, query.scalar_type(), query, num_kv_heads, length, padding, page_size,
                                   scaling, softcap, sinks, output);
    if (num_selected > 0) {
        const TokenChoice choice = choice_of(code_bits, num_selected, num_tokens, page_size, token_group);
        set_choice(params, num_selected, score_of(width, keeps_first, group), choice);
    }
    if (new_keys && num_selected > 0 && cluster_size_of(params) > 0) {
        params.new_token = token_of(query.scalar_type(), *new_keys, *new_values);
    } else if (new_keys) {
        append_to(storage, query.scalar_type(), *new_keys, *new_values, length, padding, page_size, code_bits);
    }
    if (num_selected > 0) {
        attend_chosen(params, query, length, padding, has_pool, std::nullopt);
    } else {
        attend_pages(params, std::nullopt, at::zeros({query.size(0) * query.size(1)}, query.options().dtype(at::kInt)));
    }
    return output;
}

// The strides of the first two dimensions, of which the copy engine wants multiples of 16 bytes. Of one whose size is 1
// it may be anything, so a row's length stands in for it.
void set_strides(int64_t (&strides)[2], const Tensor& tokens) {
    rows_of(tokens.unsqueeze(0), tokens.scalar_type());
    for (int dim = 0; dim < 2; ++dim) strides[dim] = tokens.size(dim) == 1 ? tokens.size(2) : tokens.stride(dim);
}

void set_prompt(PromptParams& params, const Tensor& query, const Tensor& keys, int64_t first_position,
                int64_t segment_size, int64_t block_size, double scaling) {
    params.launch = launch_on_current_stream();
    params.data_type = data_type_of(query);
    params.num_kv_heads = keys.size(0);
    params.group_size = query.size(0) / keys.size(0);
    params.segment_size = segment_size;
    params.block_size = block_size;
    params.num_segments = query.size(1) / segment_size;
    params.first_position = first_position;
    params.scaling = scaling;
    params.query = address_of(query);
    params.keys = address_of(keys);
    set_strides(params.query_strides, query);
    set_strides(params.key_strides, keys);
}

Tensor prompt_estimate(const Tensor& query, const Tensor& keys, int64_t first_position, int64_t segment_size,
                       int64_t sample_stride, int64_t block_size, double scaling) {
    const c10::cuda::CUDAGuard guard(query.device());
    PromptEstimateParams params = {};
    set_prompt(params, query, keys, first_position, segment_size, block_size, scaling);
    params.query_strides[1] *= sample_stride;
    params.num_samples = segment_size / sample_stride;
    params.num_blocks = (first_position + query.size(1) - segment_size) / block_size;
    const int64_t num_rows = query.size(0) * params.num_segments * params.num_samples;
    const int64_t num_chunks = (params.num_blocks * block_size + kEstimateChunk - 1) / kEstimateChunk;
    const Tensor maxima = at::empty({num_rows, params.num_blocks}, query.options().dtype(at::kHalf));
    const Tensor softmax = at::empty({num_rows, num_chunks, 2}, query.options().dtype(at::kFloat));
    const Tensor scores = at::empty({keys.size(0), params.num_segments, params.num_blocks}, softmax.options());
    params.maxima = reinterpret_cast<__half*>(maxima.data_ptr());
    params.softmax = reinterpret_cast<float2*>(softmax.data_ptr<float>());
    params.scores = scores.data_ptr<float>();
    C10_CUDA_CHECK(launch_prompt_estimate(params));
    return scores;
}

void prompt_attend(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& block_ids,
                   const Tensor& output, int64_t first_position, int64_t segment_size, int64_t block_size,
                   double scaling, const std::optional<Tensor>& sinks) {
    const c10::cuda::CUDAGuard guard(query.device());
    PromptAttendParams params = {};
    set_prompt(params, query, keys, first_position, segment_size, block_size, scaling);
    params.num_selected = block_ids.size(2);
    params.values = address_of(values);
    set_strides(params.value_strides, values);
    params.block_ids = block_ids.data_ptr<int64_t>();
    params.sinks = sinks ? sinks->data_ptr() : nullptr;
    params.output = address_of(output);
    set_strides(params.output_strides, output);
    C10_CUDA_CHECK(launch_prompt_attend(params));
}

}  // namespace hf_quest::operators

TORCH_LIBRARY_IMPL(hf_quest, CUDA, library) {
    library.impl("append", &hf_quest::operators::append);
    library.impl("estimate", &hf_quest::operators::estimate);
    library.impl("select", &hf_quest::operators::select);
    library.impl("find_candidates", &hf_quest::operators::find_candidates);
    library.impl("refine", &hf_quest::operators::refine);
    library.impl("attend", &hf_quest::operators::attend);
    library.impl("chain", &hf_quest::operators::chain);
    library.impl("decode", &hf_quest::operators::decode);
    library.impl("prompt_estimate", &hf_quest::operators::prompt_estimate);
    library.impl("prompt_attend", &hf_quest::operators::prompt_attend);
}
