"""`capture(model)`: the decode step of `generate` as one CUDA graph."""

from .recording import capture

__all__ = ["capture"]
