"""One picture file to upright sRGB pixels, or one clear problem. What a file is, its bytes say, not its name.

Files come from strangers: only five decoders may run, the size is judged by the header before any pixel is decoded,
and whatever a decoder raises over damaged bytes comes out as one `DatasetError`.
"""

from __future__ import annotations

import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

from sdlora.data.colour import ColourNote, UnsupportedModeError, opacity, to_srgb
from sdlora.data.names import shown_name
from sdlora.errors import DatasetError, Problem

__all__ = [
    "MAX_PIXELS",
    "SUFFIXES",
    "DecodedImage",
    "decode_alpha",
    "decode_image",
    "decode_with_notes",
    "read_header",
    "sniff_format",
]

MAX_PIXELS = 64_000_000

SUFFIXES = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
}
"""The accepted formats and the usual ends of their names."""

# GIF is opened only to tell an animation from a still; neither is accepted.
_OPENED_FORMATS = (*SUFFIXES, "GIF")

# EXIF 2.32, tag 0x0112: what turns the stored picture upright. Rotations of Pillow run counter-clockwise.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)

# What Pillow's decoders let through on damaged or hostile bytes.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_ACCEPTED_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", 0, "PNG"),
    (b"\xff\xd8\xff", 0, "JPEG"),
    (b"WEBP", 8, "WEBP"),
    (b"BM", 0, "BMP"),
    (b"II*\0", 0, "TIFF"),
    (b"MM\0*", 0, "TIFF"),
)

_FOREIGN_MAGIC = (
    (b"version https://git-lfs", 0, "a Git LFS pointer, not the picture"),
    (b"<svg", 0, "an SVG drawing"),
    (b"<?xml", 0, "an XML or SVG file"),
    (b"<!doctype html", 0, "a web page"),
    (b"<html", 0, "a web page"),
    (b"%!ps", 0, "a PostScript file"),
    (b"%pdf", 0, "a PDF document"),
    (b"8bps", 0, "a Photoshop document"),
    (b"ftypavif", 4, "an AVIF picture"),
    (b"ftyphei", 4, "a HEIC picture"),
    (b"ftypmif1", 4, "a HEIC picture"),
    (b"\0\0\0\x0cjxl ", 0, "a JPEG XL picture"),
    (b"\xff\x0a", 0, "a JPEG XL picture"),
    (b"pk\x03\x04", 0, "a ZIP archive"),
)


@dataclass(frozen=True)
class DecodedImage:
    """A decoded picture: RGB, upright, sRGB; its file format; and what was decided on the way."""

    image: Image.Image
    format: str
    notes: tuple[ColourNote, ...]


def decode_image(
    path: Path, *, background: tuple[int, int, int] = (255, 255, 255), max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The picture at `path`: mode RGB, turned upright by its EXIF tag, in sRGB, transparency laid on `background`.

    Accepts still PNG, JPEG, WEBP, BMP and TIFF files of at most `max_pixels`. Raises `DatasetError` with one problem.
    """
    return decode_with_notes(path, background=background, max_pixels=max_pixels).image


def decode_with_notes(path: Path, *, background: tuple[int, int, int], max_pixels: int) -> DecodedImage:
    """As `decode_image`, together with the format and the notes."""
    with _loaded(path, max_pixels) as image:
        rgb, notes = to_srgb(image, background=background)
        return DecodedImage(image=_upright(rgb, image), format=_format(image), notes=notes)


def decode_alpha(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """How opaque each pixel of the picture at `path` is: mode L, upright, white where nothing shines through.

    Raises `DatasetError` as `decode_image` does.
    """
    with _loaded(path, max_pixels) as image:
        return _upright(opacity(image), image)


def read_header(path: Path, *, max_pixels: int) -> tuple[str, tuple[int, int]]:
    """(format, size_hw after EXIF rotation) of the picture at `path`, its pixels mostly left alone.

    Raises `DatasetError` for what a header can tell: not a picture, too large, animated.
    """
    with _opened(path, max_pixels) as image:
        width, height = image.size
        swapped = _orientation(image) in _SWAPS_SIDES
        return _format(image), (width, height) if swapped else (height, width)


def sniff_format(path: Path) -> str | None:
    """The accepted format that the first bytes of `path` announce, or None; also None if it cannot be read."""
    try:
        head = _first_bytes(path)
    except OSError:
        return None
    announced = _match(head, _ACCEPTED_MAGIC)
    # "BM" alone may begin any text; the reserved bytes behind the size do not.
    return None if announced == "BMP" and head[6:10] != bytes(4) else announced


@contextmanager
def _loaded(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """The picture at `path` with its pixels, as they are stored."""
    with _opened(path, max_pixels) as image:
        image.load()
        try:
            yield image
        except UnsupportedModeError as error:
            raise _error(path, f"{error}.", "Save it as 8-bit or 16-bit RGB or grey.") from error


def _upright(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """`pixels` turned as the EXIF tag of `image` says."""
    method = _UPRIGHT.get(_orientation(image))
    return pixels if method is None else pixels.transpose(method)


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """The picture at `path`, header read and judged; every failure, also of the `with` body, as `DatasetError`."""
    try:
        # A named pipe would block for ever when opened.
        if not stat.S_ISREG(path.stat().st_mode):
            raise _error(path, "is not a regular file.", "Remove it or replace it by a picture file.")
        with warnings.catch_warnings():
            # Pillow warns of big pictures and odd tags; our own limit and the decoded pixels decide.
            warnings.simplefilter("ignore")
            with path.open("rb") as file, Image.open(file, formats=_OPENED_FORMATS) as image:
                _judge_header(path, image, max_pixels)
                yield image
    except UnidentifiedImageError as error:
        raise _unidentified(path) from error
    except Image.DecompressionBombError as error:
        raise _too_large(path, "too many", max_pixels) from error
    except PermissionError as error:
        raise _error(path, "may not be read: permission denied.", "Change its permissions.") from error
    except _DECODER_ERRORS as error:
        # The system's errors carry a number; those of the decoders do not.
        if isinstance(error, OSError) and error.errno is not None:
            raise _error(path, f"cannot be read: {error.strerror}.", "Check that the file is there.") from error
        reason = str(error).strip().rstrip(".") or type(error).__name__
        remedy = "The file is damaged or incomplete: save or download it again, or remove it."
        raise _error(path, f"cannot be decoded: {reason}.", remedy) from error


def _judge_header(path: Path, image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise _too_large(path, f"{width} x {height}", max_pixels)
    # MPO is what phones write: a JPEG with further views or a gain map behind it, the picture itself first.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        kind = "pages" if image.format == "TIFF" else "frames"
        verb = "holds" if image.format == "TIFF" else "is animated: it has"
        raise _error(path, f"{verb} {frames} {kind}.", "Save the one you want as a still picture.")
    if image.format not in (*SUFFIXES, "MPO"):
        raise _error(path, f"is a {image.format} file.", f"Save it as {_accepted()}.")


def _unidentified(path: Path) -> DatasetError:
    head = _first_bytes(path)
    if not head:
        return _error(path, "is empty (0 bytes).", "Save or download it again, or remove it.")
    announced = _match(head, _ACCEPTED_MAGIC)
    if announced is not None:
        remedy = "The file is damaged or incomplete: save or download it again, or remove it."
        return _error(path, f"begins like {announced}, but its header cannot be read.", remedy)
    foreign = _match(head.lower().lstrip(), _FOREIGN_MAGIC) or _match(head.lower(), _FOREIGN_MAGIC)
    what = f"is {foreign}." if foreign else f"is no {_accepted()} picture."
    return _error(path, what, f"Save it as {_accepted()}, or remove it.")


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def _match(head: bytes, table: tuple[tuple[bytes, int, str], ...]) -> str | None:
    return next((name for magic, offset, name in table if head.startswith(magic, offset)), None)


def _format(image: Image.Image) -> str:
    return "JPEG" if image.format == "MPO" else str(image.format)


def _orientation(image: Image.Image) -> int:
    # Pillow turns a TIFF itself, and gives its upright size from the start.
    if image.format == "TIFF":
        return 1
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if isinstance(orientation, int) else 1


def _too_large(path: Path, size: str, max_pixels: int) -> DatasetError:
    what = f"has {size} pixels; the limit is {max_pixels / 1e6:g} million."
    return _error(path, what, "Scale it down: training needs far less.")


def _accepted() -> str:
    *first, last = SUFFIXES
    return f"{', '.join(first)} or {last}"


def _error(path: Path, what: str, remedy: str) -> DatasetError:
    return DatasetError(shown_name(path), [Problem(shown_name(path), what, remedy)])
