"""Folding: the scale of a pair moved into its factors, so that delta = up @ down and nothing else."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdlora.adapter_file.types import LoraPair

__all__ = ["fold", "is_finite", "largest_entry"]

_MAX_SHIFT = 40


def fold(pair: LoraPair, *, weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """(down, up) in fp32 with up @ down = weight * alpha / rank * (pair.up @ pair.down); shapes as in the pair.

    The largest entries of both factors are brought within a factor of two of each other by a power of two, which is
    exact. The up factor of a short training is a thousand times smaller than down; left so, fp16 would store it as
    subnormals.
    """
    down = pair.down.float()
    up = pair.up.float() * (weight * pair.scale)
    largest_down, largest_up = largest_entry(down), largest_entry(up)
    if not (0 < largest_down < math.inf and 0 < largest_up < math.inf):
        return down, up
    shift = round((math.log2(largest_down) - math.log2(largest_up)) / 2)
    shift = max(-_MAX_SHIFT, min(_MAX_SHIFT, shift))
    return (torch.mul(down, 2.0**-shift), torch.mul(up, 2.0**shift)) if shift else (down, up)


def largest_entry(tensor: Tensor) -> float:
    """The largest absolute value; NaN if there is one. One pass without a copy: `torch.isfinite` takes far longer."""
    low, high = (float(value) for value in tensor.aminmax())
    return math.nan if math.isnan(low) or math.isnan(high) else max(-low, high)


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    return math.isfinite(largest_entry(tensor))
