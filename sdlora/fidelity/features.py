"""What is measured of a set of pictures, without any learnt network: colours, patches, textures.

Everything random is drawn once from a fixed seed, so the same pictures always have the same features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sdlora.fidelity.pictures import laplacian_levels, to_lab, to_pixels

__all__ = ["MEASURES", "StyleFeatures", "picture_vectors", "style_features"]

MEASURES = ("palette", "patches", "texture")
NUM_QUANTILES = 64
LEVELS = 3
PATCH = 7
DIRECTIONS = 24
FILTERS = 24


@dataclass(frozen=True, eq=False)
class StyleFeatures:
    """Of a set of pictures, as flat vectors. Two sets are compared by mean absolute difference.

    palette: quantiles of the CIELAB colours along fixed directions (sliced Wasserstein distance, arXiv 1011.2105).
    patches: quantiles of random 7 x 7 projections of three Laplacian levels (as arXiv 2006.07229 does on features).
    texture: mean Gram matrices of seeded random filters with a ReLU (arXiv 1606.00021), square root of magnitude.
    """

    palette: Tensor
    patches: Tensor
    texture: Tensor


def style_features(images: Sequence[Image.Image]) -> StyleFeatures:
    """Features of a set as a whole: what single subjects look like averages out."""
    pixels = to_pixels(images)
    colours, patches = _responses(pixels)
    return StyleFeatures(
        palette=_quantiles([colours.transpose(0, 1).flatten(1)]),
        patches=_quantiles([level.transpose(0, 1).flatten(1) for level in patches]),
        texture=_signed_root(_gram(pixels).mean(0)),
    )


def picture_vectors(images: Sequence[Image.Image]) -> Tensor:
    """One vector [N, D] a picture with all three measures, each of about unit spread: for telling styles apart."""
    pixels = to_pixels(images)
    colours, patches = _responses(pixels)
    rows = []
    for index in range(len(pixels)):
        palette = _quantiles([colours[index].flatten(1)], count=12)
        patch = _quantiles([level[index].flatten(1) for level in patches], count=12)
        rows.append(torch.cat([palette, patch * 4]))
    return torch.cat([torch.stack(rows), _signed_root(_gram(pixels)) * 2], dim=1)


def _responses(pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Colours [N, directions, h, w], and the patch projections [N, directions, h, w] of each level."""
    lab = to_lab(pixels)
    colours = F.conv2d(F.avg_pool2d(lab, 4), _unit_filters("palette", 3, 1))
    filters = _unit_filters("patches", 3, PATCH)
    # Every second position of the finest level: neighbours say almost the same.
    strides = (2, 1, 1)
    levels = laplacian_levels(lab, LEVELS)
    return colours, [F.conv2d(level, filters, stride=stride) for level, stride in zip(levels, strides, strict=True)]


def _quantiles(rows: Sequence[Tensor], count: int = NUM_QUANTILES) -> Tensor:
    """Of each row of each [R, values] tensor, `count` evenly spaced quantiles, all in one vector."""
    picked = []
    for values in rows:
        ordered = values.sort(dim=1).values
        positions = ((torch.arange(count) + 0.5) / count * ordered.shape[1]).long()
        picked.append(ordered[:, positions].flatten())
    return torch.cat(picked)


def _gram(pixels: Tensor) -> Tensor:
    """[N, D]: Gram matrices of the random filters' responses at three scales, upper halves."""
    grams = []
    images = to_lab(pixels)
    filters = _unit_filters("texture", 3, PATCH)
    upper = torch.triu_indices(2 * FILTERS, 2 * FILTERS)
    for _ in range(LEVELS):
        response = F.conv2d(images, filters[:FILTERS])
        active = torch.cat([response.relu(), (-response).relu()], dim=1).flatten(2)
        gram = active @ active.mT / active.shape[2]
        grams.append(gram[:, upper[0], upper[1]])
        images = F.avg_pool2d(images, 2)
    return torch.cat(grams, dim=1)


def _signed_root(values: Tensor) -> Tensor:
    """Products back to the scale of the responses."""
    return values.sign() * values.abs().sqrt()


@cache
def _unit_filters(purpose: str, channels: int, side: int) -> Tensor:
    """Random filters [DIRECTIONS, channels, side, side] of norm 1, without mean over space where they have any."""
    generator = torch.Generator().manual_seed(sum(purpose.encode()))
    filters = torch.randn(DIRECTIONS, channels, side, side, generator=generator)
    if side > 1:
        filters -= filters.mean(dim=(2, 3), keepdim=True)
    norms: Tensor = torch.linalg.vector_norm(filters, dim=(1, 2, 3), keepdim=True)
    return filters / norms
