// How a warp scores pages: what estimate.cu and chain.cu share.
#pragma once

#include <cmath>

#include "common.cuh"

namespace hf_quest {

constexpr int kPagesPerWarp = 16;  // at a time
constexpr int kChunk = 32;         // channels that the four lanes of a quad have together, and that share a scale
constexpr int kDigits = 3;         // of a query as integers, see NarrowBounds
constexpr int kFractionBits = 21;  // of the same
constexpr int kRowPadding = 16;    // bytes, against bank conflicts

// Bytes of the signed query of a group, of the larger kind, that of NarrowBounds.
__host__ __device__ constexpr int count_query_bytes(int group_size, int head_dim) {
    const int num_tiles = (group_size + kHeadTile - 1) / kHeadTile;
    const int num_words = 2 * head_dim / kChunk * kDigits * kWarpSize;
    return num_tiles * (num_words * int(sizeof(uint2)) + kHeadTile * int(sizeof(float)));
}

// Bytes of 16 pages' bounds of 8 bits in shared memory.
__host__ __device__ constexpr int count_tile_bytes(int head_dim) {
    return kPagesPerWarp * (2 * head_dim + kRowPadding);
}

// The bounds of a row's KV head in the dtype of its keys. Its signed query is [min(q, 0), max(q, 0)], of the same type,
// as 16-byte vectors [head tiles, chunks, lanes]. A tile's spare columns repeat the last head, which leaves the maximum
// over heads as it is.
template <typename T, int kHeadDim>
struct WideBounds {
    static constexpr int kNumChunks = 2 * kHeadDim / kChunk;
    struct Page {
        uint4 chunks[kNumChunks];
    };
    const T* extremes;  // [pages, 2, D]

    __device__ WideBounds(const Storage& storage, int64_t first_page)
        : extremes(static_cast<const T*>(storage.bounds) + first_page * 2 * kHeadDim) {}

    __device__ void load(Page& page, int page_idx) const {
        const T* channels = extremes + int64_t(page_idx) * 2 * kHeadDim + threadIdx.x % 4 * 8;
#pragma unroll
        for (int i = 0; i < kNumChunks; ++i) {
            page.chunks[i] = load_once(reinterpret_cast<const uint4*>(channels + i * kChunk));
        }
    }

    static __device__ void sign_query(void* signed_query, const T* query, int64_t head_stride, int group_size) {
        const int num_vectors = ceil_div(group_size, kHeadTile) * kNumChunks * kWarpSize;
        for (int idx = threadIdx.x; idx < num_vectors; idx += blockDim.x) {
            const int chunk_idx = idx / kWarpSize % kNumChunks, tile_idx = idx / kWarpSize / kNumChunks;
            const int head_idx = min(tile_idx * kHeadTile + idx % kWarpSize / 4, group_size - 1);
            const int channel = chunk_idx * kChunk % kHeadDim + idx % 4 * 8;
            const uint4 vector = load_once(reinterpret_cast<const uint4*>(query + head_idx * head_stride + channel));
            const auto signed_part = [&](uint32_t bits) {
                const Pair<T> pair = as_pair<T>(bits), zero = as_pair<T>(0);
                return as_bits(chunk_idx * kChunk < kHeadDim ? __hmin2(pair, zero) : __hmax2(pair, zero));
            };
            static_cast<uint4*>(signed_query)[idx] = {signed_part(vector.x), signed_part(vector.y),
                                                      signed_part(vector.z), signed_part(vector.w)};
        }
    }

    // The scores of pages group_idx and group_idx + 8 for two query heads.
    static __device__ float2 score(const Page& low, const Page& high, const void* signed_query, int tile_idx) {
        const uint4* q = static_cast<const uint4*>(signed_query) + tile_idx * kNumChunks * kWarpSize;
        float even[4] = {}, odd[4] = {};  // two sums, so that products wait less for each other
#pragma unroll
        for (int i = 0; i < kNumChunks; ++i) {
            const uint4 a = low.chunks[i], b = high.chunks[i], c = q[i * kWarpSize + threadIdx.x % kWarpSize];
            multiply_add<T>(even, a.x, b.x, a.y, b.y, c.x, c.y);
            multiply_add<T>(odd, a.z, b.z, a.w, b.w, c.z, c.w);
        }
        return {fmaxf(even[0] + odd[0], even[1] + odd[1]), fmaxf(even[2] + odd[2], even[3] + odd[3])};
    }
};

// The same in 8 bits, which tensor cores multiply as they are. So the signed query is integers too, rounded to a step
// of each head, 2^-21 of the power of two of its largest channel: three signed digits to base 256, the highest first,
// each of 8 channels to a word, [head tiles, chunks, digits, lanes], and behind all digits the steps, [head tiles, 8].
// Of a channel either the minimum or the maximum counts, so a block's sum is 32 products, for each digit 2^19 at most.
template <typename T, int kHeadDim>
struct NarrowBounds {
    static constexpr int kNumChunks = 2 * kHeadDim / kChunk;
    static constexpr int kBlocks = kHeadDim / kChunk;  // of channels that share a scale
    static constexpr int kRowBytes = 2 * kHeadDim + kRowPadding;
    struct Scales {  // bytes, in the largest words that they fill
        using Word = std::conditional_t<kBlocks % 4 == 0, uint32_t,
                                        std::conditional_t<kBlocks % 2 == 0, uint16_t, uint8_t>>;
        Word words[kBlocks / sizeof(Word)];
        __device__ float of(int block_idx) const {
            const unsigned word = words[block_idx / sizeof(Word)];
            return __uint_as_float((word >> block_idx % sizeof(Word) * 8 & 0xff) << 23);
        }
    };
    const int8_t* extremes;  // [pages, 2, D]
    const Scales* scales;    // [pages]

    __device__ NarrowBounds(const Storage& storage, int64_t first_page)
        : extremes(static_cast<const int8_t*>(storage.bounds) + first_page * 2 * kHeadDim),
          scales(reinterpret_cast<const Scales*>(storage.scales) + first_page) {}

    // Begins to copy 16 pages, or those up to `end_page`, to a warp's rows of shared memory.
    __device__ void copy(unsigned rows, int page_idx, int end_page) const {
        constexpr int kVectors = 2 * kHeadDim / 16;  // of 16 bytes, of a page
        const int8_t* vectors = extremes + int64_t(page_idx) * 2 * kHeadDim + threadIdx.x % kWarpSize * 16;
#pragma unroll
        for (int i = 0; i < kPagesPerWarp * kVectors / kWarpSize; ++i) {
            const int idx = i * kWarpSize + threadIdx.x % kWarpSize, row_idx = idx / kVectors;
            if (page_idx + row_idx >= end_page) continue;
            copy_async(rows + row_idx * kRowBytes + idx % kVectors * 16, vectors + i * kWarpSize * 16);
        }
    }

    static __device__ float* steps_of(void* signed_query, int num_tiles) {
        const int num_words = num_tiles * kNumChunks * kDigits * kWarpSize;
        return reinterpret_cast<float*>(static_cast<uint2*>(signed_query) + num_words);
    }

    static __device__ void sign_query(void* signed_query, const T* query, int64_t head_stride, int group_size) {
        const int num_tiles = ceil_div(group_size, kHeadTile), num_words = num_tiles * kNumChunks * kWarpSize;
        for (int idx = threadIdx.x; idx < num_words; idx += blockDim.x) {
            const int chunk_idx = idx / kWarpSize % kNumChunks, tile_idx = idx / kWarpSize / kNumChunks;
            const int head_of_tile = idx % kWarpSize / 4, quad_idx = idx % 4;
            const T* head = query + min(tile_idx * kHeadTile + head_of_tile, group_size - 1) * head_stride;
            const T* channels = head + chunk_idx % kBlocks * kChunk + quad_idx * 4;
            const uint2 own[2] = {load_once(reinterpret_cast<const uint2*>(channels)),
                                  load_once(reinterpret_cast<const uint2*>(channels + kChunk / 2))};
            Pair<T> largest_pair = as_pair<T>(0);
#pragma unroll
            for (int i = 0; i < kBlocks; ++i) {  // with the other lanes of the quad, the whole head
                const uint4 vector = load_once(reinterpret_cast<const uint4*>(head) + i * 4 + quad_idx);
#pragma unroll
                for (int j = 0; j < 4; ++j) largest_pair = __hmax2(largest_pair, __habs2(as_pair<T>((&vector.x)[j])));
            }
            float largest = fmaxf(to_float(largest_pair.x), to_float(largest_pair.y));
            largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 2));
            const int exponent = max(int(__float_as_uint(largest) >> 23), kFractionBits + 1);
            const float inverse_step = __uint_as_float((254 + kFractionBits - exponent) << 23);
            if (chunk_idx == 0 && quad_idx == 0) {
                steps_of(signed_query, num_tiles)[tile_idx * kHeadTile + head_of_tile] =
                    __uint_as_float((exponent - kFractionBits) << 23);
            }
            uint2 digits[kDigits];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const Pair<T> pair = as_pair<T>((&own[i / 4].x)[i / 2 % 2]);
                const float value = to_float(i % 2 == 0 ? pair.x : pair.y);
                const float signed_value = chunk_idx < kBlocks ? fminf(value, 0.0f) : fmaxf(value, 0.0f);
                int rest = __float2int_rn(signed_value * inverse_step);
#pragma unroll
                for (int digit_idx = kDigits - 1; digit_idx >= 0; --digit_idx) {
                    const int8_t digit = int8_t(rest);
                    reinterpret_cast<int8_t*>(&digits[digit_idx])[i] = digit;
                    rest = (rest - digit) >> 8;
                }
            }
            uint2* target = static_cast<uint2*>(signed_query) + idx / kWarpSize * kDigits * kWarpSize + idx % kWarpSize;
#pragma unroll
            for (int i = 0; i < kDigits; ++i) target[i * kWarpSize] = digits[i];
        }
    }

    struct Query {  // of 8 heads, what a lane needs
        uint2 digits[kNumChunks][kDigits];
        float2 step;
    };

    static __device__ Query load_query(void* signed_query, int tile_idx, int num_tiles) {
        const int lane_idx = threadIdx.x % kWarpSize;
        const uint2* words = static_cast<uint2*>(signed_query) + tile_idx * kNumChunks * kDigits * kWarpSize + lane_idx;
        Query query;
#pragma unroll
        for (int i = 0; i < kNumChunks * kDigits; ++i) query.digits[i / kDigits][i % kDigits] = words[i * kWarpSize];
        const float* steps = steps_of(signed_query, num_tiles) + tile_idx * kHeadTile;
        query.step = reinterpret_cast<const float2*>(steps)[lane_idx % 4];
        return query;
    }

    // The scores of pages group_idx and group_idx + 8 of a warp's rows for two query heads.
    static __device__ float2 score(unsigned rows, const Scales& low_scales, const Scales& high_scales,
                                   const Query& query) {
        rows += threadIdx.x % 16 * kRowBytes + threadIdx.x % kWarpSize / 16 * 16;
        float sums[4] = {};
#pragma unroll
        for (int block_idx = 0; block_idx < kBlocks; ++block_idx) {
            int by_digit[kDigits][4] = {};
#pragma unroll
            for (int i = block_idx; i < kNumChunks; i += kBlocks) {  // minimum and maximum
                const uint4 pages = load_matrices(rows + i * kChunk);
#pragma unroll
                for (int j = 0; j < kDigits; ++j) multiply_add(by_digit[j], pages, query.digits[i][j]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float upper = float(by_digit[0][i] * 256 + by_digit[1][i]), lower = float(by_digit[2][i]);
                const float product = fmaf(upper, 256.0f, lower) * (i % 2 == 0 ? query.step.x : query.step.y);
                sums[i] = fmaf(product, (i < 2 ? low_scales : high_scales).of(block_idx), sums[i]);
            }
        }
        return {fmaxf(sums[0], sums[1]), fmaxf(sums[2], sums[3])};
    }
};

// The largest over the query heads, which the lanes of a quad share.
__device__ inline float2 reduce_quad(float2 scores) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
        scores.x = fmaxf(scores.x, __shfl_xor_sync(kWholeWarp, scores.x, distance));
        scores.y = fmaxf(scores.y, __shfl_xor_sync(kWholeWarp, scores.y, distance));
    }
    return scores;
}

__device__ inline float2 larger(float2 a, float2 b) { return {fmaxf(a.x, b.x), fmaxf(a.y, b.y)}; }

// Where a warp finds what it scores pages with.
template <typename T>
struct ScoreInput {
    const T* query;  // of the first head of a group
    int64_t head_stride;
    int group_size, num_head_tiles;
    char* signed_query;  // in shared memory, count_query_bytes()
    char* tiles;         // in shared memory, count_tile_bytes() for each warp and stage
};

// Scores 16 pages at a time, from `first_page` on in steps of `step` up to `end_page`, and calls store(page, low, high)
// in all lanes for each 16 from `page` on: a quad has the scores of the pages group_idx and group_idx + 8 of them.
// Those past the last page are not to be used. All threads call it: first they make the block's signed query, whose
// stores (and shuffles) would wait in one queue with the loads of pages until memory has taken these. A warp has
// `kStages` times 16 pages on their way, in registers.
template <int kStages, typename T, int kHeadDim, typename Store>
__device__ void score_pages(WideBounds<T, kHeadDim> bounds, const ScoreInput<T>& input, int first_page, int step,
                            int end_page, Store store) {
    using Page = typename WideBounds<T, kHeadDim>::Page;
    const int group_idx = threadIdx.x % kWarpSize / 4;
    Page low[kStages], high[kStages];  // pages group_idx and group_idx + 8
    const auto load = [&](int stage, int page_idx) {  // past the last page the last one
        bounds.load(low[stage], min(page_idx + group_idx, end_page - 1));
        bounds.load(high[stage], min(page_idx + group_idx + 8, end_page - 1));
    };
    bounds.sign_query(input.signed_query, input.query, input.head_stride, input.group_size);
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
        if (first_page + stage * step < end_page) load(stage, first_page + stage * step);
    }
    __syncthreads();
    while (first_page < end_page) {
#pragma unroll
        for (int stage = 0; stage < kStages; ++stage, first_page += step) {
            if (stage > 0 && first_page >= end_page) break;
            float2 scores = {-INFINITY, -INFINITY};
            for (int tile_idx = 0; tile_idx < input.num_head_tiles; ++tile_idx) {
                scores = larger(scores, bounds.score(low[stage], high[stage], input.signed_query, tile_idx));
            }
            const int next_page = first_page + kStages * step;
            if (next_page < end_page) load(stage, next_page);
            scores = reduce_quad(scores);
            store(first_page, scores.x, scores.y);
        }
    }
}

// The same of bounds in 8 bits, which come through shared memory: so each request is for whole lines, where a quad's
// own channels would be 32 bytes of each of eight lines, and registers are free for the query.
template <int kStages, typename T, int kHeadDim, typename Store>
__device__ void score_pages(NarrowBounds<T, kHeadDim> bounds, const ScoreInput<T>& input, int first_page, int step,
                            int end_page, Store store) {
    using Scales = typename NarrowBounds<T, kHeadDim>::Scales;
    constexpr int kTileBytes = count_tile_bytes(kHeadDim);
    const int group_idx = threadIdx.x % kWarpSize / 4;
    const unsigned tiles = address_of(input.tiles) + threadIdx.x / kWarpSize * kStages * kTileBytes;
    Scales low[2], high[2];  // of this tile and the next
    const auto load_scales = [&](int set, int page_idx) {
        if (page_idx >= end_page) return;
        low[set] = bounds.scales[min(page_idx + group_idx, end_page - 1)];
        high[set] = bounds.scales[min(page_idx + group_idx + 8, end_page - 1)];
    };
    const auto copy = [&](int stage, int page_idx) {
        if (page_idx < end_page) bounds.copy(tiles + stage * kTileBytes, page_idx, end_page);
        commit_copies();
    };
    load_scales(0, first_page);
    load_scales(1, first_page + step);
    bounds.sign_query(input.signed_query, input.query, input.head_stride, input.group_size);
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) copy(stage, first_page + stage * step);
    __syncthreads();
    // That of the first 8 heads stays in registers.
    const auto query = bounds.load_query(input.signed_query, 0, input.num_head_tiles);
    for (int stage = 0; first_page < end_page;) {
#pragma unroll
        for (int set = 0; set < 2; ++set, first_page += step) {
            if (set > 0 && first_page >= end_page) break;
            wait_for_copies<kStages - 1>();
            __syncwarp();
            const unsigned tile = tiles + stage * kTileBytes;
            float2 scores = bounds.score(tile, low[set], high[set], query);
            for (int tile_idx = 1; tile_idx < input.num_head_tiles; ++tile_idx) {
                const auto next = bounds.load_query(input.signed_query, tile_idx, input.num_head_tiles);
                scores = larger(scores, bounds.score(tile, low[set], high[set], next));
            }
            scores = reduce_quad(scores);
            store(first_page, scores.x, scores.y);
            __syncwarp();
            load_scales(set, first_page + 2 * step);
            copy(stage, first_page + kStages * step);
            stage = stage + 1 == kStages ? 0 : stage + 1;
        }
    }
}

}  // namespace hf_quest
