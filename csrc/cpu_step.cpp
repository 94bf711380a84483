// The stages of a decode step on a CPU, one query per row in rows without padding; hf_quest/reference.py says what they
// mean and what the letters of the shapes stand for, hf_quest/kernels/cpu.py calls them.
//
// Work is cut into items, which the threads of PyTorch's own OpenMP take one after the other. It is reached by a
// pointer to its GOMP_parallel, so that no second pool waits for work on the same cores, and no compiler needs its
// headers. Attention is by blocks of tokens: their logits, a running maximum, and the weighted sum of their values;
// what several items have of a KV head is put together at the end. Loops are left to the compiler, which knows this
// machine.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kBlock = 64;  // tokens whose logits are held at once
constexpr int kMaxGroup = 128;  // query heads of a KV head
constexpr int kMaxDim = 1024;  // channels
constexpr int kScaleBlock = 32;  // channels that share a scale
constexpr int64_t kLeastWork = 1 << 15;  // products that are worth another thread
constexpr float kLargest = 1e30f;  // what a score counts as at most, LARGEST_SCORE

using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Threads {
    Fork fork;  // GOMP_parallel, or null
    int num;
};

// Call work(item) for all items, by all threads or, if there is little to do, by this one.
template <class Work>
void for_each(int64_t num_items, int64_t num_products, Threads threads, const Work& work) {
    if (threads.fork == nullptr || threads.num < 2 || num_items < 2 || num_products < 2 * kLeastWork) {
        for (int64_t item = 0; item < num_items; item++) work(item);
        return;
    }
    struct Job {
        const Work& work;
        int64_t num_items;
        std::atomic<int64_t> next{0};
    } job{work, num_items};
    auto run = [](void* data) {
        Job& job = *static_cast<Job*>(data);
        for (int64_t item; (item = job.next++) < job.num_items;) job.work(item);
    };
    threads.fork(run, &job, threads.num, 0);
}

float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

struct BFloat16 {
    uint16_t bits;
    operator float() const { return from_bits(uint32_t(bits) << 16); }
};

struct Half {
    uint16_t bits;
    operator float() const {
        uint32_t magnitude = uint32_t(bits & 0x7fff) << 13;
        uint32_t scaled = bits_of(from_bits(magnitude) * 0x1p112f);  // subnormal numbers, too
        uint32_t special = magnitude | 0x7f800000;  // infinite, or not a number
        return from_bits((magnitude >= 0x0f800000 ? special : scaled) | uint32_t(bits & 0x8000) << 16);
    }
};

// e^x for x <= 0, to about 1e-7 of it; not a number for none.
float exponential(float x) {
    float clamped = x < -88.0f ? -88.0f : x;
    float shifted = clamped * 1.44269504f + 12582912.0f;  // whose last bits are the nearest integer
    float whole = shifted - 12582912.0f;
    float rest = clamped - whole * 0.693359375f + whole * 2.12194440e-4f;
    float power = 1.9875691500e-4f * rest + 1.3981999507e-3f;
    power = (power * rest + 8.3334519073e-3f) * rest + 4.1665795894e-2f;
    power = (power * rest + 1.6666665459e-1f) * rest + 5.0000001201e-1f;
    power = (power * rest + 1) * rest + 1;
    return x < -87.0f ? 0.0f : power * from_bits((bits_of(shifted) + 127) << 23);
}

// Numbers of a vector register, and how many of them hold sums at once.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTile = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kTile = 2;
#else
constexpr int kLanes = 4, kTile = 4;
#endif
template <class Number, int kNum = kLanes>
using Vector __attribute__((vector_size(sizeof(Number) * kNum))) = Number;
using Floats = Vector<float>;
using Words = Vector<uint32_t>;

template <class To, class From>
To read(const From* from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

Floats load(const float* from) { return read<Floats>(from); }
Floats load(const int8_t* from) {  // in steps that compilers have instructions for
    const auto wider = __builtin_convertvector(read<Vector<int8_t>>(from), Vector<int16_t>);
    return __builtin_convertvector(__builtin_convertvector(wider, Vector<int32_t>), Floats);
}
Floats load(const BFloat16* from) {
    return (Floats)(__builtin_convertvector(read<Vector<uint16_t>>(from), Words) << 16);
}
Floats load(const Half* from) {
    const Words bits = __builtin_convertvector(read<Vector<uint16_t>>(from), Words), magnitude = (bits & 0x7fff) << 13;
    const Words scaled = (Words)((Floats)magnitude * 0x1p112f);  // subnormal numbers, too
    const Words is_special = (Words)(magnitude >= 0x0f800000);  // infinite, or not a number
    return (Floats)(scaled | (is_special & 0x7f800000) | (bits & 0x8000) << 16);
}

// A vector of four numbers whose sum is that of all.
Vector<float, 4> folded(Floats numbers) {
    float parts[kLanes];
    std::memcpy(parts, &numbers, sizeof parts);
    auto sum = read<Vector<float, 4>>(parts);
    for (int i = 4; i < kLanes; i += 4) sum += read<Vector<float, 4>>(parts + i);
    return sum;
}

// Products of `kHeads` queries [.., dim] with the vector of which at(d) is what begins at channel d: four numbers for
// each, `stride` from those of the next, whose sum it is.
template <int kHeads, class At>
void multiply(const float* query, int64_t dim, const At& at, float* products, int64_t stride) {
    Floats sums[kHeads] = {};
    for (int64_t d = 0; d < dim; d += kLanes) {
        const Floats numbers = at(d);
        for (int g = 0; g < kHeads; g++) sums[g] += load(query + g * dim + d) * numbers;
    }
    for (int g = 0; g < kHeads; g++) {
        const auto four = folded(sums[g]);
        std::memcpy(products + g * stride, &four, sizeof four);
    }
}

float sum_of(const float* four) { return (four[0] + four[1]) + (four[2] + four[3]); }

// Call work(heads, first) for all heads, up to four at a time; `heads` has their number as a type.
template <class Work>
void by_heads(int64_t num_heads, const Work& work) {
    int64_t first = 0;
    for (; first + 4 <= num_heads; first += 4) work(std::integral_constant<int, 4>(), first);
    if (num_heads - first == 3) work(std::integral_constant<int, 3>(), first);
    if (num_heads - first == 2) work(std::integral_constant<int, 2>(), first);
    if (num_heads - first == 1) work(std::integral_constant<int, 1>(), first);
}

struct Estimate {
    const float* query;  // [rows, G, D]
    const void* bounds;  // [rows, capacity, 2, D]
    const uint8_t* scales;  // [rows, capacity, D / 32] or null
    float* scores;  // [rows, P]
    int64_t num_rows, group_size, head_dim, num_pages, capacity;
    float scaling, width;
};

template <class T>
void estimate(const Estimate& of, Threads threads) {
    constexpr int64_t kPages = 128;
    const int64_t dim = of.head_dim, num_scales = (dim + kScaleBlock - 1) / kScaleBlock;
    const int64_t num_chunks = (of.num_pages + kPages - 1) / kPages;
    // What the minimum and the maximum of a channel count.
    std::vector<float> weights(of.num_rows * of.group_size * 2 * dim);
    const float outer = (1 + of.width) / 2, inner = (1 - of.width) / 2;
    for (int64_t head = 0; head < of.num_rows * of.group_size; head++) {
        for (int64_t d = 0; d < dim; d++) {
            float channel = of.query[head * dim + d], negative = std::min(channel, 0.0f),
                  positive = std::max(channel, 0.0f);
            weights[head * 2 * dim + d] = outer * negative + inner * positive;
            weights[(head * 2 + 1) * dim + d] = outer * positive + inner * negative;
        }
    }
    const int64_t num_products = of.num_rows * of.group_size * of.num_pages * 2 * dim;
    for_each(of.num_rows * num_chunks, num_products, threads, [&](int64_t item) {
        const int64_t row = item / num_chunks, first = item % num_chunks * kPages;
        float scales[kMaxDim / kScaleBlock], products[4 * 4];
        for (int64_t page = first; page < std::min(first + kPages, of.num_pages); page++) {
            const T* bounds = static_cast<const T*>(of.bounds) + (row * of.capacity + page) * 2 * dim;
            if (of.scales)
                for (int64_t i = 0; i < num_scales; i++)
                    scales[i] = from_bits(uint32_t(of.scales[(row * of.capacity + page) * num_scales + i]) << 23);
            float best = -INFINITY;
            by_heads(of.group_size, [&](auto heads, int64_t first_head) {
                const float* query = &weights[(row * of.group_size + first_head) * 2 * dim];
                multiply<heads>(
                    query, 2 * dim,
                    [&](int64_t d) {
                        Floats numbers = load(bounds + d);
                        if (of.scales) numbers *= scales[(d < dim ? d : d - dim) / kScaleBlock];
                        return numbers;
                    },
                    products, 4);
                for (int g = 0; g < heads; g++) {
                    const float score = sum_of(products + g * 4);
                    if (score > best || score != score) best = score;
                }
            });
            of.scores[row * of.num_pages + page] = best * of.scaling;
        }
    });
}

struct Attend {
    const float* query;  // [B, Hkv, G, D]
    const void *keys, *values;
    const int64_t* strides;  // of B, Hkv and slots, of keys and then of values
    const int64_t* ids;  // [B, Hkv, K], -1 for none, or null for all tokens
    float* output;  // [B, Hkv, G, Dv]
    int64_t batch_size, num_kv_heads, group_size, head_dim, value_dim;
    int64_t num_ids, size, length;
    float scaling;
};

// Add to kVectors vectors of sums of each head the values of tokens, weighted.
template <int kHeads, int kVectors, class T>
void add_values(float* sums, int64_t stride, const float* weights, const T* values, int64_t value_stride,
                const int64_t* slots, int64_t num) {
    Floats sum[kHeads][kVectors];
    for (int g = 0; g < kHeads; g++)
        for (int v = 0; v < kVectors; v++) sum[g][v] = load(sums + g * stride + v * kLanes);
    for (int64_t i = 0; i < num; i++) {
        for (int v = 0; v < kVectors; v++) {
            const Floats numbers = load(values + slots[i] * value_stride + v * kLanes);
            for (int g = 0; g < kHeads; g++) sum[g][v] += weights[g * kBlock + i] * numbers;
        }
    }
    for (int g = 0; g < kHeads; g++)
        for (int v = 0; v < kVectors; v++) std::memcpy(sums + g * stride + v * kLanes, &sum[g][v], sizeof(Floats));
}

// Into `parts`, for each query head: the largest logit, the sum of weights relative to it, and that of values so
// weighted.
template <class T>
void attend_tokens(const Attend& of, int64_t row, int64_t first, int64_t last, float* parts) {
    const int64_t batch = row / of.num_kv_heads, head = row % of.num_kv_heads;
    const T* keys = static_cast<const T*>(of.keys) + batch * of.strides[0] + head * of.strides[1];
    const T* values = static_cast<const T*>(of.values) + batch * of.strides[3] + head * of.strides[4];
    const float* query = of.query + row * of.group_size * of.head_dim;
    const int64_t part_size = of.value_dim + 2;
    float weights[kMaxGroup][kBlock];
    for (int64_t g = 0; g < of.group_size; g++) parts[g * part_size] = -INFINITY;
    while (first < last) {
        int64_t slots[kBlock], num = 0;
        for (; first < last && num < kBlock; first++) {
            int64_t slot = first;
            if (of.ids) {
                int64_t id = of.ids[row * of.num_ids + first / of.size];
                slot = id < 0 ? of.length : id * of.size + first % of.size;
            }
            if (slot < of.length) slots[num++] = slot;
        }
        by_heads(of.group_size, [&](auto heads, int64_t first_head) {
            float products[heads][kBlock * 4];
            for (int64_t i = 0; i < num; i++) {
                const T* key = keys + slots[i] * of.strides[2];
                const T* value = values + slots[i] * of.strides[5];  // which comes meanwhile
                for (int64_t d = 0; d < of.value_dim; d += 64 / sizeof(T)) __builtin_prefetch(value + d);
                multiply<heads>(
                    query + first_head * of.head_dim, of.head_dim, [&](int64_t d) { return load(key + d); },
                    products[0] + i * 4, kBlock * 4);
            }
            for (int64_t g = first_head; g < first_head + heads; g++) {
                float *largest = parts + g * part_size, *sum = largest + 1, before = *largest, highest = before;
#pragma omp simd reduction(max : highest)
                for (int64_t i = 0; i < num; i++) {
                    weights[g][i] = sum_of(products[g - first_head] + i * 4) * of.scaling;
                    highest = weights[g][i] > highest ? weights[g][i] : highest;
                }
                *largest = highest;
                const float base = *largest == -INFINITY ? 0 : *largest;
                const float kept = exponential(before - base);
                float added = 0;
#pragma omp simd reduction(+ : added)
                for (int64_t i = 0; i < num; i++) added += weights[g][i] = exponential(weights[g][i] - base);
                *sum = *sum * kept + added;
                for (int64_t d = 0; d < of.value_dim && before != *largest; d++) sum[1 + d] *= kept;
            }
            const int64_t in_tiles = of.value_dim / (kTile * kLanes) * kTile * kLanes;
            float* sums = parts + first_head * part_size + 2;
            for (int64_t d = 0; d < in_tiles; d += kTile * kLanes)
                add_values<heads, kTile>(sums + d, part_size, weights[first_head], values + d, of.strides[5], slots,
                                         num);
            for (int64_t d = in_tiles; d < of.value_dim; d += kLanes)
                add_values<heads, 1>(sums + d, part_size, weights[first_head], values + d, of.strides[5], slots, num);
        });
    }
}

template <class T>
void attend(const Attend& of, Threads threads) {
    const int64_t num_rows = of.batch_size * of.num_kv_heads, part_size = of.value_dim + 2;
    const int64_t num_tokens = of.ids ? of.num_ids * of.size : of.length;
    // As many items as keep all threads busy, if one has other work, too.
    const int64_t per_row =
        std::max<int64_t>(1, std::min((8 * threads.num + num_rows - 1) / num_rows, num_tokens / kBlock));
    const int64_t per_item = ((num_tokens + per_row - 1) / per_row + kBlock - 1) / kBlock * kBlock;
    std::vector<float> parts(num_rows * per_row * of.group_size * part_size);
    const int64_t num_products = num_rows * num_tokens * of.group_size * (of.head_dim + of.value_dim);
    for_each(num_rows * per_row, num_products, threads, [&](int64_t item) {
        const int64_t row = item / per_row, first = item % per_row * per_item;
        float* part = &parts[item * of.group_size * part_size];
        const int64_t last = std::min(first + per_item, num_tokens);
        attend_tokens<T>(of, row, first, last, part);
    });
    for (int64_t row = 0; row < num_rows; row++) {
        for (int64_t g = 0; g < of.group_size; g++) {
            float largest = -INFINITY, sum = 0, *output = of.output + (row * of.group_size + g) * of.value_dim;
            auto part_of = [&](int64_t i) { return &parts[((row * per_row + i) * of.group_size + g) * part_size]; };
            for (int64_t i = 0; i < per_row; i++) largest = std::max(largest, *part_of(i));
            if (largest == -INFINITY) largest = 0;
            std::fill_n(output, of.value_dim, 0.0f);
            for (int64_t i = 0; i < per_row; i++) {
                const float* part = part_of(i);
                const float share = exponential(part[0] - largest);
                sum += share * part[1];
                for (int64_t d = 0; d < of.value_dim; d++) output[d] += share * part[2 + d];
            }
            for (int64_t d = 0; d < of.value_dim; d++) output[d] /= sum;
        }
    }
}

// The newest page, the first if it is kept, and of the others those of the highest scores, of equal ones the lower.
void select_row(const float* scores, int64_t num_pages, int64_t num_selected, bool keeps_first, int64_t* ids) {
    std::vector<std::pair<float, int64_t>> pages(num_pages);
    for (int64_t page = 0; page < num_pages; page++) {
        float score = std::max(-kLargest, std::min(kLargest, scores[page]));  // the largest for what is no number
        if (page == 0 && keeps_first) score = 2 * kLargest;
        if (page == num_pages - 1) score = INFINITY;
        pages[page] = {-score, page};
    }
    std::nth_element(pages.begin(), pages.begin() + num_selected - 1, pages.end());
    for (int64_t i = 0; i < num_selected; i++) ids[i] = pages[i].second;
    std::sort(ids, ids + num_selected);
}

// The bounds of one page in 8 bits, rounded outwards: hf_quest/rounding.py.
template <class T>
void bound_page(const T* keys, int64_t page_size, int64_t dim, int8_t* bounds, uint8_t* scales) {
    float lowest[kMaxDim], highest[kMaxDim];
    std::fill_n(lowest, dim, INFINITY);
    std::fill_n(highest, dim, -INFINITY);
    for (int64_t token = 0; token < page_size; token++) {
        for (int64_t d = 0; d < dim; d++) {
            float key = keys[token * dim + d];
            if (key < lowest[d] || key != key) lowest[d] = key;
            if (key > highest[d] || key != key) highest[d] = key;
        }
    }
    for (int64_t block = 0; block < dim; block += kScaleBlock) {
        const int64_t end = std::min(block + kScaleBlock, dim);
        float largest = 0;
        for (int64_t d = block; d < end; d++)
            for (float bound : {lowest[d], highest[d]})
                largest = std::max(largest, bound == bound ? std::fabs(bound) : INFINITY);
        const int scale = std::max(int((bits_of(largest) + 0x1ffff) >> 23) - 6, 1);
        const float inverse = from_bits(uint32_t(254 - scale) << 23);
        for (int64_t d = block; d < end; d++) {
            const float low = std::floor(lowest[d] * inverse), high = std::ceil(highest[d] * inverse);
            bounds[d] = low == low ? std::min(std::max(low, -128.0f), 127.0f) : -128;
            bounds[dim + d] = high == high ? std::min(std::max(high, -128.0f), 127.0f) : 127;
        }
        scales[block / kScaleBlock] = scale;
    }
}

// Call work(T()) of the type that keys.. have.
enum Type { kFloat, kBFloat16, kHalf, kInt8 };

template <class Work>
void with_type(int type, const Work& work) {
    if (type == kFloat) work(float());
    if (type == kBFloat16) work(BFloat16());
    if (type == kHalf) work(Half());
}

}  // namespace

extern "C" {

void hf_quest_bound(const void* keys, int type, int64_t num_rows, int64_t capacity, int64_t dim, int64_t page_size,
                    int64_t page, int8_t* bounds, uint8_t* scales) {
    const int64_t num_pages = capacity / page_size, num_scales = (dim + kScaleBlock - 1) / kScaleBlock;
    with_type(type, [&](auto like) {
        for (int64_t row = 0; row < num_rows; row++) {
            auto* first = static_cast<const decltype(like)*>(keys) + (row * capacity + page * page_size) * dim;
            const int64_t place = row * num_pages + page;
            bound_page(first, page_size, dim, bounds + place * 2 * dim, scales + place * num_scales);
        }
    });
}

void hf_quest_estimate(const float* query, const void* bounds, const uint8_t* scales, float* scores, int type,
                       int64_t num_rows, int64_t group_size, int64_t head_dim, int64_t num_pages, int64_t capacity,
                       float scaling, float width, Fork fork, int num_threads) {
    const Estimate of{query,    bounds,    scales,   scores,  num_rows, group_size,
                      head_dim, num_pages, capacity, scaling, width};
    if (scales) return estimate<int8_t>(of, {fork, num_threads});
    with_type(type, [&](auto like) { estimate<decltype(like)>(of, {fork, num_threads}); });
}

void hf_quest_select(const float* scores, int64_t* ids, int64_t num_rows, int64_t num_pages, int64_t num_selected,
                     bool keeps_first, Fork fork, int num_threads) {
    for_each(num_rows, num_rows * num_pages * 16, {fork, num_threads}, [&](int64_t row) {
        select_row(scores + row * num_pages, num_pages, num_selected, keeps_first, ids + row * num_selected);
    });
}

void hf_quest_attend(const float* query, const void* keys, const void* values, const int64_t* ids, float* output,
                     int type, const int64_t* strides, int64_t batch_size, int64_t num_kv_heads, int64_t group_size,
                     int64_t head_dim, int64_t value_dim, int64_t num_ids, int64_t size, int64_t length, float scaling,
                     Fork fork, int num_threads) {
    const Attend of{query,      keys,     values,    strides, ids,  output, batch_size, num_kv_heads,
                    group_size, head_dim, value_dim, num_ids, size, length, scaling};
    with_type(type, [&](auto like) { attend<decltype(like)>(of, {fork, num_threads}); });
}
}
