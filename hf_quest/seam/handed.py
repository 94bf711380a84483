"""Handed: what a layer's `update` gave the model, on its way to the attention of the same forward."""

from dataclasses import dataclass

import torch


@dataclass
class Handed:
    """It is dead with the forward. The attention may be called with it several times, by layers that share keys."""

    num_new: int = 0  # tokens of the forward
    is_under_way: bool = False  # the attention has not been called with it
    is_plain: bool = True  # the forward's mask is causal with left padding at most
    new: tuple | None = None  # of a captured step: the key and value that its attention stores
    is_seen: bool = True  # a method that evicts has taken note of it
    positions: torch.Tensor | None = None  # [B, Hkv, n] of a layer that evicts: the slots of the keys handed over
