"""What Quest is measured by: the paper's evaluations beside its baselines, and a calibration on one's own text."""

from .calibration import calibrate
from .compare import evaluate_compare
from .hits import evaluate_hits
from .longbench import evaluate_longbench
from .passkey import evaluate_passkey
from .perplexity import evaluate_perplexity
from .recall import evaluate_recall
from .ruler import evaluate_ruler
from .selection import evaluate_selection
from .top10 import evaluate_top10

__all__ = [
    "calibrate",
    "evaluate_compare",
    "evaluate_hits",
    "evaluate_longbench",
    "evaluate_passkey",
    "evaluate_perplexity",
    "evaluate_recall",
    "evaluate_ruler",
    "evaluate_selection",
    "evaluate_top10",
]
