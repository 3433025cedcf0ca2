"""How much of the way to a style an adapter went, measured on the same subjects before and after.

Two sets of 40 drawings in one style have a distance, because they show different things; two sets of the same subjects
are nearer than their styles are. Both are taken out here: only pictures of different subjects are compared across the
sets, and what different subjects of one set are apart is subtracted. The expectation is 0 for two sets in one style,
whatever their size, as with the unbiased form of the energy distance (Szekely & Rizzo 2013) and of MMD (Gretton et al.
2012, eq. 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from sdlora.fidelity.distance import measure_distances
from sdlora.fidelity.features import MEASURES, StyleFeatures, style_features

__all__ = ["SQUARES", "squared_measures", "squared_style_distance", "style_gap_closed"]

SQUARES = {"palette": 0.286, "patches": 0.00655, "texture": 1.58}
"""Each measure's median square between two hand-drawn styles (docs/FIDELITY.md): together 1 is two ordinary styles."""

_DIVISIONS = 32

Drawings = Sequence[Image.Image] | Sequence[StyleFeatures]
"""Pictures, or the features of each single one."""


def squared_measures(a: Drawings, b: Drawings) -> dict[str, float]:
    """The squared distance of the styles of two sets in each of `MEASURES`, unbiased: by chance below 0 for one style.

    Both sets show the same subjects in the same order, at least four.

    Raises:
        ValueError: the sets differ in size, or have fewer than four pictures.
    """
    if len(a) != len(b) or len(a) < 4:
        raise ValueError(f"{len(a)} and {len(b)} pictures: both sets need the same subjects, at least four")
    first, second = _rows(a), _rows(b)
    totals = dict.fromkeys(MEASURES, 0.0)
    for half, rest in _divisions(len(first.palette)):
        a_half, a_rest, b_half, b_rest = (_mean(rows, part) for rows in (first, second) for part in (half, rest))
        # Every pair is of different subjects.
        across, within = ((a_half, b_rest), (a_rest, b_half)), ((a_half, a_rest), (b_half, b_rest))
        for sign, pairs in ((0.5, across), (-0.5, within)):
            for left, right in pairs:
                for name, distance in measure_distances(left, right).items():
                    totals[name] += sign * distance**2 / _DIVISIONS
    return totals


def squared_style_distance(a: Drawings, b: Drawings) -> float:
    """The measures together, each divided by its median between two styles: about 0 is one style, 1 two ordinary ones.

    Raises:
        ValueError: as `squared_measures`.
    """
    squares = squared_measures(a, b)
    return sum(squares[name] / SQUARES[name] for name in MEASURES) / len(MEASURES)


def style_gap_closed(with_adapter: Drawings, without_adapter: Drawings, reference: Drawings) -> float:
    """1 - d(with, reference) / d(without, reference), d the root of `squared_style_distance`, at least 0.

    1 is the style itself, 0 is no nearer than without, below 0 is farther. All three show the same subjects in the
    same order: drawn with and without the adapter from the same seeds, and true drawings in the style.

    Raises:
        ValueError: as `squared_measures`, or the pictures without the adapter already are in the style.
    """
    target = [_features(item) for item in reference]
    before = squared_style_distance(without_adapter, target)
    if before <= 0:
        raise ValueError("without the adapter the pictures already are in the style: there is no gap to close")
    return float(1 - (max(squared_style_distance(with_adapter, target), 0.0) / before) ** 0.5)


def _divisions(count: int) -> Iterator[tuple[list[int], list[int]]]:
    """Always the same ones, so that a distance is the same every time."""
    random = np.random.default_rng(0)
    for _ in range(_DIVISIONS):
        order = random.permutation(count).tolist()
        yield order[: count // 2], order[count // 2 :]


def _features(item: Image.Image | StyleFeatures) -> StyleFeatures:
    return item if isinstance(item, StyleFeatures) else style_features([item])


def _rows(drawings: Drawings) -> StyleFeatures:
    """Of all of them, one after the other: each tensor has one dimension more in front."""
    each = [_features(item) for item in drawings]
    return StyleFeatures(*(torch.stack([getattr(item, name) for item in each]) for name in MEASURES))


def _mean(rows: StyleFeatures, chosen: list[int]) -> StyleFeatures:
    return StyleFeatures(*(getattr(rows, name)[chosen].mean(0) for name in MEASURES))
