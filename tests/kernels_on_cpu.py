"""The operators where there is no GPU, by the specification, so that the seam drives them as it drives the kernels."""

import ctypes

import torch

from hf_quest import codes as codes_
from hf_quest import reference, stripes
from hf_quest.kernels import ops
from hf_quest.reference import Score
from hf_quest.storage.pool import TOKEN

calls = []  # the names of the operators that were called


def emulate(monkeypatch):
    """Have storage on the CPU be served by operators; return the list of their names as they are called."""
    monkeypatch.setattr(ops, "serves", lambda keys, values, page_size: True)
    monkeypatch.setattr(ops, "_check_rows", lambda *arguments: None)
    calls.clear()
    return calls


def operator(function):
    name = function.__name__

    def run(*arguments):
        calls.append(name)
        return function(*arguments)

    library.impl(name, run, "CPU")
    return function


library = torch.library.Library("hf_quest", "IMPL")


@operator
def append(keys, values, bounds, scales, new_keys, new_values, length, padding, page_size, codes=None):
    length, num_new = int(length), new_keys.shape[2]
    reference.append(keys, values, bounds, scales, new_keys, new_values, length, padding, page_size)
    if codes is not None:
        bits = codes.shape[-1] * 8 // keys.shape[-1]
        codes_.refresh_codes(keys, bounds, scales, codes, num_new, length, padding, page_size, bits)


@operator
def estimate(query, bounds, scales, length, padding, page_size, scaling, width=0.5, group="max"):
    where = (int(length), padding, page_size)
    return reference.estimate(query, bounds, scales, scaling, Score(width, False, group), where)


@operator
def select(scores, length, padding, num_selected, page_size, keeps_first=False):
    return reference.select(scores, int(length), padding, num_selected, page_size, keeps_first)


@operator
def find_candidates(scores, length, padding, num_candidates, page_size, keeps_first=False, num_stripes=16):
    where = (int(length), padding, num_candidates, page_size)
    return codes_.find_candidates(scores, *where, keeps_first, num_stripes)


@operator
def refine(query, bounds, scales, codes, candidates, length, padding, page_size, scaling, num_tokens, group="sum"):
    how = (codes.shape[-1] * 8 // query.shape[-1], scaling, num_tokens, group)
    return codes_.refine(query, bounds, scales, codes, candidates, int(length), padding, page_size, *how)


def with_defaults(given, defaults):
    """The dispatcher leaves out what is at its default at the end."""
    return (*given, *defaults[len(given) :])


@operator
def chain(query, keys, values, bounds, scales, length, padding, num_selected, page_size, scaling, *options):
    softcap, sinks, told_ids, width, keeps_first, group, codes, num_tokens, token_group, *pool = with_defaults(
        options, (None, None, None, 0.5, True, "max", None, 0, "sum", None, None, None, None)
    )
    length, score = int(length), Score(width, keeps_first, group)
    num_pages = -(-length // page_size)
    bounds, scales = bounds[:, :, :num_pages], None if scales is None else scales[:, :, :num_pages]
    where = (length, padding, page_size)
    scores = reference.estimate(query, bounds, scales, scaling, score, where)
    where_found = (length, padding, num_selected, page_size, score.keeps_first)
    if codes is None:
        ids = reference.select(scores, *where_found)
    else:
        bits = codes.shape[-1] * 8 // keys.shape[-1]
        how = (bits, scaling, num_tokens, token_group)
        num_stripes = stripes.count(num_tokens, page_size)
        candidates = codes_.find_candidates(scores, *where_found, num_stripes)
        ids, page_size = codes_.refine(query, bounds, scales, codes, candidates, *where, *how), 1
    if told_ids is not None:
        told_ids.copy_(ids)
    if pool[0] is not None and page_size == 1:
        keys, values = by_pool(keys, values, ids, length, padding, *pool)
    return reference.attend(query, keys, values, ids, length, padding, page_size, scaling, softcap, sinks)


def by_pool(keys, values, ids, length, padding, pool_keys, pool_values, tags, counts):
    """Keys and values of which those that are chosen and in the pool come from there; the others are put there.

    As csrc/pool.cuh does, but that any slot will do for a token.
    """
    keys, values = keys.clone(), values.clone()
    for row, head in ((row, head) for row in range(keys.shape[0]) for head in range(keys.shape[1])):
        start, newest = int(padding[row]), length - int(padding[row]) - 1
        own = tags[row, head]
        there = {tag & TOKEN: slot for slot, tag in enumerate(own.tolist()) if tag}
        wanted = [token for token in ids[row, head, 0].tolist() if 0 <= token < newest]
        free = sorted(set(range(len(own))) - {there.get(token) for token in wanted}, key=lambda slot: int(own[slot]))
        counts[row, head] += torch.tensor([len(wanted), len(there.keys() & set(wanted))])
        for token in wanted:
            if token not in there and not free:
                continue
            slot = there[token] if token in there else free.pop(0)
            own[slot] = (newest + 1) * (TOKEN + 1) + token
            for stored, pooled in ((keys, pool_keys), (values, pool_values)):
                if token in there:
                    stored[row, head, start + token] = pooled[row, head, slot]
                else:
                    pooled[row, head, slot] = stored[row, head, start + token]
    return keys, values


@operator
def attend(query, keys, values, page_ids, length, padding, counters, page_size, *logits):
    return reference.attend(query, keys, values, page_ids, int(length), padding, page_size, *logits)


@operator
def decode(query, new_keys, new_values, addresses, length, padding, layer_idx, num_kv_heads, *settings):
    num_selected, page_size, scaling, *options = settings
    softcap, sinks, width, keeps_first, group, code_bits, num_tokens, token_group, has_pool = with_defaults(
        options, (None, None, 0.5, True, "max", 0, 0, "sum", False)
    )
    row = addresses[layer_idx].tolist()
    batch_size, _, _, head_dim = query.shape
    capacity = row[5]
    slots, pages = (batch_size, num_kv_heads, capacity), (batch_size, num_kv_heads, -(-capacity // page_size))
    keys, values = (tensor_at(address, (*slots, head_dim), query.dtype) for address in row[:2])
    scales = tensor_at(row[3], (*pages, -(-head_dim // reference.SCALE_BLOCK)), torch.uint8)
    bounds = tensor_at(row[2], (*pages, 2, head_dim), query.dtype if scales is None else torch.int8)
    codes = tensor_at(row[6], (*slots, head_dim * code_bits // 8), torch.uint8) if code_bits else None
    if new_keys is not None:
        append(keys, values, bounds, scales, new_keys, new_values, length, padding, page_size, codes)
    if num_selected == 0:
        return attend(query, keys, values, None, length, padding, None, page_size, scaling, softcap, sinks)
    where = (length, padding, num_selected, page_size, scaling, softcap, sinks)
    pool = [None] * 4
    if has_pool and row[11]:
        rows, of_token = slots[:2], (row[11], head_dim)
        kinds = [(of_token, query.dtype), (of_token, query.dtype), ((row[11],), torch.int64), ((2,), torch.int64)]
        pool = [tensor_at(at, (*rows, *shape), kind) for at, (shape, kind) in zip(row[7:11], kinds, strict=True)]
    score, by_codes = (width, keeps_first, group), (codes, num_tokens, token_group, *pool)
    return chain(query, keys, values, bounds, scales, *where, None, *score, *by_codes)


def tensor_at(address, shape, dtype):
    """A view of memory, or None of none."""
    if not address:
        return None
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * num_bytes).from_address(address), dtype=dtype).view(shape)
