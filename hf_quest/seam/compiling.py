"""`compile_prompts(model)`: what surrounds the attention of a prompt, compiled once for all of its layers."""

import contextlib
import threading
import types
import weakref
from typing import Any

import torch
from torch import _dynamo, nn
from torch.fx.experimental import _config
from torch.nn.modules.module import _has_any_global_hook
from transformers import EncoderDecoderCache, PreTrainedModel

from ..errors import say_once
from .attention import quest_attention
from .cache import MethodCache
from .region import Region

symbols: Any = _config  # whose methods come when it is imported
# Graphs of one model: of each kind of layer, with a mask and without, of one row and of several.
MOST_GRAPHS = 64
one_at_a_time = threading.RLock()


def compile_prompts(model: PreTrainedModel, enabled: bool = True, backend: str = "inductor") -> PreTrainedModel:
    """Let prompts with a cache of this package run compiled, but for their attention.

    What surrounds the attention of a decoder layer becomes one graph, in which norms, rotary embeddings, activations
    and residuals are fused. It is compiled with the first prompt, which takes seconds, and serves all layers of a kind,
    and prompts, chunks and drafts of any length over any number of stored tokens. Decode steps, training, and forwards
    without such a cache or with a watcher run as before.

    The answers are those of the model as it stands but for rounding: in 16 bits a fused operation rounds once, where
    each of the model's own rounds its result.

    A layer stays as it is, which is said once, if it is not one graph around one attention (layers that share keys and
    values, or look at those that are stored), under autocast, or where PyTorch cannot compile it.

    Args:
        model: loaded with `attn_implementation="quest"`. Mutated. Its copies are not compiled.
        enabled: whether prompts are compiled from now on, or, with False, no longer.
        backend: of `torch.compile`.

    Returns:
        The model.

    Raises:
        TypeError: for what is no model of Transformers.
        ValueError: for a model without a decoder layer that holds one attention, as are those with cross-attention, and
            for an unknown backend or "cudagraphs".
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"compile_prompts takes a model of Transformers, and not a {type(model).__name__}. If that holds one, pass "
            "the one inside: `get_base_model()` of peft's models."
        )
    layers = {layer: attention for layer in decoder_layers(model) if (attention := attention_of(layer)) is not None}
    if not layers:
        raise ValueError(f"compile_prompts found no decoder layer with one attention in a {type(model).__name__}.")
    if backend == "cudagraphs":
        raise ValueError("The backend 'cudagraphs' would record a prompt's attention once, and store nothing later.")
    try:
        _dynamo.lookup_backend(backend)
    except _dynamo.exc.InvalidBackend as error:
        raise ValueError(f"There is no backend {backend!r} for compile_prompts: {error}") from None
    compiled = compiled_call(backend)
    for layer, attention in layers.items():
        layer._compiled_call_impl = PromptLayer(layer, attention, compiled) if enabled else None
    return model


def decoder_layers(model):
    """The modules that Transformers never splits over devices, which are its layers, in every model; no encoder's."""
    names = model._no_split_modules or ()
    decoder = model.get_decoder() if model.config.is_encoder_decoder else model
    return [module for module in decoder.modules() if type(module).__name__ in names]


def attention_of(layer):
    """The one module inside a decoder layer that has an index in the cache, or None."""
    modules = [module for module in layer.modules() if module is not layer]
    found = [module for module in modules if isinstance(getattr(module, "layer_idx", None), int)]
    return found[0] if len(found) == 1 else None


def compiled_call(backend):
    """`call` compiled: one graph for each kind of layer and of inputs."""
    # Code of its own, by which PyTorch counts graphs.
    own = types.FunctionType(call.__code__.replace(), call.__globals__)

    def compile_region(graph, inputs):
        check_is_region(graph)
        return _dynamo.lookup_backend(backend)(graph, inputs)

    return torch.compile(own, fullgraph=True, dynamic=True, backend=compile_region)


def call(layer, args, kwargs):
    return layer._call_impl(*args, **kwargs)


def check_is_region(graph):
    """Raise unless a graph attends once, and nothing but its attention is given the new keys and values."""
    attentions = [node for node in graph.graph.nodes if node.target == torch.ops.hf_quest.attend_in_region.default]
    if len(attentions) != 1:
        raise ValueError(f"it attends {len(attentions)} times with what the cache handed over")
    if any(len(node.users) != 1 for node in attentions[0].args[1:3]):
        raise ValueError("keys or values that the cache handed over are not for its attention only")


class PromptLayer:
    """Calls a decoder layer, in a region where it reads a prompt.

    The layer holds it, and not the other way round, so that a model is freed as soon as nobody refers to it.
    """

    def __init__(self, layer: nn.Module, attention: nn.Module, compiled: Any) -> None:
        self.layer, self.attention = weakref.ref(layer), weakref.ref(attention)
        self.compiled = compiled
        self.is_fit = True  # to be a region, as far as is known

    def __call__(self, *args, **kwargs):
        layer = self.layer()
        cache = None if torch.compiler.is_dynamo_compiling() or not self.is_fit else cache_of_prompt(args, kwargs)
        if cache is None or _has_any_global_hook():  # which no guard of the compiler looks at
            return layer._call_impl(*args, **kwargs)
        args, kwargs = tuple(map(as_made, args)), {name: as_made(value) for name, value in kwargs.items()}
        with Region(cache, self.attention(), quest_attention) as region:
            try:
                with settings():
                    return self.compiled(layer, args, kwargs)
            except (_dynamo.exc.TorchDynamoException, _dynamo.exc.FailOnRecompileLimitHit) as error:
                if region.num_calls:
                    raise
                reason = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0].rstrip(".")
        self.is_fit = False
        say_once(f"compile_prompts leaves a {type(layer).__name__} as it is: {reason}.")
        return layer._call_impl(*args, **kwargs)


def cache_of_prompt(args, kwargs):
    """The cache of this package that a decoder layer with these arguments reads several new tokens into, or None."""
    if torch.is_grad_enabled():
        return None
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, (MethodCache, EncoderDecoderCache))]
    hidden_states = args[0] if args else kwargs.get("hidden_states")
    if len(caches) != 1 or not isinstance(hidden_states, torch.Tensor) or hidden_states.shape[-2] == 1:
        return None
    if not isinstance(caches[0], MethodCache):
        if isinstance(caches[0].self_attention_cache, MethodCache):
            say_once("compile_prompts leaves a layer as it is that is given an EncoderDecoderCache.")
        return None
    if caches[0].shared.step.is_captured:  # drafts, whose graph holds their attention
        return None
    if caches[0].shared.watcher is not None:  # which may keep what it is told of, where a graph writes again
        return None
    if any(type(value) is int for value in (*args, *kwargs.values())):  # by which it finds its keys, for example
        say_once("compile_prompts leaves a layer as it is that is told a number, as those are that run more than once.")
        return None
    if torch.is_autocast_enabled(hidden_states.device.type):
        say_once("compile_prompts leaves prompts under autocast as they are.")
        return None
    return caches[0]


def as_made(value):
    """An argument of a layer; a contiguous copy of positions: a chunk's are a view, whose strides would be compiled."""
    is_positions = isinstance(value, torch.Tensor) and value.dim() <= 3 and value.dtype == torch.int64
    return value.clone(memory_format=torch.contiguous_format) if is_positions else value


@contextlib.contextmanager
def settings():
    """Settings of PyTorch's compiler for a region: in some versions they are those of all threads."""
    # Or lengths that are equal in the first prompt would be taken for one, and hooks that come later not be seen.
    of_graphs = {"recompile_limit": MOST_GRAPHS, "skip_nnmodule_hook_guards": False}
    with one_at_a_time, symbols.patch(use_duck_shape=False), _dynamo.config.patch(of_graphs):
        yield
