"""Dense attention of a prompt: one table of who takes which way, and the ways."""

import torch

# Products q·k from which cuDNN's lead over flash outweighs the 65 ms that it takes to plan for a new shape. The shapes
# of slabs come again in every layer and prompt, those of whole prompts do not.
CUDNN_PAYS, CUDNN_PAYS_AGAIN = 1 << 27, 1 << 24


def causal_attention(query, keys, values, logits):
    """Dense attention of the newest T tokens, [B, Hq, T, D], over all N, [B, Hkv, N, D], without a mask."""
    past = keys.shape[2] - query.shape[2]
    own = attention(query, keys[:, :, past:], values[:, :, past:], True, logits)
    if past == 0:
        return own[0] if logits.sinks is None else give_to_sinks(*own, logits.sinks)
    before = attention(query, keys[:, :, :past], values[:, :, :past], False, logits)
    output = before[0]
    return merge(*before, *own, logits.sinks, output)


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


def attention(query, keys, values, is_causal, logits, cudnn_pays=CUDNN_PAYS):
    """Exact attention [R, Hq, L, D] of [R, Hq, L, D] over [R, Hkv, M, D], and the logsumexp of its logits, [R, Hq, L].

    The causal one has L = M. cuDNN is used for at least `cudnn_pays` products.
    """
    scaling, softcap, _ = logits  # sinks get theirs of the whole, see give_to_sinks
    if softcap is None and has_library_attention(query, values):
        return library_attention(query, keys, values, is_causal, scaling, cudnn_pays)
    num_queries, num_keys = query.shape[2], keys.shape[2]
    grouped = query.float().unflatten(1, (keys.shape[1], -1))
    products = grouped @ keys.float()[:, :, None].transpose(-1, -2) * scaling  # [R, Hkv, G, L, M]
    if softcap is not None:
        products = softcap * torch.tanh(products / softcap)
    if is_causal:
        future = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).triu(1)
        products = products.masked_fill_(future, -torch.inf)
    logsumexp = products.logsumexp(dim=-1, keepdim=True)
    output = products.sub_(logsumexp).exp_() @ values.float()[:, :, None]
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
