"""Pictures as the measures see them: CIELAB at one size, and the few image operations that are shared.

Equal distances in CIELAB look about equally different (D65 white, CIE 15). Everything runs in torch on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "SIDE",
    "blur",
    "even_regions",
    "fixed_directions",
    "halve",
    "ink",
    "lab_pictures",
    "rgb_to_lab",
    "white",
]

SIDE = 128
"""Side in pixels that every picture is brought to before it is measured."""

_RGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = _RGB_TO_XYZ.sum(axis=1)


def rgb_to_lab(rgb: NDArray[np.floating]) -> NDArray[np.floating]:
    """sRGB in [0, 1], [..., 3], to CIELAB under D65: L in [0, 100] (CIE 15, IEC 61966-2-1)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ (_RGB_TO_XYZ.T / _WHITE).astype(rgb.dtype)
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(np.maximum(xyz, 0)), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def lab_pictures(images: Sequence[Image.Image]) -> Tensor:
    """CIELAB [N, 3, 128, 128]; other sizes are resampled, transparency is laid on white.

    Raises:
        ValueError: there are no pictures.
    """
    if not images:
        raise ValueError("a set of pictures needs at least one")
    pixels = np.stack([np.asarray(_resized(_opaque(image))) for image in images])
    return torch.from_numpy(rgb_to_lab(pixels.astype(np.float32) / 255)).permute(0, 3, 1, 2).float()


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    ground = Image.new("RGBA", rgba.size, "white")
    ground.alpha_composite(rgba)
    return ground.convert("RGB")


def _resized(image: Image.Image) -> Image.Image:
    if image.size == (SIDE, SIDE):
        return image
    # Boxes average, so that a drawing at a multiple of the size equals the drawing at the size.
    resample = Image.Resampling.BOX if min(image.size) >= SIDE else Image.Resampling.BICUBIC
    return image.resize((SIDE, SIDE), resample)


def white() -> Tensor:
    """The ground that everything is drawn on, as CIELAB [3, 1, 1]."""
    return torch.tensor([100.0, 0.0, 0.0])[:, None, None]


def ink(lab: Tensor) -> Tensor:
    """How far each pixel is from the white ground, [N, H, W] in [0, 1); half at a colour difference of 10."""
    return 1 - torch.exp(-(lab - white()).square().sum(1) / 144)


def blur(pictures: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [N, C, H, W], the border repeated."""
    radius = math.ceil(3 * sigma)
    taps = torch.exp(-torch.arange(-radius, radius + 1).square() / (2 * sigma**2))
    taps = taps / taps.sum()
    channels = pictures.shape[1]
    padded = F.pad(pictures, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(rows, taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def halve(pictures: Tensor) -> Tensor:
    """Half the side, by averaging squares of four pixels."""
    return F.avg_pool2d(pictures, 2)


def even_regions(lab: Tensor, *, colour_sigma: float = 6.0, radius: int = 3, rounds: int = 2) -> Tensor:
    """Bilateral filter of [N, 3, H, W]: evens out mottled fills and keeps the borders between colours.

    A decoder paints a flat fill a little blotchy; without this that would count as another style.
    """
    height, width = lab.shape[-2:]
    reach = range(-radius, radius + 1)
    offsets = [(dy, dx) for dy in reach for dx in reach if dy * dy + dx * dx <= radius * radius + 1]
    for _ in range(rounds):
        padded = F.pad(lab, (radius,) * 4, mode="replicate")
        total, weights = torch.zeros_like(lab), torch.zeros_like(lab[:, :1])
        for dy, dx in offsets:
            moved = padded[:, :, radius + dy : radius + dy + height, radius + dx : radius + dx + width]
            weight = torch.exp(-(moved - lab).square().sum(1, keepdim=True) / (2 * colour_sigma**2))
            total += weight * moved
            weights += weight
        lab = total / weights
    return lab


def fixed_directions(count: int, dimensions: int, *, seed: int) -> Tensor:
    """`count` random unit vectors [count, dimensions], the same on every machine."""
    draws = np.random.Generator(np.random.PCG64(seed)).standard_normal((count, dimensions))
    return torch.from_numpy(draws / np.linalg.norm(draws, axis=1, keepdims=True)).float()
