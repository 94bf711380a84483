"""Quest sparse attention for Hugging Face Transformers: `attn_implementation="quest"` and `QuestCache`."""

from .attention import register
from .cache import QuestCache, QuestError
from .recording import capture

__all__ = ["QuestCache", "QuestError", "capture"]
__version__ = "0.1.0"

register()
