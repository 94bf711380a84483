"""Quest sparse attention for Hugging Face Transformers: `attn_implementation="quest"` and `QuestCache`."""

from .attention import register
from .baselines import H2OCache, StreamingLLMCache, TOVACache
from .cache import CACHE_NAME, QuestCache
from .errors import QuestError
from .pages import PageReads
from .prefill import CritiPrefill, prefill_progress
from .recording import capture

__all__ = [
    "CACHE_NAME",
    "CritiPrefill",
    "H2OCache",
    "PageReads",
    "QuestCache",
    "QuestError",
    "StreamingLLMCache",
    "TOVACache",
    "capture",
    "prefill_progress",
]
__version__ = "0.1.0"

register()
