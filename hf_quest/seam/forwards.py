"""Forwards: how a cache takes part in the forwards of a model, which may be interrupted, and be one step in a graph."""

import weakref
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..errors import QuestError
from ..storage.rows import cannot_be_written
from . import generate
from .checks import check_layer_types, check_room, reserve_host
from .layer import Layer
from .local import reaches_of
from .state import State
from .step import PREPARED, TAKEN, end_of_text
from .stock import tokens_of_layer

outside_of_graphs = torch.compiler.disable(
    reason="a graph can hold one decode step of a QuestCache, after its get_mask_sizes(1, 0) as `generate` calls it"
)


class Forwards(Cache):
    """What models, and the mask and attention functions, ask of a cache in a forward. See `MethodCache`."""

    shared: State
    layers: list[Any]  # of Layer
    config: Any  # of the model, as its mask function knows it
    reader: weakref.ref | None = None  # the model

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if not self.shared.step.is_captured:
            return self._update(key_states, value_states, layer_idx)
        if self.shared.region is not None:
            return self.shared.region.hand_over(key_states, value_states)
        if self.shared.step.takes(layer_idx, key_states.shape[2]):
            return self.layers[layer_idx].update_captured(key_states, value_states)
        return self._update_outside_of_graph(key_states, value_states, layer_idx)

    def _update(self, key_states, value_states, layer_idx):
        self._settle()
        self.shared.step.is_over()
        if layer_idx == 0:
            self._begin_forward()
        elif layer_idx <= len(self.layers) and self.layers[layer_idx - 1].handed.is_under_way:
            before = self.layers[layer_idx - 1]
            raise QuestError(
                "The keys and values that the cache handed to the model never reached Quest's attention. Load the "
                'model with attn_implementation="quest". If you did, this model changes keys and values on the way, '
                f"and Quest cannot serve it. {self._put_back(before.length - before.handed.num_new)}"
            )
        if layer_idx >= len(self.layers):
            self._add_layer(layer_idx, key_states.shape[2])
        if self.shared.offloading:
            return self._update_offloading(key_states, value_states, layer_idx)
        return self.layers[layer_idx].update(key_states, value_states)

    def _update_offloading(self, key_states, value_states, layer_idx):
        """`_update` that leaves the cache as it was where the host's memory runs out."""
        layer = self.layers[layer_idx]
        if layer_idx == 0:
            self.shared.rows.expect(generate.prompt_under_way())
            reserve_host(self, layer.autocast(key_states), layer.autocast(value_states))
            for each in self.layers:
                if each.storage.offloading:
                    each.storage.begin_forward()
        length, num_new = layer.length, key_states.shape[2]
        try:
            reached = layer.update(key_states, value_states)
        except QuestError:
            self._put_back(length)
            raise
        is_prompt = num_new > 1 and self.shared.draft_start is None
        if is_prompt and layer_idx + 1 < len(self.layers) and self.layers[layer_idx + 1].storage.offloading:
            self.layers[layer_idx + 1].storage.come(num_new)
        return reached

    _update_outside_of_graph = outside_of_graphs(_update)

    def _begin_forward(self):
        self._check_last_forward_was_whole()
        self.masks.begin()
        self.shared.begin_forward(len(self.layers))
        if self.reading_model() is None:
            self.was_read_by(generate.calling_model())
        if self.shared.draft_start is not None and not generate.is_assisted():
            self.shared.expect_drafts(None)

    def reading_model(self):
        """The model that has read what is stored, or None if that is not known or it is gone."""
        return None if self.reader is None else self.reader()

    def was_read_by(self, model):
        self.reader = None if model is None else weakref.ref(model)

    def _check_last_forward_was_whole(self):
        lengths = [layer.storage.length for layer in self.layers]
        length = min(lengths, default=0)
        if self.layers and self.layers[-1].handed.is_under_way:  # its attention never came
            length = min(length, self.layers[-1].length - self.layers[-1].handed.num_new)
        num_ahead = len(lengths) - lengths.count(length)
        if num_ahead or self.shared.is_broken:
            raise QuestError(
                f"The last forward filled {num_ahead} of this cache's {len(self.layers)} layers and did not end: it "
                "was interrupted, its model has fewer layers than the one before, or it is not loaded with "
                f'attn_implementation="quest". {self._put_back(length)}'
            )

    def _put_back(self, length):
        """Undo the forward under way, before which there were `length` tokens; say what has become of the cache."""
        are_back = [layer.put_back(length) for layer in self.layers]  # all of them, whatever the first says
        self.shared.undo_forward(all(are_back))
        if self.shared.is_broken:
            return "The cache cannot be used on: call cache.reset(), or make a new one."
        return (
            f"The cache has been put back to the {length} tokens before; repeat the call with the same model, or use a "
            "new cache."
        )

    def _add_layer(self, layer_idx, num_new):
        if layer_idx > len(self.layers):
            name = type(self).__name__
            raise QuestError(
                f"Layer {len(self.layers)} of this model caches no keys and values: a hybrid of attention with linear "
                f"attention or convolutions, which {name} does not serve. Use the model without {name}."
            )
        if self.layers and self.layers[0].length != num_new and generate.called_by_module():
            num_layers = len(self.layers)
            self._put_back(self.layers[0].length - num_new)
            after = "It cannot be used on" if self.shared.is_broken else "The content of this one is unchanged"
            raise ValueError(
                f"The cache holds tokens of {num_layers} layers and this model has more: it is another model's cache, "
                f"or its first forward was interrupted. Use a new one, or call cache.reset(). {after}."
            )
        self.layers.append(Layer(self.shared, layer_idx))

    def _may_be_step(self, num_new):
        """Whether a graph may hold a forward of so many new tokens."""
        return num_new == 1 or (generate.prepares_drafts() and not any(layer.is_sliding for layer in self.layers))

    def _prepare_step(self, num_new=1):
        """Do outside of the graph, before a step that may be a captured one, what a graph cannot do."""
        num_tokens, rows = self.get_seq_length() + num_new, self.shared.rows
        check_room(self.layers[0], num_new)
        if num_tokens > rows.room or cannot_be_written(self.layers[0].keys):
            for layer in self.layers:
                layer.storage.make_room(num_tokens)
            addresses = [layer.storage.find_addresses() for layer in self.layers]
            rows.set_addresses(addresses, min(layer.storage.room for layer in self.layers))
        rows.set_length(num_tokens)
        end = end_of_text(self.shared.max_positions, self.max_cache_len)
        self.shared.step.prepare(num_new, num_tokens, self.method, end)

    def _settle(self):
        """Count the tokens of the captured step that has run since it was prepared."""
        step = self.shared.step
        if step.state == TAKEN:
            step.is_over()
            self.shared.masks.begin()
            for layer in self.layers:
                layer.took_step(step.num_new)

    def _end_step(self):
        """Settle the step that was prepared, or forget what an interrupted graph has put of its drafts in a pool."""
        self._settle()
        step = self.shared.step
        if step.state == PREPARED and step.num_new > 1:
            step.is_over()
            for layer in self.layers:
                layer.storage.set_length(layer.length)

    @property
    def masks(self):
        return self.shared.masks

    @property
    def left_padding(self):
        """Slots at the start of each row that hold no token: a tuple of B ints, empty before the first prompt."""
        return self.shared.rows.left_padding

    def set_left_padding(self, left_padding):
        """Take over how many slots at the start of each row hold no token, for the tokens that are stored."""
        for layer in self.layers:  # a batch of another size is refused when its keys arrive
            is_new = left_padding != layer.left_padding and len(left_padding) == len(layer.left_padding)
            if is_new and layer.length:
                layer.set_left_padding(left_padding)

    def take_config(self, config, max_positions):
        """Learn from a model's config what its layers reach, before the first of them is filled."""
        if self.config is config:
            return
        self.shared.limit(max_positions)
        if cross_layers := getattr(config, "cross_attention_layers", None):
            raise QuestError(
                f"The layers {cross_layers} of this model are cross-attention, whose keys are not of its text. "
                f"{type(self).__name__} does not serve it. Use the model without {type(self).__name__}."
            )
        if getattr(config, "recurrent_kv_cache_mode", None) == "last_loop":
            raise QuestError(
                "This model attends what its cache stores (recurrent_kv_cache_mode='last_loop') in place of what it is "
                f"handed. {type(self).__name__} does not serve it. Use the model without {type(self).__name__}."
            )
        check_layer_types(config, type(self).__name__)
        self.config = config
        reaches = reaches_of(config, max_positions)
        if not self.layers:
            self.shared.learn(reaches)
        for layer_idx, layer in enumerate(self.layers):
            if layer.is_sliding and layer_idx not in reaches:
                self._widen(layer_idx, layer)

    def _widen(self, layer_idx, layer):
        """Make a layer that reaches everything of one that came with a window, of another cache."""
        tokens = tokens_of_layer(layer_idx, layer)
        if tokens.keys.shape[2] < layer.length:
            raise QuestError(
                f"Layer {layer_idx} of this cache keeps the newest tokens only, and this model attends all of them "
                "there: it is another model's cache. Use a new QuestCache."
            )
        self.shared.widen(layer_idx)
        self.layers[layer_idx] = Layer(self.shared, layer_idx)
        self.layers[layer_idx].take(tokens)

    def _no_state(self, *args, **kwargs):
        raise QuestError(
            "This model keeps states beside keys and values (linear attention, convolutions or an indexer), which "
            f"{type(self).__name__} does not serve. Use the model without {type(self).__name__}."
        )

    has_previous_state = _no_state
    get_conv_state = update_conv_state = _no_state
    get_recurrent_state = update_recurrent_state = _no_state
    update_indexer = _no_state
