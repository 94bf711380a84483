"""What the layers of a cache store: `Pages` every token, `Offloaded` every token in host memory, `Ring` what a
window reaches, `Kept` what was not evicted, `Pruned` every token, of some keys fewer channels, `Weighted` tokens that
stand for others.
"""

from .base import Storage
from .kept import Kept
from .offloaded import Offloaded
from .pages import Pages
from .pruned import Pruned
from .ring import Ring
from .rows import Rows
from .weighted import Weighted

__all__ = ["Kept", "Offloaded", "Pages", "Pruned", "Ring", "Rows", "Storage", "Weighted"]
