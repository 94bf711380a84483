"""The segments of a prompt: neighbouring queries want the same keys, so they read only those blocks (CritiPrefill,
arXiv 2409.12490).

The prompt is cut into segments of queries and blocks of keys, both counted from the row's first token. Four stages, of
which all segments go through together, in slabs that bound the memory:

    estimate       how much each block before a segment matters to the segment's queries, per KV head
    fuse           the same, mixed with what the last layer found
    select         the best blocks of every segment
    attend         exact attention over those blocks and, causally, over the segment itself

Letters beside those of `reference.py`, for one row at a time:

    L    queries in a segment (segment_size)     C    blocks before a segment, or before the last one of a slab
    R    segments                                K    blocks that a segment attends
"""

import math
from functools import reduce

import torch

from ..kernels import ops
from .dense import CUDNN_PAYS_AGAIN, attention, causal_attention, has_library_attention, merge

SLAB_BYTES = 1 << 30  # what the segments that are attended together may take beside the result
SLAB_SEGMENTS = 64  # which fill a GPU; more gain nothing
# The score "mass" looks at one query in four, and at fewer where there are more keys before them than this. So an
# estimate, like attention, takes the same wherever its segment is: within a factor of two, and while it has queries to
# leave out.
SAMPLE_STRIDE, SAMPLED_KEYS = 4, 1 << 14


def attend(query, keys, values, left_padding, prefill, earlier, logits, num_drafts=0, watch=None):
    """Attention of the newest T tokens of every row, of whole segments by their blocks and of all others dense.

    Args:
        query: [B, Hq, T, D].
        keys, values: [B, Hkv, N, D], views of storage whose capacity is a multiple of the block size.
        left_padding: a tuple of B ints.
        prefill: a CritiPrefill, or None for dense attention.
        earlier: BlockScores, mutated.
        logits: a reference.Logits.
        num_drafts: how many of the T tokens, the last ones, are no part of the prompt and fill no segment of it.
        watch: called with (row, position of a slab, its queries [Hq, R · L, D], the row's keys [Hkv, N, D], the blocks
            that its segments attend [Hkv, R, K]), or None.

    Returns:
        [B, T, Hq, D] in the dtype of `query`; 0 in left padding.
    """
    query = query.detach()
    if logits.sinks is not None:
        logits = logits._replace(sinks=logits.sinks.detach().to(query.dtype))
    batch_size, num_heads, num_queries, _ = query.shape
    num_prompt, end = num_queries - num_drafts, keys.shape[2] - num_drafts
    if not any(left_padding) and (prefill is None or not prefill.is_sparse(num_prompt, end)):
        return causal_attention(query, keys, values, logits).transpose(1, 2)
    output = query.new_empty(batch_size, num_queries, num_heads, values.shape[-1])
    for row, padding in enumerate(left_padding):
        first = keys.shape[2] - num_queries - padding  # position of the first query, negative in padding
        skipped = max(0, -first)
        output[row, :skipped] = 0
        tokens = (query[row, :, skipped:], keys[row, :, padding:], values[row, :, padding:])
        attend_row(output[row, skipped:], *tokens, prefill, earlier, row, num_drafts, logits, watch)
    return output


def attend_row(output, query, keys, values, prefill, earlier, row, num_drafts, logits, watch=None):
    """`attend` of one row without padding: query [Hq, T, D], keys and values [Hkv, N, D], into `output` [T, Hq, D]."""
    end = keys.shape[1]
    first = end - query.shape[1]
    start, stop = (end, end) if prefill is None else prefill.segments(first, end - num_drafts)
    if start == stop:
        attend_dense(output, query, keys, values, logits)
        return

    def between(begin, finish):
        return output[begin - first : finish - first], query[:, begin - first : finish - first]

    segment_size, block_size = prefill.segment_size, prefill.block_size
    num_samples = segment_size // sample_stride(start, segment_size)
    has_kernels = ops.serves_prompts(query, keys, values, segment_size, block_size, num_samples, logits.softcap)
    attend_dense(*between(first, start), keys[:, :start], values[:, :start], logits, has_kernels)
    attend_dense(*between(stop, end), keys, values, logits)
    limit = segments_in_slab(query, keys, prefill, stop // block_size, has_kernels)
    for slab, slab_end in slabs(start, stop, segment_size, limit):
        slab_output, slab_query = between(slab, slab_end)
        scores = estimate(slab_query, keys, slab, logits.scaling, prefill, has_kernels)
        scores = fuse(scores, earlier.scores, (row, slab), prefill.layer_fusion)
        block_ids = select(scores, prefill.num_selected, prefill.score == "mass", has_kernels)
        if watch is not None:
            watch(row, slab, slab_query, keys, block_ids)
        of_segments = (slab_query, keys, values, block_ids, slab_output, slab, segment_size, block_size)
        if has_kernels:
            ops.prompt_attend(*of_segments, logits.scaling, logits.sinks)
        else:
            attend_segments(*of_segments, logits)


def attend_dense(output, query, keys, values, logits, has_kernels=False):
    """Attention of the newest T of N tokens over all: query [Hq, T, D], keys and values [Hkv, N, D], into `output`
    [T, Hq, D].
    """
    num_queries, num_keys = query.shape[1], keys.shape[1]
    if has_kernels and num_queries == num_keys:  # one segment, before which there is nothing to choose from
        nothing = torch.empty(len(keys), 1, 0, dtype=torch.int64, device=keys.device)
        place = (0, num_keys, ops.PROMPT_BLOCK_SIZES[-1])  # the fewest copies
        ops.prompt_attend(query, keys, values, nothing, output, *place, logits.scaling, logits.sinks)
    elif num_queries > 0:
        output.copy_(causal_attention(query[None], keys[None], values[None], logits)[0].transpose(0, 1))


def slabs(start, stop, segment_size, limit):
    """(start, stop) of runs of whole segments: `limit` of them, a power of two, and smaller powers for what is left.

    So there are few shapes, whatever the length of the prompt. The segments of a run have one sample stride.
    """
    while start < stop:
        end = min(stop, next_power_of_two(max(start, SAMPLED_KEYS - 1)))
        num_segments = max(1, (end - start) // segment_size)
        num_segments = min(limit, 1 << num_segments.bit_length() - 1)
        yield start, start + num_segments * segment_size
        start += num_segments * segment_size


def next_power_of_two(number):
    """The least one above `number`."""
    return 1 << number.bit_length()


def sample_stride(position, segment_size):
    """From one query that is looked at to the next, in a segment that begins at `position`."""
    return math.gcd(segment_size, SAMPLE_STRIDE * max(1, next_power_of_two(position) // SAMPLED_KEYS))


def segments_in_slab(query, keys, prefill, num_blocks, has_kernels):
    """How many segments, a power of two, fit SLAB_BYTES with what is made of them beside the result."""
    num_heads, _, head_dim = query.shape
    segment_size, block_size, width = prefill.segment_size, prefill.block_size, query.element_size()
    per_segment = 8 * keys.shape[0] * num_blocks  # bytes; the scores, twice
    if prefill.score == "published":
        per_segment += 16 * num_heads * num_blocks
    else:
        # Queries that are looked at, times blocks before: most at the end, or where the share is still the largest.
        num_looks = max(
            segment_size // sample_stride(position, segment_size) * min(num_blocks, position // block_size)
            for position in (SAMPLED_KEYS - 1, num_blocks * block_size)
        )
        per_segment += num_heads * num_looks * (2 if has_kernels else 3 * width)
    if not has_kernels:
        num_chosen = prefill.num_selected * block_size
        outputs = 2 * num_heads * segment_size * head_dim
        per_segment += width * (2 * keys.shape[0] * num_chosen * head_dim + outputs)
        if not has_library_attention(query, keys):
            per_segment += 4 * num_heads * segment_size * num_chosen
    return 1 << min(SLAB_SEGMENTS, max(1, SLAB_BYTES // per_segment)).bit_length() - 1


def estimate(query, keys, start, scaling, prefill, has_kernels=False):
    """How much every block matters to the queries of every segment.

    Args:
        query: [Hq, R · L, D] of segments, the first of which begins at position `start`.
        keys: [Hkv, N, D].

    Returns:
        [Hkv, R, C] float32; -1 for blocks that are not before the segment, so that blocks whose softmax has come to 0
        are better still.
    """
    segment_size, block_size = prefill.segment_size, prefill.block_size
    if has_kernels and prefill.score == "mass":
        stride = sample_stride(start, segment_size)
        return ops.prompt_estimate(query, keys, start, segment_size, stride, block_size, scaling)
    num_segments = query.shape[1] // segment_size
    num_visible = start // block_size  # to all segments
    num_before = num_visible + torch.arange(num_segments, device=query.device) * (segment_size // block_size)
    num_blocks = num_visible + (num_segments - 1) * (segment_size // block_size)
    hidden = torch.arange(num_visible, num_blocks, device=query.device) >= num_before[:, None]
    query = query.unflatten(1, (-1, segment_size)).unflatten(0, (len(keys), -1)).transpose(1, 2)  # [Hkv, R, G, L, D]
    blocks = keys[:, : num_blocks * block_size].unflatten(1, (num_blocks, block_size))
    if prefill.score == "mass":
        logits = largest_logits(query[..., :: sample_stride(start, segment_size), :], blocks) * scaling
    else:
        logits = published_logits(query, blocks)
    logits[..., num_visible:].masked_fill_(hidden[:, None], -torch.inf)
    weights = logits.softmax(dim=-1)
    if prefill.score == "mass":
        # The mean of squares: a block that one query needs more than anything is worth more than one that all look at a
        # little. In float32, since squares of 16 bits come to 0. docs/notes/critiprefill.md has what was measured.
        scores = torch.linalg.vector_norm(weights, dim=2, dtype=torch.float32).square_().div_(weights.shape[2])
    else:
        scores = weights.mean(dim=2, dtype=torch.float32)
    scores[..., num_visible:].masked_fill_(hidden, -1)
    return scores


def largest_logits(samples, blocks):
    """[Hkv, R, G · samples, C]: the largest q·k of each block, for samples [Hkv, R, G, samples, D] of the queries."""
    num_segments, rows = samples.shape[1], samples.flatten(1, 3)
    # One key of every block at a time: all products at once are so many bytes that it takes longer.
    logits = reduce(torch.maximum, (rows @ keys.transpose(1, 2) for keys in blocks.unbind(dim=2)))
    return logits.unflatten(1, (num_segments, -1))


def published_logits(query, blocks):
    """[Hkv, R, 1, C] float32: the middle of a segment's queries against the extremes of each block, [Hkv, C, block, D],
    as the mean over the heads of a group; unscaled (CritiPrefill, section 3.2).
    """
    middle = (query.amax(dim=3) + query.amin(dim=3)) / 2  # [Hkv, R, G, D]
    extremes = torch.stack(blocks.aminmax(dim=2), dim=2)  # [Hkv, C, 2, D]
    logits = (middle.flatten(1, 2) @ extremes.flatten(1, 2).transpose(1, 2)).unflatten(1, middle.shape[1:3])
    return logits.float().unflatten(3, (-1, 2)).amax(dim=4).mean(dim=2, keepdim=True)


def fuse(scores, earlier, place, share):
    """[Hkv, R, C]: `scores` with `share` of what the last layer left in `earlier` at `place`, left there in turn."""
    if share == 0:
        return scores
    if place in earlier and earlier[place].shape == scores.shape:
        scores = torch.lerp(scores, earlier[place].to(scores.device), share)
    earlier[place] = scores
    return scores


def select(scores, num_selected, keeps_sink, has_kernels=False):
    """The blocks that each segment attends, [Hkv, R, K] int64 in no order: the best, and the first if it is kept."""
    # A copy; for the kernel with one more, since it takes the newest page besides, whatever its score.
    scores = torch.nn.functional.pad(scores, (0, int(has_kernels)))
    if keeps_sink:
        scores[..., 0] = torch.inf
    if not has_kernels:
        return scores.topk(num_selected, dim=-1, sorted=False).indices
    page_size = ops.PAGE_SIZES[0]  # any will do
    length = torch.full((1,), (scores.shape[2] - 1) * page_size + 1, dtype=torch.int64, device=scores.device)
    scores = scores.unsqueeze(2)  # [Hkv, R, 1, C + 1], as rows, heads and pages
    page_ids = ops.select(scores, length, length.new_zeros(len(scores)), num_selected + 1, page_size)
    return page_ids[:, :, 0, :-1].contiguous()


def gather(stored, block_ids, block_size):
    """[R, Hkv, K · block_size, D]: the blocks `block_ids` [Hkv, R, K] of keys or values [Hkv, N, D]."""
    num_heads, num_tokens, head_dim = stored.shape
    head_stride, row_len = stored.stride(0), block_size * head_dim
    num_rows = ((num_heads - 1) * head_stride + num_tokens * head_dim) // row_len
    rows = stored.as_strided((num_rows, row_len), (row_len, 1))
    head = torch.arange(num_heads, device=stored.device)[:, None, None] * (head_stride // row_len)
    row_ids = (block_ids + head).transpose(0, 1)
    return rows.index_select(0, row_ids.flatten()).view(*row_ids.shape[:2], -1, head_dim)


def attend_segments(query, keys, values, block_ids, output, start, segment_size, block_size, logits):
    """Attention of each segment over its chosen blocks and, causally, itself: one softmax over both.

    Args:
        query: [Hq, R · L, D] of segments, the first of which begins at position `start`.
        keys, values: [Hkv, N, D].
        block_ids: [Hkv, R, K].
        output: [R · L, Hq, D], written.
    """
    by_segment = (-1, segment_size)
    query = query.unflatten(1, by_segment).transpose(0, 1)
    output = output.unflatten(0, by_segment).transpose(1, 2)
    own = [stored[:, start : start + len(query) * segment_size] for stored in (keys, values)]
    own = [stored.unflatten(1, by_segment).transpose(0, 1) for stored in own]
    chosen = [gather(stored, block_ids, block_size) for stored in (keys, values)]
    before = attention(query, *chosen, False, logits, CUDNN_PAYS_AGAIN)
    merge(*before, *attention(query, *own, True, logits, CUDNN_PAYS_AGAIN), logits.sinks, output)
