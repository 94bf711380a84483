"""What the layers of a cache store: `Pages` every token, `Ring` what a window reaches, `Kept` what was not evicted."""

from .base import Storage
from .kept import Kept
from .pages import Pages
from .ring import Ring
from .rows import Rows

__all__ = ["Kept", "Pages", "Ring", "Rows", "Storage"]
