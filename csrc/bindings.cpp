// The CUDA implementations of the operators whose schemas, fakes and checks stand in hf_quest/ops.py.

#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <cstdlib>
#include <optional>

#include "params.h"

namespace hf_quest::operators {

using at::Tensor;

Launch launch_on_current_stream() {
    static const bool is_allowed = std::getenv("HF_QUEST_NO_OVERLAP") == nullptr;
    const cudaDeviceProp* gpu = at::cuda::getCurrentDeviceProperties();
    return {at::cuda::getCurrentCUDAStream(), gpu->multiProcessorCount, is_allowed && gpu->major >= 9};
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

void append(const Tensor& keys, const Tensor& values, const std::optional<Tensor>& bounds, const Tensor& new_keys,
            const Tensor& new_values, const Tensor& length, const Tensor& padding, int64_t page_size) {
    const c10::cuda::CUDAGuard guard(keys.device());
    AppendParams params = {};
    params.launch = launch_on_current_stream();
    params.data_type = data_type_of(keys);
    params.num_rows = keys.size(0);
    params.num_kv_heads = keys.size(1);
    params.head_dim = keys.size(3);
    params.page_size = page_size;
    params.capacity = keys.size(2);
    params.num_pages = bounds ? bounds->size(2) : 0;
    params.num_new = new_keys.size(2);
    params.new_keys = address_of(new_keys);
    params.new_values = address_of(new_values);
    for (int dim = 0; dim < 3; ++dim) {
        params.key_strides[dim] = new_keys.stride(dim);
        params.value_strides[dim] = new_values.stride(dim);
    }
    params.length = length.data_ptr<int64_t>();
    params.padding = padding.data_ptr<int64_t>();
    params.keys = address_of(keys);
    params.values = address_of(values);
    params.bounds = bounds ? address_of(*bounds) : nullptr;
    C10_CUDA_CHECK(launch_append(params));
}

Tensor estimate(const Tensor& query, const Tensor& bounds, const Tensor& length, const Tensor& padding,
                int64_t page_size, double scaling) {
    const c10::cuda::CUDAGuard guard(query.device());
    const Tensor scores =
        at::empty({bounds.size(0), bounds.size(1), 1, bounds.size(2)}, query.options().dtype(at::kFloat));
    EstimateParams params = {};
    params.launch = launch_on_current_stream();
    params.data_type = data_type_of(query);
    params.num_rows = bounds.size(0);
    params.num_kv_heads = bounds.size(1);
    params.group_size = query.size(1) / bounds.size(1);
    params.head_dim = query.size(3);
    params.page_size = page_size;
    params.num_pages = bounds.size(2);
    params.scaling = scaling;
    params.query = address_of(query);
    params.query_strides[0] = query.stride(0);
    params.query_strides[1] = query.stride(1);
    params.bounds = address_of(bounds);
    params.length = length.data_ptr<int64_t>();
    params.padding = padding.data_ptr<int64_t>();
    params.scores = scores.data_ptr<float>();
    C10_CUDA_CHECK(launch_estimate(params));
    return scores;
}

Tensor select(const Tensor& scores, const Tensor& length, const Tensor& padding, int64_t num_selected,
              int64_t page_size) {
    const c10::cuda::CUDAGuard guard(scores.device());
    const Tensor page_ids =
        at::empty({scores.size(0), scores.size(1), 1, num_selected}, scores.options().dtype(at::kLong));
    SelectParams params = {};
    params.launch = launch_on_current_stream();
    params.num_rows = scores.size(0);
    params.num_kv_heads = scores.size(1);
    params.page_size = page_size;
    params.num_selected = num_selected;
    params.num_pages = scores.size(3);
    params.scores = scores.data_ptr<float>();
    params.length = length.data_ptr<int64_t>();
    params.padding = padding.data_ptr<int64_t>();
    params.page_ids = page_ids.data_ptr<int64_t>();
    C10_CUDA_CHECK(launch_select(params));
    return page_ids;
}

Tensor attend(const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& page_ids,
              const Tensor& length, const Tensor& padding, const Tensor& counters, int64_t page_size, double scaling,
              std::optional<double> softcap, const std::optional<Tensor>& sinks) {
    const c10::cuda::CUDAGuard guard(query.device());
    const Tensor output = at::empty(query.sizes(), query.options());
    AttendParams params = {};
    params.launch = launch_on_current_stream();
    params.data_type = data_type_of(query);
    params.num_rows = keys.size(0);
    params.num_kv_heads = keys.size(1);
    params.group_size = query.size(1) / keys.size(1);
    params.head_dim = keys.size(3);
    params.page_size = page_size;
    params.num_selected = page_ids ? page_ids->size(3) : 0;
    params.capacity = keys.size(2);
    params.scaling = scaling;
    params.softcap = softcap.value_or(0.0);
    params.query = address_of(query);
    params.query_strides[0] = query.stride(0);
    params.query_strides[1] = query.stride(1);
    params.keys = address_of(keys);
    params.values = address_of(values);
    params.page_ids = page_ids ? page_ids->data_ptr<int64_t>() : nullptr;
    params.length = length.data_ptr<int64_t>();
    params.padding = padding.data_ptr<int64_t>();
    params.sinks = sinks ? sinks->data_ptr() : nullptr;
    params.counters = counters.data_ptr<int>();
    params.output = output.data_ptr();
    params.num_splits = count_splits(params);

    Tensor partial_output, partial_softmax;  // freed on return; the allocator keeps to the stream's order
    if (params.num_splits > 1) {
        const int64_t num_partials = keys.size(0) * keys.size(1) * params.num_splits * padded_group(params.group_size);
        partial_output = at::empty({num_partials, params.head_dim}, query.options().dtype(at::kFloat));
        partial_softmax = at::empty({num_partials, 2}, query.options().dtype(at::kFloat));
        params.partial_output = partial_output.data_ptr<float>();
        params.partial_softmax = reinterpret_cast<float2*>(partial_softmax.data_ptr<float>());
    }
    C10_CUDA_CHECK(launch_attend(params));
    return output;
}

}  // namespace hf_quest::operators

TORCH_LIBRARY_IMPL(hf_quest, CUDA, library) {
    library.impl("append", &hf_quest::operators::append);
    library.impl("estimate", &hf_quest::operators::estimate);
    library.impl("select", &hf_quest::operators::select);
    library.impl("attend", &hf_quest::operators::attend);
}
