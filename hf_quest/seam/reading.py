"""What a layer with pages reads for its newest tokens: what its method chooses for each, or a prompt's segments."""

import functools

import torch

from .. import prompts
from ..errors import say_if_constant, say_once
from ..kernels import ops
from ..reference import Choice
from ..watch import Read, SegmentsRead


def num_decoding(layer, num_queries):
    """How many of the last `num_queries` queries are decode steps, each of which selects for itself."""
    # A prompt of several tokens may come with one query: KV-shared layers compute only what the next token needs.
    if layer.handed.num_new == 1:
        return 1
    if layer.shared.draft_start is None:
        return 0
    return min(num_queries, max(0, layer.length - layer.shared.draft_start))


def kernels_attend(layer, query):
    """Whether the kernels do the attention of these queries, [B, Hq, T, D]."""
    # In this order: a graph of fused kernels must not hang on what the storage may come to hold.
    if not layer.has_kernels or (layer.method.fused is None and layer.is_sparse):
        return False
    # They take one query at a time, which is too slow where each of several would read everything. Drafts in a graph
    # have no other way.
    is_one_by_one = query.shape[2] == 1 or layer.is_sparse or layer.shared.step.is_captured
    return is_one_by_one and query.shape[1] <= ops.MAX_GROUP * layer.storage.num_kv_heads


def attend(layer, query, logits):
    """Attention of the newest T tokens, [B, Hq, T, D], each over what is chosen for it (Quest, algorithm 1)."""
    is_captured = layer.shared.step.is_captured
    say_if_constant(query)
    if kernels_attend(layer, query):
        sinks = None if logits.sinks is None else logits.sinks.detach().to(query.dtype)
        query, logits = query.detach(), logits._replace(sinks=sinks)
        is_step = is_captured and layer.method.fused is not None
        return attend_in_graph(layer, query, logits) if is_step else attend_one_by_one(layer, query, logits)
    is_sparse = layer.is_sparse
    if is_sparse and layer.has_kernels and layer.method.fused is None:
        say_once(f"There are no CUDA kernels for {layer.method}: the layers that choose by it run in PyTorch.")
    layer.store_handed()
    length = layer.storage.on_device.length if is_captured else layer.length
    choice = choose(layer, query, logits, length) if is_sparse else None
    tell(layer, query, choice, logits)
    return layer.storage.attend(query, choice, length, logits)


def choose(layer, query, logits, length):
    """What the method chooses, by what it remembers of this layer. In a graph it remembers nothing."""
    if not layer.shared.step.is_captured:
        layer.storage.next_reader()
    return layer.method.choose(layer.storage, query, logits, length)


def attend_in_graph(layer, query, logits):
    """A step of one token or, of drafts, a step for each: it stores that one, and attends up to it."""
    reads_all = layer.is_dense or layer.shared.step.reads_everything
    method, num_new, new = layer.method, query.shape[2], layer.take_new()
    step = functools.partial(method.fused.step, method, layer.storage, layer.layer_idx, logits, reads_all)
    end = layer.storage.on_device.length
    if num_new == 1:
        return step(query, new, end)
    ends = end + torch.arange(1 - num_new, 1, device=query.device)
    of_each = [slice(idx, idx + 1) for idx in range(num_new)]
    news = [None if new is None else tuple(tensor[:, :, one] for tensor in new) for one in of_each]
    outputs = [step(query[:, :, one], new, ends[one]) for one, new in zip(of_each, news, strict=True)]
    return torch.cat(outputs, dim=2)


def attend_one_by_one(layer, query, logits):
    layer.store_handed()
    attend_one, num_queries = attend_sparse if layer.is_sparse else attend_all, query.shape[2]
    if num_queries == 1:
        return attend_one(layer, query, 0, logits)
    outputs = [attend_one(layer, query[:, :, i : i + 1], i + 1 - num_queries, logits) for i in range(num_queries)]
    return torch.cat(outputs, dim=2)


def attend_all(layer, query, offset, logits):
    """Dense attention of the one query, [B, Hq, 1, D], whose token stands `offset`, 0 or less, from the newest."""
    length = layer.storage.on_device.length
    tell(layer, query, None, logits, offset)
    return layer.storage.attend_all_by_kernel(query, length + offset if offset else length, logits)


def attend_sparse(layer, query, offset, logits):
    """The same over what is selected for it."""
    method, pages = layer.method, layer.storage
    length = pages.on_device.length
    length = length + offset if offset else length
    if layer.shared.watcher is None:
        return method.fused.attend(method, pages, query, length, logits, None)
    num_ids, tokens_per_id = method.choice_shape
    ids = pages.padding.new_empty(*pages.keys.shape[:2], 1, num_ids)
    output = method.fused.attend(method, pages, query, length, logits, ids)
    tell(layer, query, Choice(ids, tokens_per_id), logits, offset)
    return output


def tell(layer, query, choice, logits, offset=0):
    """Tell who watches what T tokens, [B, Hq, T, D], attend, the last of which stands `offset` from the newest; a
    `choice` of None is everything.
    """
    watcher = layer.shared.watcher
    if watcher is not None and not layer.shared.step.is_captured:
        watcher(Read(layer, query.detach(), choice, logits, layer.length + offset))


def is_read_by_segments(layer, query, num_keys, num_drafts, needs_eager):
    """Whether `attend_prompt` is for these queries: it has sparse segments, or is a faster way to be dense.

    `needs_eager` tells that the model's own dense attention is not SDPA.
    """
    if layer.prefill is not None:
        ends = {num_keys - num_drafts - padding for padding in layer.left_padding}
        if any(layer.prefill.is_sparse(query.shape[2] - num_drafts, end) for end in ends):
            return True
    is_free = not needs_eager and not query.requires_grad  # to choose, and to leave no trace for gradients
    return is_free and prompts.is_faster(query, layer.values, num_keys, any(layer.left_padding))


def attend_prompt(layer, query, num_keys, num_drafts, logits):
    """Attention [B, T, Hq, D] of the newest T of the first `num_keys` tokens, dense or by CritiPrefill.

    The last `num_drafts` are no part of the prompt, which ends before them.
    """
    say_if_constant(query)
    earlier, watcher = layer.shared.block_scores, layer.shared.watcher
    earlier.enter(layer.layer_idx)
    keys, values = layer.storage.at_hand(layer.keys[:, :, :num_keys], layer.values[:, :, :num_keys])
    watch = None if watcher is None else functools.partial(tell_of_segments, watcher, layer)
    return prompts.attend(query, keys, values, layer.left_padding, layer.prefill, earlier, logits, num_drafts, watch)


def tell_of_segments(watcher, layer, row, position, query, keys, block_ids):
    watcher(SegmentsRead(layer, row, position, query, keys, block_ids))
