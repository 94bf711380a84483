"""The decode step of `generate`, recorded as one CUDA graph: as it stands, which begins in a second, or compiled."""

import contextlib
import functools
import threading
import weakref
from collections import Counter

import torch
from transformers import PreTrainedModel

from ...errors import QuestError, say_once
from ..cache import CACHE_NAME, MethodCache
from ..generate import verifies_drafts
from ..step import PREPARED
from .fingerprint import fingerprint
from .graphs import one_at_a_time, recorded_into
from .rehearsal import Rehearsal
from .values import copied, kinds_of

# Of one cache: of its step, and of drafts of each number that comes again and again.
MOST_RECORDINGS = 16
DRAFTS_UNRECORDED = 2  # times that so many drafts are verified without a recording, which takes longer than a few


def capture(model: PreTrainedModel, compile: bool | dict[str, object] = False) -> PreTrainedModel:
    """Let `model.generate` record its decode step as a CUDA graph, and replay that for every token.

    Compiling takes up to a minute and fuses the small operations between the matrix products; recording takes a second
    and replays the model's own. With `compile` the fused ones are recorded, and a replay is spared what a compiled
    model does before each token, which is to check every parameter and take quantised ones apart. A recording serves
    one QuestCache in one thread and is made again for another; it stays right while the cache grows. A forward that
    cannot be recorded (a prompt, another cache, layers that the CUDA kernels do not serve or that attend a window, a
    model in which the host waits for the GPU or draws random numbers) runs as it would without, and says so once. A
    `compile_config` given to `generate` takes precedence. A recording ends with its cache, and a process group can be
    destroyed only after it.

    From Transformers 5.24 on drafts of assisted decoding are verified by recordings, too, whatever the
    `compile_config`: in each layer their tokens attend one after another. Not after left padding.

    Weights may change in place. Each `generate` begins with a look at what else of the model a recording depends on,
    and records anew if it has changed: where tensors lie (`model.to`, `load_adapter`), flags, numbers and names in
    modules (`set_adapter`, `train`), hooks, configurations. Two kinds of change it does not see, and `capture(model)`
    has to be called again after them: inside of objects that modules hold, and in code, such as a `forward` that is
    replaced in its class. No change may come between two tokens of one `generate`, by a logits processor say.

    Several threads may generate at once, each with a cache of its own. While one of them records, none may wait for the
    GPU as a whole (`torch.cuda.synchronize`).

    Args:
        model: a model on one GPU, loaded with `attn_implementation="quest"`. Mutated. Its copies are captured too, and
            record for themselves.
        compile: whether the step is compiled before it is recorded; or the `options` by which `torch.compile` does so.
            With `{"triton.enable_pdl": True}` fused kernels begin while the ones before them end, from sm_90 on.

    Returns:
        The model.

    Raises:
        TypeError: for what is no model of Transformers, since nothing would be recorded; for another `compile`.
        RuntimeError: for options that PyTorch does not have.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"capture takes a model of Transformers, since its `generate` uses what is recorded, and not a "
            f"{type(model).__name__}. If that holds one, capture the one inside: `get_base_model()` of peft's models."
        )
    if not isinstance(compile, (bool, dict)):
        raise TypeError(f"compile is True, False, or a dict of options of torch.compile, and not {compile!r}.")
    step = RecordedStep(model, compile)
    # What `generate` looks for before it compiles, with the configuration that it was compiled for.
    model._compiled_call = step
    model.__dict__.pop("_last_compile_config", None)
    vars(model)["get_compiled_call"] = step.get_compiled_call
    return model


class RecordedStep:
    """Calls the model, by a recording where there can be one.

    The model holds it, and not the other way round, so that a model is freed as soon as nobody refers to it.
    """

    records_drafts = True  # which `generate` asks before it has them verified as a step

    def __init__(self, model, compile):
        self.model = weakref.ref(model)
        self.compile = compile
        self.compiled = None if compile is False else torch.compile(call, options=None if compile is True else compile)
        self.recordings = {}  # of each thread, the last that was used at the end
        self.num_seen = Counter()  # kinds of inputs with drafts
        self.verdicts = {}  # whether a step can be recorded, of all kinds of inputs that were tried
        self.fingerprint = None  # of the model that these are of
        self.beginning = set()  # threads in which `generate` has begun since their last step

    def __getstate__(self):
        """For copies and pickles: another model has to record anew."""
        return {"model": self.model(), "compile": self.compile}

    def __setstate__(self, state):
        self.__init__(**state)

    @property
    def recording(self):
        """The last of this thread, or None."""
        return next(reversed(self.recordings.get(threading.get_ident(), ())), None)

    def get_compiled_call(self, compile_config):
        """The model's method, which every `generate` calls once."""
        self.beginning.add(threading.get_ident())
        if verifies_drafts():  # which are recorded only
            return self
        model = self.model()
        return type(model).get_compiled_call(model, compile_config)

    def __call__(self, **inputs):
        model, thread = self.model(), threading.get_ident()
        cache = inputs.pop(CACHE_NAME, None)
        if thread in self.beginning:
            self.beginning.discard(thread)
            self.forget_another(model)
        recording = None
        if can_be_recorded(cache, inputs):
            recording = self.recording_for(model, cache, inputs)
        elif not is_draft(cache):
            say_once("hf_quest.capture does not record a step that the CUDA kernels do not serve alone, on one GPU.")
        if recording is None:
            return model(**{CACHE_NAME: cache}, **inputs)
        return recording.replay(cache, inputs)

    def forget_another(self, model):
        """Drop what is recorded of a model that has changed since."""
        now = fingerprint(model)
        if now != self.fingerprint:
            self.recordings.clear()
            self.verdicts.clear()
            self.num_seen.clear()
            self.fingerprint = now

    def recording_for(self, model, cache, inputs):
        """A recording of this thread that does what the model would, made now where there is none; or None."""
        thread, kinds = threading.get_ident(), kinds_of(inputs)
        # The memory of others is free before the next one takes its own.
        mine = [recording for recording in self.recordings.pop(thread, ()) if recording.fits(cache)]
        found = next((recording for recording in mine if recording.kinds == kinds), None)
        others = [recording for recording in mine if recording is not found][1 - MOST_RECORDINGS :]
        if others:
            self.recordings[thread] = others
        if found is None:
            found = self.record(model, cache, inputs, kinds)
        if found is not None:
            self.recordings[thread] = [*others, found]
        return found

    def record(self, model, cache, inputs, kinds):
        """A recording, or None where that is not possible or too early."""
        if is_draft(cache):
            self.num_seen[kinds] += 1
            if self.num_seen[kinds] <= DRAFTS_UNRECORDED:
                return None
        if kinds not in self.verdicts:
            self.verdicts[kinds] = rehearse(model, cache, inputs)
        if not self.verdicts[kinds]:
            return None
        # Compiled drafts would take one graph for every number of them.
        is_compiled = self.compile is not False and not is_draft(cache)
        step = functools.partial(self.compiled, model) if is_compiled else model
        return Recording(step, cache, inputs, kinds, self.forgetter())

    def forgetter(self):
        """What drops the recording that serves a cache, by a weak reference to it whose object is gone.

        Not for its memory alone: NCCL waits with the end of a process group for every graph that communicates by it.
        """
        itself = weakref.ref(self)

        def forget(cache):
            step = itself()
            recordings = {} if step is None else step.recordings
            for thread, held in list(recordings.items()):
                if any(recording.cache is cache for recording in held):
                    recordings.pop(thread, None)

        return forget


def call(model, **inputs):
    return model(**inputs)


def can_be_recorded(cache, inputs):
    """Whether these are the inputs of a step that was prepared, and no layer does it otherwise than by the kernels."""
    if not isinstance(cache, MethodCache) or cache.shared.step.state != PREPARED or torch.is_grad_enabled():
        return False
    mask, others = inputs.get("attention_mask"), [inputs[name] for name in inputs if name != "attention_mask"]
    # One that is there hides tokens of this step, or is that of layers which attend a window.
    is_unmasked = all(each is None for each in mask.values()) if isinstance(mask, dict) else mask is None
    is_flat = all(value is None or isinstance(value, (bool, int, torch.Tensor)) for value in others)
    if not is_unmasked or not is_flat or inputs.get("return_dict") is False:
        return False
    devices = {value.device for value in others if torch.is_tensor(value)}
    devices |= {layer.keys.device for layer in cache.layers}
    return len(devices) == 1 and kernels_serve(cache)


def is_draft(cache):
    """Whether the step that was prepared is of drafts."""
    return isinstance(cache, MethodCache) and cache.shared.step.num_new > 1


def kernels_serve(cache):
    return all(layer.has_kernels for layer in cache.layers)


def rehearse(model, cache, inputs):
    """Whether a graph can hold the model's step. It is done once, and can be done again: the cache is as before."""
    rehearsal = Rehearsal(cache.layers[0].keys.device)
    with prepared(cache):
        try:
            with rehearsal:
                model(**{CACHE_NAME: cache}, **inputs)
        except QuestError as error:
            say_once(f"hf_quest.capture does not record the steps of this model: {error}")
            return False
    if rehearsal.misfits:
        say_once(
            "hf_quest.capture does not record the steps of this model, in which the host waits for the GPU or draws "
            f"random numbers: {', '.join(sorted(rehearsal.misfits))}."
        )
    return not rehearsal.misfits


@contextlib.contextmanager
def prepared(cache):
    """Have a step run as one in a graph, and leave it prepared: the next one stores the same token in the same slot."""
    cache.shared.step.record()
    try:
        yield
    finally:
        cache.shared.step.end_recording()
        for layer in cache.layers:
            layer.take_new()  # where the step did not come to its end


class Recording:
    """One decode step of a model in a CUDA graph: what it reads and what it returns.

    What it reads has to outlive it or be seen to change: the inputs and the cache's tensors are held, and the latter
    compared before every replay; storage is found by addresses on the device; of the model see `fingerprint`.
    """

    def __init__(self, step, cache, inputs, kinds, forget):
        self.cache = weakref.ref(cache, forget)
        with torch.inference_mode(False):  # or they could not be written outside of it
            self.inputs = {name: value.clone() if torch.is_tensor(value) else value for name, value in inputs.items()}
        self.kinds = kinds
        self.state, self.modes = state_of(cache), modes()
        with torch.cuda.device_of(cache.layers[0].keys):  # a stream and a graph are the current device's
            self.graph = torch.cuda.CUDAGraph()
            output = self.record(step, cache)
        self.output_class = type(output)
        self.output = {name: value for name, value in output.items() if name != CACHE_NAME}

    def record(self, step, cache):
        """The output of the step in the graph, on the current device."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream), prepared(cache):
            step(**{CACHE_NAME: cache}, **self.inputs)  # compiles and loads, at its first use
        current.wait_stream(stream)
        with recorded_into(self.graph, stream), prepared(cache):
            return step(**{CACHE_NAME: cache}, **self.inputs)

    def fits(self, cache):
        """Whether the graph does what the model would, with inputs of its kinds."""
        if self.cache() is not cache or self.modes != modes():
            return False
        return all(mine is given for mine, given in zip(self.state, state_of(cache), strict=True))

    def replay(self, cache, inputs):
        for name, mine in self.inputs.items():
            if torch.is_tensor(mine):
                mine.copy_(inputs[name])
        with one_at_a_time:
            self.graph.replay()
        cache.shared.step.was_replayed()
        return self.output_class(**{CACHE_NAME: cache}, **copied(self.output, {}))


def state_of(cache):
    """What a graph depends on as the object that it is: tensors that kernels read, and how pages are chosen."""
    on_device, step = cache.layers[0].storage.on_device, cache.shared.step
    return on_device.length, on_device.padding, on_device.addresses, step.reads_everything, cache.method


def modes():
    """Of PyTorch, which decide in what precision a step is done."""
    is_mixed, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    deterministic = torch.are_deterministic_algorithms_enabled()
    return is_mixed, dtype, deterministic, torch.get_float32_matmul_precision()
