"""Weighted histograms that share each count between neighbouring bins, so that they change smoothly with the values."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from sdlora.fidelity.pictures import rgb_to_lab

__all__ = ["colour_histogram", "row_histograms"]

_LOWEST = (0.0, -90.0, -112.0)
_HIGHEST = (100.0, 102.0, 98.0)
"""Of L, a and b in sRGB, rounded outwards."""


def row_histograms(values: Tensor, weights: Tensor, *, reach: float, step: float) -> Tensor:
    """[R, bins] of each row of `values` [R, P], clipped to +-`reach`, weighted by `weights` [P]; rows sum to 1."""
    bins = round(2 * reach / step) + 1
    position = ((values + reach) / step).clamp(0, bins - 1.001)
    below = position.floor()
    share = position - below
    cells = torch.arange(len(values))[:, None] * bins + below.long()
    counts = torch.zeros(len(values) * bins)
    counts.index_add_(0, cells.flatten(), ((1 - share) * weights).flatten())
    counts.index_add_(0, cells.flatten() + 1, (share * weights).flatten())
    return counts.view(len(values), bins) / weights.sum()


def colour_histogram(colours: Tensor, weights: Tensor, *, step: float) -> Tensor:
    """[bins] of CIELAB `colours` [P, 3] weighted by `weights` [P], on a grid of `step` units; sums to 1.

    Weights under a hundredth of the largest are left out. Only the cells that sRGB reaches are kept: 18 thousand at a
    step of 4, some hundreds at 16.
    """
    shape, cell_of = _colour_grid(step)
    heavy = weights > 0.01 * weights.max()
    colours, weights = colours[heavy], weights[heavy]
    position = (colours - torch.tensor(_LOWEST)) / step
    below = position.floor()
    share = position - below
    counts = torch.zeros(int(cell_of.max()) + 1)
    for corner in np.ndindex(2, 2, 2):
        offset = torch.tensor(corner)
        part = torch.where(offset.bool(), share, 1 - share).prod(dim=1) * weights
        index = (below.long() + offset).clamp(min=0).minimum(torch.tensor(shape) - 1)
        counts.index_add_(0, cell_of[(index[:, 0] * shape[1] + index[:, 1]) * shape[2] + index[:, 2]], part)
    return counts / counts.sum()


@cache
def _colour_grid(step: float) -> tuple[tuple[int, int, int], Tensor]:
    """The grid's shape, and for each of its cells its place among those in use; all others share the last place."""
    spans = [int((high - low) / step) + 2 for low, high in zip(_LOWEST, _HIGHEST, strict=True)]
    shape = (spans[0], spans[1], spans[2])
    ramp = np.linspace(0, 1, 64)
    rgb = np.stack(np.meshgrid(ramp, ramp, ramp, indexing="ij"), axis=-1).reshape(-1, 3)
    below = np.floor((rgb_to_lab(rgb) - _LOWEST) / step).astype(int)
    used = np.zeros(shape, dtype=bool)
    for corner in np.ndindex(2, 2, 2):
        index = np.clip(below + corner, 0, np.array(shape) - 1)
        used[tuple(index.T)] = True
    place = np.where(used.ravel(), np.cumsum(used) - 1, used.sum())
    return shape, torch.from_numpy(place)
