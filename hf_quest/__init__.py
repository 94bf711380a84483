"""Quest sparse attention for Hugging Face Transformers: `attn_implementation="quest"` and `QuestCache`."""

from .attention import register
from .cache import QuestCache, QuestError

__all__ = ["QuestCache", "QuestError"]
__version__ = "0.1.0"

register()
