// append: store new keys and values after the stored ones, and widen the bounds of their pages in the same pass.
//
// A thread owns 8 channels (16 bytes) of one page of one KV head. It copies the page's new tokens, 8 at a time with all
// loads before the stores, and keeps the minimum and maximum of the keys in registers. A page that begins among the new
// tokens starts its bounds afresh; an older one starts from the bounds that it has, and no stored key is read again:
// bounds of 8 bits, once rounded outwards, widen to what rounding the bounds of all keys would give.
// When a page is full its keys are read once more, and their codes written by its bounds: where one token is new, by a
// whole block, whose threads know the bounds as well and have a few keys each.
// Slots before a row's padding are cut into pages as well, of negative index: they are copied and have no bounds.

#include "append.cuh"

namespace hf_quest {
namespace {

constexpr int kThreads = 128;
constexpr int kTokensInFlight = 8;

template <typename T, int kBits>  // of codes, or 0
__global__ void __launch_bounds__(kThreads, kBits > 0 ? 3 : 0) append_kernel(const AppendParams params) {
    wait_for_previous_kernel();
    let_next_kernel_begin();
    const Storage storage = find(params.storage);
    const int num_vectors = params.head_dim / kVector;
    const int pages_per_block = blockDim.x / num_vectors;
    const int vector_idx = threadIdx.x % num_vectors, page_of_block = threadIdx.x / num_vectors;
    const int kv_head_idx = blockIdx.y, row_idx = blockIdx.z;
    if (page_of_block >= pages_per_block) return;
    // Where one token is new there is one page, of which the threads for others make some codes.
    const bool is_shared = kBits > 0 && params.num_new == 1;
    const int num_sharing = is_shared ? pages_per_block : 1, first_key = is_shared ? page_of_block : 0;
    const int64_t touched_idx = is_shared ? 0 : int64_t(blockIdx.x) * pages_per_block + page_of_block;

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
    const int64_t first_vector = (head_idx * num_pages + page_idx) * 2 * num_vectors + vector_idx;
    uint4* bounds = static_cast<uint4*>(storage.bounds) + first_vector;
    const bool has_bounds8 = has_bounds && storage.scales != nullptr;
    uint2* bounds8 = static_cast<uint2*>(storage.bounds) + first_vector;
    uint8_t* scale = storage.scales + ((head_idx * num_pages + page_idx) * num_vectors + vector_idx) / 4;
    Bounds8 widest = {};
    constexpr uint32_t kInfinity = std::is_same_v<T, __half> ? 0x7c007c00u : 0x7f807f80u;
    constexpr uint32_t kMinusInfinity = kInfinity | 0x80008000u;
    uint4 lowest = {kInfinity, kInfinity, kInfinity, kInfinity};
    uint4 highest = {kMinusInfinity, kMinusInfinity, kMinusInfinity, kMinusInfinity};
    if (has_bounds && page_start < first) {
        if (has_bounds8) {
            widest = {bounds8[0], bounds8[num_vectors], *scale};
        } else {
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
                widen<T>(lowest, highest, key[i]);
                if (first_key > 0) continue;
                keys[(slot + i) * num_vectors] = key[i];
                values[(slot + i) * num_vectors] = value[i];
            }
        }
    }
    if (is_shared) __syncthreads();  // all have read the bounds, and see the key
    if (has_bounds8) widen<T>(widest, lowest, highest);
    if (first_key > 0) {
        // another thread writes the bounds
    } else if (has_bounds8) {
        bounds8[0] = widest.lowest;
        bounds8[num_vectors] = widest.highest;
        if (vector_idx % 4 == 0) *scale = uint8_t(widest.exponent);
    } else if (has_bounds) {
        bounds[0] = lowest;
        bounds[num_vectors] = highest;
    }
    if constexpr (kBits > 0) {
        const bool is_full = slot_end == page_start + params.page_size;
        if (!has_bounds || !is_full) return;
        float low[kVector], high[kVector];
        if (has_bounds8) {
            widest.to_floats(low, high);
        } else {
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                low[i] = to_float(reinterpret_cast<const T*>(&lowest)[i]);
                high[i] = to_float(reinterpret_cast<const T*>(&highest)[i]);
            }
        }
        const int64_t code_bytes = params.head_dim * kBits / 8;
        const int64_t first_slot = page_start + first_key;
        const int num_keys = (params.page_size - first_key + num_sharing - 1) / num_sharing;
        uint8_t* codes = storage.codes + (head_idx * storage.capacity + first_slot) * code_bytes;
        encode<T, kBits>(keys + first_slot * num_vectors, num_sharing * num_vectors, num_keys, low, high,
                         codes + vector_idx * kBits, num_sharing * code_bytes);
    }
}

}  // namespace

cudaError_t launch_append(const AppendParams& params) {
    const int num_vectors = params.head_dim / kVector;
    const int of_one = params.code_bits > 0 ? kThreads / num_vectors * num_vectors : kWarpSize;
    const int num_threads = params.num_new == 1 ? of_one : kThreads;
    const int64_t pages_per_block = num_threads / num_vectors;
    const int64_t num_touched = ceil_div<int64_t>(params.num_new - 1, params.page_size) + 1;
    const dim3 grid(unsigned(ceil_div(num_touched, pages_per_block)), params.num_kv_heads, params.num_rows);
    const auto run = [&](auto bits) {
        constexpr int kBits = decltype(bits)::value;
        const bool is_half = params.data_type == DataType::kHalf;
        const auto kernel = is_half ? append_kernel<__half, kBits> : append_kernel<__nv_bfloat16, kBits>;
        return launch(kernel, grid, num_threads, 0, params);
    };
    switch (params.code_bits) {
        case 0: return run(std::integral_constant<int, 0>());
        case 2: return run(std::integral_constant<int, 2>());
        case 4: return run(std::integral_constant<int, 4>());
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace hf_quest
