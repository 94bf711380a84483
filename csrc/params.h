// What each kernel is told, and how it is launched. Plain pointers: no torch header is needed to compile a kernel.
// The letters of the shapes are those of hf_quest/reference.py. `length` counts the filled slots, the new tokens
// included; it lives on the device, so that a captured graph stays right while the sequence grows.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace hf_quest {

enum class DataType { kHalf, kBFloat16 };

struct Launch {
    cudaStream_t stream;
    int num_sms;
    int most_shared_bytes;  // that a block may ask for
    bool has_clusters;  // of thread blocks (sm_90 and later)
    bool overlaps;  // may begin before the previous kernel ends (programmatic dependent launch, sm_90 and later)
};

// How the query heads of a KV head agree on pages: by their largest score, or by shares, each head's softmax over the
// pages before the newest, of which a page gets the sum or the largest.
enum class Agreement { kMax, kSum, kShare };

// hf_quest/reference.py says what each is.
struct Score {
    float width;
    bool keeps_first;
    Agreement agreement;
};

// The storage of one layer: given here, or found on the device. A captured graph must not know where storage lies,
// which may be other storage by the time it runs.
struct Storage {
    void* keys;                // [B, Hkv, capacity, D]
    void* values;              // [B, Hkv, capacity, D]
    void* bounds;              // [B, Hkv, pages, 2, D] or null; pages = capacity / S, rounded up
    uint8_t* scales;           // [B, Hkv, pages, D / 32], with which bounds are int8, or null: bounds are like keys
    float* scores;             // [B, Hkv, 1, pages]
    int64_t capacity;          // slots
    uint8_t* codes;            // [B, Hkv, capacity, D * code_bits / 8] or null
    const int64_t* addresses;  // [12] on the device, or null: the seven members above, which count instead of them
};

// What of a layer's tokens in the host's memory lies on the device, too (pool.cuh). Storage that is found by addresses
// has it in the last five of these.
struct Pool {
    void* keys;        // [B, Hkv, size, D]
    void* values;      // [B, Hkv, size, D]
    uint64_t* tags;    // [B, Hkv, size]
    uint64_t* counts;  // [B, Hkv, 2]: tokens that were looked up, and those that were there
    int64_t size;      // slots, a multiple of kPoolStep, or 0
};

struct AppendParams {
    Launch launch;
    DataType data_type;
    int num_rows, num_kv_heads, head_dim, page_size, code_bits;
    int64_t num_new;
    const void* new_keys;    // [B, Hkv, T, D]
    const void* new_values;  // [B, Hkv, T, D]
    int64_t key_strides[3], value_strides[3];  // of B, Hkv, T, in elements
    const int64_t* length;   // [1]
    const int64_t* padding;  // [B]
    Storage storage;
};

struct EstimateParams {
    Launch launch;
    DataType data_type;
    int num_rows, num_kv_heads, group_size, head_dim, page_size;
    float scaling;
    Score score;
    const void* query;         // [B, Hq, 1, D]
    int64_t query_strides[2];  // of B and Hq, in elements
    const int64_t* length;     // [1]
    const int64_t* padding;    // [B]
    Storage storage;
    float2* head_sums;         // [B, Hkv, blocks, head tiles, 8], see count_head_sums(); scratch
};

struct SelectParams {
    Launch launch;
    int num_rows, num_kv_heads, page_size, num_selected;
    bool keeps_first;
    const int64_t* length;   // [1]
    const int64_t* padding;  // [B]
    Storage storage;
    int64_t* page_ids;       // [B, Hkv, 1, num_selected]
};

// Of `num_candidates` pages the newest is one, and not among those that are found: its tokens are chosen anyway.
struct CandidatesParams {
    Launch launch;
    int num_rows, num_kv_heads, page_size, num_candidates, num_stripes;
    bool keeps_first;
    const int64_t* length;   // [1]
    const int64_t* padding;  // [B]
    Storage storage;
    int64_t* page_ids;       // [B, Hkv, 1, num_stripes, count_most_in_stripe()]
};

struct RefineParams {
    Launch launch;
    DataType data_type;
    int num_rows, num_kv_heads, group_size, head_dim, page_size, code_bits, num_stripes, most_in_stripe, num_tokens;
    float scaling;
    Agreement agreement;
    const void* query;         // [B, Hq, 1, D]
    int64_t query_strides[2];  // of B and Hq, in elements
    const int64_t* length;     // [1]
    const int64_t* padding;    // [B]
    Storage storage;
    const int64_t* page_ids;   // [B, Hkv, 1, num_stripes, most_in_stripe], candidates
    int num_blocks;            // count_refine_blocks()
    float* logits;             // [B, Hkv, G, num_stripes * most_in_stripe * S]; scratch
    float2* head_sums;         // [B, Hkv, head tiles, num_blocks, 8]; scratch
    unsigned* keys;            // [B, Hkv, num_stripes * most_in_stripe * S]; scratch
    int64_t* token_ids;        // [B, Hkv, 1, num_tokens]
};

// The newest token's key and value, where they are not stored yet: null where they are.
struct NewToken {
    const void* key;    // [B, Hkv, D]
    const void* value;  // [B, Hkv, D]
    int64_t key_strides[2], value_strides[2];  // of B and Hkv, in elements
};

// How tokens are chosen by their codes: code_bits 0 where pages are attended whole.
struct TokenChoice {
    int code_bits, num_candidates, num_tokens;  // candidates are pages, the newest among them
    int num_stripes;                            // count_stripes()
    Agreement agreement;
};

struct AttendParams {
    Launch launch;
    DataType data_type;
    int num_rows, num_kv_heads, group_size, head_dim, page_size, num_selected, num_splits;
    float scaling, softcap;    // softcap 0 for none
    Score score;               // of launch_chain and launch_chain_by_codes
    TokenChoice choice;        // of launch_chain_by_codes
    NewToken new_token;        // of launch_chain and launch_chain_by_codes, which store it
    const void* query;         // [B, Hq, 1, D]
    int64_t query_strides[2];  // of B and Hq, in elements
    Storage storage;
    const int64_t* page_ids;   // [B, Hkv, 1, num_selected], of tokens if page_size is 1, or null for every page
    int64_t* told_ids;         // the same, where what is chosen here is told, or null
    const int64_t* length;     // [1]
    const int64_t* padding;    // [B]
    const void* sinks;         // [Hq] or null
    float* partial_output;     // [B, Hkv, head tiles, num_splits, min(G, 8), D]
    float2* partial_softmax;   // [B, Hkv, head tiles, num_splits, min(G, 8)]: maximum and sum
    int* counters;             // [B, Hkv, head tiles], zero before and after
    void* output;              // [B, Hq, 1, D]
    Pool pool;                 // of launch_pooled_chain_by_codes, unless it is found by addresses
};

// Whole segments of one row's prompt, which begin at position `first_position`. The row's tokens are given from its
// first one on, without padding. Strides are of heads and tokens, in elements.
struct PromptParams {
    Launch launch;
    DataType data_type;
    int num_kv_heads, group_size, segment_size, block_size, num_segments, first_position;
    float scaling;
    const void* query;  // [Hq, R * L, D], for the estimate [Hq, R * samples, D]
    const void* keys;   // [Hkv, first_position + R * L, D]
    int64_t query_strides[2], key_strides[2];
};

// Tokens whose part of a softmax is summed at a time.
constexpr int kEstimateChunk = 2048;

// `num_samples` queries of each segment.
struct PromptEstimateParams : PromptParams {
    int num_samples, num_blocks;  // C, blocks before the last segment: a multiple of 4
    __half* maxima;               // [Hq, R * samples, C]; scratch
    float2* softmax;              // [Hq, R * samples, chunks]: highest and sum; scratch
    float* scores;                // [Hkv, R, C]
};

struct PromptAttendParams : PromptParams {
    int num_selected;
    const void* values;         // as keys
    int64_t value_strides[2];
    const int64_t* block_ids;   // [Hkv, R, K]
    const void* sinks;          // [Hq] or null
    void* output;               // [R * L, Hq, D]
    int64_t output_strides[2];  // of tokens and heads
};

// Into how many stripes a row's pages are dealt where so many tokens are chosen, those of the newest page included: as
// hf_quest/stripes.py does. A power of two.
constexpr int kMaxStripes = 16, kMinStripes = 4, kLeastShare = 12;
constexpr int count_stripes(int num_tokens, int page_size) {
    int num = kMaxStripes;
    while (num > kMinStripes && num * kLeastShare > num_tokens - page_size) num /= 2;
    return num;
}

// A pool has so many slots or a multiple: sets of 16 in each stripe.
constexpr int kPoolWays = 16, kPoolStep = kMaxStripes * kPoolWays;

// Query heads that one thread block attends for together.
constexpr int kHeadTile = 8;

// The query heads of a KV head, in whole tiles where they fill more than one.
constexpr int padded_group(int group_size) {
    return group_size <= kHeadTile ? group_size : (group_size + kHeadTile - 1) / kHeadTile * kHeadTile;
}

cudaError_t launch_append(const AppendParams& params);
cudaError_t launch_estimate(const EstimateParams& params);
int64_t count_head_sums(const EstimateParams& params);  // 0 where heads don't agree by shares
cudaError_t launch_select(const SelectParams& params);
cudaError_t launch_attend(const AttendParams& params);
cudaError_t launch_find_candidates(const CandidatesParams& params);
int count_most_in_stripe(int num_candidates, int num_stripes);
cudaError_t launch_refine(const RefineParams& params);
int count_refine_blocks(const RefineParams& params);  // of a row's KV head

// For prompts, on sm_90 alone: head dim 128, blocks of 16 or 32, segments that are multiples of 128 and begin at
// multiples of their size.
cudaError_t launch_prompt_estimate(const PromptEstimateParams& params);
cudaError_t launch_prompt_attend(const PromptAttendParams& params);

// launch_append of one token that comes beside the storage, if one does, launch_estimate, launch_select and
// launch_attend in one, by clusters of find_cluster_size() blocks; 0 of them if this GPU or these shapes have none, of
// two or more, that run all at once. Where needs_scores(), the storage must have scores.
int find_cluster_size(const AttendParams& params);
bool needs_scores(const AttendParams& params);
cudaError_t launch_chain(const AttendParams& params, int cluster_size);

// The same of launch_append, launch_estimate, launch_find_candidates, launch_refine and launch_attend, for bounds in 8
// bits. Where addresses say where storage is, it must have scores.
int find_cluster_size_by_codes(const AttendParams& params);
bool needs_scores_by_codes(const AttendParams& params, int cluster_size);
cudaError_t launch_chain_by_codes(const AttendParams& params, int cluster_size);

// The same with a pool, and to the bit the same output, if there is memory for it in blocks of such clusters.
bool has_pool_by_codes(const AttendParams& params, int cluster_size);
cudaError_t launch_pooled_chain_by_codes(const AttendParams& params, int cluster_size);

// Into how many parts, each of one thread block, a launch with these shapes cuts the pages of a KV head.
int count_splits(const AttendParams& params);

}  // namespace hf_quest
