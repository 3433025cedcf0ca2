"""At which weight an adapter has had its effect, and between which weights it can be used.

A style's effect on a picture grows with the weight, then flattens: what there is to change is changed. The recommended
weight is where it flattens, the knee of the curve of effect against weight: the point farthest above its chord
(Satopaa et al., Finding a Kneedle in a Haystack, 2011, equation 3). So adapters stacked at their recommended weights
have each done what they can do, whatever they were trained with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image

__all__ = ["Calibration", "calibrate", "calibration_metadata", "effect", "recommended_weight", "roughness"]

_WEIGHT_KEY, _RANGE_KEY = "sdlora.recommended_weight", "sdlora.usable_weights"
_FLAT = 0.02
"""A curve that is nowhere farther above its chord than this share of its height has no knee."""
_ROUGHEST = 2.0


@dataclass(frozen=True)
class Calibration:
    """What was measured, and what follows from it."""

    weights: tuple[float, ...]
    effects: tuple[float, ...]
    """Root mean square difference to the pictures without the adapter, 0..1."""
    roughnesses: tuple[float, ...]
    """Mean step from pixel to pixel, as a multiple of that without."""
    recommended: float
    usable: tuple[float, float]
    """From half of the recommended weight's effect, to where the pictures become twice as rough as without."""


def calibrate(weights: Sequence[float], effects: Sequence[float], roughnesses: Sequence[float]) -> Calibration:
    """Find knee and range on a curve measured at ascending weights from 0 on; without a knee 1 is recommended.

    Raises:
        ValueError: the weights do not ascend from 0.
    """
    if len(weights) < 3 or weights[0] != 0 or any(left >= right for left, right in pairwise(weights)):
        raise ValueError("the weights must ascend from 0, and be at least three")
    torn = [index for index, value in enumerate(roughnesses) if value > _ROUGHEST or not math.isfinite(value)]
    last = (torn[0] if torn else len(weights)) - 1
    kept = range(max(last, 2) + 1)
    height, width = effects[kept[-1]], weights[kept[-1]]
    above = [effects[i] - height * weights[i] / width for i in kept]
    knee = max(kept, key=above.__getitem__)
    recommended = weights[knee] if above[knee] > _FLAT * height else min(1.0, weights[kept[-1]])
    half = float(np.interp(recommended, weights, effects)) / 2
    low = float(np.interp(half, np.maximum.accumulate(effects), weights))
    return Calibration(
        tuple(weights), tuple(effects), tuple(roughnesses), recommended, (round(low, 2), weights[max(last, knee)])
    )


def effect(pictures: Sequence[Image.Image], without: Sequence[Image.Image]) -> float:
    """Root mean square difference of the pixels, 0..1."""
    gaps = [np.square(_pixels(a) - _pixels(b)).mean() for a, b in zip(pictures, without, strict=True)]
    return float(np.sqrt(np.mean(gaps)))


def roughness(pictures: Sequence[Image.Image]) -> float:
    """Mean absolute step between neighbouring pixels, 0..1: noise and torn pictures have much more of it."""
    steps = [np.abs(np.diff(_pixels(picture), axis=axis)).mean() for picture in pictures for axis in (0, 1)]
    return float(np.mean(steps))


def calibration_metadata(calibration: Calibration) -> dict[str, str]:
    """The header texts that keep it."""
    low, high = calibration.usable
    return {_WEIGHT_KEY: f"{calibration.recommended:g}", _RANGE_KEY: f"{low:g}..{high:g}"}


def recommended_weight(metadata: Mapping[str, str]) -> float:
    """What an adapter's header recommends; 1.0 if it says nothing that is a number."""
    try:
        weight = float(metadata.get(_WEIGHT_KEY, "1"))
    except ValueError:
        return 1.0
    return weight if math.isfinite(weight) else 1.0


def _pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), dtype=np.float64) / 255
