"""One layer of a cache that evicts: what it keeps, and how a forward that did not end is undone."""

from dataclasses import dataclass, field

import torch
from transformers.cache_utils import CacheLayerMixin

from ..attention import dense_attention, dense_decode
from ..errors import QuestError
from ..generation import called_by_module
from ..reference import order_of
from .weights import as_bool, is_of_token

BESIDE_TOKENS = ("keys", "values", "positions", "scores", "is_visible", "is_token")  # [B, Hkv, n, ...] of a layer


@dataclass
class Settings:
    """What a cache shares with its layers."""

    budget: int  # tokens
    num_layers: int | None = None  # of the model, known from the second forward on
    before: dict = field(default_factory=dict)  # of each layer that the forward under way has reached, its former state


class EvictingLayer(CacheLayerMixin):
    """The tokens of one layer that were kept, n of the N seen.

    `keys`, `values` [B, Hkv, n, D], keys after the rotary embedding; `positions` [B, Hkv, n] int64, the slot of each
    among all that were seen, ascending; `scores` [B, Hkv, n] float32, which a subclass keeps and ranks by; `is_visible`
    [B, Hkv, n] bool, what the newest query could attend; `is_token` [B, Hkv, n] bool, what could attend to itself, as
    padding cannot and a row that pauses.
    """

    is_croppable = False  # what was evicted does not come back

    def __init__(self, settings, layer_idx, is_dense):
        super().__init__()
        self.settings = settings
        self.layer_idx = layer_idx
        self.is_dense = is_dense
        self.num_seen = 0
        self.pending = False  # keys and values were handed to the model and have not reached its attention
        self.is_observed = True  # the newest queries are part of `scores` and `is_visible`
        self.positions = self.scores = self.is_visible = self.is_token = self.device = None

    def observe(self, query, mask, is_token, **kwargs):
        """Bring `scores` up to date after the newest T tokens attended.

        Args:
            query: [B, Hq, T, D].
            mask: bool or float, broadcastable to [B, Hq, T, n], or None for causal attention.
            is_token: [B, T] bool, False for queries of padding, which count for nothing; None where all are of tokens.
            kwargs: what the model calls its attention with, for `attention_weights`.
        """
        raise NotImplementedError

    def priority(self):
        """[B, Hkv, n] float32: the tokens of highest priority stay."""
        return self.scores

    def lazy_initialization(self, key_states, value_states):
        self.keys, self.values = key_states[:, :, :0].detach(), value_states[:, :, :0].detach()
        self.scores = self.keys.new_empty(self.keys.shape[:3], dtype=torch.float32)
        self.positions = self.scores.long()
        self.is_visible = self.is_token = self.scores.bool()
        self.device = key_states.device
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Append [B, Hkv, T, D] keys and values; return all that is kept, which carries this layer and the gradients of
        what is new. Without a model that calls, nothing is evicted until the next forward has attended.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.check(key_states, value_states)
        self.prefetch()
        num_new, num_old = key_states.shape[2], self.keys.shape[2]
        positions = torch.arange(self.num_seen, self.num_seen + num_new, device=self.device)
        positions = positions.expand(*key_states.shape[:2], num_new)
        yes = torch.ones_like(positions, dtype=torch.bool)
        new = (key_states, value_states, positions, torch.zeros_like(positions), yes, yes)
        former = {name: getattr(self, name) for name in BESIDE_TOKENS}
        joined = {name: torch.cat([former[name], part], dim=2) for name, part in zip(BESIDE_TOKENS, new, strict=True)}
        stored = {name: tensor.detach() for name, tensor in joined.items()}
        by_module = called_by_module()
        if by_module:
            if num_old and not self.is_above_budget(num_old + num_new):  # no copy of what stays
                former = {name: tensor[:, :, :num_old] for name, tensor in stored.items()}
            former |= {"num_seen": self.num_seen, "is_observed": self.is_observed, "pending": False}
            self.settings.before[self.layer_idx] = former
        vars(self).update(stored, num_seen=self.num_seen + num_new, is_observed=False, pending=by_module)
        keys, values = joined["keys"], joined["values"]
        keys.quest_layer = values.quest_layer = self
        keys.positions = self.positions
        return keys, values

    def check(self, key_states, value_states):
        """Raise for keys and values that cannot be appended. Nothing is changed."""
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            if stored.shape[0] != new.shape[0]:
                raise ValueError(
                    f"The cache holds {stored.shape[0]} rows and this batch has {new.shape[0]}. Call cache.reset() or "
                    "use a new cache for another batch. The content of the cache is unchanged."
                )
            if (stored.shape[1], stored.shape[3]) != (new.shape[1], new.shape[3]):
                raise ValueError(
                    f"The cache holds {stored.shape[1]} heads of dim {stored.shape[3]} and this model brings "
                    f"{new.shape[1]} of dim {new.shape[3]}: it is another model's cache. Use a new one. The content of "
                    "this one is unchanged."
                )

    def attention(self, module, query, key, value, attention_mask, **kwargs):
        """What `quest_attention` does with this layer: attend to what is kept, then evict. Args and result as there."""
        check_is_self_attention(module, kwargs.get("is_causal"))
        mask = self.at_positions(attention_mask, key.positions, query)
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = self.at_positions(kwargs["position_bias"], key.positions, query)
        attend = dense_decode if query.shape[2] == 1 else dense_attention
        output = attend(module, query, key, value, mask, **kwargs)
        if not self.is_observed:  # else it was by the layer whose keys and values this call shares
            with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
                self.see(query, mask, **kwargs)
                self.evict()
            self.pending = False
            if self.layer_idx + 1 == self.settings.num_layers:
                self.settings.before.clear()
        return output

    def at_positions(self, by_token, positions, query):
        """A mask or bias of all tokens seen, [B, 1 or Hq, T, N], as one of those at `positions`, [B, Hq, T, n]."""
        if by_token is None:
            return None
        if by_token.shape[3] != self.num_seen:
            raise QuestError(
                f"This model made a mask or a bias of {by_token.shape[3]} positions, and {self.num_seen} were seen: "
                "it counts the keys that a layer kept, and would hide others than it means. Where layer 0 makes it for "
                "all layers, dense_layers=1 or more helps; otherwise use QuestCache."
            )
        if positions.shape[2] == self.num_seen:
            return by_token
        num_heads, num_queries = query.shape[1:3]
        slot = positions.repeat_interleave(num_heads // positions.shape[1], dim=1)
        by_token = by_token.expand(slot.shape[0], num_heads, num_queries, -1)
        return by_token.gather(3, slot[:, :, None].expand(-1, -1, num_queries, -1))

    def see(self, query, mask, **kwargs):
        """Take note of what the newest queries could attend, and did."""
        self.is_observed = True
        if self.is_dense:
            return
        is_token = None
        if mask is None:
            self.is_visible = torch.ones_like(self.is_visible)
        else:
            newest = as_bool(mask[:, :, -1])
            group = max(1, newest.shape[1] // self.keys.shape[1])
            self.is_visible = newest[:, ::group].expand_as(self.is_visible).contiguous()
            is_token = is_of_token(mask).expand(query.shape[0], -1)
            new = is_token[:, None].expand(-1, self.keys.shape[1], -1)
            self.is_token = torch.cat([self.is_token[:, :, : -new.shape[2]], new], dim=2)
        self.observe(query, mask, is_token, **kwargs)

    def is_above_budget(self, num_tokens):
        return not self.is_dense and num_tokens > self.settings.budget

    def evict(self):
        """Keep `budget` tokens per KV head."""
        if not self.is_initialized or not self.is_observed or not self.is_above_budget(self.keys.shape[2]):
            return
        kept = self.ranks().topk(self.settings.budget, dim=-1).indices.sort(dim=-1).values  # [B, Hkv, budget]
        for name in BESIDE_TOKENS:
            tensor = getattr(self, name)
            index = kept if tensor.dim() == 3 else kept[..., None].expand(-1, -1, -1, tensor.shape[-1])
            setattr(self, name, tensor.gather(2, index))

    def ranks(self):
        """[B, Hkv, n] int64, no two alike in a head: visible tokens, then those that are not, then what is no token,
        each by priority, the older one of two alike first.
        """
        priority = order_of(self.priority()) >> 32  # to 2^31
        slot = torch.arange(priority.shape[2], device=priority.device)
        place = self.is_token.long() + (self.is_token & self.is_visible)
        return (place << 58) + (priority << 25) - slot

    def crop(self, tokens_to_remove):
        if tokens_to_remove != 0:
            refuse_crop()

    def get_seq_length(self):
        return self.num_seen  # which positions and masks count by

    def get_max_length(self):
        return -1

    def get_mask_sizes(self, query_length):
        return self.num_seen + query_length, 0

    def reset(self):
        self.__init__(self.settings, self.layer_idx, self.is_dense)
        self.settings.before.pop(self.layer_idx, None)

    def _transform(self, change):
        if self.is_initialized:
            for name in BESIDE_TOKENS:
                setattr(self, name, change(getattr(self, name)))

    def offload(self):
        self._transform(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self):
        self._transform(lambda tensor: tensor.to(self.device, non_blocking=True))

    def select_rows(self, rows):
        self._transform(lambda tensor: tensor[rows.to(tensor.device)])
        self.settings.before.pop(self.layer_idx, None)

    reorder_cache = batch_select_indices = select_rows

    def batch_repeat_interleave(self, repeats):
        if self.is_initialized:
            self.select_rows(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))


def refuse_crop():
    raise QuestError(
        "A cache that evicts cannot take tokens back, as crop and assisted decoding do. Use generate without an "
        "assistant, or QuestCache."
    )


def check_is_self_attention(module, is_causal):
    if (getattr(module, "is_causal", True) if is_causal is None else is_causal) is False:
        raise QuestError(
            "A cache that evicts is for the tokens that a decoder writes, and this attention is not causal: it is "
            "cross-attention or an encoder's. Give an encoder-decoder model an EncoderDecoderCache of a new cache of "
            "this kind and, for cross-attention, a DynamicCache."
        )
