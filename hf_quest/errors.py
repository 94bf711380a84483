"""The error of this package, and what it says once."""

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)


class QuestError(RuntimeError):
    """A model or a call that Quest cannot serve. The message says what, why, and what to do."""


def say_once(message):
    if not torch.compiler.is_dynamo_compiling():
        logger.warning_once(message)


def say_if_constant(tensor):
    """Say that `tensor` is taken for a constant, where gradients are asked for."""
    if tensor.requires_grad and torch.is_grad_enabled():
        say_once(
            "Decode steps and CritiPrefill give keys and values no gradients. For inference use torch.no_grad(); for "
            "training forwards of several tokens, without CritiPrefill."
        )
