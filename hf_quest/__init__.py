"""Quest sparse attention for Hugging Face Transformers: `attn_implementation="quest"` and `QuestCache`."""

from .attention import register
from .cache import QuestCache
from .errors import QuestError
from .prefill import CritiPrefill, prefill_progress
from .recording import capture

__all__ = ["CritiPrefill", "QuestCache", "QuestError", "capture", "prefill_progress"]
__version__ = "0.1.0"

register()
