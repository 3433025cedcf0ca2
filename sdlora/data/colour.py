"""Pixels of any colour mode to plain sRGB: bit depth, palettes, transparency, colour profiles.

Pillow's own `convert("RGB")` is not used on what it gets wrong without a word: it clips 16-bit grey to white, cuts
floats to 0 or 1, shows the colours that hide under transparent pixels and ignores colour profiles.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from PIL import Image, ImageCms

__all__ = ["ColourNote", "UnsupportedModeError", "opacity", "to_srgb"]

_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC = 258, 262
_TIFF_WHITE_IS_ZERO = 0

_PROFILE_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}


class ColourNote(StrEnum):
    """What was decided on the way to sRGB and a user may want to know."""

    TRANSPARENT = "transparent parts"
    NO_CMYK_PROFILE = "CMYK colours without a usable profile"
    BAD_PROFILE = "a colour profile that cannot be used"


class UnsupportedModeError(Exception):
    """Pixels whose range or colour space the file does not tell; the message completes "the file ..."."""


@dataclass(frozen=True)
class _Layers:
    colour: Image.Image  # mode L, RGB or CMYK
    alpha: Image.Image | None  # mode L


def to_srgb(image: Image.Image, *, background: tuple[int, int, int]) -> tuple[Image.Image, tuple[ColourNote, ...]]:
    """`image` (loaded) as mode RGB in sRGB, transparent parts laid on `background` (sRGB, 0-255), and what to note.

    16-bit grey is divided by 257, not clipped. Profiles are followed with relative colorimetric intent and black point
    compensation. Raises `UnsupportedModeError` for floats, 32-bit integers and modes such as LAB.
    """
    notes: list[ColourNote] = []
    layers = _split(image)
    rgb = _follow_profile(layers.colour, image.info.get("icc_profile"), notes)
    if layers.alpha is not None and layers.alpha.getextrema() != (255, 255):
        notes.append(ColourNote.TRANSPARENT)
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, background), layers.alpha)
    return rgb, tuple(notes)


def opacity(image: Image.Image) -> Image.Image:
    """How opaque each pixel of `image` (loaded) is, mode L: 255 where nothing shines through.

    Raises `UnsupportedModeError` as `to_srgb` does.
    """
    return _split(image).alpha or Image.new("L", image.size, 255)


def _split(image: Image.Image) -> _Layers:
    mode = image.mode
    if mode.startswith("I;16"):
        return _split_16_bit(image)
    if mode in ("F", "I"):
        kind = "floating-point" if mode == "F" else "32-bit"
        raise UnsupportedModeError(f"has {kind} samples, whose range is not known")
    if mode == "CMYK":
        return _Layers(image, None)
    if mode in ("YCbCr", "RGBX"):
        return _Layers(image.convert("RGB"), None)
    if mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa"):
        raise UnsupportedModeError(f"has the colour mode {mode}, which is not supported")
    plain = "L" if mode in ("1", "L", "LA", "La") else "RGB"
    if not image.has_transparency_data:
        return _Layers(image.convert(plain), None)
    rgba = image.convert("RGBA")
    # Grey pixels stay grey in RGBA, so that one channel is the luminance, unrounded.
    colour = rgba.getchannel("R") if plain == "L" else rgba.convert("RGB")
    return _Layers(colour, rgba.getchannel("A"))


def _split_16_bit(image: Image.Image) -> _Layers:
    samples = np.asarray(image).astype(np.uint32)
    white = 65535
    tags = getattr(image, "tag_v2", {})  # TIFF only
    bits = tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0]
    if bits < 16:
        white = 2**bits - 1
    grey = (samples * 255 + white // 2) // white
    if tags.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    alpha = None
    if isinstance(transparent, int):
        alpha = Image.fromarray(np.where(samples == transparent, 0, 255).astype(np.uint8))
    return _Layers(Image.fromarray(grey.astype(np.uint8)), alpha)


def _follow_profile(colour: Image.Image, icc_profile: bytes | None, notes: list[ColourNote]) -> Image.Image:
    if icc_profile:
        converted = _convert_by_profile(colour, icc_profile)
        if converted is not None:
            return converted
        notes.append(ColourNote.BAD_PROFILE)
    if colour.mode == "CMYK":
        notes.append(ColourNote.NO_CMYK_PROFILE)
    return colour.convert("RGB")


def _convert_by_profile(colour: Image.Image, icc_profile: bytes) -> Image.Image | None:
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        space = profile.profile.xcolor_space.strip()
        if space == "RGB" and colour.mode == "L":
            colour = colour.convert("RGB")
        if _PROFILE_SPACES[colour.mode] != space:
            return None
        return ImageCms.profileToProfile(
            colour,
            profile,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
