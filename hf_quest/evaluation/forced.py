"""Teacher-forced decoding in one forward: every query chooses what it attends for itself, as in a step of its own.

The first tokens of a text are a dense prompt. The last ones go through one forward, in which a layer that is not always
dense gives each query what it would have attended to had it come alone. What that costs is seen at once, for any way to
choose, without a loop over steps.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from .. import CACHE_NAME
from ..seam.attention import dense_attention
from .choices import Choice, attended_tokens, grouped_logits
from .methods import DENSE, new_cache, prefill
from .scores import in_8_bits

FORCED = "quest_forced"  # an attn_implementation
NUM_TOP = 10
MAX_LOGITS = 2**28  # elements, of all heads and queries of a layer: more steps are fed in several forwards


@dataclass
class Observed:
    """What one layer kept in a forward, means over its queries, each [B, Hq]: the share of its attention mass and of
    the ten heaviest tokens; and [B] tokens attended, a mean over KV heads, too, and the most that any query attended.
    """

    mass: Tensor
    top10: Tensor
    attended: Tensor
    most: Tensor


@dataclass
class Forward:
    """A forward under way: a choice at a budget (None: dense attention), and what its layers kept."""

    choice: Choice | None
    budget: int
    dense_layers: int
    layers: dict[int, list[Observed]] = field(default_factory=dict)  # of each part that was fed


forward: ContextVar[Forward | None] = ContextVar("forward", default=None)


def forced_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    """Attention of several new tokens, dense in the layers that are always dense or whose mask is more than causal."""
    state = forward.get()
    is_dense = state is None or state.choice is None or module.layer_idx < state.dense_layers
    if is_dense or not is_causal(attention_mask, query.shape[2], key.shape[2]):
        if softcap is not None:
            kwargs["softcap"] = softcap
        return dense_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = kwargs.get("sinks") if kwargs.get("s_aux") is None else kwargs["s_aux"]
    output, seen = chosen_attention(state.choice, state.budget, query, key, value, scaling, softcap, sinks)
    state.layers.setdefault(module.layer_idx, []).append(seen)
    return output, None


AttentionInterface.register(FORCED, forced_attention)
AttentionMaskInterface.register(FORCED, sdpa_mask)


def is_causal(mask: Tensor | None, num_queries: int, num_keys: int) -> bool:
    """Whether a mask lets the newest `num_queries` see all before them, and nothing else."""
    if mask is None:
        return True
    causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=mask.device).tril(num_keys - num_queries)
    return mask.dtype == torch.bool and mask.shape[-1] == num_keys and bool((mask == causal).all())


def chosen_attention(
    choice: Choice,
    budget: int,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Observed]:
    """[B, T, Hq, D] exact attention of [B, Hq, T, D] queries over what each chooses, and what that keeps."""
    logits = grouped_logits(query, keys, scaling)  # [B, Hkv, G, T, N]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    position = torch.arange(keys.shape[2], device=keys.device)
    logits = logits.masked_fill(position > position[-query.shape[2] :, None], -torch.inf)
    is_attended = attended_tokens(choice, budget, query, keys, logits, scaling)[:, :, None]  # [B, Hkv, 1, T, N]
    weights = with_sinks(logits, sinks).softmax(dim=-1)[..., : keys.shape[2]]
    mass = (weights * is_attended).sum(dim=-1) / weights.sum(dim=-1)
    top = logits.topk(min(NUM_TOP, keys.shape[2]), dim=-1).indices
    top10 = is_attended.expand_as(logits).gather(-1, top).float().mean(dim=-1)
    kept = with_sinks(logits.masked_fill(~is_attended, -torch.inf), sinks).softmax(dim=-1)[..., : keys.shape[2]]
    values = in_8_bits(values) if choice.value_bits == 8 else values.float()
    output = (kept @ values[:, :, None]).flatten(1, 2).to(query.dtype)
    attended = is_attended.sum(dim=-1).float().flatten(1)
    observed = Observed(
        mass.mean(dim=-1).flatten(1), top10.mean(dim=-1).flatten(1), attended.mean(dim=1), attended.amax(dim=1)
    )
    return output.transpose(1, 2).contiguous(), observed


def with_sinks(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Logits [B, Hkv, G, T, N] with the heads' sinks [Hq] behind them, if there are some."""
    if sinks is None:
        return logits
    sinks = sinks.float().view(1, *logits.shape[1:3], 1, 1).expand(*logits.shape[:-1], 1)
    return torch.cat([logits, sinks], dim=-1)


class Forced:
    """Texts [B, N] of one length whose last `num_steps` tokens but the very last are fed in one forward, in any way."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, num_steps: int, dense_layers: int = 2):
        self.model = model
        self.dense_layers = dense_layers
        self.prompt, self.fed = ids[:, : -num_steps - 1], ids[:, -num_steps - 1 : -1]
        self.targets = ids[:, -num_steps:, None]
        config = model.config.get_text_config(decoder=True)
        num_logits = config.num_attention_heads * ids.numel()  # of one step
        self.parts = self.fed.split(max(1, MAX_LOGITS // num_logits), dim=1)
        self.cache = new_cache(model, DENSE)
        prefill(model, self.cache, self.prompt)

    def log_probs(self, choice: Choice | None, budget: int = 0) -> tuple[Tensor, dict[int, Observed]]:
        """[B, num_steps, V] log-probabilities of each next token, and by layer what the choice kept."""
        # What a window has let go of does not come back by a crop.
        can_crop = not any(layer.is_sliding for layer in self.cache.layers)
        cache = self.cache if can_crop else copy.deepcopy(self.cache)
        with attending(self.model, Forward(choice, budget, self.dense_layers)) as state:
            logits = [self.model(part, **{CACHE_NAME: cache}, use_cache=True).logits for part in self.parts]
        if can_crop:
            cache.crop(-self.fed.shape[1])
        sizes = [part.shape[1] for part in self.parts]
        layers = {layer_idx: joined(seen, sizes) for layer_idx, seen in state.layers.items()}
        return torch.cat(logits, dim=1).float().log_softmax(dim=-1), layers

    def losses(self, log_probs: Tensor) -> Tensor:
        """[B] mean negative log-likelihoods of what the text says, in nats."""
        return -log_probs.gather(-1, self.targets)[..., 0].mean(dim=1)


def joined(seen: list[Observed], sizes: list[int]) -> Observed:
    """What a layer kept over all parts, of so many queries each."""
    shares = [size / sum(sizes) for size in sizes]
    names = ("mass", "top10", "attended")
    means = (sum(share * getattr(part, name) for share, part in zip(shares, seen, strict=True)) for name in names)
    return Observed(*means, torch.stack([part.most for part in seen]).amax(dim=0))


@contextmanager
def attending(model: PreTrainedModel, state: Forward) -> Iterator[Forward]:
    """The model attends as `state` says."""
    model.set_attn_implementation(FORCED)
    token = forward.set(state)
    try:
        yield state
    finally:
        forward.reset(token)
