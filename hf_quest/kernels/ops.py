"""The five stages on CUDA, as operators of `torch.ops.hf_quest`: schemas, fakes and checks. The kernels are in csrc/.

Stages, arguments and shapes are those of `reference`, which says what they mean, with these differences. `length` is a
tensor on the device, [1] int64: the kernels stop at it, so that a captured graph stays right while the sequence grows.
Tensors with a dim of pages or slots come whole, not cut to the length. There is one query per row, T = 1.

`prompt_estimate` and `prompt_attend` are those of `prefill`, for the segments of one row.
"""

import warnings

import torch

from .. import stripes
from ..reference import GROUPS, PUBLISHED
from . import build

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 96, 128, 256)
PAGE_SIZES = (8, 16, 32, 64)
MAX_GROUP = 32
MAX_SLOTS = 2**24  # so that 32 bits count the elements of a head
ALIGNMENT = 8  # elements of 2 bytes in the 16 that a thread loads at once
NUM_ADDRESSES = 12  # of a layer, see decode
POOL_STEP = 256  # tokens, a number of which a pool has room for
CODE_BITS = (2, 4)  # of a channel, for which there are kernels
PROMPT_HEAD_DIM, PROMPT_BLOCK_SIZES, PROMPT_TILE = 128, (16, 32), 128  # of the kernels for prompts
PROMPT_MAX_SAMPLES = 1024  # queries of a segment that are looked at, of all heads that choose together
SCALE_BLOCK = 32  # channels that share a scale, in csrc as in reference.py

library = torch.library.Library("hf_quest", "DEF")
library.define(
    "append(Tensor(a!) keys, Tensor(b!) values, Tensor(c!)? bounds, Tensor(d!)? scales, Tensor new_keys, "
    "Tensor new_values, Tensor length, Tensor padding, int page_size, Tensor(e!)? codes=None) -> ()"
)
library.define(
    "estimate(Tensor query, Tensor bounds, Tensor? scales, Tensor length, Tensor padding, int page_size, "
    "float scaling, float width=0.5, str group='max') -> Tensor"
)
library.define(
    "select(Tensor scores, Tensor length, Tensor padding, int num_selected, int page_size, "
    "bool keeps_first=False) -> Tensor"
)
library.define(
    "find_candidates(Tensor scores, Tensor length, Tensor padding, int num_candidates, int page_size, "
    "bool keeps_first=False, int num_stripes=16) -> Tensor"
)
library.define(
    "refine(Tensor query, Tensor bounds, Tensor? scales, Tensor codes, Tensor candidates, Tensor length, "
    "Tensor padding, int page_size, float scaling, int num_tokens, str group='sum') -> Tensor"
)
library.define(
    "attend(Tensor query, Tensor keys, Tensor values, Tensor? page_ids, Tensor length, Tensor padding, "
    "Tensor(a!) counters, int page_size, float scaling, float? softcap=None, Tensor? sinks=None) -> Tensor"
)
library.define(
    "chain(Tensor query, Tensor keys, Tensor values, Tensor bounds, Tensor? scales, Tensor length, Tensor padding, "
    "int num_selected, int page_size, float scaling, float? softcap=None, Tensor? sinks=None, "
    "Tensor(a!)? page_ids=None, float width=0.5, bool keeps_first=True, str group='max', Tensor? codes=None, "
    "int num_tokens=0, str token_group='sum', Tensor(b!)? pool_keys=None, Tensor(c!)? pool_values=None, "
    "Tensor(d!)? pool_tags=None, Tensor(e!)? pool_counts=None) -> Tensor"
)
library.define(
    "decode(Tensor query, Tensor? new_keys, Tensor? new_values, Tensor addresses, Tensor length, Tensor padding, "
    "int layer_idx, int num_kv_heads, int num_selected, int page_size, float scaling, float? softcap=None, "
    "Tensor? sinks=None, float width=0.5, bool keeps_first=True, str group='max', int code_bits=0, int num_tokens=0, "
    "str token_group='sum', bool has_pool=False) -> Tensor"
)

library.define(
    "prompt_estimate(Tensor query, Tensor keys, int first_position, int segment_size, int sample_stride, "
    "int block_size, float scaling) -> Tensor"
)
library.define(
    "prompt_attend(Tensor query, Tensor keys, Tensor values, Tensor block_ids, Tensor(a!) output, int first_position, "
    "int segment_size, int block_size, float scaling, Tensor? sinks=None) -> ()"
)


def serves(keys, values, page_size):
    """Whether the kernels serve a layer with such storage; builds them on first use. On a GPU, a no is announced."""
    if keys.device.type != "cuda":
        return False
    reason = why_not(keys, values, page_size)
    if reason is not None:
        warnings.warn(f"hf_quest has no CUDA kernels for {reason} and runs its slower PyTorch path.", stacklevel=2)
        return False
    return build.load()


def why_not(keys, values, page_size):
    """What of a layer with such storage no kernels serve, or None."""
    for is_served, what in (
        (keys.dtype in DTYPES, f"{keys.dtype} keys (float16 and bfloat16 are served)"),
        (keys.shape[-1] in HEAD_DIMS, f"a head dim of {keys.shape[-1]} ({HEAD_DIMS} are served)"),
        (values.shape == keys.shape, f"values of another head dim ({values.shape[-1]}) than the keys"),
        (page_size in PAGE_SIZES, f"page_size={page_size} ({PAGE_SIZES} are served)"),
        (keys.shape[2] < MAX_SLOTS, f"{keys.shape[2]} slots (fewer than {MAX_SLOTS} are served)"),
    ):
        if not is_served:
            return what
    return None


def has_pools(device, num_heads):
    """Whether the kernels of a device look for tokens in a pool, for so many KV heads of all rows together.

    They do where the device has clusters of thread blocks, and room for one of two blocks for each head at once.
    """
    if device.type != "cuda":
        return True
    properties = torch.cuda.get_device_properties(device)
    return properties.major >= 9 and 2 * num_heads <= properties.multi_processor_count


def append(keys, values, bounds, scales, new_keys, new_values, length, padding, page_size, codes=None):
    """Store new keys and values in the last T of the `length` filled slots and update the bounds of their pages.

    The codes of a page are written when it is full.

    Args:
        keys, values: [B, Hkv, capacity, D], mutated.
        bounds: [B, Hkv, P, 2, D], mutated, or None. scales: [B, Hkv, P, D / 32] uint8, mutated, with which bounds are
            int8 (`reference.to_8_bits`), or None for bounds in the dtype of the keys.
        new_keys, new_values: [B, Hkv, T, D], in any layout with 16-byte aligned rows.
        length: [1] int64. padding: [B] int64.
        codes: [B, Hkv, capacity, D * bits / 8] uint8, mutated, as in `codes.encode`; or None.
    """
    batch_size, num_kv_heads, num_new, head_dim = new_keys.shape
    stored = (batch_size, num_kv_heads, keys.shape[2], head_dim)
    _check_page_size(page_size)
    _check("keys", keys, keys.device, DTYPES, stored)
    _check("values", values, keys.device, (keys.dtype,), stored)
    if bounds is not None:
        _check_bounds(bounds, scales, keys, (batch_size, num_kv_heads, -(-keys.shape[2] // page_size)))
    _check_rows("new_keys", new_keys, keys.device, (keys.dtype,), (batch_size, num_kv_heads, num_new, head_dim))
    _check_rows("new_values", new_values, keys.device, (keys.dtype,), (batch_size, num_kv_heads, num_new, head_dim))
    _check("length", length, keys.device, (torch.int64,), (1,))
    _check("padding", padding, keys.device, (torch.int64,), (batch_size,))
    if not 1 <= num_new <= keys.shape[2]:
        raise ValueError(f"append takes 1 to {keys.shape[2]} new tokens, the capacity, not {num_new}.")
    if codes is not None:
        _check_codes(codes, keys, (batch_size, num_kv_heads, keys.shape[2]))
        if bounds is None:
            raise ValueError("codes are on the grid of a page's bounds, so there must be bounds.")
    torch.ops.hf_quest.append(keys, values, bounds, scales, new_keys, new_values, length, padding, page_size, codes)


def estimate(query, bounds, scales, length, padding, page_size, scaling, score=PUBLISHED):
    """Page scores [B, Hkv, 1, P] float32; those of the newest page and later ones are undefined.

    With bounds in 8 bits their weights are rounded, in each head by 2^-21 of its largest channel at most.

    Args:
        query: [B, Hq, 1, D], in any layout with 16-byte aligned rows.
        bounds: [B, Hkv, P, 2, D]. scales: [B, Hkv, P, D / 32] or None, as in `append`.
        length: [1] int64. padding: [B] int64.
        score: a `reference.Score`.
    """
    batch_size, num_kv_heads, num_pages, _, head_dim = bounds.shape
    _check_page_size(page_size)
    _check_query(query, num_kv_heads, head_dim)
    _check_bounds(bounds, scales, query, (query.shape[0], num_kv_heads, num_pages))
    _check("length", length, bounds.device, (torch.int64,), (1,))
    _check("padding", padding, bounds.device, (torch.int64,), (batch_size,))
    _check_score(score)
    return torch.ops.hf_quest.estimate(
        query, bounds, scales, length, padding, page_size, scaling, score.width, score.group
    )


def select(scores, length, padding, num_selected, page_size, keeps_first=False):
    """Page ids [B, Hkv, 1, K] int64, ascending, then -1. Scores of the newest page and later ones are not read.

    Args:
        scores: [B, Hkv, 1, P] float32.
        length: [1] int64. padding: [B] int64.
        keeps_first: as in `reference.Score`.
    """
    _check_scores(scores, length, padding, num_selected, page_size)
    return torch.ops.hf_quest.select(scores, length, padding, num_selected, page_size, keeps_first)


def find_candidates(scores, length, padding, num_candidates, page_size, keeps_first=False, num_stripes=16):
    """Candidates [B, Hkv, 1, X, W] int64: `codes.find_candidates`. No score of the newest page or a later one is read.

    Args:
        scores: [B, Hkv, 1, P] float32.
        length: [1] int64. padding: [B] int64.
        num_candidates: pages, the newest among them.
        keeps_first: as in `reference.Score`.
        num_stripes: X, of `stripes.COUNTS`.
    """
    _check_scores(scores, length, padding, num_candidates, page_size)
    _check_num_stripes(num_stripes)
    how = (num_candidates, page_size, keeps_first, num_stripes)
    return torch.ops.hf_quest.find_candidates(scores, length, padding, *how)


def refine(query, bounds, scales, codes, candidates, length, padding, page_size, scaling, num_tokens, group="sum"):
    """Token ids [B, Hkv, 1, num_tokens] int64, ascending in each stripe, the newest page's last: `codes.refine`, whose
    logits are rounded: weights by 2^-21 of their page's largest, and the sums of their products.

    Args:
        query: [B, Hq, 1, D], in any layout with 16-byte aligned rows.
        bounds: [B, Hkv, P, 2, D]. scales: [B, Hkv, P, D / 32] or None, as in `append`.
        codes: [B, Hkv, capacity, D * bits / 8] uint8, of 2 or 4 bits, where P pages hold the capacity.
        candidates: [B, Hkv, 1, X, W] int64, as `find_candidates` gives them.
        length: [1] int64. padding: [B] int64.
        num_tokens: those of the newest page included.
        group: of `reference.GROUPS`.
    """
    batch_size, num_kv_heads, num_pages, _, head_dim = bounds.shape
    _check_page_size(page_size)
    _check_query(query, num_kv_heads, head_dim)
    _check_bounds(bounds, scales, query, (query.shape[0], num_kv_heads, num_pages))
    _check_codes(codes, query, (batch_size, num_kv_heads, codes.shape[2]))
    if -(-codes.shape[2] // page_size) != num_pages:
        raise ValueError(f"{num_pages} pages of {page_size} do not hold codes of {codes.shape[2]} tokens.")
    shape = (batch_size, num_kv_heads, 1, *candidates.shape[-2:])
    _check_num_stripes(shape[3])
    _check("candidates", candidates, bounds.device, (torch.int64,), shape)
    _check("length", length, bounds.device, (torch.int64,), (1,))
    _check("padding", padding, bounds.device, (torch.int64,), (batch_size,))
    _check_num_tokens(num_tokens, page_size)
    _check_group(group)
    where = (candidates, length, padding, page_size)
    return torch.ops.hf_quest.refine(query, bounds, scales, codes, *where, scaling, num_tokens, group)


def attend(query, keys, values, page_ids, length, padding, page_size, scaling, softcap=None, sinks=None, counters=None):
    """Attention [B, Hq, 1, D] of each row's newest token over its pages, or over all that is stored.

    Args:
        query: [B, Hq, 1, D], in any layout with 16-byte aligned rows.
        keys, values: [B, Hkv, capacity, D].
        page_ids: [B, Hkv, 1, K] int64, -1 for none; None for every page, which is dense attention. With a page_size of
            1 they are tokens.
        length: [1] int64. padding: [B] int64.
        softcap: float or None. sinks: [Hq] in the dtype of `query`, or None.
        counters: what `new_counters` returns. Calls that may run at the same time need counters of their own.
    """
    batch_size, num_kv_heads, capacity, head_dim = keys.shape
    if page_size != 1 or page_ids is None:
        _check_page_size(page_size)
    _check("keys", keys, keys.device, DTYPES, (batch_size, num_kv_heads, capacity, head_dim))
    _check("values", values, keys.device, (keys.dtype,), (batch_size, num_kv_heads, capacity, head_dim))
    _check_query(query, num_kv_heads, head_dim, keys)
    if page_ids is not None:
        _check("page_ids", page_ids, keys.device, (torch.int64,), (batch_size, num_kv_heads, 1, page_ids.shape[-1]))
    _check("length", length, keys.device, (torch.int64,), (1,))
    _check("padding", padding, keys.device, (torch.int64,), (batch_size,))
    _check_sinks(sinks, query)
    if counters is None:
        counters = new_counters(keys)
    _check("counters", counters, keys.device, (torch.int32,), (len(counters),))
    if len(counters) < batch_size * query.shape[1]:
        raise ValueError(f"counters must be {batch_size * query.shape[1]} or more, not {len(counters)}.")
    return torch.ops.hf_quest.attend(
        query, keys, values, page_ids, length, padding, counters, page_size, scaling, softcap, sinks
    )


def chain(
    query,
    keys,
    values,
    bounds,
    scales,
    length,
    padding,
    num_selected,
    page_size,
    scaling,
    softcap=None,
    sinks=None,
    page_ids=None,
    score=PUBLISHED,
    codes=None,
    num_tokens=0,
    token_group="sum",
    pool=None,
):
    """`estimate`, `select` and `attend`, in one kernel where the GPU has thread block clusters (sm_90 and later).

    With codes there are `find_candidates` and `refine` in the place of `select`, in the one kernel too if bounds are in
    8 bits.

    Args:
        num_selected: K. `page_ids`: [B, Hkv, 1, K] int64, mutated to what was selected, or None. `score`: a
            `reference.Score`. The others as there.
        codes: as in `refine`, or None. With them K pages are candidates, `num_tokens` of whose tokens are attended,
            `token_group` is the group of `refine`, and `page_ids`, [B, Hkv, 1, num_tokens], gets the tokens, ordered as
            those of `refine`.
        pool: of what was attended lately, where keys and values are in the host's memory: keys and values [B, Hkv, N,
            D], tags [B, Hkv, N] and counts [B, Hkv, 2] int64, mutated, see `storage.pool`; or None. It is used by the
            one kernel with codes. The output is the same.

    Returns:
        [B, Hq, 1, D].
    """
    batch_size, num_kv_heads, capacity, head_dim = keys.shape
    _check_page_size(page_size)
    _check("keys", keys, keys.device, DTYPES, (batch_size, num_kv_heads, capacity, head_dim))
    _check("values", values, keys.device, (keys.dtype,), (batch_size, num_kv_heads, capacity, head_dim))
    _check_bounds(bounds, scales, keys, (batch_size, num_kv_heads, -(-capacity // page_size)))
    _check_query(query, num_kv_heads, head_dim, keys)
    _check("length", length, keys.device, (torch.int64,), (1,))
    _check("padding", padding, keys.device, (torch.int64,), (batch_size,))
    _check_num_selected(num_selected)
    _check_sinks(sinks, query)
    if codes is not None:
        _check_codes(codes, keys, (batch_size, num_kv_heads, capacity))
        _check_num_tokens(num_tokens, page_size, num_selected)
    if page_ids is not None:
        shape = (batch_size, num_kv_heads, 1, num_selected if codes is None else num_tokens)
        _check("page_ids", page_ids, keys.device, (torch.int64,), shape)
    _check_score(score)
    _check_group(token_group)
    if pool is not None:
        _check_pool(pool, keys)
    where = (length, padding, num_selected, page_size, scaling)
    how = (softcap, sinks, page_ids, *score, codes, num_tokens, token_group, *(pool or ()))
    return torch.ops.hf_quest.chain(query, keys, values, bounds, scales, *where, *how)


def decode(
    query,
    new_keys,
    new_values,
    addresses,
    length,
    padding,
    layer_idx,
    num_kv_heads,
    num_selected,
    page_size,
    scaling,
    softcap=None,
    sinks=None,
    score=PUBLISHED,
    code_bits=0,
    num_tokens=0,
    token_group="sum",
    has_pool=False,
):
    """A decode step of one layer, all its stages: append; estimate and select, unless it is dense, and with codes
    refine; attend.

    Made for captured graphs. The storage is no argument but found on the device, so that a graph does not depend on
    where storage lies and how large it is, and it may move between two replays. What is written there (the new token's
    key, value and bounds) is therefore invisible to the schema; nothing else in a graph may read it.

    Args:
        query: [B, Hq, 1, D].
        new_keys, new_values: [B, Hkv, 1, D], or None where they are stored already.
        addresses: [layers, 12] int64, a row for every layer: the addresses of its keys, values, bounds, scales and
            scores ([B, Hkv, 1, P] float32, to work in), its capacity in slots, the addresses of its codes and of its
            pool's keys, values, tags and counts, and that pool's slots; 0 for what there is not.
        length: [1] int64. padding: [B] int64.
        num_selected: K, or 0 for every page, which is dense attention.
        score: a `reference.Score`.
        code_bits: of a channel in codes, beside which bounds are in 8 bits, or 0 where there are none. num_tokens,
            token_group: as in `chain`.
        has_pool: whether the layer may have a pool, as in `chain`.

    Returns:
        [B, Hq, 1, D].
    """
    batch_size, _, _, head_dim = query.shape
    _check_page_size(page_size)
    for name, tensor in (("new_keys", new_keys), ("new_values", new_values)):
        if tensor is not None:
            _check_rows(name, tensor, query.device, (query.dtype,), (batch_size, num_kv_heads, 1, head_dim))
    _check_query(query, num_kv_heads, head_dim)
    if (new_keys is None) != (new_values is None):
        raise ValueError("decode stores a key and a value, or neither.")
    _check("addresses", addresses, query.device, (torch.int64,), (len(addresses), NUM_ADDRESSES))
    if not 0 <= layer_idx < len(addresses):
        raise ValueError(f"addresses are those of {len(addresses)} layers, and layer_idx is {layer_idx}.")
    _check("length", length, query.device, (torch.int64,), (1,))
    _check("padding", padding, query.device, (torch.int64,), (batch_size,))
    if num_selected != 0:
        _check_num_selected(num_selected)
    _check_sinks(sinks, query)
    _check_score(score)
    if code_bits:
        _check_code_bits(code_bits)
        _check_num_tokens(num_tokens, page_size, num_selected or None)  # a dense layer chooses nothing
    _check_group(token_group)
    return torch.ops.hf_quest.decode(
        query,
        new_keys,
        new_values,
        addresses,
        length,
        padding,
        layer_idx,
        num_kv_heads,
        num_selected,
        page_size,
        scaling,
        softcap,
        sinks,
        *score,
        code_bits,
        num_tokens,
        token_group,
        has_pool,
    )


def serves_prompts(query, keys, values, segment_size, block_size, num_samples, softcap=None):
    """Whether a prompt's segments have kernels of their own, by up to `num_samples` queries of each: on Hopper, for the
    heads of most models.
    """
    is_served = (
        query.device.type == "cuda"
        and query.dtype in DTYPES
        and query.shape[-1] == values.shape[-1] == PROMPT_HEAD_DIM
        and segment_size % PROMPT_TILE == 0
        and block_size in PROMPT_BLOCK_SIZES
        and keys.dtype == query.dtype
        and query.shape[0] <= MAX_GROUP * keys.shape[0]
        and query.shape[0] // keys.shape[0] * num_samples <= PROMPT_MAX_SAMPLES
        and softcap is None
        and torch.cuda.get_device_capability(query.device) == (9, 0)
    )
    return is_served and build.load()


def prompt_estimate(query, keys, first_position, segment_size, sample_stride, block_size, scaling):
    """How much each block matters to the segments: `prefill.estimate`, by some queries of each.

    Args:
        query: [Hq, R · L, D] of whole segments, the first of which begins at `first_position`; float16 or bfloat16.
        keys: [Hkv, N, D] from the row's first token on.
        sample_stride: from one query that is looked at to the next; it divides segment_size, L.

    Returns:
        [Hkv, R, C] float32: -1 for blocks that are not before the segment.
    """
    _check_prompt(query, keys, first_position, segment_size, block_size)
    if segment_size % sample_stride:
        raise ValueError(f"sample_stride={sample_stride} does not divide segment_size={segment_size}.")
    if first_position + query.shape[1] == segment_size:
        raise ValueError("there are no blocks before the first segment of a prompt.")
    num_samples = query.shape[0] // len(keys) * (segment_size // sample_stride)
    if num_samples > PROMPT_MAX_SAMPLES:
        raise ValueError(f"{num_samples} queries of a segment and KV head are more than {PROMPT_MAX_SAMPLES}.")
    return torch.ops.hf_quest.prompt_estimate(
        query, keys, first_position, segment_size, sample_stride, block_size, scaling
    )


def prompt_attend(
    query, keys, values, block_ids, output, first_position, segment_size, block_size, scaling, sinks=None
):
    """Attention of each segment over its blocks and, causally, itself, as `prefill.attend_segments`.

    Args:
        query: [Hq, R · L, D] of whole segments, the first of which begins at `first_position`.
        keys, values: [Hkv, N, D] from the row's first token on.
        block_ids: [Hkv, R, K] int64, of blocks before the segment.
        output: [R · L, Hq, D], mutated.
        sinks: [Hq] in the dtype of `query`, or None.
    """
    _check_prompt(query, keys, first_position, segment_size, block_size)
    num_heads, num_queries, head_dim = query.shape
    _check_rows("values", values, query.device, (query.dtype,), tuple(keys.shape))
    _check_rows("output", output, query.device, (query.dtype,), (num_queries, num_heads, head_dim))
    block_shape = (len(keys), num_queries // segment_size, block_ids.shape[-1])
    _check("block_ids", block_ids, query.device, (torch.int64,), block_shape)
    if sinks is not None:
        _check("sinks", sinks, query.device, (query.dtype,), (num_heads,))
    torch.ops.hf_quest.prompt_attend(
        query, keys, values, block_ids, output, first_position, segment_size, block_size, scaling, sinks
    )


def _check_prompt(query, keys, first_position, segment_size, block_size):
    num_heads, num_queries, _ = query.shape
    _check_rows("query", query, query.device, DTYPES, (num_heads, num_queries, PROMPT_HEAD_DIM))
    _check_rows("keys", keys, query.device, (query.dtype,), (*keys.shape[:2], PROMPT_HEAD_DIM))
    if num_heads % len(keys) or not 1 <= num_heads // len(keys) <= MAX_GROUP:
        raise ValueError(f"query must have 1 to {MAX_GROUP} heads for each of {len(keys)} KV heads, not {num_heads}.")
    if segment_size % PROMPT_TILE or num_queries % segment_size or num_queries < segment_size:
        raise ValueError(f"{num_queries} queries are not segments of {segment_size}, a multiple of {PROMPT_TILE}.")
    if block_size not in PROMPT_BLOCK_SIZES or first_position % segment_size:
        raise ValueError(
            f"blocks of {block_size} tokens or a first position of {first_position} are not served: blocks are of "
            f"{PROMPT_BLOCK_SIZES}, and segments begin at multiples of their size, {segment_size}."
        )
    if keys.shape[1] < first_position + num_queries:
        raise ValueError(f"there are {keys.shape[1]} keys for queries that end at {first_position + num_queries}.")


def new_counters(keys):
    """int32 zeros, by which the thread blocks of `attend` know which is the last; zeros again afterwards.

    They are as many as the largest group of query heads may need for `keys`, [B, Hkv, capacity, D].
    """
    return torch.zeros(keys.shape[0] * keys.shape[1] * MAX_GROUP, dtype=torch.int32, device=keys.device)


def _check_page_size(page_size):
    if page_size not in PAGE_SIZES:
        raise ValueError(f"The CUDA kernels serve a page_size of {PAGE_SIZES}, not {page_size}.")


def _check_num_selected(num_selected):
    if not 1 <= num_selected <= MAX_SLOTS:
        raise ValueError(f"num_selected is a number of pages, 1 to {MAX_SLOTS}, not {num_selected}.")


def _check_sinks(sinks, query):
    if sinks is not None:
        _check("sinks", sinks, query.device, (query.dtype,), (query.shape[1],))


def _check_scores(scores, length, padding, num_selected, page_size):
    """Raise unless so many pages can be chosen by these [B, Hkv, 1, P] scores."""
    batch_size, num_kv_heads, _, num_pages = scores.shape
    _check_page_size(page_size)
    _check("scores", scores, scores.device, (torch.float32,), (batch_size, num_kv_heads, 1, num_pages))
    _check("length", length, scores.device, (torch.int64,), (1,))
    _check("padding", padding, scores.device, (torch.int64,), (batch_size,))
    _check_num_selected(num_selected)


def _check_num_tokens(num_tokens, page_size, num_candidates=None):
    if num_tokens < page_size:
        raise ValueError(f"num_tokens is {page_size} or more, those of the newest page, not {num_tokens}.")
    if num_candidates is not None and num_tokens > num_candidates * page_size:
        raise ValueError(
            f"{num_candidates} candidates of {page_size} tokens do not hold num_tokens={num_tokens}: give more, "
            "or fewer tokens."
        )


def _check_num_stripes(num_stripes):
    if num_stripes not in stripes.COUNTS:
        raise ValueError(f"The CUDA kernels choose in {stripes.COUNTS} stripes, not in {num_stripes}.")


def _check_group(group):
    if group not in GROUPS:
        raise ValueError(f"group must be one of {GROUPS}, not {group!r}.")


def _check_code_bits(bits):
    if bits not in CODE_BITS:
        raise ValueError(f"The CUDA kernels serve codes of {CODE_BITS} bits, not {bits}.")


def _check_codes(codes, like, slots):
    """Raise unless these are codes of `slots`, (B, Hkv, capacity), of keys or queries such as `like`."""
    head_dim = like.shape[-1]
    bits = codes.shape[-1] * 8 // head_dim
    _check_code_bits(bits)
    _check("codes", codes, like.device, (torch.uint8,), (*slots, head_dim * bits // 8))


def _check_pool(pool, stored):
    """Raise unless this is a pool for such keys."""
    keys, values, tags, counts = pool
    rows, (size, head_dim) = stored.shape[:2], keys.shape[2:]
    _check("pool keys", keys, stored.device, (stored.dtype,), (*rows, size, stored.shape[3]))
    _check("pool values", values, stored.device, (stored.dtype,), (*rows, size, head_dim))
    _check("pool tags", tags, stored.device, (torch.int64,), (*rows, size))
    _check("pool counts", counts, stored.device, (torch.int64,), (*rows, 2))
    if size % POOL_STEP:
        raise ValueError(f"a pool has room for multiples of {POOL_STEP} tokens, not {size}.")


def _check_score(score):
    if not 0 <= score.width <= 1 or score.group not in GROUPS:
        raise ValueError(f"score must have a width from 0 to 1 and a group of {GROUPS}; it is {score}.")


def _check_bounds(bounds, scales, keys, pages):
    """Raise unless these are bounds in the dtype of `keys` and on its device, or in 8 bits, of `pages`, (B, Hkv, P)."""
    head_dim = keys.shape[-1]
    dtype = keys.dtype if scales is None else torch.int8
    _check("bounds", bounds, keys.device, (dtype,), (*pages, 2, head_dim))
    if scales is not None:
        _check("scales", scales, keys.device, (torch.uint8,), (*pages, head_dim // SCALE_BLOCK))


def _check_query(query, num_kv_heads, head_dim, like=None):
    if query.dim() == 4 and query.shape[2] != 1:
        raise ValueError(
            f"The CUDA kernels take one query per row, not {query.shape[2]}; hf_quest.reference takes more."
        )
    device, dtypes, batch_size = query.device, DTYPES, query.shape[0]
    if like is not None:
        device, dtypes, batch_size = like.device, (like.dtype,), like.shape[0]
    _check_rows("query", query, device, dtypes, (batch_size, query.shape[1], 1, head_dim))
    if query.shape[1] % num_kv_heads or not 1 <= query.shape[1] // num_kv_heads <= MAX_GROUP:
        raise ValueError(
            f"query must have 1 to {MAX_GROUP} heads for each of {num_kv_heads} KV heads, not {query.shape[1]} in all."
        )


def _check(name, tensor, device, dtypes, shape):
    """Raise unless `tensor` is contiguous and what the kernels take."""
    _check_rows(name, tensor, device, dtypes, shape)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; its strides are {tuple(tensor.stride())}.")


def _check_rows(name, tensor, device, dtypes, shape):
    """Raise unless `tensor` is what the kernels take: a CUDA tensor with rows of 16-byte aligned vectors."""
    if tensor.device.type != "cuda" or tensor.device != device:
        raise ValueError(f"{name} must be on a CUDA device, the same for all tensors; it is on {tensor.device}.")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, not {tensor.dtype}.")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape}, not {tuple(tensor.shape)}.")
    if tensor.dtype not in DTYPES or tensor.dim() < 4:
        return
    if tensor.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"{name} has a head dim of {tensor.shape[-1]}; the CUDA kernels serve {HEAD_DIMS}.")
    if tensor.shape[2] >= MAX_SLOTS:
        raise ValueError(f"{name} has {tensor.shape[2]} slots; the CUDA kernels serve fewer than {MAX_SLOTS}.")
    strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
    if tensor.stride(-1) != 1 or any(stride % ALIGNMENT for stride in strides):
        raise ValueError(
            f"{name} must have rows of neighbouring elements that begin at multiples of 16 bytes; its strides are "
            f"{tuple(tensor.stride())}."
        )


@torch.library.register_fake("hf_quest::append", lib=library)
def _(keys, values, bounds, scales, new_keys, new_values, length, padding, page_size, codes=None):
    return None


@torch.library.register_fake("hf_quest::estimate", lib=library)
def _(query, bounds, *settings, **options):
    batch_size, num_kv_heads, num_pages = bounds.shape[:3]
    return query.new_empty((batch_size, num_kv_heads, 1, num_pages), dtype=torch.float32)


@torch.library.register_fake("hf_quest::select", lib=library)
def _(scores, length, padding, num_selected, *settings, **options):
    return scores.new_empty((*scores.shape[:-1], num_selected), dtype=torch.int64)


@torch.library.register_fake("hf_quest::find_candidates", lib=library)
def _(scores, length, padding, num_candidates, page_size, keeps_first=False, num_stripes=16):
    shape = (*scores.shape[:-1], num_stripes, stripes.most_pages(num_candidates - 1, num_stripes))
    return scores.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("hf_quest::refine", lib=library)
def _(query, bounds, scales, codes, candidates, length, padding, page_size, scaling, num_tokens, group="sum"):
    return candidates.new_empty((*candidates.shape[:3], num_tokens))


@torch.library.register_fake("hf_quest::attend", lib=library)
def _(query, keys, values, page_ids, length, padding, counters, page_size, scaling, softcap=None, sinks=None):
    return query.new_empty(query.shape)


@torch.library.register_fake("hf_quest::chain", lib=library)
def _(query, keys, *rest, **options):
    return query.new_empty(query.shape)


@torch.library.register_fake("hf_quest::decode", lib=library)
def _(query, new_keys, new_values, addresses, *settings, **options):
    return query.new_empty(query.shape)


@torch.library.register_fake("hf_quest::prompt_estimate", lib=library)
def _(query, keys, first_position, segment_size, sample_stride, block_size, scaling):
    num_blocks = (first_position + query.shape[1] - segment_size) // block_size
    shape = (len(keys), query.shape[1] // segment_size, num_blocks)
    return query.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("hf_quest::prompt_attend", lib=library)
def _(query, keys, values, block_ids, output, *settings):
    return None
