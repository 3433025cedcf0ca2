"""Pictures that look alike, and captions that say the same: what makes a small dataset smaller than it seems.

The fingerprint is a difference hash: where brightness rises and where it falls from left to right on a 16 x 16 grid.
It survives scaling, JPEG and small changes of brightness; the mirror image has its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Fingerprint", "fingerprint", "group_lookalikes", "group_same_captions"]

_GRID = 16
_NOTICEABLE = 6  # grey levels; less is JPEG noise on a flat background

# Chosen on four sets of 252 drawings: half size, JPEG quality 30 and -15 % brightness stay below 0.25 for 99 of 100,
# and of 31,626 pairs of different drawings about 15 fall below it, all the same shape in another colour or detail.
_MAX_DISTANCE = 0.25
_MAX_COLOUR_DISTANCE = 24.0


@dataclass(frozen=True)
class Fingerprint:
    """Edges [2 * 16 * 16] bool of a picture and of its mirror image, mean colour [3] in 0-255."""

    edges: NDArray[np.bool_]
    mirrored: NDArray[np.bool_]
    mean_colour: NDArray[np.float32]


def fingerprint(image: Image.Image) -> Fingerprint:
    """The fingerprint of an RGB picture."""
    small = image.resize((_GRID + 1, _GRID), Image.Resampling.BOX)
    grey = np.asarray(small.convert("L"), dtype=np.int16)
    mean_colour = np.asarray(small, dtype=np.float32).mean(axis=(0, 1), dtype=np.float32)
    return Fingerprint(_edges(grey), _edges(grey[:, ::-1]), mean_colour)


def _edges(grey: NDArray[np.int16]) -> NDArray[np.bool_]:
    steps = np.diff(grey, axis=1)
    return np.concatenate([(steps > _NOTICEABLE).ravel(), (steps < -_NOTICEABLE).ravel()])


def group_lookalikes(prints: Sequence[Fingerprint]) -> list[list[int]]:
    """Groups, of two or more indices each, of pictures that look alike or are mirror images of each other."""
    if len(prints) < 2:
        return []
    edges = np.stack([p.edges for p in prints]).astype(np.float32)  # [N, 512]
    mirrored = np.stack([p.mirrored for p in prints]).astype(np.float32)
    colours = np.stack([p.mean_colour for p in prints])  # [N, 3]
    parent = list(range(len(prints)))
    for i in range(len(prints) - 1):
        rest = slice(i + 1, None)
        near = np.minimum(_distances(edges[i], edges[rest]), _distances(mirrored[i], edges[rest])) <= _MAX_DISTANCE
        near &= np.abs(colours[i] - colours[rest]).max(axis=1) <= _MAX_COLOUR_DISTANCE
        for j in np.flatnonzero(near):
            parent[_top(parent, i + 1 + int(j))] = _top(parent, i)
    groups: dict[int, list[int]] = {}
    for i in range(len(prints)):
        groups.setdefault(_top(parent, i), []).append(i)
    return sorted(group for group in groups.values() if len(group) > 1)


def _distances(one: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """Jaccard distance [N]: the share of edges that only one of the two has; 0 between pictures without edges."""
    common = others @ one
    either = others.sum(axis=1) + one.sum() - common
    distances = np.where(either > 0, 1 - common / np.maximum(either, 1), 0)
    return distances.astype(np.float32)


def _top(parent: list[int], i: int) -> int:
    while parent[i] != i:
        i = parent[i]
    return i


def group_same_captions(captions: Mapping[str, str | None]) -> list[list[str]]:
    """Groups of two or more names (the keys) with the same caption, ignoring case; empty captions do not count."""
    groups: dict[str, list[str]] = {}
    for name, caption in captions.items():
        if caption:
            groups.setdefault(caption.casefold(), []).append(name)
    return [names for names in groups.values() if len(names) > 1]
