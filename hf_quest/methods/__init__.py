"""The ways to choose what a decode step reads or what is kept, each a file."""

from .base import Attended, Method
from .cascading import Cascading
from .h2o import H2O
from .quest import Quest
from .recycled_attention import RecycledAttention
from .squeezed_attention import SqueezedAttention
from .streaming_llm import StreamingLLM
from .subgen import SubGen
from .think import ThinK
from .token_select import TokenSelect
from .tova import TOVA

__all__ = [
    "H2O",
    "TOVA",
    "Attended",
    "Cascading",
    "Method",
    "Quest",
    "RecycledAttention",
    "SqueezedAttention",
    "StreamingLLM",
    "SubGen",
    "ThinK",
    "TokenSelect",
]
