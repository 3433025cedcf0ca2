"""What is measured of a set of pictures, without any learnt network: colours, patches, textures.

All of it is taken from 64 pixels and coarser, with mottled fills evened out: the finest octave and the faintest
differences are where a decoder leaves its trace, not where a style lives. Everything random comes from fixed seeds.

Each picture is described by distributions, and a set by their mean over its pictures: the distribution of all of them
together. Comparing two sets then costs next to nothing, however many pictures they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sdlora.fidelity.histograms import colour_histogram, row_histograms
from sdlora.fidelity.pictures import blur, even_regions, fixed_directions, halve, ink, lab_pictures

__all__ = ["MEASURES", "PATCH_STEP", "StyleFeatures", "colour_weights", "pool_features", "style_features"]

MEASURES = ("palette", "patches", "texture")
COLOUR_STEPS = (8.0, 16.0, 32.0)
OCTAVES = 2
PATCH_DIRECTIONS = 32
PATCH_STEP = 0.125
FILTERS = 12
LEVELS = torch.arange(-3.0, 4.0)
"""Of the warped responses, where the bins of the texture stand."""
REACH = 4.0
FAINT = 6.0
"""Responses well below this, in CIELAB units, count by their size, those above by its logarithm."""
CHUNK = 16


@dataclass(frozen=True, eq=False)
class StyleFeatures:
    """The mean description of a set of pictures; `style_distance` compares two.

    palette: of the inked regions' CIELAB colours, histograms on grids of 8, 16 and 32 units, one after the other [B].
    patches: of random projections of 3 x 3 patches less their mean, at 64 and 32 pixels, distributions [64, bins]
        (sliced Wasserstein distance as in arXiv 2006.07229, there on the features of a network).
    texture: of random 3 x 3 filters at 64 and 32 pixels, Gram matrices [2, 84, 84] of the responses, each first told
        in 7 soft levels (random filters as in arXiv 1606.00021): how often which responses come together.
    """

    palette: Tensor
    patches: Tensor
    texture: Tensor


def style_features(images: Sequence[Image.Image]) -> StyleFeatures:
    """Features of a set as a whole, every picture counting the same; about 25 ms a picture.

    Raises:
        ValueError: there are no pictures.
    """
    sums: list[Tensor] = []
    for start in range(0, max(len(images), 1), CHUNK):
        even = even_regions(halve(lab_pictures(images[start : start + CHUNK])))
        parts = [rows.sum(0) for rows in (_palettes(even), _patches(even), _textures(even))]
        sums = [total + part for total, part in zip(sums, parts, strict=True)] if sums else parts
    palette, patches, texture = (total / len(images) for total in sums)
    return StyleFeatures(palette=palette, patches=patches, texture=texture)


def pool_features(features: Sequence[StyleFeatures]) -> StyleFeatures:
    """The features of several sets of equal size taken together, from those of each."""
    rows = ([item.palette, item.patches, item.texture] for item in features)
    palette, patches, texture = (torch.stack(part).mean(0) for part in zip(*rows, strict=True))
    return StyleFeatures(palette=palette, patches=patches, texture=texture)


def colour_weights(lab: Tensor) -> Tensor:
    """[N, H, W]: how much each pixel counts in a palette; inked, and inside a region rather than on its border.

    Never all zero: the palette of an empty picture is white.
    """
    highest, lowest = F.max_pool2d(lab, 3, 1, 1), -F.max_pool2d(-lab, 3, 1, 1)
    contrast = (highest - lowest).square().sum(1).sqrt()
    return ink(lab) * (torch.exp(-contrast / 12) + 0.02) + 1e-6


def _palettes(even: Tensor) -> Tensor:
    """[N, B]."""
    rows = []
    for colours, weights in zip(even.flatten(2).mT, colour_weights(even).flatten(1), strict=True):
        rows.append(torch.cat([colour_histogram(colours, weights, step=step) for step in COLOUR_STEPS]))
    return torch.stack(rows)


def _patches(even: Tensor) -> Tensor:
    """[N, OCTAVES * PATCH_DIRECTIONS, bins]."""
    filters = _zero_mean_filters(PATCH_DIRECTIONS, seed=2)
    octaves = []
    for octave in _octaves(even):
        pairs = zip(_warped_responses(octave, filters), _near_ink(octave), strict=True)
        octaves.append(torch.stack([row_histograms(r, w, reach=REACH, step=PATCH_STEP) for r, w in pairs]))
    return torch.cat(octaves, dim=1)


def _textures(even: Tensor) -> Tensor:
    """[N, OCTAVES, FILTERS * levels, FILTERS * levels]."""
    grams = []
    for number, octave in enumerate(_octaves(even)):
        responses = _warped_responses(octave, _zero_mean_filters(FILTERS, seed=3 + number))
        distance = responses.clamp(LEVELS[0], LEVELS[-1])[:, :, None] - LEVELS[:, None]
        levels = (1 - distance.abs()).clamp(min=0).flatten(1, 2)
        weights = _near_ink(octave)
        grams.append((levels * weights[:, None]) @ levels.mT / weights.sum(1)[:, None, None])
    return torch.stack(grams, dim=1)


def _octaves(even: Tensor) -> list[Tensor]:
    octaves = [even]
    for _ in range(OCTAVES - 1):
        octaves.append(halve(blur(octaves[-1], 0.7)))
    return octaves


def _zero_mean_filters(count: int, *, seed: int) -> Tensor:
    """[count, 3, 3, 3]; without its mean a filter sees the drawing and not the ground."""
    filters = fixed_directions(count, 27, seed=seed).view(count, 3, 3, 3)
    return filters - filters.mean(dim=(2, 3), keepdim=True)


def _warped_responses(lab: Tensor, filters: Tensor) -> Tensor:
    """[N, filters, pixels], logarithmic where large: otherwise a few black edges would outweigh the rest."""
    return torch.asinh(F.conv2d(F.pad(lab, (1,) * 4, mode="replicate"), filters).flatten(2) / FAINT)


def _near_ink(lab: Tensor) -> Tensor:
    """[N, pixels]: the empty ground around a drawing counts next to nothing."""
    return F.max_pool2d(ink(lab), 5, 1, 2).flatten(1) + 1e-3
