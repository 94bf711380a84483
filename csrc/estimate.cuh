// How a warp scores pages: what estimate.cu and chain.cu share.
#pragma once

#include <climits>
#include <cmath>

#include "common.cuh"

namespace hf_quest {

constexpr int kPagesPerTile = 16;
constexpr int kDigits = 3;         // of a query as integers, see NarrowBounds
constexpr int kFractionBits = 21;  // of the same
constexpr int kRowPadding = 16;    // bytes, against bank conflicts
constexpr int kNoPage = INT_MAX;

// Whether the integers of a group's query wait in shared memory, where registers are too few for them.
__host__ __device__ constexpr bool is_query_stored(int num_head_tiles, int head_dim) {
    return num_head_tiles > 1 || head_dim > 128;
}

// Bytes of a group's query in shared memory, as one of the two kinds of bounds below wants it.
__host__ __device__ constexpr int count_query_bytes(int group_size, int head_dim) {
    const int num_head_tiles = (group_size + kHeadTile - 1) / kHeadTile, num_chunks = 2 * head_dim / kChunk;
    return is_query_stored(num_head_tiles, head_dim)
               ? num_head_tiles * (num_chunks * kDigits + 1) * kWarpSize * int(sizeof(uint2))
               : num_head_tiles * num_chunks * kWarpSize * int(sizeof(uint4));
}

// Bytes of a tile's bounds of 8 bits in shared memory.
__host__ __device__ constexpr int count_tile_bytes(int head_dim) {
    return kPagesPerTile * (2 * head_dim + kRowPadding);
}

// Where a block finds what it scores pages with.
template <typename T>
struct ScoreInput {
    const T* query;  // of the first head of a group, in any memory
    int64_t head_stride;
    int group_size, num_head_tiles;
    float width;    // of Score
    char* queries;  // in shared memory, count_query_bytes()
    char* tiles;    // in shared memory, count_tile_bytes() for each warp and tile on its way

    // Of 8 heads that of a lane: head group_idx, or the last one where there are fewer.
    __device__ const T* own_head(int head_tile) const {
        return query + min(head_tile * kHeadTile + int(threadIdx.x % kWarpSize / 4), group_size - 1) * head_stride;
    }
};

// The bounds of a row's KV head in the dtype of its keys. Its signed query is [min(q, 0), max(q, 0)], of the same type,
// as 16-byte vectors [head tiles, chunks, lanes]. Its product with [min, max] is the largest that q·k can be, and that
// with [max, min] the least: a score is somewhere between them. So no weight of an extreme is rounded to that type.
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

    static __device__ void sign_query(const ScoreInput<T>& input) {
        const int num_vectors = input.num_head_tiles * kNumChunks * kWarpSize;
        for (int idx = threadIdx.x; idx < num_vectors; idx += blockDim.x) {
            const int chunk_idx = idx / kWarpSize % kNumChunks, head_tile = idx / kWarpSize / kNumChunks;
            const T* channels = input.own_head(head_tile) + chunk_idx * kChunk % kHeadDim + idx % 4 * 8;
            const uint4 vector = *reinterpret_cast<const uint4*>(channels);
            const auto signed_part = [&](uint32_t bits) {
                const Pair<T> pair = as_pair<T>(bits), zero = as_pair<T>(0);
                return as_bits(chunk_idx * kChunk < kHeadDim ? __hmin2(pair, zero) : __hmax2(pair, zero));
            };
            reinterpret_cast<uint4*>(input.queries)[idx] = {signed_part(vector.x), signed_part(vector.y),
                                                            signed_part(vector.z), signed_part(vector.w)};
        }
    }

    // The scores of two query heads for page group_idx, and for page group_idx + 8.
    static __device__ float4 score(const Page& low, const Page& high, const char* queries, int head_tile, float width) {
        const uint4* q = reinterpret_cast<const uint4*>(queries) + head_tile * kNumChunks * kWarpSize;
        float4 largest = multiply<0>(low, high, q);
        if (width == 1.0f) return largest;
        // One product after the other: both at once would want more registers than there are.
        finish(largest);
        const float4 least = multiply<kNumChunks / 2>(low, high, q);
        const auto between = [&](float upper, float lower) {
            return fmaf(0.5f + 0.5f * width, upper, (0.5f - 0.5f * width) * lower);
        };
        return {between(largest.x, least.x), between(largest.y, least.y), between(largest.z, least.z),
                between(largest.w, least.w)};
    }

    // Products with the query's chunks from kFirst on, and then those before.
    template <int kFirst>
    static __device__ float4 multiply(const Page& low, const Page& high, const uint4* q) {
        float even[4] = {}, odd[4] = {};  // two sums, so that products wait less for each other
#pragma unroll
        for (int i = 0; i < kNumChunks; ++i) {
            const uint4 a = low.chunks[i], b = high.chunks[i];
            const uint4 c = q[(i + kFirst) % kNumChunks * kWarpSize + threadIdx.x % kWarpSize];
            multiply_add<T>(even, a.x, b.x, a.y, b.y, c.x, c.y);
            multiply_add<T>(odd, a.z, b.z, a.w, b.w, c.z, c.w);
        }
        return {even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3]};
    }
};

// Which pages are meant by the numbers that score_pages() counts: find(idx), and find(first, i) is the same of the i-th
// of a tile. Here every page has its own.
struct PagesInARow {
    __device__ int find(int idx) const { return idx; }
    __device__ int find(int first, int i) const { return first + i; }
};

// The same in 8 bits, which tensor cores multiply as they are. So what an extreme is multiplied with is an integer,
// too, in steps of 2^-21 of the power of two of the largest channel of 8 heads, or 2^-20 where both extremes count:
// three signed digits to base 256, the highest first. A block's sum is 64 products, for each digit 2^20 at most.
template <typename T, int kHeadDim, typename Pages = PagesInARow>
struct NarrowBounds {
    static constexpr int kNumChunks = 2 * kHeadDim / kChunk;
    static constexpr int kBlocks = kHeadDim / kChunk;  // of channels that share a scale
    static constexpr int kRowBytes = 2 * kHeadDim + kRowPadding;
    struct Scales {  // bytes, in the largest words that they fill
        using Word =
            std::conditional_t<kBlocks % 4 == 0, uint32_t, std::conditional_t<kBlocks % 2 == 0, uint16_t, uint8_t>>;
        static constexpr int kWords = kBlocks / int(sizeof(Word));
        Word words[kWords];

        __device__ float of(int block_idx) const {
            const unsigned word = words[block_idx / sizeof(Word)];
            return __uint_as_float((word >> block_idx % sizeof(Word) * 8 & 0xff) << 23);
        }

        __device__ Scales of_lane(int lane_idx) const {
            Scales scales;
#pragma unroll
            for (int i = 0; i < kWords; ++i) scales.words[i] = Word(__shfl_sync(kWholeWarp, words[i], lane_idx));
            return scales;
        }
    };
    const int8_t* extremes;  // [pages, 2, D]
    const Scales* scales;    // [pages]
    Pages pages;

    __device__ NarrowBounds(const Storage& storage, int64_t first_page, Pages pages = {})
        : extremes(static_cast<const int8_t*>(storage.bounds) + first_page * 2 * kHeadDim),
          scales(reinterpret_cast<const Scales*>(storage.scales) + first_page),
          pages(pages) {}

    __device__ Scales load_scales(int idx) const {
        const int page_idx = pages.find(idx);
        Scales loaded;
#pragma unroll
        for (int i = 0; i < Scales::kWords; ++i) loaded.words[i] = __ldcg(&scales[page_idx].words[i]);
        return loaded;
    }

    // Begins to copy a tile's pages, or those up to `end_page`, to rows of shared memory.
    __device__ void copy(unsigned rows, int page_idx, int end_page) const {
        constexpr int kVectors = 2 * kHeadDim / 16, kRounds = kPagesPerTile * kVectors / kWarpSize;
        const int first_page = pages.find(page_idx, 0);
        const int8_t* in_a_row = extremes + int64_t(first_page) * 2 * kHeadDim;
        const auto copy_vectors = [&](int round_idx, int num_pages) {
            const int idx = round_idx * kWarpSize + threadIdx.x % kWarpSize, page_of_tile = idx / kVectors;
            if (page_of_tile >= num_pages) return;
            const int8_t* source = in_a_row + idx * 16;
            if constexpr (!std::is_same_v<Pages, PagesInARow>) {
                source = extremes + int64_t(pages.find(page_idx, page_of_tile)) * 2 * kHeadDim + idx % kVectors * 16;
            }
            copy_async(rows + page_of_tile * kRowBytes + idx % kVectors * 16, source);
        };
        if (page_idx + kPagesPerTile <= end_page) {
#pragma unroll
            for (int i = 0; i < kRounds; ++i) copy_vectors(i, kPagesPerTile);
        } else {
#pragma unroll 1
            for (int i = 0; i < kRounds; ++i) copy_vectors(i, end_page - page_idx);
        }
    }

    // The channels of a head that a lane has in products: four in each half of a chunk.
    struct Head {
        uint2 halves[kBlocks][2];

        __device__ void load(const T* head) {
#pragma unroll
            for (int i = 0; i < 2 * kBlocks; ++i) {
                halves[i / 2][i % 2] = reinterpret_cast<const uint2*>(head + i * (kChunk / 2))[threadIdx.x % 4];
            }
        }

        // That of the warp's largest channel, as the bits of a float have it.
        __device__ int find_exponent() const {
            Pair<T> largest = as_pair<T>(0);
#pragma unroll
            for (int i = 0; i < 2 * kBlocks; ++i) {
                const uint2 half = halves[i / 2][i % 2];
                largest = __hmax2(largest, __hmax2(__habs2(as_pair<T>(half.x)), __habs2(as_pair<T>(half.y))));
            }
            const unsigned bits = __float_as_uint(fmaxf(to_float(largest.x), to_float(largest.y)));
            return max(int(__reduce_max_sync(kWholeWarp, bits) >> 23), kFractionBits + 1);
        }

        // Of a half of a chunk, in all bits of each channel's byte.
        __device__ unsigned find_signs(int idx) const {
            const uint2 half = halves[idx / 2][idx % 2];
            return spread_signs(half.x, half.y);
        }
    };

    struct Query {  // of 8 heads, what a lane needs
        static constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23, whose sum with a float has its integer below
        uint2 digits[kNumChunks][kDigits];
        float step;

        // By registers alone: stores to shared memory would wait until memory has taken the pages that are on their
        // way.
        __device__ Query(const Head& head, float width) {
            const int exponent = head.find_exponent();
            const float half_inverse = __uint_as_float((253 + kFractionBits - exponent) << 23);
            if (width == 1.0f) {
                step = __uint_as_float((exponent - kFractionBits) << 23);
                take_signs(head, 2.0f * half_inverse);
            } else {
                step = __uint_as_float((exponent - kFractionBits + 1) << 23);
                take_weights(head, (0.5f + 0.5f * width) * half_inverse, (0.5f - 0.5f * width) * half_inverse);
            }
        }

        // A channel counts whole with one extreme, by its sign.
        __device__ void take_signs(const Head& head, float inverse_step) {
            constexpr unsigned kBias = 0x808080 - 0x400000;  // so that the lowest bytes are digits above -128
#pragma unroll
            for (int i = 0; i < 2 * kBlocks; ++i) {
                unsigned biased[4], words[kDigits];
                for_each_channel(head.halves[i / 2][i % 2], [&](int j, float channel) {
                    biased[j] = __float_as_uint(fmaf(channel, inverse_step, kToInteger)) + kBias;
                });
                gather_digits(words, biased);
                const unsigned are_negative = head.find_signs(i);
#pragma unroll
                for (int j = 0; j < kDigits; ++j) {
                    const unsigned word = words[j] ^ 0x80808080u;
                    (&digits[i / 2][j].x)[i % 2] = word & are_negative;
                    (&digits[kBlocks + i / 2][j].x)[i % 2] = word & ~are_negative;
                }
            }
        }

        // A channel counts `outer` with one extreme, by its sign, and `inner` with the other. In steps twice as large
        // there is room for the lower digits' bias in the same sum.
        __device__ void take_weights(const Head& head, float outer, float inner) {
            constexpr float kBiasedToInteger = kToInteger + 0x8080;
#pragma unroll
            for (int i = 0; i < 2 * kBlocks; ++i) {
                unsigned biased[2][4], words[2][kDigits];
                for_each_channel(head.halves[i / 2][i % 2], [&](int j, float channel) {
                    biased[0][j] = __float_as_uint(fmaf(channel, outer, kBiasedToInteger));
                    biased[1][j] = __float_as_uint(fmaf(channel, inner, kBiasedToInteger));
                });
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    gather_digits(words[k], biased[k]);
                    words[k][0] += 0x40404040u;  // the highest digits, -33 to 33, are 64 above what they are
                }
                const unsigned are_negative = head.find_signs(i);
#pragma unroll
                for (int j = 0; j < kDigits; ++j) {
                    const unsigned of_outer = words[0][j] ^ 0x80808080u, of_inner = words[1][j] ^ 0x80808080u;
                    (&digits[i / 2][j].x)[i % 2] = (of_outer & are_negative) | (of_inner & ~are_negative);
                    (&digits[kBlocks + i / 2][j].x)[i % 2] = (of_outer & ~are_negative) | (of_inner & are_negative);
                }
            }
        }

        template <typename Visit>
        static __device__ void for_each_channel(uint2 half, Visit visit) {
            const Pair<T> low = as_pair<T>(half.x), high = as_pair<T>(half.y);
            visit(0, to_float(low.x));
            visit(1, to_float(low.y));
            visit(2, to_float(high.x));
            visit(3, to_float(high.y));
        }

        // The three lowest bytes of four numbers, the highest first.
        static __device__ void gather_digits(unsigned (&words)[kDigits], const unsigned (&biased)[4]) {
            const unsigned low_pair = __byte_perm(biased[0], biased[1], 0x5140);
            const unsigned high_pair = __byte_perm(biased[2], biased[3], 0x5140);
            words[0] = __byte_perm(__byte_perm(biased[0], biased[1], 0x0062), __byte_perm(biased[2], biased[3], 0x0062),
                                   0x5410);
            words[1] = __byte_perm(low_pair, high_pair, 0x7632);
            words[2] = __byte_perm(low_pair, high_pair, 0x5410);
        }
    };

    // In shared memory: [head tiles, digits and step, lanes].
    static constexpr int kQueryDigits = kNumChunks * kDigits, kQueryWords = (kQueryDigits + 1) * kWarpSize;

    static __device__ void store_queries(const ScoreInput<T>& input) {
        const int lane_idx = threadIdx.x % kWarpSize, num_warps = blockDim.x / kWarpSize;
        for (int head_tile = threadIdx.x / kWarpSize; head_tile < input.num_head_tiles; head_tile += num_warps) {
            Head head;
            head.load(input.own_head(head_tile));
            const Query query(head, input.width);
            uint2* words = reinterpret_cast<uint2*>(input.queries) + head_tile * kQueryWords + lane_idx;
#pragma unroll
            for (int i = 0; i < kQueryDigits; ++i) words[i * kWarpSize] = query.digits[i / kDigits][i % kDigits];
            words[kQueryDigits * kWarpSize] = {__float_as_uint(query.step), 0};
        }
    }

    static __device__ void load_query(Query& query, const ScoreInput<T>& input, int head_tile) {
        const uint2* words = reinterpret_cast<const uint2*>(input.queries) + head_tile * kQueryWords;
        words += threadIdx.x % kWarpSize;
#pragma unroll
        for (int i = 0; i < kQueryDigits; ++i) query.digits[i / kDigits][i % kDigits] = words[i * kWarpSize];
        query.step = __uint_as_float(words[kQueryDigits * kWarpSize].x);
    }

    struct Tile {  // of 16 pages, what a lane needs
        uint4 chunks[kNumChunks];
        Scales low_scales, high_scales;

        __device__ void load(unsigned rows, const Scales& scales, int first_lane) {
            const int lane_idx = threadIdx.x % kWarpSize;
            rows += lane_idx % 16 * kRowBytes + lane_idx / 16 * 16;
#pragma unroll
            for (int i = 0; i < kNumChunks; ++i) chunks[i] = load_matrices(rows + i * kChunk);
            low_scales = scales.of_lane(first_lane + lane_idx / 4);
            high_scales = scales.of_lane(first_lane + lane_idx / 4 + 8);
        }
    };

    // The scores of two query heads for page group_idx of a tile, and for page group_idx + 8.
    static __device__ float4 score(const Tile& tile, const Query& query) {
        float sums[4] = {};
#pragma unroll
        for (int block_idx = 0; block_idx < kBlocks; ++block_idx) {
            int by_digit[kDigits][4] = {};
#pragma unroll
            for (int i = block_idx; i < kNumChunks; i += kBlocks) {  // minimum and maximum
#pragma unroll
                for (int j = 0; j < kDigits; ++j) multiply_add(by_digit[j], tile.chunks[i], query.digits[i][j]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float upper = float(by_digit[0][i] * 256 + by_digit[1][i]), lower = float(by_digit[2][i]);
                const float scale = (i < 2 ? tile.low_scales : tile.high_scales).of(block_idx);
                sums[i] = fmaf(fmaf(upper, 256.0f, lower), scale, sums[i]);
            }
        }
        return {sums[0] * query.step, sums[1] * query.step, sums[2] * query.step, sums[3] * query.step};
    }
};

// How query heads agree on pages: of() says what two heads make of two pages' scores, and join() what two such are.
// This one takes the largest score.
struct LargestScore {
    __device__ float2 of(float4 scores, int, int) const {
        return {fmaxf(scores.x, scores.y), fmaxf(scores.z, scores.w)};
    }
    __device__ float join(float a, float b) const { return fmaxf(a, b); }
};

template <typename Agree>
__device__ float2 join(const Agree& agree, float2 a, float2 b) {
    return {agree.join(a.x, b.x), agree.join(a.y, b.y)};
}

__device__ inline float2 exchange(float2 scores, int distance) {
    return {__shfl_xor_sync(kWholeWarp, scores.x, distance), __shfl_xor_sync(kWholeWarp, scores.y, distance)};
}

// The lanes of a quad share the query heads, and have what theirs make of a low and a high page of each tile. Gives
// what all heads make of one page to each: in turn of the first tile's low and high page, and of the second's.
template <typename Agree, int kTiles>
__device__ float deal(const Agree& agree, const float2 (&scores)[kTiles]) {
    const bool is_second = threadIdx.x % 4 > 1, is_high = threadIdx.x % 2 == 1;
    const float2 kept = is_second ? scores[kTiles - 1] : scores[0], other = is_second ? scores[0] : scores[kTiles - 1];
    const float2 both = join(agree, kept, exchange(other, 2));
    return agree.join(is_high ? both.y : both.x, __shfl_xor_sync(kWholeWarp, is_high ? both.x : both.y, 1));
}

// For a query that can be read from the start, which then is read ahead of pages.
struct QueryIsThere {
    __device__ void operator()() const {}
};

// The page that a lane gets the score of, in tiles from `first_page` on in steps of `step`, or kNoPage.
__device__ inline int find_own_page(int first_page, int num_tiles, int step, int end_page) {
    const int tile_idx = threadIdx.x % 4 / 2;
    first_page += tile_idx * step;
    if (tile_idx >= num_tiles || first_page >= end_page) return kNoPage;
    return first_page + threadIdx.x % kWarpSize / 4 + threadIdx.x % 2 * 8;
}

// Scores tiles of 16 pages, from `first_page` on in steps of `step` up to `end_page`, `kTiles` at a time (1 or 2), and
// calls store(first_page, num_tiles, own_page, score) in all lanes: each has the score of a page of these tiles, on
// which heads have agreed, which may lie past the last page, or kNoPage. There is a page. All threads call it. The next
// tiles are on their way, in registers, while these are scored.
template <int kTiles, typename T, int kHeadDim, typename Wait, typename Agree, typename Store>
__device__ void score_pages(WideBounds<T, kHeadDim> bounds, const ScoreInput<T>& input, Wait wait_for_query,
                            int first_page, int step, int end_page, Agree& agree, Store store) {
    using Page = typename WideBounds<T, kHeadDim>::Page;
    const int group_idx = threadIdx.x % kWarpSize / 4;
    Page low[kTiles], high[kTiles];  // pages group_idx and group_idx + 8
    const auto load = [&](int tile, int page_idx) {  // past the last page the last one
        bounds.load(low[tile], min(page_idx + group_idx, end_page - 1));
        bounds.load(high[tile], min(page_idx + group_idx + 8, end_page - 1));
    };
    wait_for_query();
    bounds.sign_query(input);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        if (first_page + tile * step < end_page) load(tile, first_page + tile * step);
    }
    __syncthreads();
    while (first_page < end_page) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile, first_page += step) {
            if (tile > 0 && first_page >= end_page) break;
            float2 scores[1];
            for (int head_tile = 0; head_tile < input.num_head_tiles; ++head_tile) {
                const float4 of_heads = bounds.score(low[tile], high[tile], input.queries, head_tile, input.width);
                const float2 of_tile = agree.of(of_heads, head_tile, first_page + group_idx);
                scores[0] = head_tile == 0 ? of_tile : join(agree, scores[0], of_tile);
            }
            const int next_page = first_page + kTiles * step;
            if (next_page < end_page) load(tile, next_page);
            const float score = deal(agree, scores);
            store(first_page, 1, find_own_page(first_page, 1, step, end_page), score);
        }
    }
}

// The same of bounds in 8 bits, which come through shared memory: so each request is for whole lines, where a quad's
// own channels would be 32 bytes of each of eight lines. The first pages are on their way before the query is waited
// for, which may take as long as they do.
template <int kTiles, typename T, int kHeadDim, typename Pages, typename Wait, typename Agree, typename Store>
__device__ void score_pages(NarrowBounds<T, kHeadDim, Pages> bounds, const ScoreInput<T>& input, Wait wait_for_query,
                            int first_page, int step, int end_page, Agree& agree, Store store) {
    using Narrow = NarrowBounds<T, kHeadDim, Pages>;
    constexpr int kTileBytes = count_tile_bytes(kHeadDim);
    const int lane_idx = threadIdx.x % kWarpSize;
    const unsigned rows = address_of(input.tiles) + threadIdx.x / kWarpSize * kTiles * kTileBytes;
    const auto load_scales = [&] {  // of a page for each lane
        const int page_idx = first_page + lane_idx / kPagesPerTile * step + lane_idx % kPagesPerTile;
        return bounds.load_scales(min(page_idx, end_page - 1));
    };
    const auto copy = [&] {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            const int page_idx = first_page + i * step;
            if (page_idx < end_page) bounds.copy(rows + i * kTileBytes, page_idx, end_page);
        }
        commit_copies();
    };
    typename Narrow::Head head;
    constexpr bool kIsThere = std::is_same_v<Wait, QueryIsThere>;
    if constexpr (kIsThere) head.load(input.own_head(0));
    auto scales = load_scales();
    copy();
    wait_for_query();
    if constexpr (!kIsThere) head.load(input.own_head(0));
    typename Narrow::Query query(head, input.width);
    const bool is_stored = is_query_stored(input.num_head_tiles, kHeadDim);
    if (is_stored) {
        bounds.store_queries(input);
        __syncthreads();
    }
    while (first_page < end_page) {
        wait_for_copies<0>();
        __syncwarp();
        typename Narrow::Tile tiles[kTiles];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) tiles[i].load(rows + i * kTileBytes, scales, i * kPagesPerTile);
        __syncwarp();
        const int page_idx = first_page;
        first_page += kTiles * step;
        scales = load_scales();
        copy();
        float2 scores[kTiles];
#pragma unroll 1
        for (int head_tile = 0; head_tile < input.num_head_tiles; ++head_tile) {
            if (is_stored) bounds.load_query(query, input, head_tile);
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
                const float4 of_heads = bounds.score(tiles[i], query);
                const float2 of_tile = agree.of(of_heads, head_tile, page_idx + i * step + lane_idx / 4);
                scores[i] = head_tile == 0 ? of_tile : join(agree, scores[i], of_tile);
            }
        }
        store(page_idx, kTiles, find_own_page(page_idx, kTiles, step, end_page), deal(agree, scores));
    }
}

}  // namespace hf_quest
