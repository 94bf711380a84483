"""Quest sparse attention for Hugging Face Transformers: `attn_implementation="quest"` and `QuestCache`."""

from . import former
from .auditing import Audit, audit
from .errors import QuestError
from .methods import Method
from .planning import MemoryPlan, plan_memory
from .prompts import CritiPrefill
from .seam.ahead import decode_ahead
from .seam.attention import register
from .seam.cache import CACHE_NAME, MethodCache
from .seam.caches import (
    CascadingCache,
    H2OCache,
    QuestCache,
    RecycledAttentionCache,
    SqueezedAttentionCache,
    StreamingLLMCache,
    SubGenCache,
    ThinKCache,
    TokenSelectCache,
    TOVACache,
)
from .seam.capture import capture
from .seam.compiling import compile_prompts
from .seam.progress import prefill_progress
from .seam.saving import saved_inputs
from .watch import PageReads

__all__ = [
    "CACHE_NAME",
    "Audit",
    "CascadingCache",
    "CritiPrefill",
    "H2OCache",
    "MemoryPlan",
    "Method",
    "MethodCache",
    "PageReads",
    "QuestCache",
    "QuestError",
    "RecycledAttentionCache",
    "SqueezedAttentionCache",
    "StreamingLLMCache",
    "SubGenCache",
    "TOVACache",
    "ThinKCache",
    "TokenSelectCache",
    "audit",
    "capture",
    "compile_prompts",
    "decode_ahead",
    "plan_memory",
    "prefill_progress",
    "saved_inputs",
]
__version__ = "0.2.0"

register()
former.keep_names()
