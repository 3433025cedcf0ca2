"""The picture that is drawn over: read like a training picture, brought to a size the U-Net takes, enlarged."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from sdlora.data.decode import decode_image
from sdlora.errors import DatasetError, GenerationError

__all__ = ["StartImage", "enlarged_latents", "enlarged_side"]


@dataclass(frozen=True)
class StartImage:
    """A picture as it is drawn over, what its file is called and how it is known again."""

    image: Image.Image
    file: str
    pixel_hash: str
    """SHA-256 of size and RGB pixels before any scaling; it survives another name or file format without loss."""

    @classmethod
    def read(cls, source: Path | Image.Image, *, height: int | None, width: int | None, area: int) -> StartImage:
        """Cropped around its middle to `height` x `width`; where none is given, scaled down to `area` pixels at most.

        Files are turned upright and into sRGB; transparent parts become white.

        Raises:
            GenerationError: the file cannot be read as a picture.
        """
        if isinstance(source, Image.Image):
            image, file = source.convert("RGB"), ""
        else:
            try:
                image, file = decode_image(source), source.name
            except DatasetError as error:
                raise GenerationError(str(error.problems[0])) from error
        scale = min(1.0, math.sqrt(area / (image.width * image.height)))
        size = (width or _side(image.width * scale), height or _side(image.height * scale))
        fitted = ImageOps.fit(image, size, Image.Resampling.LANCZOS) if image.size != size else image
        return cls(fitted, file, pixel_hash(image))


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 of size and pixels of an RGB picture."""
    return hashlib.sha256(f"{image.width}x{image.height} ".encode() + image.tobytes()).hexdigest()


def enlarged_side(side: int, scale: float) -> int:
    """A side in pixels, enlarged, as a multiple of 8."""
    return _side(side * scale)


def enlarged_latents(latents: Tensor, height: int, width: int) -> Tensor:
    """[B, C, h, w] to [B, C, height, width] in latent pixels, bilinear in fp32."""
    resized = torch.nn.functional.interpolate(latents.float(), size=(height, width), mode="bilinear")
    return resized.to(latents.dtype)


def _side(pixels: float) -> int:
    return max(8, round(pixels / 8) * 8)
