// The stages of a decode step on a CPU, one query per row in rows without padding. hf_quest/reference.py says what they
// mean and what the letters of the shapes stand for; hf_quest/kernels/native.py calls them.
//
// Work is cut into items, which the threads of PyTorch's own OpenMP take one after the other: a pointer to its
// GOMP_parallel is all that this needs of it, and no second pool waits on the same cores. Attention goes by blocks of
// tokens: their logits, a running maximum, the weighted sum of their values. The parts of a KV head are
// merged at the end.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr int kBlock = 64;  // tokens whose logits are held at once
constexpr int kMaxDim = 1024;  // channels, MAX_DIM
constexpr int kScaleBlock = 32;  // channels that share a scale, SCALE_BLOCK
constexpr int kPages = 128;  // pages that are scored in one item
constexpr float kLargest = 1e30f;  // LARGEST_SCORE
constexpr int64_t kLeastProducts = 1 << 18;  // that are worth the call of other threads

struct Threads {
    void (*fork)(void (*work)(void*), void* data, unsigned num_threads, unsigned flags);
    int64_t num;
};

// Call work(item) for all items, in all threads or, where there is little to do, in this one.
template <class Work>
void for_each(int64_t num_items, int64_t num_products, Threads threads, const Work& work) {
    struct Job {
        const Work& work;
        int64_t num_items;
        std::atomic<int64_t> next;
    } job{work, num_items, {0}};
    void (*run)(void*) = [](void* data) {
        Job& job = *static_cast<Job*>(data);
        for (int64_t item; (item = job.next++) < job.num_items;) job.work(item);
    };
    if (threads.num < 2 || num_items < 2 || num_products < kLeastProducts) return run(&job);
    threads.fork(run, &job, threads.num, 0);
}

template <class To, class From>
To read(const From* from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

float from_bits(uint32_t bits) { return read<float>(&bits); }

// Numbers of a vector register, and how many registers hold sums of a query head at once.
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

enum Type { kFloat, kBFloat16, kHalf };
enum class BFloat16 : uint16_t {};
enum class Half : uint16_t {};

Floats load(const float* from) { return read<Floats>(from); }

Floats load(const int8_t* from) {  // in steps for which there are instructions
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

// e^x for x <= 0, to 2^-23 of it or about that; what is not a number stays so.
float exponential(float x) {
    const float clamped = x < -88.0f ? -88.0f : x;
    const float shifted = clamped * 1.44269504f + 12582912.0f;  // the nearest integer is in its last bits
    const float whole = shifted - 12582912.0f;
    const float rest = clamped - whole * 0.693359375f + whole * 2.12194440e-4f;
    float power = 1.9875691500e-4f * rest + 1.3981999507e-3f;
    power = (power * rest + 8.3334519073e-3f) * rest + 4.1665795894e-2f;
    power = (power * rest + 1.6666665459e-1f) * rest + 5.0000001201e-1f;
    power = (power * rest + 1) * rest + 1;
    return x < -87.0f ? 0.0f : power * from_bits((read<uint32_t>(&shifted) + 127) << 23);
}

// The products of `kHeads` queries, [.., dim], with what at(d) loads from channel d on: four numbers for each query,
// `stride` from those of the next, whose sum it is.
template <int kHeads, class At>
void multiply(const float* query, int64_t dim, const At& at, float* products, int64_t stride) {
    Floats sums[kHeads] = {};
    for (int64_t d = 0; d < dim; d += kLanes) {
        const Floats numbers = at(d);
        for (int g = 0; g < kHeads; g++) sums[g] += load(query + g * dim + d) * numbers;
    }
    for (int g = 0; g < kHeads; g++) {
        float parts[kLanes];
        std::memcpy(parts, &sums[g], sizeof parts);
        auto four = read<Vector<float, 4>>(parts);
        for (int i = 4; i < kLanes; i += 4) four += read<Vector<float, 4>>(parts + i);
        std::memcpy(products + g * stride, &four, sizeof four);
    }
}

float sum_of(const float* four) { return (four[0] + four[1]) + (four[2] + four[3]); }

// Call work(heads, first) for up to four heads at a time; `heads` has their number as a type.
template <class Work>
void by_heads(int64_t num_heads, const Work& work) {
    for (int64_t first = 0; first < num_heads; first += 4) {
        const int64_t num = num_heads - first;
        if (num > 3) work(std::integral_constant<int, 4>(), first);
        if (num == 3) work(std::integral_constant<int, 3>(), first);
        if (num == 2) work(std::integral_constant<int, 2>(), first);
        if (num == 1) work(std::integral_constant<int, 1>(), first);
    }
}

// Call work(T()) of the type of keys.
template <class Work>
void with_type(int64_t type, const Work& work) {
    if (type == kFloat) work(float());
    if (type == kBFloat16) work(BFloat16());
    if (type == kHalf) work(Half());
}

// The structs are those of hf_quest/kernels/native.py. What is beside pages has room for `capacity` of them.
struct Bound {
    const void* keys;  // [rows, slots, D], where slots are whole pages
    int8_t* bounds;  // [rows, capacity, 2, D]
    uint8_t* scales;  // [rows, capacity, D / 32]
    int64_t type, num_rows, head_dim, capacity, page_size, page;
};

struct Estimate {
    const float* query;  // [rows, G, D]
    const void* bounds;  // [rows, capacity, 2, D], of the type or, with scales, int8
    const uint8_t* scales;  // [rows, capacity, D / 32] or null
    float* scores;  // [rows, P]
    int64_t type, num_rows, group_size, head_dim, num_pages, capacity;
    double scaling, width;
    Threads threads;
};

struct Select {
    const float* scores;  // [rows, P], the last of which are of the newest page
    int64_t* ids;  // [rows, K], ascending
    int64_t num_rows, num_pages, num_selected, keeps_first;
    Threads threads;
};

struct Attend {
    const float* query;  // [B, Hkv, G, D]
    const void *keys, *values;
    const int64_t* ids;  // [B, Hkv, K], -1 for none, or null for all tokens
    float* output;  // [B, Hkv, G, Dv]
    int64_t type, batch_size, num_kv_heads, group_size, head_dim, value_dim, num_ids, size, length;
    int64_t key_strides[3], value_strides[3];  // of B, Hkv and slots
    double scaling;
    Threads threads;
};

template <class T>
void bound_page(const T* keys, int64_t page_size, int64_t dim, int8_t* bounds, uint8_t* scales) {
    float lowest[kMaxDim], highest[kMaxDim];
    for (int64_t d = 0; d < dim; d += kLanes) {
        Floats low = load(keys + d), high = low;
        for (int64_t token = 1; token < page_size; token++) {
            const Floats key = load(keys + token * dim + d);
            low = (key < low) | (key != key) ? key : low;
            high = (key > high) | (key != key) ? key : high;
        }
        std::memcpy(lowest + d, &low, sizeof low);
        std::memcpy(highest + d, &high, sizeof high);
    }
    for (int64_t first = 0; first < dim; first += kScaleBlock) {
        const int64_t end = std::min(first + kScaleBlock, dim);
        float largest = 0;
        for (int64_t d = first; d < end; d++) {
            const float either = std::max(std::fabs(lowest[d]), std::fabs(highest[d]));
            largest = std::max(largest, lowest[d] == lowest[d] ? either : INFINITY);
        }
        const int scale = std::max(int((read<uint32_t>(&largest) + 0x1ffff) >> 23) - 6, 1);
        const float inverse = from_bits(uint32_t(254 - scale) << 23);
        scales[first / kScaleBlock] = scale;
        for (int64_t d = first; d < end; d++) {
            const float low = std::floor(lowest[d] * inverse), high = std::ceil(highest[d] * inverse);
            bounds[d] = low == low ? std::min(std::max(low, -128.0f), 127.0f) : -128;
            bounds[dim + d] = high == high ? std::min(std::max(high, -128.0f), 127.0f) : 127;
        }
    }
}

template <class T>
void estimate(const Estimate& of) {
    const int64_t dim = of.head_dim, num_scales = (dim + kScaleBlock - 1) / kScaleBlock;
    const int64_t num_heads = of.num_rows * of.group_size, per_row = (of.num_pages + kPages - 1) / kPages;
    const float outer = (1 + of.width) / 2, inner = (1 - of.width) / 2;
    std::vector<float> weights(num_heads * 2 * dim);  // of the minimum and the maximum of each channel
    for (int64_t i = 0; i < num_heads * dim; i++) {
        const float negative = std::min(of.query[i], 0.0f), positive = std::max(of.query[i], 0.0f);
        float* weight = &weights[i / dim * 2 * dim + i % dim];
        weight[0] = outer * negative + inner * positive;
        weight[dim] = outer * positive + inner * negative;
    }
    for_each(of.num_rows * per_row, num_heads * of.num_pages * 2 * dim, of.threads, [&](int64_t item) {
        const int64_t row = item / per_row, first = item % per_row * kPages;
        float scales[kMaxDim / kScaleBlock], products[4 * 4];
        for (int64_t page = first; page < std::min(first + kPages, of.num_pages); page++) {
            const int64_t place = row * of.capacity + page;
            const T* bounds = static_cast<const T*>(of.bounds) + place * 2 * dim;
            for (int64_t i = 0; i < num_scales && of.scales; i++)
                scales[i] = from_bits(uint32_t(of.scales[place * num_scales + i]) << 23);
            auto at = [&](int64_t d) {
                return of.scales ? load(bounds + d) * scales[(d < dim ? d : d - dim) / kScaleBlock] : load(bounds + d);
            };
            float best = -INFINITY;
            by_heads(of.group_size, [&](auto heads, int64_t first_head) {
                multiply<heads>(&weights[(row * of.group_size + first_head) * 2 * dim], 2 * dim, at, products, 4);
                for (int g = 0; g < heads; g++) {
                    const float score = sum_of(products + g * 4);
                    if (score > best || score != score) best = score;
                }
            });
            of.scores[row * of.num_pages + page] = best * float(of.scaling);
        }
    });
}

void select_pages(const Select& of, int64_t row) {
    std::vector<std::pair<float, int64_t>> pages(of.num_pages);
    const float* scores = of.scores + row * of.num_pages;
    for (int64_t page = 0; page < of.num_pages; page++)  // what is not a number counts as the largest
        pages[page] = {-std::max(-kLargest, std::min(kLargest, scores[page])), page};
    if (of.keeps_first) pages.front().first = -2 * kLargest;
    pages.back().first = -INFINITY;
    std::nth_element(pages.begin(), pages.begin() + of.num_selected - 1, pages.end());
    int64_t* ids = of.ids + row * of.num_selected;
    for (int64_t i = 0; i < of.num_selected; i++) ids[i] = pages[i].second;
    std::sort(ids, ids + of.num_selected);
}

// Add to `kVectors` vectors of each head's sums the values of `num` tokens, weighted.
template <int kHeads, int kVectors, class T>
void add_values(float* sums, int64_t stride, const float* weights, const T* values, const int64_t* places,
                int64_t num) {
    Floats sum[kHeads][kVectors] = {};  // of these alone, as sums of many are less exact
    for (int64_t i = 0; i < num; i++) {
        for (int v = 0; v < kVectors; v++) {
            const Floats numbers = load(values + places[i] + v * kLanes);
            for (int g = 0; g < kHeads; g++) sum[g][v] += weights[g * kBlock + i] * numbers;
        }
    }
    for (int i = 0; i < kHeads * kVectors; i++) {
        float* to = sums + i / kVectors * stride + i % kVectors * kLanes;
        const Floats both = load(to) + sum[i / kVectors][i % kVectors];
        std::memcpy(to, &both, sizeof both);
    }
}

// Into `parts`, [G, 2 + Dv]: the largest logit, the sum of weights relative to it, and that of values so weighted.
template <class T>
void attend_tokens(const Attend& of, int64_t row, int64_t first, int64_t last, float* parts) {
    const int64_t batch = row / of.num_kv_heads, head = row % of.num_kv_heads, part_size = of.value_dim + 2;
    const T* keys = static_cast<const T*>(of.keys) + batch * of.key_strides[0] + head * of.key_strides[1];
    const T* values = static_cast<const T*>(of.values) + batch * of.value_strides[0] + head * of.value_strides[1];
    const int64_t in_tiles = of.value_dim - of.value_dim % (kTile * kLanes);
    for (int64_t g = 0; g < of.group_size; g++) parts[g * part_size] = -INFINITY;
    while (first < last) {
        int64_t key_at[kBlock], value_at[kBlock], num = 0;
        for (; first < last && num < kBlock; first++) {
            const int64_t id = of.ids ? of.ids[row * of.num_ids + first / of.size] : first;
            const int64_t slot = of.ids ? id * of.size + first % of.size : id;
            if (id < 0 || slot >= of.length) continue;
            key_at[num] = slot * of.key_strides[2];
            value_at[num++] = slot * of.value_strides[2];
        }
        by_heads(of.group_size, [&](auto heads, int64_t first_head) {
            float products[heads][kBlock * 4], weights[heads][kBlock], *part = parts + first_head * part_size;
            const float* query = of.query + (row * of.group_size + first_head) * of.head_dim;
            for (int64_t i = 0; i < num; i++) {
                for (int64_t d = 0; d < of.value_dim; d += 64 / sizeof(T)) __builtin_prefetch(values + value_at[i] + d);
                auto at = [&](int64_t d) { return load(keys + key_at[i] + d); };
                multiply<heads>(query, of.head_dim, at, products[0] + i * 4, kBlock * 4);
            }
            for (int g = 0; g < heads; g++) {
                float *sums = part + g * part_size, largest = sums[0], added = 0;
#pragma omp simd reduction(max : largest)
                for (int64_t i = 0; i < num; i++) {
                    weights[g][i] = sum_of(products[g] + i * 4) * float(of.scaling);
                    largest = weights[g][i] > largest ? weights[g][i] : largest;
                }
                const float base = largest == -INFINITY ? 0 : largest, kept = exponential(sums[0] - base);
#pragma omp simd reduction(+ : added)
                for (int64_t i = 0; i < num; i++) added += weights[g][i] = exponential(weights[g][i] - base);
                for (int64_t i = 1; i < part_size && sums[0] != largest; i++) sums[i] *= kept;
                sums[0] = largest;
                sums[1] += added;
            }
            for (int64_t d = 0; d < in_tiles; d += kTile * kLanes)
                add_values<heads, kTile>(part + 2 + d, part_size, weights[0], values + d, value_at, num);
            for (int64_t d = in_tiles; d < of.value_dim; d += kLanes)
                add_values<heads, 1>(part + 2 + d, part_size, weights[0], values + d, value_at, num);
        });
    }
}

template <class T>
void attend(const Attend& of) {
    const int64_t num_rows = of.batch_size * of.num_kv_heads, part_size = of.value_dim + 2;
    if (num_rows == 0) return;
    const int64_t num_tokens = of.ids ? of.num_ids * of.size : of.length;
    // Items for all threads, and some more, as one of them may have other work, too.
    const int64_t wanted = std::min((8 * of.threads.num + num_rows - 1) / num_rows, num_tokens / kBlock);
    const int64_t per_row = std::max<int64_t>(wanted, 1), per_item = (num_tokens + per_row - 1) / per_row;
    const int64_t num_products = num_rows * num_tokens * of.group_size * (of.head_dim + of.value_dim);
    std::vector<float> parts(num_rows * per_row * of.group_size * part_size);
    for_each(num_rows * per_row, num_products, of.threads, [&](int64_t item) {
        const int64_t row = item / per_row, first = item % per_row * per_item;
        const int64_t last = std::min(first + per_item, num_tokens);
        attend_tokens<T>(of, row, first, last, &parts[item * of.group_size * part_size]);
    });
    for (int64_t head = 0; head < num_rows * of.group_size; head++) {
        const int64_t row = head / of.group_size, stride = of.group_size * part_size;
        const float* part = &parts[row * per_row * stride + head % of.group_size * part_size];
        float largest = -INFINITY, sum = 0, *output = of.output + head * of.value_dim;
        for (int64_t i = 0; i < per_row; i++) largest = std::max(largest, part[i * stride]);
        const float base = largest == -INFINITY ? 0 : largest;
        std::fill_n(output, of.value_dim, 0.0f);
        for (int64_t i = 0; i < per_row; i++) {
            const float share = exponential(part[i * stride] - base);
            sum += share * part[i * stride + 1];
            for (int64_t d = 0; d < of.value_dim; d++) output[d] += share * part[i * stride + 2 + d];
        }
        for (int64_t d = 0; d < of.value_dim && sum != 0; d++) output[d] /= sum;
    }
}

}  // namespace

extern "C" {

void hf_quest_bound(const Bound& of) {
    const int64_t num_scales = (of.head_dim + kScaleBlock - 1) / kScaleBlock;
    with_type(of.type, [&](auto like) {
        for (int64_t row = 0; row < of.num_rows; row++) {
            const int64_t place = row * of.capacity + of.page;
            auto* keys = static_cast<const decltype(like)*>(of.keys) + place * of.page_size * of.head_dim;
            int8_t* bounds = of.bounds + place * 2 * of.head_dim;
            bound_page(keys, of.page_size, of.head_dim, bounds, of.scales + place * num_scales);
        }
    });
}

void hf_quest_estimate(const Estimate& of) {
    if (of.scales) return estimate<int8_t>(of);
    with_type(of.type, [&](auto like) { estimate<decltype(like)>(of); });
}

void hf_quest_select(const Select& of) {
    const int64_t about = of.num_rows * of.num_pages * 16;  // in time, of products
    for_each(of.num_rows, about, of.threads, [&](int64_t row) { select_pages(of, row); });
}

void hf_quest_attend(const Attend& of) {
    with_type(of.type, [&](auto like) { attend<decltype(like)>(of); });
}
}
