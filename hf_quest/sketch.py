"""Sketches: a model, and what caches of it hold, on PyTorch's meta device, where tensors have shapes and no memory.

Nothing here knows how much a model or a cache takes. The model reads a prompt, and what it asks for is added up.
"""

import copy
import inspect
import math
import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)

from .errors import QuestError
from .methods.base import Attended
from .models import first_line, is_on_hub
from .reference import Logits
from .seam.cache import CACHE_NAME, MethodCache
from .seam.caches import QuestCache
from .seam.checks import check_arrival
from .seam.same_model import plain
from .seam.served import check_model
from .storage import Pages, Pruned

SKETCHED = "quest_sketched"  # an attention that asks for its output's memory and computes nothing
EXPERTS = torch.ops.aten._grouped_mm.default  # [T, D] by [experts, D, E]: [T, E]
LOCAL, ROOM, TOKENS, POOL = "local layers", "room to grow", "keys and values", "pool"
KINDS = {"keys": TOKENS, "values": TOKENS, "bounds": "bounds", "scales": "bounds"}


class Sketch:
    """A model on the meta device, and what caches of it hold there."""

    def __init__(self, model, dtype=None):
        config = model.config if isinstance(model, PreTrainedModel) else config_of(model)
        self.name = getattr(config, "name_or_path", "") or config.model_type
        self.config = copy.deepcopy(config).get_text_config(decoder=True)
        check_model(self.config)
        self.max_positions = getattr(self.config, "max_position_embeddings", None) or math.inf
        self.dtype = dtype_named(dtype or getattr(model, "dtype", None) or self.config.dtype or torch.float32)
        self.model = sketched(self.name, config, self.dtype)
        is_loaded = isinstance(model, PreTrainedModel)
        self.weights = size_of(model if is_loaded else self.model)
        self.is_quantised = not is_loaded and getattr(config, "quantization_config", None) is not None
        with Asked([]):
            one = self.read(self.empty(QuestCache()), 1, 1)
        self.new = [(layer.keys[:, :, :0], layer.values[:, :, :0]) for layer in one.layers]  # [1, Hkv, 0, D]

    def ask(self, like, num_tokens, batch_size, chunk_size, last):
        """(bytes held, by what they are for; the same in the host's memory; bytes at most beside them on the device,
        while the prompt is read).

        Args:
            like: an empty cache of the settings.
            chunk_size: tokens that are read at a time, the last time `last`.
        """
        cache = self.empty(like)
        asked = Asked([*self.model.parameters(), *self.model.buffers()])
        cache.shared.rows.expect(num_tokens)  # as it does of a prompt that `generate` reads in chunks
        with asked, torch.no_grad():
            self.fill(cache, num_tokens - last, batch_size, chunk_size)
            asked.begin()
            self.read(cache, last, batch_size)
        held, on_host = held_by(cache)
        grows = last < num_tokens and cache.max_cache_len is None  # a layer at a time, beside what it was
        largest = max(sum(tensor.nbytes for _, tensor in on_device(layer.storage)) for layer in cache.layers)
        prompt = (
            asked.most
            - sum(held.values())
            - sum(on_host.values())
            + largest * grows
            + at_hand(cache, last < num_tokens)
        )
        return held, on_host, prompt

    def empty(self, like):
        """An empty cache of the settings of another one."""
        if like.get_seq_length():
            raise ValueError("plan_memory takes an empty cache, for its settings. Give a new one.")
        options = {"dense_layers": like.dense_layers, "max_cache_len": like.max_cache_len, "prefill": like.prefill}
        options |= {"offloading": like.shared.offloading, "pool": like.shared.pool}
        cache = SketchedCache._with_method(like.method, **options)
        cache.take_config(self.config, self.max_positions)
        return cache

    @torch.no_grad()
    def read(self, cache, num_tokens, batch_size):
        """Have the model read new tokens into a cache, which is returned."""
        options = {CACHE_NAME: cache, "use_cache": True}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            options["logits_to_keep"] = 1  # as `generate` does
        try:
            self.model(input_ids=torch.zeros(batch_size, num_tokens, dtype=torch.long, device="meta"), **options)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            if isinstance(error, QuestError):
                raise
            raise QuestError(
                f"{self.name} cannot be planned: its forward does not run without memory ({first_line(error)}). Load "
                "it, and look at what PyTorch says of the device's memory."
            ) from error
        return cache

    def fill(self, cache, num_tokens, batch_size, chunk_size):
        """Store so many tokens, as chunks of a prompt bring them. Those that fit into what is there need none."""
        while (length := cache.num_stored) < num_tokens:
            end = -(-(cache.num_slots + 1) // chunk_size) * chunk_size
            for layer_idx, new in enumerate(self.new_tokens(batch_size, min(end, num_tokens) - length)):
                cache.update(*new, layer_idx)

    def new_tokens(self, batch_size, num_tokens):
        """Keys and values of every layer."""
        for pair in self.new:
            yield [like.new_empty(batch_size, like.shape[1], num_tokens, like.shape[3]) for like in pair]

    def ask_stock(self, num_tokens, batch_size):
        """Bytes of Transformers' own cache after so many tokens, by what they are for."""
        cache, found = DynamicCache(config=self.config), Counter()
        for count in (num_tokens - 1, 1):  # by the second forward windows have let go of the prompt
            for layer_idx, new in enumerate(self.new_tokens(batch_size, count)):
                cache.update(*new, layer_idx)
        for layer in cache.layers[: len(self.new)]:
            found[LOCAL if layer.is_sliding else TOKENS] += size_of_tensors([layer.keys, layer.values])
        return dict(found)


class SketchedCache(MethodCache):
    """A cache on the meta device: it stores what is new as ever, and no attention is asked for."""

    @property
    def num_stored(self):
        return self.layers[0].length if self.layers else 0

    @property
    def num_slots(self):
        """Tokens for which the layers that keep all of them have room; without such layers, any number."""
        slots = [layer.capacity for layer in self.layers if isinstance(layer.storage, Pages)]
        return min(slots, default=math.inf if self.layers else 0)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx >= len(self.layers):
            self._add_layer(layer_idx, key_states.shape[2])
        layer = self.layers[layer_idx]
        check_arrival(layer, key_states, value_states)
        if not layer.length:
            layer.storage.begin_rows((0,) * key_states.shape[0])
        reached = layer.storage.append(key_states, value_states)
        if isinstance(layer.storage, Pruned):
            self.method.attended(layer.storage, Attended(key_states, None, None, Logits(1.0)))
        if layer.evicts and layer.capacity > self.budget:
            self.keep(layer)
        return reached

    def keep(self, layer):
        """Let go of as much as the method would, whatever it is."""
        if isinstance(layer.storage, Pruned):
            self.method.keep(layer.storage)
        else:
            layer.storage.keep(torch.empty(*layer.keys.shape[:2], self.budget, dtype=torch.int64, device="meta"))

    def get_mask_sizes(self, query_length, layer_idx):
        return query_length, 0


class Asked(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, while they are there; not those of the tensors `known`."""

    def __init__(self, known):
        super().__init__()
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self.now = self.most = 0

    def begin(self):
        """Count the most from now on."""
        self.most = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is EXPERTS and args[0].is_meta:  # which PyTorch knows of in bfloat16 alone there
            result = args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        if storage not in self.seen:
            self.seen.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.is_gone, storage.nbytes())

    def is_gone(self, num_bytes):
        self.now -= num_bytes


def held_by(cache):
    """Bytes of what a cache holds, by what they are for: two dicts, of the device's memory and of the host's."""
    found = Counter(), Counter()
    for layer in cache.layers:
        filled = layer.storage.saved()[0]
        for name, tensor in layer.storage.tensors().items():
            place = found[is_on_host(layer.storage, name)]
            if layer.is_sliding:
                place[LOCAL] += tensor.nbytes
            else:
                place[KINDS.get(name, name)] += filled[name].nbytes
                place[ROOM] += tensor.nbytes - filled[name].nbytes
        found[False][POOL] += sum(tensor.nbytes for tensor in pooled(layer.storage))
    return [{kind: size for kind, size in place.items() if size} for place in found]


def is_on_host(storage, name):
    return storage.offloading and name in storage.names


def on_device(storage):
    own = [(name, tensor) for name, tensor in storage.tensors().items() if not is_on_host(storage, name)]
    return own + [(POOL, tensor) for tensor in pooled(storage)]


def pooled(storage):
    return () if storage.pool is None else storage.pool.tensors()


def at_hand(cache, is_in_parts):
    """Bytes of keys and values that a prompt's attention brings to the device: those of a layer, and those of the next
    meanwhile, if it is read in parts.
    """
    filled = [layer.storage.saved()[0] for layer in cache.layers if layer.storage.offloading]
    sizes = sorted(tensors["keys"].nbytes + tensors["values"].nbytes for tensors in filled)
    return sum(sizes[-1 - is_in_parts :])


def sketched_attention(module, query, key, value, attention_mask=None, **kwargs):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def no_mask(**kwargs):
    return None


AttentionInterface.register(SKETCHED, sketched_attention)
AttentionMaskInterface.register(SKETCHED, no_mask)


def sketched(name, config, dtype):
    """The model of a config, on the meta device."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=SKETCHED)
    except (KeyError, ValueError) as error:
        raise QuestError(f"{name} is no model that hf_quest can plan for: {first_line(error)}") from error
    model.config.pad_token_id = None  # or it would be looked for among ids that are not there
    return model.eval()


def config_of(model):
    if isinstance(model, PreTrainedConfig):
        return model
    try:
        return AutoConfig.from_pretrained(model, local_files_only=not is_on_hub(str(model)))
    except Exception as error:  # whatever Transformers and the hub raise
        raise ValueError(f"{model} cannot be planned: {first_line(error)}") from error


def size_of(model):
    return size_of_tensors([*model.parameters(), *model.buffers()])


def size_of_tensors(tensors):
    """Bytes of what tensors lie in, each counted once."""
    parts = [part for tensor in tensors for part in plain(tensor)]
    return sum({part.untyped_storage()._cdata: part.untyped_storage().nbytes() for part in parts}.values())


def dtype_named(dtype):
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is that of weights, such as bfloat16, not {dtype!r}.")
    return found
