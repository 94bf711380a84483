"""CUDA graphs that other threads and other graphs leave alone."""

import contextlib
import threading

import torch

# Of all threads: PyTorch records one graph at a time, and some versions can replay none meanwhile.
one_at_a_time = threading.Lock()


@contextlib.contextmanager
def recorded_into(graph, stream):
    """Have `graph` record what this thread does on `stream`, of the current device, while other threads go on."""
    whole = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
    with one_at_a_time, own_workspaces(), spare_generator() as put_back, whole:
        put_back()
        yield


@contextlib.contextmanager
def own_workspaces():
    """Have cuBLAS take its workspace from the memory of the graph that is recorded meanwhile, and leave it to that.

    PyTorch keeps one for every stream. What it had of an earlier graph would be freed with that.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)  # as torch._inductor.cudagraph_trees does
    clear()
    try:
        yield
    finally:
        clear()


@contextlib.contextmanager
def spare_generator():
    """Begin a graph on a spare state of the GPU's random numbers; yield what puts back the usual one.

    Until a graph is recorded nothing else can draw from the state that it began with, in older versions of PyTorch: a
    thread that samples its next token would fail. The graph itself must draw nothing, which a decode step does not.
    """
    if not torch.cuda.is_initialized() or threading.active_count() == 1:
        yield lambda: None
        return
    device = torch.cuda.current_device()
    generator, spare = torch.cuda.default_generators[device], torch.Generator(device=f"cuda:{device}")
    spare.seed()  # for who draws before the usual one is back
    usual = generator.graphsafe_get_state()
    generator.graphsafe_set_state(spare)
    try:
        yield lambda: generator.graphsafe_set_state(usual)
    finally:
        generator.graphsafe_set_state(usual)
