"""Bounds of pages in 8 bits, rounded outwards."""

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE_BLOCK = 32  # neighbouring channels that share a scale


def to_8_bits(bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds in 8 bits, the minimum rounded down and the maximum up, so that they stay bounds.

    A power of two is the scale of 32 neighbouring channels, of minimum and maximum alike: the smallest with which none
    exceeds 127 (OCP Microscaling formats, MXINT8). So dividing by it is exact, and widening what is rounded already
    gives what rounding the widened bounds would. What is infinite or not a number is unbounded; what float32 loses
    beside the scale, not even 2^-149 of it, is zero.

    Args:
        bounds: [..., 2, D], in any floating-point dtype.

    Returns:
        int8 [..., 2, D], and uint8 [..., D / 32], rounded up, e for a scale of 2^(e - 127).
    """
    blocks = F.pad(bounds.float(), (0, -bounds.shape[-1] % SCALE_BLOCK)).unflatten(-1, (-1, SCALE_BLOCK))
    largest = blocks.abs().amax(dim=(-3, -1)).nan_to_num(torch.inf, torch.inf)
    # One more than the exponent bits, if the mantissa is above that of 127.
    scales = (((largest.view(torch.int32) + 0x1FFFF) >> 23) - 6).clamp(min=1)
    inverse = ((254 - scales) << 23).view(torch.float32)[..., None, :, None]
    lowest, highest = (blocks * inverse).split(1, dim=-3)
    rounded = torch.cat([lowest.floor().nan_to_num(-128.0), highest.ceil().nan_to_num(127.0)], dim=-3).clamp(-128, 127)
    return rounded.flatten(-2)[..., : bounds.shape[-1]].to(torch.int8), scales.to(torch.uint8)


def from_8_bits(bounds: Tensor, scales: Tensor) -> Tensor:
    """[..., 2, D] float32: what the result of `to_8_bits` stands for."""
    by_channel = (scales.int() << 23).view(torch.float32).repeat_interleave(SCALE_BLOCK, dim=-1)
    return bounds.float().mul_(by_channel[..., None, : bounds.shape[-1]])
