"""Recordings of `hf_quest.capture` where there is no GPU: a replay runs the step again, from the recorded inputs into
the recorded output. What a CUDA graph knows of addresses, streams and devices is for the tests on GPUs."""

import contextlib
import weakref
from types import SimpleNamespace

import torch
from small_llama import on_any_device

from hf_quest import CACHE_NAME, capture
from hf_quest.seam.capture import recording


def emulate(monkeypatch):
    """Have the steps of `captured` models be recorded; return a list that every recording is appended to."""
    recordings = []

    def record(self, step, cache):
        cache = weakref.ref(cache)  # as a graph, which knows of storage alone

        def run():
            with recording.prepared(cache()):
                return step(**{CACHE_NAME: cache()}, **self.inputs)

        recordings.append(self)
        self.graph.replay = lambda: write_into(self.output, run())
        return run()

    monkeypatch.setattr(recording, "kernels_serve", lambda cache: True)
    monkeypatch.setattr(recording.Recording, "record", record)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    return recordings


def write_into(output, new):
    if torch.is_tensor(output):
        with torch.inference_mode() if output.is_inference() else contextlib.nullcontext():
            output.copy_(new)
    elif isinstance(output, dict):
        for name, old in output.items():
            write_into(old, new[name])
    elif isinstance(output, (tuple, list)):
        for old, item in zip(output, new, strict=True):
            write_into(old, item)


def captured(model, **options):
    """`capture(model)`, whose `generate` asks for the captured step on a CPU too."""
    config = model.generation_config.compile_config = on_any_device()
    capture(model, **options)
    model._last_compile_config = config
    return model
