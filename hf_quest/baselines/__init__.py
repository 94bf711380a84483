"""The caches that Quest's paper compares with: each throws tokens away and attends to what it kept."""

from .h2o import H2OCache
from .streaming_llm import StreamingLLMCache
from .tova import TOVACache

__all__ = ["H2OCache", "StreamingLLMCache", "TOVACache"]
