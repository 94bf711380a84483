"""MethodCache: a cache of Transformers whose layers choose by a method what they read or keep."""

from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from typing_extensions import Self

from .. import former
from ..errors import QuestError
from ..methods import Method
from ..prompts import CritiPrefill
from ..watch import Watcher
from . import generate
from .checks import check_crop, check_settings, refuse_crop
from .forwards import outside_of_graphs
from .layer import Layer
from .masks import MaskLength
from .saving import Saving
from .state import State
from .stock import tokens_of

# What models and `generate` call their cache. From Transformers 5.24 on the former name is deprecated.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class MethodCache(generate.Events, Saving, former.Cache):
    """A key/value cache for `model.generate(cache=MethodCache(method))` of a model that was loaded with
    `attn_implementation="quest"`. Before Transformers 5.24 the argument is called `past_key_values`.

    After the first `dense_layers`, layers attend or keep what the method chooses for each KV head, `budget` tokens.
    Where no more are stored it is dense attention. Longer forwards (the prompt) follow `prefill`. Row i of a batch that
    is padded on the left gives what it gives alone. While `generate` is in assisted decoding every drafted token
    chooses for itself, as if fed alone.

    Layers with a window or chunks keep what their next token can reach and a little more. Any attention mask is obeyed;
    a layer whose mask of one new token hides more than left padding attends everything that it shows. Gradients flow in
    forwards of several tokens, to the keys and values of that forward.

    With a method that evicts, memory falls to the budget at the end of every forward, a prompt's too, which itself
    attends everything. Tokens keep the positions at which they were seen, and those that the mask hides go first.

    Args:
        method: a `hf_quest.methods.Method`.
        dense_layers: how many of the first layers attend, and keep, everything.
        max_cache_len: tokens per row to allocate at once. By default storage follows the prompt and grows.
        compile: whether `generate` may compile its decode step on a GPU, as it does for a StaticCache, where the method
            can be part of a graph. Storage that grows costs one more recording of the CUDA graph, no compilation.
        prefill: a CritiPrefill, by which long prompts are read; by default they are dense.
        offloading: whether layers that choose keep keys and values in the host's memory, where the GPU's kernels read
            what is chosen in place. The tokens are the same.
        pool: with offloading, how many tokens that steps attended lately each KV head of these layers holds on the GPU
            as well, to read fewer of the host's; rounded up to a multiple of 256. By default four times what a step
            attends, where there are kernels for it: those of codes, from compute capability 9.0 on. 0 for none.

    Raises:
        ValueError: for arguments outside these ranges, and later for a batch, model, dtype or length that does not fit;
            the cache is then as it was before.
        QuestError: for a model that cannot be served, and after a forward that did not end.
    """

    def __init__(
        self,
        method: Method,
        *,
        dense_layers: int = 2,
        max_cache_len: int | None = None,
        compile: bool = True,
        prefill: CritiPrefill | None = None,
        offloading: bool = False,
        pool: int | None = None,
    ):
        check_settings(method, dense_layers, max_cache_len, prefill, offloading, pool)
        self.shared = State(method, dense_layers, max_cache_len, prefill, offloading, pool)
        self.config: Any = None  # of the model, as its mask function knows it
        self.compile = compile
        super().__init__(layers=[])

    def __getstate__(self):
        for layer in self.layers:
            layer.up_to_date()  # wherever the copy goes on
        return {**self.__dict__, "config": None, "reader": None}  # a copy is for whatever model has the same

    @classmethod
    def _with_method(cls, method, **options):
        cache = cls.__new__(cls)
        MethodCache.__init__(cache, method, **options)
        return cache

    @classmethod
    def from_cache(cls, cache: Cache, *args: Any, **options: Any) -> Self:
        """A cache of this class with the tokens of another cache, which is left as it is.

        So a prompt may be read without Quest, come from a disk or from a compressor of keys and values. Left padding is
        told by the next forward's mask, as ever.

        Args:
            cache: a DynamicCache, StaticCache, QuantizedCache or QuestCache, filled.
            args, options: those of the class, the budget first.

        Raises:
            TypeError: for what is no cache of Transformers.
            QuestError: for a cache that has dropped tokens, or whose layers do not hold keys and values of one text.
        """
        tokens = tokens_of(cache)
        taken = cls(*args, **options)
        if taken.method.evicts:
            raise QuestError(
                f"{cls.__name__} evicts by what it saw of a prompt. Let the model read the prompt with it."
            )
        taken._take(tokens)
        return taken

    def _take(self, tokens):
        self.shared.learn({idx: each.reach for idx, each in enumerate(tokens) if each.reach is not None})
        for layer_idx, layer_tokens in enumerate(tokens):
            self.layers.append(Layer(self.shared, layer_idx))
            self.layers[layer_idx].take(layer_tokens)

    def __repr__(self):
        name = type(self).__name__
        settings = f"budget={self.budget}, dense_layers={self.dense_layers}, max_cache_len={self.max_cache_len}"
        settings += ", offloading=True" if self.shared.offloading else ""
        return f"{name}({settings}, layers={len(self.layers)}, tokens={self.get_seq_length()})"

    @property
    def method(self) -> Method:
        """How its layers choose."""
        return self.shared.method

    @property
    def budget(self) -> int:
        """Tokens that each KV head may attend in one decode step, or keeps. May be changed at any time by assignment:
        what evicts does so at once, and pools of the default size get that of the new budget.
        """
        return self.method.budget

    @budget.setter
    def budget(self, budget: int):
        self.shared.choose_by(replace(self.method, budget=budget))
        for layer in self.layers:
            layer.evict()
            layer.storage.resize_pool(self.shared.num_pooled)

    @property
    def watcher(self) -> Watcher | None:
        """None, or what is called with a `watch.Read` for every decode step of a layer, and with a `watch.SegmentsRead`
        for every slab of a prompt's segments, as is a `watch.PageReads`. `generate` does not compile its step then.
        """
        return self.shared.watcher

    @watcher.setter
    def watcher(self, watcher: Watcher | None):
        self.shared.watch(watcher)

    @property
    def page_size(self) -> int:
        return self.method.page_size

    @property
    def dense_layers(self) -> int:
        return self.shared.dense_layers

    @property
    def max_cache_len(self) -> int | None:  # type: ignore[override]
        return self.shared.max_cache_len

    @property
    def prefill(self) -> CritiPrefill | None:
        """The CritiPrefill by which prompts are read, or None."""
        return self.shared.prefill

    @property
    def tokens_attended(self) -> list[int]:
        """Tokens that one decode step attends per KV head with what is stored now, for each layer."""
        self._settle()
        return [layer.num_attended for layer in self.layers]

    @property
    def read_share(self) -> float:
        """Bytes of keys, values and bounds that a decode step reads now, over the bytes that a dense one would."""
        self._settle()
        stored = sum(layer.num_dense for layer in self.layers)
        if stored == 0:
            return 1.0
        beside = sum(
            self.method.read_beside(layer.storage) / layer.storage.bytes_of_token
            for layer in self.layers
            if layer.selects
        )
        unread = sum(layer.storage.num_unread for layer in self.layers)
        return (sum(self.tokens_attended) + beside - unread) / stored

    def can_be_compiled(self) -> bool:
        # In a graph it is asked for whether a mask must hide unused slots, which the kernels never read.
        is_out = self.watcher is not None or self.method.fused is None or self.shared.step.is_captured
        return self.compile and not is_out

    def get_seq_length(self, layer_idx=0):
        if self.shared.step.is_prepared():
            return self.layers[layer_idx].storage.on_device.length - self.shared.step.num_new
        self._settle()
        length = self.layers[layer_idx].length if layer_idx < len(self.layers) else 0
        return length if torch.compiler.is_dynamo_compiling() else generate.length_or_read_again(self, length)

    def get_mask_sizes(self, query_length, layer_idx):
        if self.shared.step.is_captured and self.shared.step.is_prepared_for(query_length):
            return 0, 0  # there is no key that a mask would have to hide
        return self._mask_sizes(query_length, layer_idx)

    @outside_of_graphs
    def _mask_sizes(self, query_length, layer_idx):
        if query_length == 0:
            raise ValueError(
                f"The cache already holds {self.get_seq_length()} tokens, the whole input, so there is no new token to "
                "continue from. Pass a longer input, cache.crop(-1), or cache.reset() for a new one."
            )
        self._end_step()
        num_keys, offset = query_length, 0
        if layer_idx < len(self.layers):
            num_keys, offset = self.layers[layer_idx].get_mask_sizes(query_length)
        if self.layers and self.method.fused is not None and self._may_be_step(query_length):
            self._prepare_step(query_length)
        return MaskLength(num_keys, self), offset

    @property
    def can_go_on(self) -> bool:
        """Whether the last forward's mask was causal with left padding, so that the next one's is known."""
        return self.masks.num_known is not None

    def go_on(self) -> None:
        """Be ready for a decode step whose mask, which nobody makes, goes on as that of the last one."""
        num_keys, _ = self.get_mask_sizes(1, 0)
        self.masks.go_on(int(num_keys), self.left_padding)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def reset(self) -> None:
        """Forget every token; storage is kept for the next prompt, of whatever batch size."""
        self._settle()
        super().reset()
        self.shared.reset()
        self.was_read_by(None)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest `-tokens_to_remove` tokens.

        Raises:
            ValueError: for more than are stored.
            QuestError: for more than layers with a window can take back. Either way the cache is as it was.
        """
        self._settle()
        if self.method.evicts and tokens_to_remove != 0:
            refuse_crop()
        tokens_to_remove = int(tokens_to_remove)  # a tensor from Transformers 5.17 in assisted decoding
        for layer in self.layers:
            check_crop(layer, -tokens_to_remove)
        super().crop(tokens_to_remove)
        self.masks.forget()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows take the tokens of the rows `beam_idx` [B], in place."""
        self._settle()
        sources = beam_idx.tolist()
        start = self.shared.rows.take_sources(sources, self.get_seq_length())
        for layer in self.layers:
            layer.reorder(sources, start)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._settle()
        num_rows = len(self.left_padding)
        try:
            super().batch_repeat_interleave(repeats)
        except (RuntimeError, MemoryError):  # of memory, in one of the layers
            for layer in self.layers:
                if len(layer.left_padding) != num_rows:
                    layer.batch_select_indices(torch.arange(num_rows, device="cpu") * repeats)
            raise
        self.masks.forget()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._settle()
        super().batch_select_indices(indices)
        self.masks.forget()

    def generate_begins(self) -> None:
        self.masks.forget()
        num_rows, num_sequences = generate.rows_of_generate()
        if num_sequences > 1 and num_rows == len(self.left_padding):  # the ids are repeated, and what was read is not
            self.batch_repeat_interleave(num_sequences)

    def assisted_begins(self, num_prompt: int) -> None:
        """What follows the prompt is drafts, each of which selects for itself."""
        if self.method.evicts:
            refuse_crop()
        generate.empty_before_assisted(self)
        self.shared.expect_drafts(num_prompt or self.get_seq_length() or None)
