"""The error of this package, and what it says once."""

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)


class QuestError(RuntimeError):
    """A model or a call that Quest cannot serve. The message says what, why, and what to do."""


def say_once(message):
    if not torch.compiler.is_compiling():
        logger.warning_once(message)
