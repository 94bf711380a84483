"""CritiPrefill (arXiv 2409.12490): neighbouring queries of a prompt want the same keys, so they read only those blocks.

The prompt is cut into segments of queries and blocks of keys, both counted from the row's first token. Five stages, of
which all segments go through together, in slabs that bound the memory:

    block_bounds   per-channel minimum and maximum of each block's keys
    estimate       how much each block before a segment matters to the segment's queries, per KV head
    fuse           the same, mixed with what the last layer found
    select         the best blocks of every segment
    attend         exact attention over those blocks and, causally, over the segment itself

Letters beside those of `reference.py`, for one row at a time:

    L    queries in a segment (segment_size)     C    blocks before a segment, or before the last one of a slab
    R    segments                                K    blocks that a segment attends
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

SLAB_BYTES = 1 << 30  # what the segments that are attended together may take beside the result
SLAB_SEGMENTS = 64  # which fill a GPU; more gain nothing
NUM_SAMPLES = 8  # queries of a segment that the score "mass" looks at
# Products q·k from which cuDNN's lead over flash outweighs the 65 ms that it takes to plan for a new shape. The shapes
# of slabs come again in every layer and prompt, those of whole prompts do not.
CUDNN_PAYS, CUDNN_PAYS_AGAIN = 1 << 27, 1 << 24
SCORES = ("mass", "published")


@dataclass(frozen=True)
class CritiPrefill:
    """How a prompt is read: `QuestCache(prefill=CritiPrefill())`. Without it every prompt is dense.

    A whole segment of `segment_size` queries attends itself and, of what is before it, `budget` tokens per KV head in
    blocks of `block_size`. Dense stay the first `dense_layers`, segments that begin before `threshold`, and the tokens
    of a forward that fill no whole segment: what follows the prompt's last edge of a segment, which tends to be the
    question, and the ends of a chunk whose size is no multiple of `segment_size`. So a prompt read by
    `prefill_chunk_size` gives what it gives read at once, wherever chunks end with a segment.

    Args:
        budget: tokens before a segment that it attends, rounded up to whole blocks.
        segment_size: queries that share one selection, a multiple of `block_size`.
        block_size: tokens in a block, a multiple of the cache's `page_size`.
        threshold: tokens below which everything is dense, at least `budget`; rounded up to whole segments.
        dense_layers: how many of the first layers attend everything.
        layer_fusion: share of the last layer's scores in a layer's own, from 0 to below 1.
        score: "mass", the attention mass that a block's bounds let some of the segment's queries expect, or
            "published", the paper's, by the extremes of all its queries.

    Raises:
        ValueError: for settings outside these ranges.
    """

    budget: int = 2048
    segment_size: int = 512
    block_size: int = 32
    threshold: int = 4096
    dense_layers: int = 1
    layer_fusion: float = 0.25
    score: str = "mass"

    def __post_init__(self):
        for name, lowest in (("budget", 1), ("segment_size", 1), ("block_size", 1), ("threshold", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(f"{name} is a number of tokens, {lowest} or more, not {value!r}.")
        if not isinstance(self.dense_layers, int) or isinstance(self.dense_layers, bool) or self.dense_layers < 0:
            raise ValueError(f"dense_layers is a number of layers, 0 or more, not {self.dense_layers!r}.")
        if self.segment_size % self.block_size:
            raise ValueError(
                f"A segment of {self.segment_size} tokens is not divided by blocks of {self.block_size}: its own "
                "tokens would share a block with those before it. Make segment_size a multiple of block_size."
            )
        if self.threshold < self.num_selected * self.block_size:
            raise ValueError(
                f"threshold={self.threshold} is under the budget, {self.num_selected * self.block_size} tokens in "
                "whole blocks: the first sparse segments would have fewer tokens before them than they are to choose. "
                "Raise the threshold or lower the budget."
            )
        if not isinstance(self.layer_fusion, (int, float)) or not 0 <= self.layer_fusion < 1:
            raise ValueError(f"layer_fusion is a share from 0 to below 1, not {self.layer_fusion!r}.")
        if self.score not in SCORES:
            raise ValueError(f"score is one of {', '.join(SCORES)}, not {self.score!r}.")

    @property
    def num_selected(self):
        """K: blocks that a segment attends beside itself."""
        return -(-self.budget // self.block_size)

    def segments(self, first, end):
        """(start, stop): the whole segments among the queries in positions `first` to `end` - 1 that are sparse."""
        start = -(-max(first, self.threshold) // self.segment_size) * self.segment_size
        return start, max(start, end // self.segment_size * self.segment_size)

    def read_share(self, num_tokens):
        """Products q·k of a prompt of `num_tokens` in a sparse layer, over those of dense attention."""
        start, stop = self.segments(0, num_tokens)
        pairs = num_tokens * (num_tokens + 1) // 2
        if stop == start:
            return 1.0
        of_segments = (stop * (stop + 1) - start * (start + 1)) // 2  # in dense attention
        per_query = self.num_selected * self.block_size + (self.segment_size + 1) / 2
        return (pairs - of_segments + (stop - start) * per_query) / pairs

    def is_sparse(self, num_queries, num_keys):
        """Whether the newest `num_queries` of `num_keys` tokens have a sparse segment."""
        start, stop = self.segments(num_keys - num_queries, num_keys)
        return stop > start


@dataclass
class BlockScores:
    """What the last sparse layer of the forward under way found, for the next one: [Hkv, R, C] for each slab."""

    layer_idx: int = -1
    scores: dict = field(default_factory=dict)
    # Called with layer_idx, position of the slab, query [R, Hq, L, D], keys [Hkv, N, D] and what `select` chose.
    watch: Callable | None = None

    def enter(self, layer_idx):
        if layer_idx <= self.layer_idx:  # a forward goes up
            self.scores = {}
        self.layer_idx = layer_idx


def attend(query, keys, values, left_padding, prefill, earlier, scaling, softcap=None, sinks=None):
    """Attention of the newest T tokens of every row, of whole segments by their blocks and of all others dense.

    Args:
        query: [B, Hq, T, D].
        keys, values: [B, Hkv, N, D], views of storage whose capacity is a multiple of the block size.
        left_padding: a tuple of B ints.
        prefill: a CritiPrefill, or None for dense attention.
        earlier: BlockScores, mutated.
        scaling, softcap, sinks: as in `reference.attend`.

    Returns:
        [B, T, Hq, D] in the dtype of `query`; 0 in left padding.
    """
    query = query.detach()
    batch_size, num_heads, num_queries, _ = query.shape
    options = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    if not any(left_padding) and (prefill is None or not prefill.is_sparse(num_queries, keys.shape[2])):
        return causal_attention(query, keys, values, **options).transpose(1, 2)
    output = query.new_empty(batch_size, num_queries, num_heads, values.shape[-1])
    for row, padding in enumerate(left_padding):
        first = keys.shape[2] - num_queries - padding  # position of the first query, negative in padding
        skipped = max(0, -first)
        output[row, :skipped] = 0
        tokens = (query[row, :, skipped:], keys[row, :, padding:], values[row, :, padding:])
        attend_row(output[row, skipped:], *tokens, prefill, earlier, row, options)
    return output


def attend_row(output, query, keys, values, prefill, earlier, row, options):
    """`attend` of one row without padding: query [Hq, T, D], keys and values [Hkv, N, D], into `output` [T, Hq, D]."""
    end = keys.shape[1]
    first = end - query.shape[1]
    start, stop = (end, end) if prefill is None else prefill.segments(first, end)
    if stop == start:
        start = stop = end
    for begin, finish in ((first, start), (stop, end)):
        if begin < finish:
            past = (keys[None, :, :finish], values[None, :, :finish])
            dense = causal_attention(query[None, :, begin - first : finish - first], *past, **options)
            output[begin - first : finish - first] = dense[0].transpose(0, 1)
    if start == stop:
        return

    segment_size, block_size = prefill.segment_size, prefill.block_size
    blocks = block_bounds(keys, (stop - segment_size) // block_size, block_size)
    for slab, slab_end in slabs(start, stop, segment_size, segments_in_slab(query, keys, prefill, blocks.shape[1])):
        by_segment = (-1, segment_size)
        slab_query = query[:, slab - first : slab_end - first].unflatten(1, by_segment).transpose(0, 1)
        num_before = torch.arange(slab, slab_end, segment_size, device=query.device) // block_size
        slab_blocks = blocks[:, : (slab_end - segment_size) // block_size]
        num_visible = slab // block_size  # to all segments of the slab
        scores = estimate(slab_query, slab_blocks, num_before, num_visible, options["scaling"], prefill.score)
        scores = fuse(scores, earlier.scores, (row, slab), prefill.layer_fusion)
        block_ids = select(scores, prefill.num_selected, keeps_sink=prefill.score == "mass")
        if earlier.watch is not None:
            earlier.watch(earlier.layer_idx, slab, slab_query, keys, block_ids)
        own = [stored[:, slab:slab_end].unflatten(1, by_segment).transpose(0, 1) for stored in (keys, values)]
        chosen = [gather(stored, block_ids, block_size) for stored in (keys, values)]
        slab_output = output[slab - first : slab_end - first].unflatten(0, by_segment).transpose(1, 2)
        attend_segments(slab_query, chosen, own, slab_output, **options)


def slabs(start, stop, segment_size, limit):
    """(start, stop) of runs of whole segments: `limit` of them, a power of two, and smaller powers for what is left.

    So there are few shapes, whatever the length of the prompt.
    """
    while start < stop:
        num_segments = min(limit, 1 << ((stop - start) // segment_size).bit_length() - 1)
        yield start, start + num_segments * segment_size
        start += num_segments * segment_size


def segments_in_slab(query, keys, prefill, num_blocks):
    """How many segments, a power of two, fit SLAB_BYTES with their scores, chosen keys and values, and two outputs."""
    num_heads, _, head_dim = query.shape
    chosen = 2 * keys.shape[0] * prefill.num_selected * prefill.block_size * head_dim
    outputs = 2 * num_heads * prefill.segment_size * head_dim
    scores = 2 * num_heads * NUM_SAMPLES * num_blocks
    if not has_library_attention(query, keys):
        scores += 4 * num_heads * prefill.segment_size * (prefill.num_selected * prefill.block_size)
    num_segments = SLAB_BYTES // (query.element_size() * (chosen + outputs + scores))
    return 1 << min(SLAB_SEGMENTS, max(1, num_segments)).bit_length() - 1


def block_bounds(keys, num_blocks, block_size):
    """[Hkv, C, 2, D]: minimum and maximum of the keys in each of the first `num_blocks` blocks, [Hkv, N, D]."""
    blocks = keys[:, : num_blocks * block_size].unflatten(1, (num_blocks, block_size))
    return torch.stack(blocks.aminmax(dim=2), dim=2)


def estimate(query, bounds, num_before, num_visible, scaling, score):
    """How much every block matters to the queries of every segment.

    Args:
        query: [R, Hq, L, D].
        bounds: [Hkv, C, 2, D] of blocks.
        num_before: [R], blocks before each segment.
        num_visible: the smallest of them.

    Returns:
        [Hkv, R, C] float32: shares, which sum to 1 over the blocks before a segment, and -1 for all others, less than a
        share that has come to 0.
    """
    query = query.unflatten(1, (bounds.shape[0], -1)).permute(1, 0, 2, 3, 4)  # [Hkv, R, G, L, D]
    logits = published_logits(query, bounds) if score == "published" else sampled_logits(query, bounds, scaling)
    hidden = torch.arange(num_visible, bounds.shape[1], device=bounds.device) >= num_before[:, None]
    logits[..., num_visible:].masked_fill_(hidden[:, None], -torch.inf)
    scores = logits.softmax(dim=-1).mean(dim=2, dtype=torch.float32)
    scores[..., num_visible:].masked_fill_(hidden, -1)
    return scores


def sampled_logits(query, bounds, scaling):
    """[Hkv, R, G · samples, C]: what evenly spaced queries of a segment, its last one too, expect of a block.

    They expect what is halfway between the middle of q·k within the bounds of the block and its largest value. That one
    alone, Quest's score, favours blocks with wide bounds; benchmarks/NOTES.md has what was measured.
    """
    stride = max(1, query.shape[3] // NUM_SAMPLES)
    samples = query[:, :, :, stride - 1 :: stride].flatten(2, 3) * scaling
    negative, positive = samples.clamp(max=0), samples.clamp(min=0)
    weights = torch.cat([0.75 * negative + 0.25 * positive, 0.25 * negative + 0.75 * positive], dim=-1)  # of min, max
    logits = weights.flatten(1, 2) @ bounds.flatten(2).transpose(1, 2)
    return logits.unflatten(1, weights.shape[1:3])


def published_logits(query, bounds):
    """[Hkv, R, 1, C] float32: the middle of a segment's queries against the extremes of the block, as the mean over the
    heads of a group; unscaled (CritiPrefill, section 3.2).
    """
    middle = (query.amax(dim=3) + query.amin(dim=3)) / 2  # [Hkv, R, G, D]
    logits = (middle.flatten(1, 2) @ bounds.flatten(1, 2).transpose(1, 2)).unflatten(1, middle.shape[1:3])
    return logits.float().unflatten(3, (-1, 2)).amax(dim=4).mean(dim=2, keepdim=True)


def fuse(scores, earlier, place, share):
    """[Hkv, R, C]: `scores` with `share` of what the last layer left in `earlier` at `place`, left there in turn."""
    if share == 0:
        return scores
    if place in earlier and earlier[place].shape == scores.shape:
        scores = torch.lerp(scores, earlier[place].to(scores.device), share)
    earlier[place] = scores
    return scores


def select(scores, num_selected, keeps_sink):
    """The blocks that each segment attends, [Hkv, R, K] int64 in no order: the best, and the first if it is kept."""
    if keeps_sink:
        scores = scores.index_fill(2, torch.zeros(1, dtype=torch.int64, device=scores.device), torch.inf)
    return scores.topk(num_selected, dim=-1, sorted=False).indices


def gather(stored, block_ids, block_size):
    """[R, Hkv, K · block_size, D]: the blocks `block_ids` [Hkv, R, K] of keys or values [Hkv, N, D]."""
    num_heads, num_tokens, head_dim = stored.shape
    head_stride, row_len = stored.stride(0), block_size * head_dim
    num_rows = ((num_heads - 1) * head_stride + num_tokens * head_dim) // row_len
    rows = stored.as_strided((num_rows, row_len), (row_len, 1))
    head = torch.arange(num_heads, device=stored.device)[:, None, None] * (head_stride // row_len)
    row_ids = (block_ids + head).transpose(0, 1)
    return rows.index_select(0, row_ids.flatten()).view(*row_ids.shape[:2], -1, head_dim)


def attend_segments(query, chosen, own, output, scaling, softcap=None, sinks=None):
    """Attention of each segment over its chosen blocks and, causally, itself: one softmax over both.

    Args:
        query: [R, Hq, L, D].
        chosen: keys and values of the blocks, each [R, Hkv, K · block_size, D].
        own: those of the segments, each [R, Hkv, L, D].
        output: [R, Hq, L, D], written.
    """
    before = attention(query, *chosen, False, scaling, softcap, CUDNN_PAYS_AGAIN)
    merge(*before, *attention(query, *own, True, scaling, softcap, CUDNN_PAYS_AGAIN), sinks, output)


def causal_attention(query, keys, values, scaling, softcap=None, sinks=None):
    """Dense attention of the newest T tokens, [B, Hq, T, D], over all N, [B, Hkv, N, D], without a mask."""
    past = keys.shape[2] - query.shape[2]
    own = attention(query, keys[:, :, past:], values[:, :, past:], True, scaling, softcap)
    if past == 0:
        return own[0] if sinks is None else give_to_sinks(*own, sinks)
    before = attention(query, keys[:, :, :past], values[:, :, :past], False, scaling, softcap)
    output = before[0]
    return merge(*before, *own, sinks, output)


def merge(output, logsumexp, other, other_logsumexp, sinks, into):
    """Attention over two sets of keys from that over each, [R, Hq, L, D], and their logsumexp, [R, Hq, L]."""
    share = torch.sigmoid(other_logsumexp - logsumexp).to(output.dtype)[..., None]
    torch.lerp(output, other, share, out=into)
    if sinks is not None:
        into.copy_(give_to_sinks(into, torch.logaddexp(logsumexp, other_logsumexp), sinks))
    return into


def give_to_sinks(output, logsumexp, sinks):
    """Attention [R, Hq, L, D] with one more logit per head, [Hq], that has no value (GPT-OSS)."""
    return output * torch.sigmoid(logsumexp - sinks.float()[:, None]).to(output.dtype)[..., None]


def attention(query, keys, values, is_causal, scaling, softcap, cudnn_pays=CUDNN_PAYS):
    """Exact attention [R, Hq, L, D] of [R, Hq, L, D] over [R, Hkv, M, D], and the logsumexp of its logits, [R, Hq, L].

    The causal one has L = M. cuDNN is used for at least `cudnn_pays` products.
    """
    if softcap is None and has_library_attention(query, values):
        return library_attention(query, keys, values, is_causal, scaling, cudnn_pays)
    num_queries, num_keys = query.shape[2], keys.shape[2]
    grouped = query.float().unflatten(1, (keys.shape[1], -1))
    logits = grouped @ keys.float()[:, :, None].transpose(-1, -2) * scaling  # [R, Hkv, G, L, M]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if is_causal:
        future = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill_(future, -torch.inf)
    logsumexp = logits.logsumexp(dim=-1, keepdim=True)
    output = logits.sub_(logsumexp).exp_() @ values.float()[:, :, None]
    return output.flatten(1, 2).to(query.dtype), logsumexp.flatten(1, 2)[..., 0]


def has_library_attention(query, values):
    """Whether PyTorch has a kernel for these that returns the logsumexp too."""
    head_dim = query.shape[-1]
    if head_dim != values.shape[-1]:
        return False
    if query.device.type == "cpu":
        return True
    return query.device.type == "cuda" and query.dtype != torch.float32 and head_dim % 8 == 0 and head_dim <= 256


def library_attention(query, keys, values, is_causal, scaling, cudnn_pays):
    """`attention` by PyTorch's kernels; shapes as there."""
    tensors = (query, keys, values)
    if query.device.type == "cpu":
        output = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors, 0.0, is_causal, scale=scaling)
    elif has_fast_cudnn(query) and query.shape[0] * query.shape[2] * keys.shape[2] >= cudnn_pays:
        output = torch.ops.aten._scaled_dot_product_cudnn_attention(*tensors, None, True, 0.0, is_causal, scale=scaling)
    else:
        output = torch.ops.aten._scaled_dot_product_flash_attention(*tensors, 0.0, is_causal, scale=scaling)
    return output[0], output[1].view(query.shape[:3])


def has_fast_cudnn(query):
    """Whether cuDNN was seen to beat flash here: nearly twofold on Hopper."""
    return torch.cuda.get_device_capability(query.device)[0] == 9 and query.shape[-1] <= 128


def is_faster(query, values, num_keys, is_padded):
    """Whether `attend` is a better way to be dense than SDPA, which wants a mask for chunks and for padding.

    Padded rows are attended one by one, which takes long ones to pay.
    """
    is_served = query.device.type == "cuda" and has_library_attention(query, values)
    return is_served and (not is_padded or query.shape[2] * num_keys >= 1 << 22)


@contextmanager
def prefill_progress(model, num_tokens, **options):
    """A tqdm bar of the prompt's tokens while `model` reads them, chunk by chunk with `prefill_chunk_size`.

    Args:
        model: the model on which `generate` is called inside this context.
        num_tokens: tokens in the prompt.
        options: for tqdm.
    """
    with tqdm(total=num_tokens, unit="tokens", **options) as bar:

        def advance(module, args, kwargs, output):
            if bar.n < num_tokens:
                if output.last_hidden_state.is_cuda:
                    torch.cuda.synchronize(output.last_hidden_state.device)
                bar.update(min(output.last_hidden_state.shape[1], num_tokens - bar.n))

        hook = model.base_model.register_forward_hook(advance, with_kwargs=True)
        try:
            yield bar
        finally:
            hook.remove()
