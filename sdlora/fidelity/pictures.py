"""Pictures as the distances see them: 128 pixels, RGB in [0, 1], CIELAB, Laplacian levels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

__all__ = ["SIDE", "laplacian_levels", "luminance", "rgb_to_lab", "to_lab", "to_pixels"]

SIDE = 128

_RGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = _RGB_TO_XYZ.sum(axis=1)


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """[N, 3, 128, 128] in [0, 1]; other sizes are resampled.

    Raises:
        ValueError: there are no pictures.
    """
    if not images:
        raise ValueError("a set of pictures needs at least one")
    arrays = [np.asarray(_resized(image.convert("RGB")), dtype=np.float32) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255


def _resized(image: Image.Image) -> Image.Image:
    return image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE), Image.Resampling.BOX)


def rgb_to_lab(rgb: NDArray[np.floating]) -> NDArray[np.float64]:
    """sRGB in [0, 1], [..., 3], to CIELAB under D65: L in [0, 100] (CIE 15, IEC 61966-2-1)."""
    rgb = np.asarray(rgb, dtype=np.float64)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _RGB_TO_XYZ.T / _WHITE
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(np.maximum(xyz, 0)), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def to_lab(pixels: Tensor) -> Tensor:
    """[N, 3, H, W] RGB in [0, 1] to CIELAB / 100, so that lightness is in [0, 1]."""
    lab = rgb_to_lab(pixels.permute(0, 2, 3, 1).numpy()) / 100
    return torch.from_numpy(lab).permute(0, 3, 1, 2).float()


def luminance(pixels: Tensor) -> Tensor:
    """[N, 1, H, W], Rec. 709 weights on the stored (not linear) values."""
    return (pixels * torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None]).sum(1, keepdim=True)


def laplacian_levels(images: Tensor, count: int) -> list[Tensor]:
    """`count` band-pass levels of [N, C, H, W], each half the size of the one before (Burt and Adelson, 1983)."""
    levels = []
    for _ in range(count):
        smaller = F.avg_pool2d(images, 2)
        levels.append(images - F.interpolate(smaller, scale_factor=2, mode="bilinear", align_corners=False))
        images = smaller
    return levels
