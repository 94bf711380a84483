"""What the three baselines share: a cache of `budget` tokens per KV head that drops those of least priority."""

from transformers.cache_utils import Cache

from ..errors import QuestError
from ..generation import called_by_module, length_or_read_again
from .layer import EvictingLayer, Settings, refuse_crop


class EvictingCache(Cache):
    """A cache that keeps `budget` tokens per KV head in every layer after the first `dense_layers`, for a model loaded
    with `attn_implementation="quest"`.

    It evicts at the end of every forward, a prompt's too, which itself attends everything: memory falls to the budget.
    Tokens keep the positions at which they were seen. Row i of a left-padded batch keeps what it would keep alone, and
    a row that pauses, its newest slot hidden by the mask, keeps what it has. Tokens that the mask hides go first. The
    new keys and values of a forward carry gradients, what is stored does not.

    Args:
        budget: tokens. May be changed at any time by assignment; a smaller one evicts at once.
        dense_layers: how many of the first layers keep everything, as in Quest's comparison.

    Raises:
        ValueError: for arguments outside these ranges, and later for a batch of another size.
        QuestError: for a model whose attention is not Quest's, and after a forward that did not end.
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
        by_module = called_by_module()
        if by_module and layer_idx == 0:
            self._begin_forward()
        elif by_module and layer_idx <= len(self.layers) and self.layers[layer_idx - 1].pending:
            raise QuestError(
                "The keys and values that the cache handed to the model never reached Quest's attention: the model is "
                f'not loaded with attn_implementation="quest", or it changes them on the way. {self._put_back()}'
            )
        if layer_idx >= len(self.layers):
            self._add_layer(layer_idx, key_states.shape[2] if by_module else None)
        return self.layers[layer_idx].update(key_states, value_states)

    def _begin_forward(self):
        num_tokens = [layer.num_seen for layer in self.layers]
        if len(set(num_tokens)) > 1 or any(layer.pending for layer in self.layers):
            raise QuestError(
                f"The layers of this cache were last given {', '.join(map(str, num_tokens))} tokens in all, or the "
                "attention over them did not end: the last forward was interrupted, its model has fewer layers than "
                f'the one before, or it is not loaded with attn_implementation="quest". {self._put_back()}'
            )
        self.settings.num_layers = len(self.layers) or None
        self.settings.before.clear()

    def _put_back(self):
        """Undo the forward under way as far as that can be; return what to say about it."""
        before, self.settings.before = self.settings.before, {}
        for layer_idx, state in before.items():
            vars(self.layers[layer_idx]).update(state)
        is_even = len({layer.num_seen for layer in self.layers}) == 1
        if before and is_even and not any(layer.pending for layer in self.layers):
            num_tokens = self.layers[0].num_seen
            return f"The cache has been put back to the {num_tokens} tokens before; repeat the call, or use a new one."
        self.layers[0].pending = True  # until `reset`
        return "The cache cannot be used on: call cache.reset(), or make a new one."

    def _add_layer(self, layer_idx, num_new):
        """Have a layer `layer_idx`, in a forward of `num_new` tokens; None where somebody fills the cache by hand."""
        if layer_idx > len(self.layers):
            raise QuestError(
                f"Layer {len(self.layers)} of this model caches no keys and values: a hybrid, or one with "
                f"cross-attention, which {type(self).__name__} does not serve. Use the model without it."
            )
        if num_new is not None and self.layers and self.layers[0].num_seen != num_new:
            raise QuestError(
                f"The cache holds tokens of {len(self.layers)} layers and this model has more, or caches other tokens "
                "in some: it is another model's cache, or its first forward was interrupted, or the model has "
                f"cross-attention. {self._put_back()}"
            )
        self.layers.append(self.layer_class(self.settings, layer_idx, is_dense=layer_idx < self.dense_layers))

    def get_seq_length(self, layer_idx=0):
        return length_or_read_again(self, super().get_seq_length(layer_idx))

    @property
    def is_compileable(self):
        return False

    def activate_past_recording(self):
        refuse_crop()

    def _no_state(self, *args, **kwargs):
        raise QuestError(
            "This model keeps states beside keys and values (linear attention, convolutions or an indexer), which "
            f"{type(self).__name__} does not serve. Use the model without it."
        )

    has_previous_state = _no_state
    get_conv_state = update_conv_state = _no_state
    get_recurrent_state = update_recurrent_state = _no_state
    update_indexer = _no_state
