"""The decode step of `generate`, recorded as one CUDA graph: as it stands, which begins in a second, or compiled."""

import weakref

import torch

from .cache import CACHE_NAME, QuestCache
from .errors import say_once
from .settings import PREPARED, TAKEN


def capture(model, compile=False):
    """Let `model.generate` record its decode step as a CUDA graph, and replay that for every token.

    Compiling takes up to a minute and fuses the small operations between the matrix products; recording takes a second
    and replays the model's own. With `compile` the fused ones are recorded, and a replay is spared what a compiled
    model does before each token, which is to check every parameter and take quantised ones apart. A recording serves
    one QuestCache and is made again for another; it stays right while the cache grows. A forward that cannot be
    recorded (a prompt, another cache, layers that the CUDA kernels do not serve or that attend a window) runs as it
    would without, and says so once. A `compile_config` given to `generate` takes precedence. A recording ends with its
    cache, and a process group can be destroyed only after it.

    Args:
        model: a model on one GPU, loaded with `attn_implementation="quest"`. Mutated.
        compile: whether the step is compiled before it is recorded.

    Returns:
        The model.
    """
    # What `generate` looks for before it compiles, with the configuration that it was compiled for.
    model._compiled_call = RecordedStep(model, compile)
    model.__dict__.pop("_last_compile_config", None)
    return model


class RecordedStep:
    """Calls the model, by a recording where there can be one."""

    def __init__(self, model, compile):
        self.model = model
        self.step = torch.compile(model.__call__) if compile else model
        self.recording = None

    def __call__(self, **inputs):
        cache = inputs.pop(CACHE_NAME, None)
        if not can_be_recorded(cache, inputs):
            say_once("hf_quest.capture does not record a step that the CUDA kernels do not serve alone, on one GPU.")
            return self.model(**{CACHE_NAME: cache}, **inputs)
        if self.recording is None or not self.recording.serves(cache, inputs):
            self.recording = None  # frees its memory before the next one takes its own
            self.recording = Recording(self.step, cache, inputs, self.forget)
        return self.recording.replay(cache, inputs)

    def forget(self, cache):
        """Drop the recording that serves `cache`, a weak reference whose object is gone.

        Not for its memory alone: NCCL waits with the end of a process group for every graph that communicates by it.
        """
        if self.recording is not None and self.recording.cache is cache:
            self.recording = None


def can_be_recorded(cache, inputs):
    """Whether these are the inputs of a decode step that no layer does otherwise than by the kernels."""
    if not isinstance(cache, QuestCache) or cache.settings.step != PREPARED:
        return False
    devices = {layer.keys.device for layer in cache.layers}
    is_flat = all(
        torch.is_tensor(value) or value is None or isinstance(value, (bool, int)) for value in inputs.values()
    )
    return len(devices) == 1 and all(layer.has_kernels for layer in cache.layers) and is_flat


class Recording:
    """One decode step of a model in a CUDA graph: what it reads and what it returns."""

    def __init__(self, step, cache, inputs, forget):
        self.cache = weakref.ref(cache, forget)
        self.inputs = {name: value.clone() if torch.is_tensor(value) else value for name, value in inputs.items()}
        self.budget, self.state = cache.budget, read_by_kernels(cache)
        self.graph = torch.cuda.CUDAGraph()
        cache.settings.is_recording = True
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # Compiles and loads, at its first use. The graph stores the same token in the same slot again.
                step(**{CACHE_NAME: cache}, **self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            cache.settings.step = PREPARED
            with torch.cuda.graph(self.graph):
                output = step(**{CACHE_NAME: cache}, **self.inputs)
        finally:
            cache.settings.is_recording = False
            cache.settings.step = PREPARED
        self.output_class = type(output)
        self.output = {name: value for name, value in output.items() if name != CACHE_NAME}

    def serves(self, cache, inputs):
        """Whether the graph does what the model would."""
        if self.cache() is not cache or self.budget != cache.budget or self.inputs.keys() != inputs.keys():
            return False
        if any(mine is not given for mine, given in zip(self.state, read_by_kernels(cache), strict=True)):
            return False
        return all(is_alike(mine, inputs[name]) for name, mine in self.inputs.items())

    def replay(self, cache, inputs):
        for name, mine in self.inputs.items():
            if torch.is_tensor(mine):
                mine.copy_(inputs[name])
        self.graph.replay()
        cache.settings.step = TAKEN
        return self.output_class(**{CACHE_NAME: cache}, **self.output)


def read_by_kernels(cache):
    on_device = cache.layers[0].on_device
    return on_device.length, on_device.padding, on_device.addresses, cache.settings.reads_everything


def is_alike(mine, given):
    """Whether one value can stand for the other, a tensor for others of its kind."""
    if torch.is_tensor(mine) and torch.is_tensor(given):
        return (mine.shape, mine.dtype, mine.device) == (given.shape, given.dtype, given.device)
    return not torch.is_tensor(mine) and not torch.is_tensor(given) and mine == given
