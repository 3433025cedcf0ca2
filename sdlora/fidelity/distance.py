"""How far apart two sets of pictures are in style, and how much of a style's gap an adapter closed."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from sdlora.fidelity.features import MEASURES, style_features

__all__ = ["measure_distances", "style_distance", "style_gap_closed"]

SCALES = {"palette": 0.0949, "patches": 0.0240, "texture": 0.0241}
"""Each measure's distance between the two datasets of the repository, so that none outweighs another and their distance
is 1. A test computes them again."""


def measure_distances(a: Sequence[Image.Image], b: Sequence[Image.Image]) -> dict[str, float]:
    """Mean absolute difference of each of `MEASURES`, in the features' own units."""
    left, right = style_features(a), style_features(b)
    return {name: float((getattr(left, name) - getattr(right, name)).abs().mean()) for name in MEASURES}


def style_distance(a: Sequence[Image.Image], b: Sequence[Image.Image]) -> float:
    """0 for equal sets, 1 for the two datasets of the repository; symmetric.

    Compare sets of 20 pictures or more: of a few pictures, the subject is measured and not the style.

    Raises:
        ValueError: a set is empty.
    """
    distances = measure_distances(a, b)
    return sum(distances[name] / SCALES[name] for name in MEASURES) / len(MEASURES)


def style_gap_closed(
    with_adapter: Sequence[Image.Image], without_adapter: Sequence[Image.Image], reference: Sequence[Image.Image]
) -> float:
    """1 - d(with, reference) / d(without, reference): 1 is the reference itself, 0 is no nearer than without.

    Raises:
        ValueError: the pictures without the adapter already are the reference.
    """
    before = style_distance(without_adapter, reference)
    if before == 0:
        raise ValueError("without the adapter the pictures already equal the reference: there is no gap to close")
    return 1 - style_distance(with_adapter, reference) / before
