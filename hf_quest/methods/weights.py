"""The attention weights by which a cache that evicts ranks its tokens, and attention by weights of its own."""

import torch
import torch.nn.functional as F

NUM_LOGITS = 2**28  # float32 numbers that `attention_logits` may hold at a time, about


def attention_weights(keys, attended):
    """Softmax attention weights of what `Attended` tells over [B, Hkv, n, D] keys, by chunks of queries.

    Yields [B, Hkv, G, t, n] float32, one chunk of t queries after the other. A query that sees nothing, or that is of
    no token, has no weight.
    """
    first, num_keys = 0, keys.shape[2]
    for logits, sinks in attention_logits(keys, attended, torch.float32):
        if sinks is not None:
            logits = torch.cat([logits, sinks], dim=-1)
        weights = logits.softmax(dim=-1)[..., :num_keys].nan_to_num(0.0)
        if attended.is_token is not None:
            is_token = attended.is_token[:, None, None, first : first + weights.shape[3], None]
            weights = weights.masked_fill(~is_token, 0.0)
        first += weights.shape[3]
        yield weights


def weighted_attention(keys, values, attended, numerator, denominator, dropout=0.0):
    """Attention [B, Hq, T, D] in which tokens count as often in its numerator and its denominator as two logarithms
    [B, Hkv, n] say; nothing for a query that sees nothing.
    """
    dtype = torch.promote_types(keys.dtype, torch.float32)
    numerator, denominator = (weights.to(dtype)[:, :, None, None] for weights in (numerator, denominator))
    values, outputs = values.to(dtype)[:, :, None], []
    for logits, sinks in attention_logits(keys, attended, dtype):
        total = (logits + denominator).logsumexp(dim=-1, keepdim=True)
        if sinks is not None:
            total = torch.logaddexp(total, sinks)
        weights = (logits + numerator - total).exp().nan_to_num(0.0, posinf=0.0)
        outputs.append((F.dropout(weights, dropout) @ values).flatten(1, 2))
    return torch.cat(outputs, dim=2).to(attended.query.dtype)


def attention_logits(keys, attended, dtype):
    """The logits of what `Attended` tells over [B, Hkv, n, D] keys in a dtype, by chunks of t queries, -inf for what
    they do not see.

    Yields [B, Hkv, G, t, n], and sinks [B, Hkv, G, t, 1] or None.
    """
    query, mask, position_bias = attended.query, attended.mask, attended.position_bias
    scaling, softcap, sinks = attended.logits
    batch_size, num_heads, num_queries, _ = query.shape
    num_kv_heads, num_keys = keys.shape[1:3]
    keys = keys.to(dtype)[:, :, None].transpose(-1, -2)
    if mask is None and num_queries > 1:
        mask = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(num_keys - num_queries)
    chunk_len = max(1, NUM_LOGITS // (batch_size * num_heads * num_keys))

    def of_chunk(by_head):  # [., 1 or Hq, T, n] to [., 1 or Hkv, 1 or G, t, n]
        by_head = by_head[:, :, first : first + chunk_len]
        return by_head.unflatten(1, (-1, num_heads // num_kv_heads) if by_head.shape[1] > 1 else (1, 1))

    for first in range(0, num_queries, chunk_len):
        chunk = query[:, :, first : first + chunk_len].to(dtype)
        logits = (chunk.unflatten(1, (num_kv_heads, -1)) @ keys) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if position_bias is not None:
            logits = logits + of_chunk(position_bias).to(dtype)
        if mask is not None:
            visible = of_chunk(mask)
            is_bool = visible.dtype == torch.bool
            logits = logits.masked_fill(~visible, -torch.inf) if is_bool else logits + visible.to(dtype)
        by_head = None if sinks is None else sinks.to(dtype).view(1, num_kv_heads, -1, 1, 1)
        yield logits, None if by_head is None else by_head.expand(*logits.shape[:-1], 1)
