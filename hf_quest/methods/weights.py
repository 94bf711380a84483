"""The attention weights by which a cache that evicts ranks its tokens."""

import torch

NUM_LOGITS = 2**28  # float32 numbers that `attention_weights` may hold at a time, about


def attention_weights(keys, attended):
    """Softmax attention weights of what `Attended` tells over [B, Hkv, n, D] keys, by chunks of queries.

    Yields [B, Hkv, G, t, n] float32, one chunk of t queries after the other. A query that sees nothing, or that is of
    no token, has no weight.
    """
    query, mask, position_bias = attended.query, attended.mask, attended.position_bias
    scaling, softcap, sinks = attended.logits
    batch_size, num_heads, num_queries, _ = query.shape
    num_kv_heads, num_keys = keys.shape[1:3]
    keys = keys.float()[:, :, None].transpose(-1, -2)
    if mask is None and num_queries > 1:
        mask = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(num_keys - num_queries)
    chunk_len = max(1, NUM_LOGITS // (batch_size * num_heads * num_keys))

    def of_chunk(by_head):  # [., 1 or Hq, T, n] to [., 1 or Hkv, 1 or G, t, n]
        by_head = by_head[:, :, first : first + chunk_len]
        return by_head.unflatten(1, (-1, num_heads // num_kv_heads) if by_head.shape[1] > 1 else (1, 1))

    for first in range(0, num_queries, chunk_len):
        chunk = query[:, :, first : first + chunk_len].float()
        logits = (chunk.unflatten(1, (num_kv_heads, -1)) @ keys) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if position_bias is not None:
            logits = logits + of_chunk(position_bias).float()
        if mask is not None:
            visible = of_chunk(mask)
            is_bool = visible.dtype == torch.bool
            logits = logits.masked_fill(~visible, -torch.inf) if is_bool else logits + visible.float()
        if sinks is not None:
            sink = sinks.float().view(1, num_kv_heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sink], dim=-1)
        weights = logits.softmax(dim=-1)[..., :num_keys].nan_to_num(0.0)
        if attended.is_token is not None:
            is_token = attended.is_token[:, None, None, first : first + chunk_len, None]
            weights = weights.masked_fill(~is_token, 0.0)
        yield weights
