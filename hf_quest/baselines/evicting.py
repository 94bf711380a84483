"""What the three baselines share: a cache of `budget` tokens per KV head that drops those of least priority."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..attention import dense_attention, dense_decode
from ..errors import QuestError

NUM_LOGITS = 2**28  # float32 numbers that `attention_weights` may hold at a time, about


@dataclass
class Settings:
    """What a cache shares with its layers."""

    budget: int  # tokens


class EvictingLayer(CacheLayerMixin):
    """The tokens of one layer that were kept, n of the N seen.

    `keys`, `values` [B, Hkv, n, D], keys after the rotary embedding; `positions` [B, Hkv, n] int64, the slot of each
    among all that were seen, ascending; `scores` [B, Hkv, n] float32, which a subclass keeps and ranks by.
    """

    is_croppable = False  # what was evicted does not come back

    def __init__(self, settings, is_dense):
        super().__init__()
        self.settings = settings
        self.is_dense = is_dense
        self.num_seen = 0
        self.pending = False  # keys and values were handed to the model and have not reached its attention

    def observe(self, query, mask, is_visible, **kwargs):
        """Bring `scores` up to date after the newest T tokens attended.

        Args:
            query: [B, Hq, T, D].
            mask: bool or float, broadcastable to [B, Hq, T, n], or None for causal attention.
            is_visible: [B, Hkv, n] bool, what the newest token may attend.
            kwargs: what the model calls its attention with, for `attention_weights`.
        """
        raise NotImplementedError

    def priority(self):
        """[B, Hkv, n]: the tokens of highest priority stay."""
        return self.scores

    def lazy_initialization(self, key_states, value_states):
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.scores = self.keys.new_empty(self.keys.shape[:3], dtype=torch.float32)
        self.positions = self.keys.new_empty(self.keys.shape[:3], dtype=torch.int64)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Append [B, Hkv, T, D] keys and values; return views of all that is kept, which carry this layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.keys.shape[0] != key_states.shape[0]:
            raise ValueError(
                f"The cache holds {self.keys.shape[0]} rows and this batch has {key_states.shape[0]}. Call "
                "cache.reset() or use a new cache for another batch. The content of the cache is unchanged."
            )
        num_new = key_states.shape[2]
        position = torch.arange(self.num_seen, self.num_seen + num_new, device=key_states.device)
        new_positions = position.expand(*key_states.shape[:2], num_new)
        self.keys = torch.cat([self.keys, key_states.detach()], dim=2)
        self.values = torch.cat([self.values, value_states.detach()], dim=2)
        self.positions = torch.cat([self.positions, new_positions], dim=2)
        self.scores = torch.cat([self.scores, self.scores.new_zeros(new_positions.shape)], dim=2)
        self.num_seen += num_new
        self.pending = True
        keys, values = self.keys.view_as(self.keys), self.values.view_as(self.values)
        keys.quest_layer = values.quest_layer = self
        return keys, values

    def attention(self, module, query, key, value, attention_mask, **kwargs):
        """What `quest_attention` does with this layer: attend to what is kept, then evict. Args and result as there."""
        self.pending = False
        mask = self.mask_of_kept(attention_mask, query)
        attend = dense_decode if query.shape[2] == 1 else dense_attention
        output = attend(module, query, key, value, mask, **kwargs)
        if not self.is_dense:
            self.observe(query.detach(), mask, self.is_visible(mask), **kwargs)
            self.evict()
        return output

    def mask_of_kept(self, mask, query):
        """The model's mask of all tokens seen, [B, 1 or Hq, T, N], as one of those kept, [B, Hq, T, n]."""
        if mask is None or self.keys.shape[2] == self.num_seen:
            return mask
        num_heads, num_queries = query.shape[1:3]
        slot = self.positions.repeat_interleave(num_heads // self.positions.shape[1], dim=1)
        mask = mask.expand(slot.shape[0], num_heads, num_queries, -1)
        return mask.gather(3, slot[:, :, None].expand(-1, -1, num_queries, -1))

    def is_visible(self, mask):
        """[B, Hkv, n] bool: what the newest token may attend."""
        if mask is None:
            return torch.ones_like(self.positions, dtype=torch.bool)
        newest = mask[:, :, -1]
        if newest.dtype != torch.bool:
            newest = newest > torch.finfo(newest.dtype).min / 2
        return newest[:, :: max(1, newest.shape[1] // self.positions.shape[1])].expand_as(self.positions)

    def evict(self):
        """Keep `budget` tokens per KV head."""
        budget = self.settings.budget
        if self.is_dense or not self.is_initialized or self.keys.shape[2] <= budget:
            return
        kept = self.priority().topk(budget, dim=-1).indices.sort(dim=-1).values  # [B, Hkv, budget]
        self.scores, self.positions = self.scores.gather(2, kept), self.positions.gather(2, kept)
        self.keys = self.keys.gather(2, kept[..., None].expand(-1, -1, -1, self.keys.shape[-1]))
        self.values = self.values.gather(2, kept[..., None].expand(-1, -1, -1, self.values.shape[-1]))

    def crop(self, tokens_to_remove):
        refuse_crop()

    def get_seq_length(self):
        return self.num_seen  # which positions and masks count by

    def get_max_length(self):
        return -1

    def get_mask_sizes(self, query_length):
        return self.num_seen + query_length, 0

    def reset(self):
        self.num_seen = 0
        self.pending = self.is_initialized = False
        self.keys = self.values = self.positions = self.scores = None

    def select_rows(self, rows):
        if self.is_initialized:
            rows = rows.to(self.keys.device)
            for name in ("keys", "values", "positions", "scores"):
                setattr(self, name, getattr(self, name)[rows])

    reorder_cache = batch_select_indices = select_rows

    def batch_repeat_interleave(self, repeats):
        if self.is_initialized:
            self.select_rows(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))


class EvictingCache(Cache):
    """A cache that keeps `budget` tokens per KV head in every layer after the first `dense_layers`, for a model loaded
    with `attn_implementation="quest"`.

    It evicts at the end of every forward, a prompt's too, which itself attends everything: memory falls to the budget.
    Tokens keep the positions at which they were seen. Row i of a left-padded batch keeps what it would keep alone.

    Args:
        budget: tokens. May be changed at any time by assignment; a smaller one evicts at once.
        dense_layers: how many of the first layers keep everything, as in Quest's comparison.

    Raises:
        ValueError: for arguments outside these ranges, and later for a batch of another size.
        QuestError: for a model whose attention is not Quest's.
    """

    layer_class: type[EvictingLayer]
    min_budget = 1  # tokens

    def __init__(self, budget=2048, *, dense_layers=2):
        if not isinstance(dense_layers, int) or dense_layers < 0:
            raise ValueError(f"dense_layers is a number of layers, 0 or more, not {dense_layers!r}.")
        self.dense_layers = dense_layers
        self.settings = Settings(self.checked_budget(budget))
        super().__init__(layers=[])

    def __repr__(self):
        return (
            f"{type(self).__name__}(budget={self.budget}, dense_layers={self.dense_layers}, "
            f"layers={len(self.layers)}, tokens={self.get_seq_length()})"
        )

    @property
    def budget(self):
        """Tokens that each KV head keeps."""
        return self.settings.budget

    @budget.setter
    def budget(self, budget):
        self.settings.budget = self.checked_budget(budget)
        for layer in self.layers:
            layer.evict()

    @classmethod
    def checked_budget(cls, budget):
        if not isinstance(budget, int) or isinstance(budget, bool) or budget < cls.min_budget:
            raise ValueError(
                f"budget of {cls.__name__} is a number of tokens, {cls.min_budget} or more, not {budget!r}."
            )
        return budget

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx > len(self.layers):
            raise QuestError(
                f"Layer {len(self.layers)} of this model caches no keys and values: a hybrid, which "
                f"{type(self).__name__} does not serve. Use the model without it."
            )
        if layer_idx == len(self.layers):
            self.layers.append(self.layer_class(self.settings, is_dense=layer_idx < self.dense_layers))
        if self.layers[max(0, layer_idx - 1)].pending:
            raise QuestError(
                "The keys and values that the cache handed to the model never reached Quest's attention: the last "
                'forward was interrupted, or the model is not loaded with attn_implementation="quest", or it changes '
                "keys and values on the way. The cache cannot be used on; make a new one."
            )
        return self.layers[layer_idx].update(key_states, value_states)

    @property
    def is_compileable(self):
        return False

    def activate_past_recording(self):
        refuse_crop()


def refuse_crop():
    raise QuestError(
        "A cache that evicts cannot take tokens back, as crop and assisted decoding do. Use generate without an "
        "assistant, or QuestCache."
    )


def attention_weights(query, keys, mask, scaling=None, softcap=None, s_aux=None, sinks=None, **kwargs):
    """Softmax attention weights of [B, Hq, T, D] queries, the newest, over [B, Hkv, n, D] keys, by chunks of queries.

    `mask` is broadcastable to [B, Hq, T, n], bool or added, or None for causal attention. Yields [B, Hkv, G, t, n]
    float32, one chunk of t queries after the other; a query that sees nothing has no weight.
    """
    batch_size, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_keys = keys.shape[1:3]
    keys = keys.float()[:, :, None].transpose(-1, -2)
    scaling = head_dim**-0.5 if scaling is None else scaling
    sinks = s_aux if sinks is None else sinks
    if mask is None and num_queries > 1:
        mask = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(num_keys - num_queries)
    chunk_len = max(1, NUM_LOGITS // (batch_size * num_heads * num_keys))
    for first in range(0, num_queries, chunk_len):
        chunk = query[:, :, first : first + chunk_len].float()
        logits = (chunk.unflatten(1, (num_kv_heads, -1)) @ keys) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            visible = mask[:, :, first : first + chunk_len]
            visible = visible.unflatten(1, (-1, num_heads // num_kv_heads) if visible.shape[1] > 1 else (1, 1))
            is_bool = visible.dtype == torch.bool
            logits = logits.masked_fill(~visible, -torch.inf) if is_bool else logits + visible.float()
        if sinks is not None:
            sink = sinks.float().view(1, num_kv_heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sink], dim=-1)
        yield logits.softmax(dim=-1)[..., :num_keys].nan_to_num(0.0)
