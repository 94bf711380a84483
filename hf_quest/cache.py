"""QuestCache: a Transformers cache that keeps every token and lets a decode step read only the pages that it needs."""

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from . import generation, reference
from .errors import QuestError
from .layers import QuestLayer
from .local import LocalLayer, reaches_of
from .masks import MaskLength, Masks
from .prefill import CritiPrefill
from .settings import PREPARED, TAKEN, Settings, cannot_be_written
from .stock import tokens_of, tokens_of_layer

__all__ = ["CACHE_NAME", "PREPARED", "TAKEN", "QuestCache", "QuestError", "QuestLayer", "cannot_be_written"]

# What models and `generate` call their cache. From Transformers 5.24 on the former name is deprecated.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

outside_of_graphs = torch.compiler.disable(
    reason="a graph can hold one decode step of a QuestCache, after its get_mask_sizes(1, 0) as `generate` calls it"
)


class QuestCache(Cache):
    """A key/value cache for `model.generate(cache=QuestCache(budget=2048))` of a model that was loaded with
    `attn_implementation="quest"` (Quest, arXiv 2406.10774). Before Transformers 5.24 the argument is called
    `past_key_values`.

    Every token is kept. A forward with one new token per row attends, in each layer after the first `dense_layers` and
    for each KV head, the newest page, the first and those that may matter most to the query, `budget` tokens in all.
    Where no more than `budget` tokens are stored it is dense attention. Longer forwards (the prompt) follow `prefill`.
    While `generate` is in assisted decoding every drafted token selects for itself, as if fed alone.

    Layers with a window or chunks keep what their next token can reach and a little more. Any attention mask is obeyed;
    a layer whose mask of one new token hides more than left padding attends everything that it shows. Gradients flow in
    forwards of several tokens, to the keys and values of that forward.

    Args:
        budget: tokens that each KV head may attend in one decode step, rounded up to whole pages, at least two pages.
            May be changed at any time by assignment.
        page_size: tokens in a page, a power of two.
        dense_layers: how many of the first layers attend everything (Quest, section 3.4).
        max_cache_len: tokens per row to allocate at once. By default storage follows the prompt and grows.
        compile: whether `generate` may compile its decode step on a GPU, as it does for a StaticCache. Storage that
            grows costs one more recording of the CUDA graph, no compilation.
        prefill: a CritiPrefill, by which long prompts are read; by default they are dense.
        bounds_dtype: torch.int8, in which pages' minima and maxima are rounded outwards, so that scores stay upper
            bounds, and a step reads half as many bytes of them as in 16 bits; or None for the dtype of the keys, as in
            the paper.
        score: how pages are scored. "default": the middle of q·k within a page's bounds and half of its half width, the
            row's first page kept, which loses several times less on pretrained models than "published", the paper's
            upper bound. Or a `hf_quest.reference.Score`.

    Raises:
        ValueError: for arguments outside these ranges, and later for a batch, model, dtype or length that does not fit;
            the cache is then as it was before.
        QuestError: for a model that Quest cannot serve.
    """

    def __init__(
        self,
        budget=2048,
        *,
        page_size=16,
        dense_layers=2,
        max_cache_len=None,
        compile=True,
        prefill=None,
        bounds_dtype=torch.int8,
        score="default",
    ):
        if not _is_int(page_size) or page_size < 1 or page_size & (page_size - 1):
            raise ValueError(
                f"page_size is a number of tokens and a power of two (16 in the paper), not {page_size!r}."
            )
        if not _is_int(dense_layers) or dense_layers < 0:
            raise ValueError(f"dense_layers is a number of layers, 0 or more, not {dense_layers!r}.")
        if max_cache_len is not None and (not _is_int(max_cache_len) or max_cache_len < 1):
            raise ValueError(
                f"max_cache_len is a number of tokens, or None for a cache that grows, not {max_cache_len!r}."
            )
        if prefill is not None and not isinstance(prefill, CritiPrefill):
            raise ValueError(f"prefill is a CritiPrefill, or None for dense prompts, not {prefill!r}.")
        if prefill is not None and prefill.block_size % page_size:
            raise ValueError(
                f"CritiPrefill's blocks of {prefill.block_size} tokens are not made of whole pages of {page_size}. "
                "Make block_size a multiple of page_size."
            )
        if bounds_dtype not in (torch.int8, None):
            raise ValueError(f"bounds_dtype is torch.int8, or None for the dtype of the keys, not {bounds_dtype!r}.")
        budget = _checked_budget(budget, page_size)
        score = _checked_score(score)
        self.settings = Settings(budget, page_size, dense_layers, max_cache_len, bounds_dtype, prefill, score=score)
        self.config = None  # of the model, as its mask function knows it
        self.compile = compile
        super().__init__(layers=[])

    def __getstate__(self):
        return {**self.__dict__, "config": None}  # a copy is for whatever model has the same

    @classmethod
    def from_cache(cls, cache, budget=2048, **options):
        """A QuestCache with the tokens of another cache, which is left as it is.

        So a prompt may be read without Quest, come from a disk or from a compressor of keys and values. Left padding is
        told by the next forward's mask, as ever.

        Args:
            cache: a DynamicCache, StaticCache, QuantizedCache or QuestCache, filled.
            budget, options: as of QuestCache.

        Raises:
            TypeError: for what is no cache of Transformers.
            QuestError: for a cache that has dropped tokens, or whose layers do not hold keys and values of one text.
        """
        tokens = tokens_of(cache)
        quest_cache = cls(budget, **options)
        quest_cache.settings.reaches = {idx: each.reach for idx, each in enumerate(tokens) if each.reach is not None}
        for layer_idx, layer_tokens in enumerate(tokens):
            quest_cache._add_layer(layer_idx, layer_tokens.length)
            quest_cache.layers[layer_idx].take(layer_tokens)
        return quest_cache

    def __repr__(self):
        return (
            f"QuestCache(budget={self.budget}, page_size={self.page_size}, dense_layers={self.dense_layers}, "
            f"max_cache_len={self.max_cache_len}, layers={len(self.layers)}, tokens={self.get_seq_length()})"
        )

    @property
    def budget(self):
        """Tokens that each KV head may attend in one decode step."""
        return self.settings.budget

    @budget.setter
    def budget(self, budget):
        self.settings.budget = _checked_budget(budget, self.page_size)

    @property
    def recorder(self):
        """None, or what every layer that selects pages calls with (layer, query, page_ids, scaling, softcap, sinks).

        `page_ids` [B, Hkv, T, K] int64 are those of the layer's newest T tokens, whose queries [B, Hq, T, D] are
        `query`, as `reference.select` returns them; the others are those of `reference.attend`. A layer that reads
        everything does not call it. With a recorder `generate` does not compile its decode step.
        `hf_quest.pages.PageReads` is a recorder.
        """
        return self.settings.recorder

    @recorder.setter
    def recorder(self, recorder):
        self.settings.recorder = recorder

    @property
    def page_size(self):
        return self.settings.page_size

    @property
    def dense_layers(self):
        return self.settings.dense_layers

    @property
    def max_cache_len(self):
        return self.settings.max_cache_len

    @property
    def prefill(self):
        """The CritiPrefill by which prompts are read, or None."""
        return self.settings.prefill

    def watch_prefill(self, watch):
        """Have `watch(layer_idx, position, query, keys, block_ids)` called for every slab of segments, or None.

        The slab begins at `position` of its row; query [Hq, R · L, D] of its R segments, keys [Hkv, N, D] of the row,
        block_ids [Hkv, R, K] of the blocks that the segments attend.
        """
        self.settings.block_scores.watch = watch

    @property
    def tokens_attended(self):
        """Tokens that one decode step attends per KV head with what is stored now, for each layer."""
        self._settle()
        return [layer.num_attended for layer in self.layers]

    @property
    def read_share(self):
        """Bytes of keys, values and bounds that a decode step reads now, over the bytes that a dense one would."""
        self._settle()
        stored = sum(layer.num_stored for layer in self.layers)
        if stored == 0:
            return 1.0
        bounds = sum(layer.bounds_in_tokens for layer in self.layers if layer.selects_pages)
        return (sum(self.tokens_attended) + bounds) / stored

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if not self.settings.is_captured:
            return self._update(key_states, value_states, layer_idx)
        if self._takes_step(layer_idx, key_states.shape[2]):
            return self.layers[layer_idx].update_captured(key_states, value_states)
        return self._update_outside_of_graph(key_states, value_states, layer_idx)

    def _update(self, key_states, value_states, layer_idx):
        self._settle()
        self.settings.step = None
        if layer_idx == 0:
            self._check_last_forward_was_whole()
            self.masks.begin()
            if self.settings.draft_start is not None and not generation.is_assisted():
                self.settings.draft_start = None
        elif layer_idx <= len(self.layers) and self.layers[layer_idx - 1].pending:
            before = self.layers[layer_idx - 1]
            self._crop_to(before.length - before.num_new)
            raise QuestError(
                "The keys and values that the cache handed to the model never reached Quest's attention. Load the "
                'model with attn_implementation="quest". If you did, this model changes keys and values on the way, '
                "and Quest cannot serve it. The content of the cache is unchanged."
            )
        if layer_idx >= len(self.layers):
            self._add_layer(layer_idx, key_states.shape[2])
        return self.layers[layer_idx].update(key_states, value_states)

    _update_outside_of_graph = outside_of_graphs(_update)

    def _check_last_forward_was_whole(self):
        length = min((layer.length for layer in self.layers), default=0)
        if self.layers and self.layers[-1].pending:  # its attention never came
            length = min(length, self.layers[-1].length - self.layers[-1].num_new)
        num_ahead = sum(layer.length > length for layer in self.layers)
        if num_ahead:
            self._crop_to(length)
            raise QuestError(
                f"The last forward filled {num_ahead} of this cache's {len(self.layers)} layers and did not end: it "
                "was interrupted, its model has fewer layers than the one before, or it is not loaded with "
                f'attn_implementation="quest". The cache has been put back to the {length} tokens before; repeat the '
                "call with the same model, or use a new QuestCache."
            )

    def _add_layer(self, layer_idx, num_new):
        if layer_idx > len(self.layers):
            raise QuestError(
                f"Layer {len(self.layers)} of this model caches no keys and values: a hybrid of attention with linear "
                "attention or convolutions, which QuestCache does not serve. Use the model without QuestCache."
            )
        if self.layers and self.layers[0].length != num_new:
            num_layers = len(self.layers)
            self._crop_to(self.layers[0].length - num_new)
            raise ValueError(
                f"The cache holds tokens of {num_layers} layers and this model has more: it is another model's cache, "
                "or its first forward was interrupted. Use a new QuestCache. The content of this one is unchanged."
            )
        reach = self.settings.reaches.get(layer_idx)
        if reach is not None:
            self.layers.append(LocalLayer(self.settings, layer_idx, reach))
        else:
            self.layers.append(QuestLayer(self.settings, layer_idx, is_dense=layer_idx < self.dense_layers))

    def _crop_to(self, length):
        for layer in self.layers:
            layer.crop(length - layer.length)
            layer.pending = False

    def _prepare_step(self):
        """Do outside of the graph, before a decode step that may be a captured one, what a graph cannot do."""
        num_tokens = self.get_seq_length() + 1
        self.layers[0].check_room(1)
        if num_tokens > self.settings.room or cannot_be_written(self.layers[0].keys):
            for layer in self.layers:
                layer.make_room(num_tokens)
            self.settings.set_addresses([layer.find_addresses() for layer in self.layers])
            self.settings.room = min(layer.room for layer in self.layers)
        self.settings.set_length(num_tokens)
        self.settings.choose_kernel(num_tokens)
        self.settings.step = PREPARED

    def _takes_step(self, layer_idx, num_new):
        """In a graph: whether this is the decode step that was prepared."""
        if layer_idx == 0 and num_new == 1 and self.settings.step == PREPARED:
            self.settings.step = TAKEN  # a mark, since a count would be compiled as a constant
            return True
        return layer_idx > 0 and self.settings.step == TAKEN

    def _settle(self):
        """Count the token of the captured step that has run since it was prepared."""
        if self.settings.step == TAKEN:
            self.settings.step = None
            self.masks.begin()
            for layer in self.layers:
                layer.took_step()

    @property
    def is_compileable(self):
        # In a graph it is asked for whether a mask must hide unused slots, which the kernels never read.
        if not self.compile or self.recorder is not None or self.settings.is_captured:
            return False
        return generation.may_compile_for_caller()

    @property
    def masks(self):
        return self.settings.masks

    @property
    def left_padding(self):
        """Slots at the start of each row that hold no token: a tuple of B ints, empty before the first prompt."""
        return self.settings.left_padding

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
        self.settings.max_positions = max_positions
        if cross_layers := getattr(config, "cross_attention_layers", None):
            raise QuestError(
                f"The layers {cross_layers} of this model are cross-attention, whose keys are not of its text. "
                "QuestCache does not serve it. Use the model without QuestCache."
            )
        self.config = config
        reaches = reaches_of(config, max_positions)
        if not self.layers:
            self.settings.reaches = reaches
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
        self.layers[layer_idx] = QuestLayer(self.settings, layer_idx, is_dense=layer_idx < self.dense_layers)
        self.layers[layer_idx].take(tokens)

    def get_seq_length(self, layer_idx=0):
        if self.settings.is_captured and self.settings.step == PREPARED:
            return self.layers[layer_idx].on_device.length - 1
        self._settle()
        length = self.layers[layer_idx].length if layer_idx < len(self.layers) else 0
        return length if torch.compiler.is_compiling() else generation.length_or_read_again(self, length)

    def get_mask_sizes(self, query_length, layer_idx):
        if self.settings.is_captured and self.settings.step == PREPARED and query_length == 1:
            return 0, 0  # there is no key that a mask would have to hide
        return self._mask_sizes(query_length, layer_idx)

    @outside_of_graphs
    def _mask_sizes(self, query_length, layer_idx):
        if query_length == 0:
            raise ValueError(
                f"The cache already holds {self.get_seq_length()} tokens, the whole input, so there is no new token to "
                "continue from. Pass a longer input, cache.crop(-1), or cache.reset() for a new one."
            )
        self._settle()
        num_keys, offset = query_length, 0
        if layer_idx < len(self.layers):
            num_keys, offset = self.layers[layer_idx].get_mask_sizes(query_length)
        if query_length == 1 and self.layers:
            self._prepare_step()
        return MaskLength(num_keys, self), offset

    def get_max_length(self, layer_idx=None):
        return -1 if self.max_cache_len is None else self.max_cache_len

    def reset(self):
        """Forget every token; storage is kept for the next prompt, of whatever batch size."""
        self._settle()
        super().reset()
        self.settings.draft_start = None
        self.settings.masks = Masks()

    def crop(self, tokens_to_remove):
        """Drop the newest `-tokens_to_remove` tokens.

        Raises:
            ValueError: for more than are stored.
            QuestError: for more than layers with a window can take back. Either way the cache is as it was.
        """
        self._settle()
        tokens_to_remove = int(tokens_to_remove)  # a tensor from Transformers 5.17 in assisted decoding
        for layer in self.layers:
            layer.check_crop(-tokens_to_remove)
        super().crop(tokens_to_remove)
        self.masks.forget()

    def reorder_cache(self, beam_idx):
        """Rows take the tokens of the rows `beam_idx` [B], in place."""
        self._settle()
        sources = beam_idx.tolist()
        start = self.settings.take_sources(sources, self.get_seq_length())
        for layer in self.layers:
            layer.reorder(sources, start)

    def batch_repeat_interleave(self, repeats):
        self._settle()
        super().batch_repeat_interleave(repeats)
        self.masks.forget()

    def batch_select_indices(self, indices):
        self._settle()
        super().batch_select_indices(indices)
        self.masks.forget()

    def activate_past_recording(self):
        """`generate` enters assisted decoding: what follows the prompt is drafts, each of which selects for itself."""
        self.settings.draft_start = generation.prompt_length_of_caller() or self.get_seq_length() or None

    @property
    def _is_user_defined(self):
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, value):
        # Every call of `generate` sets this first, and may bring another mask than the last one.
        self.masks.forget()

    def _no_state(self, *args, **kwargs):
        raise QuestError(
            "This model keeps states beside keys and values (linear attention, convolutions or an indexer), which "
            "QuestCache does not serve. Use the model without QuestCache."
        )

    has_previous_state = _no_state
    get_conv_state = update_conv_state = _no_state
    get_recurrent_state = update_recurrent_state = _no_state
    update_indexer = _no_state


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_budget(budget, page_size):
    if not _is_int(budget) or budget < 2 * page_size:
        raise ValueError(
            f"budget is a number of tokens and at least two pages, {2 * page_size} tokens with page_size={page_size}: "
            f"the newest page and one more. It is {budget!r}."
        )
    return budget


def _checked_score(score):
    """The `reference.Score` that `score` names or is."""
    found = reference.SCORES.get(score) if isinstance(score, str) else score
    if not isinstance(found, reference.Score):
        names = ", ".join(map(repr, reference.SCORES))
        raise ValueError(f"score is one of {names} or a hf_quest.reference.Score, not {score!r}.")
    if not 0 <= found.width <= 1 or found.group not in reference.GROUPS:
        raise ValueError(f"A Score has a width from 0 to 1 and a group of {reference.GROUPS}, unlike {found!r}.")
    return found
