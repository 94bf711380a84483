"""How a prompt is read: dense, or by CritiPrefill's segments."""

from .critiprefill import BlockScores, CritiPrefill
from .dense import is_faster
from .segments import attend

__all__ = ["BlockScores", "CritiPrefill", "attend", "is_faster"]
