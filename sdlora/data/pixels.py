"""One dataset picture as the array a VAE encodes: decoded, resized, cropped, scaled to [-1, 1]."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdlora.data.buckets import CropPlan
from sdlora.data.dataset import ImageCaption
from sdlora.data.decode import MAX_PIXELS, decode_image
from sdlora.data.names import shown_name
from sdlora.errors import DatasetError, Problem

__all__ = ["load_pixels"]


def load_pixels(
    example: ImageCaption,
    plan: CropPlan,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
) -> NDArray[np.float32]:
    """pixel_values float32 [3, H, W] in [-1, 1], where (H, W) is `plan.bucket_hw`; resized with a Lanczos filter.

    Raises `DatasetError` if the file cannot be read any more or has another size than when it was scanned.
    """
    image = decode_image(example.path, background=background, max_pixels=max_pixels)
    if (image.height, image.width) != example.size_hw:
        what = f"changed its size since it was scanned: {example.size_hw[1]} x {example.size_hw[0]} before."
        problem = Problem(shown_name(example.path), what, "Leave the dataset alone while a run begins; start again.")
        raise DatasetError(shown_name(example.path.parent), [problem])
    (height, width), (top, left), (rows, columns) = plan.resized_hw, plan.crop_top_left_yx, plan.bucket_hw
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    cropped = np.asarray(resized, dtype=np.float32)[top : top + rows, left : left + columns]  # [H, W, 3], 0-255
    return np.ascontiguousarray((cropped / 127.5 - 1.0).transpose(2, 0, 1))
