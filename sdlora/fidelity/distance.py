"""How far apart two sets of pictures are, in what makes their style."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from sdlora.fidelity.features import COLOUR_STEPS, MEASURES, PATCH_STEP, StyleFeatures, style_features

__all__ = ["SCALES", "measure_distances", "style_distance"]

SCALES = {"palette": 0.66, "patches": 0.084, "texture": 1.31}
"""Each measure's median distance of two hand-drawn styles of the same subjects (docs/FIDELITY.md), so that none
outweighs another and a distance of 1 is that of two ordinary styles."""

Pictures = Sequence[Image.Image] | StyleFeatures


def measure_distances(a: Pictures, b: Pictures) -> dict[str, float]:
    """The distance of two sets in each of `MEASURES`; each is a metric.

    palette: Hellinger distance of the colour histograms, mean over the grids, in [0, 1].
    patches: mean over the projections of the Wasserstein-1 distance, on the warped axis of the responses.
    texture: Euclidean distance of the square roots of the Gram matrices, both octaves together.
    """
    left, right = _features(a), _features(b)
    return {
        "palette": _hellinger(left.palette, right.palette) / len(COLOUR_STEPS) ** 0.5,
        # In one dimension it is the area between the cumulative distributions.
        "patches": float((left.patches - right.patches).cumsum(-1).abs().sum(-1).mean()) * PATCH_STEP,
        "texture": _hellinger(left.texture, right.texture),
    }


def style_distance(a: Pictures, b: Pictures) -> float:
    """0 for equal sets, about 1 for two hand-drawn styles of the same subjects; symmetric.

    Compare sets of 20 pictures or more: of a few pictures, the subject is measured and not the style.

    Raises:
        ValueError: a set is empty.
    """
    distances = measure_distances(a, b)
    return sum(distances[name] / SCALES[name] for name in MEASURES) / len(MEASURES)


def _features(pictures: Pictures) -> StyleFeatures:
    return pictures if isinstance(pictures, StyleFeatures) else style_features(pictures)


def _hellinger(a: Tensor, b: Tensor) -> float:
    return float((a.sqrt() - b.sqrt()).square().sum().div(2).sqrt())
