"""The model that ships inside: 7.5 M parameters, trained by `demos/train_tiny.py` to find and to copy."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PATH = Path(__file__).parent


def load(**options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The tiny model and its tokenizer; `options` go to `AutoModelForCausalLM.from_pretrained`."""
    return AutoModelForCausalLM.from_pretrained(PATH, **options), AutoTokenizer.from_pretrained(PATH)
