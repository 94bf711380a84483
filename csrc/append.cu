// append: store new keys and values after the stored ones, and widen the bounds of their pages in the same pass.
//
// A thread owns 8 channels (16 bytes) of one page of one KV head. It copies the page's new tokens, 8 at a time with all
// loads before the stores, and keeps the minimum and maximum of the keys in registers. A page that begins among the new
// tokens starts its bounds afresh; an older one starts from the bounds that it has, and no stored key is read again.
// Slots before a row's padding are cut into pages as well, of negative index: they are copied and have no bounds.

#include "common.cuh"

namespace hf_quest {
namespace {

constexpr int kThreads = 128;
constexpr int kVector = 8;  // channels
constexpr int kTokensInFlight = 8;

template <typename T>
__device__ void widen(uint4& lowest, uint4& highest, uint4 key) {
    const auto low = [](uint32_t a, uint32_t b) { return as_bits(__hmin2_nan(as_pair<T>(a), as_pair<T>(b))); };
    const auto high = [](uint32_t a, uint32_t b) { return as_bits(__hmax2_nan(as_pair<T>(a), as_pair<T>(b))); };
    lowest = {low(lowest.x, key.x), low(lowest.y, key.y), low(lowest.z, key.z), low(lowest.w, key.w)};
    highest = {high(highest.x, key.x), high(highest.y, key.y), high(highest.z, key.z), high(highest.w, key.w)};
}

template <typename T>
__global__ void __launch_bounds__(kThreads) append_kernel(const AppendParams params) {
    wait_for_previous_kernel();
    let_next_kernel_begin();
    const Storage storage = find(params.storage);
    const int num_vectors = params.head_dim / kVector;
    const int pages_per_block = blockDim.x / num_vectors;
    const int vector_idx = threadIdx.x % num_vectors;
    const int64_t touched_idx = int64_t(blockIdx.x) * pages_per_block + threadIdx.x / num_vectors;
    const int kv_head_idx = blockIdx.y, row_idx = blockIdx.z;
    if (threadIdx.x / num_vectors >= pages_per_block) return;

    const int64_t end = *params.length, first = end - params.num_new;
    const int64_t padding = params.padding[row_idx];
    const int page_shift = __ffs(params.page_size) - 1;
    const int64_t page_idx = ((first - padding) >> page_shift) + touched_idx;
    const int64_t page_start = padding + (page_idx << page_shift);
    const int64_t slot_begin = max(max(first, page_start), int64_t(0));
    const int64_t slot_end = min(min(end, storage.capacity), page_start + params.page_size);
    if (slot_begin >= slot_end) return;

    const int64_t head_idx = int64_t(row_idx) * params.num_kv_heads + kv_head_idx;
    const auto new_vector = [&](const void* tokens, const int64_t (&strides)[3]) {
        const int64_t offset = row_idx * strides[0] + kv_head_idx * strides[1] - first * strides[2];
        return static_cast<const T*>(tokens) + offset + vector_idx * kVector;
    };
    const T* new_keys = new_vector(params.new_keys, params.key_strides);
    const T* new_values = new_vector(params.new_values, params.value_strides);
    const int64_t stored = head_idx * storage.capacity * num_vectors + vector_idx;
    uint4* keys = static_cast<uint4*>(storage.keys) + stored;
    uint4* values = static_cast<uint4*>(storage.values) + stored;

    const int64_t num_pages = count_pages(storage, params.page_size);
    const bool has_bounds = storage.bounds != nullptr && page_idx >= 0 && page_idx < num_pages;
    uint4* bounds = nullptr;
    constexpr uint32_t kInfinity = std::is_same_v<T, __half> ? 0x7c007c00u : 0x7f807f80u;
    constexpr uint32_t kMinusInfinity = kInfinity | 0x80008000u;
    uint4 lowest = {kInfinity, kInfinity, kInfinity, kInfinity};
    uint4 highest = {kMinusInfinity, kMinusInfinity, kMinusInfinity, kMinusInfinity};
    if (has_bounds) {
        bounds = static_cast<uint4*>(storage.bounds) + (head_idx * num_pages + page_idx) * 2 * num_vectors;
        bounds += vector_idx;
        if (page_start < first) {
            lowest = bounds[0];
            highest = bounds[num_vectors];
        }
    }

    for (int64_t slot = slot_begin; slot < slot_end; slot += kTokensInFlight) {
        uint4 key[kTokensInFlight], value[kTokensInFlight];
#pragma unroll
        for (int i = 0; i < kTokensInFlight; ++i) {
            if (slot + i < slot_end) {
                key[i] = load_once(reinterpret_cast<const uint4*>(new_keys + (slot + i) * params.key_strides[2]));
                value[i] = load_once(reinterpret_cast<const uint4*>(new_values + (slot + i) * params.value_strides[2]));
            }
        }
#pragma unroll
        for (int i = 0; i < kTokensInFlight; ++i) {
            if (slot + i < slot_end) {
                keys[(slot + i) * num_vectors] = key[i];
                values[(slot + i) * num_vectors] = value[i];
                widen<T>(lowest, highest, key[i]);
            }
        }
    }
    if (has_bounds) {
        bounds[0] = lowest;
        bounds[num_vectors] = highest;
    }
}

}  // namespace

cudaError_t launch_append(const AppendParams& params) {
    const int num_threads = params.num_new == 1 ? kWarpSize : kThreads;
    const int64_t pages_per_block = num_threads / (params.head_dim / kVector);
    const int64_t num_touched = ceil_div<int64_t>(params.num_new - 1, params.page_size) + 1;
    const dim3 grid(unsigned(ceil_div(num_touched, pages_per_block)), params.num_kv_heads, params.num_rows);
    const auto kernel = params.data_type == DataType::kHalf ? append_kernel<__half> : append_kernel<__nv_bfloat16>;
    return launch(kernel, grid, num_threads, 0, params);
}

}  // namespace hf_quest
