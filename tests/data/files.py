"""Files for the tests, made from the formats' own definitions where a library would hide what is being tested."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64
WHITE = (255, 255, 255)


def drawing(seed: int = 0, *, size_hw: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """A few rectangles, different for every seed."""
    rng = np.random.default_rng(seed)
    height, width = size_hw
    pixels = np.full((height, width, 3), rng.integers(0, 256, 3), dtype=np.uint8)
    for _ in range(8):
        (top, bottom), (left, right) = (np.sort(rng.integers(0, n + 1, 2)) for n in (height, width))
        pixels[top:bottom, left:right] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def quadrants(size_hw: tuple[int, int] = (64, 96)) -> Image.Image:
    """Red, green / blue, white: tells every rotation and mirroring apart."""
    height, width = size_hw
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.paste((0, 255, 0), (width // 2, 0, width, height // 2))
    image.paste((0, 0, 255), (0, height // 2, width // 2, height))
    image.paste(WHITE, (width // 2, height // 2, width, height))
    return image


def save_drawing(path: Path, seed: int = 0, caption: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing(seed).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    pixels: np.ndarray,
    *,
    colour_type: int,
    bit_depth: int,
    chunks: Sequence[tuple[bytes, bytes]] = (),
    size_wh: tuple[int, int] | None = None,
) -> bytes:
    """A PNG of `pixels` [H, W] or [H, W, C]; `size_wh` lets the header lie."""
    width, height = size_wh or (pixels.shape[1], pixels.shape[0])
    rows = pixels.astype(">u2" if bit_depth == 16 else "u1")
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    middle = b"".join(png_chunk(kind, data) for kind, data in chunks)
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + middle + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    )


def grey_tiff(
    strip: bytes, *, size_hw: tuple[int, int], bits: int, photometric: int = 1, big_endian: bool = False
) -> bytes:
    """An uncompressed grey TIFF with one strip of packed samples."""
    order = ">" if big_endian else "<"
    entries = [
        (256, 4, size_hw[1]),
        (257, 4, size_hw[0]),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, size_hw[0]),
        (279, 4, len(strip)),
    ]
    head = (b"MM" if big_endian else b"II") + struct.pack(order + "HI", 42, 8 + len(strip))
    ifd = struct.pack(order + "H", len(entries))
    for tag, kind, value in entries:
        packed = struct.pack(order + ("HH" if kind == 3 else "I"), *((value, 0) if kind == 3 else (value,)))
        ifd += struct.pack(order + "HHI", tag, kind, 1) + packed
    return head + strip + ifd + bytes(4)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


# ICC.1:2001-04. Colours relative to D50; the columns are sRGB's own primaries, adapted.
_D50 = (0.9642, 1.0, 0.8249)
_RED, _GREEN, _BLUE = (0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)


def linear_brg_profile() -> bytes:
    """An RGB profile without gamma whose "red" is sRGB's blue and whose "blue" is sRGB's red."""
    curve = b"curv" + bytes(4) + struct.pack(">I", 0)
    tags = {b"rXYZ": _xyz(_BLUE), b"gXYZ": _xyz(_GREEN), b"bXYZ": _xyz(_RED)}
    tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def linear_grey_profile() -> bytes:
    """A grey profile without gamma."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": b"curv" + bytes(4) + struct.pack(">I", 0)})


def cyan_is_red_profile(*, black_lightness: int = 0) -> bytes:
    """A CMYK profile of an odd printer: cyan ink prints sRGB's pure red, every other ink a black of that L*.

    It is of the scanner class, since a printer's black point is sought through a reverse table that is not here.
    """
    white, red, black = (100, 0, 0), (54.29, 80.81, 69.89), (black_lightness, 0, 0)
    grid = b""
    for node in range(16):  # the first channel, cyan, varies slowest
        lab = white if node == 0 else red if node == 8 else black
        grid += bytes((round(lab[0] * 2.55), round(lab[1]) + 128, round(lab[2]) + 128))
    identity = b"".join(struct.pack(">i", 65536 if i in (0, 4, 8) else 0) for i in range(9))
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + ramp * 4 + grid + ramp * 3
    return _profile(b"scnr", b"CMYK", b"Lab ", {b"A2B0": table, b"A2B1": table})


def _xyz(values: tuple[float, float, float]) -> bytes:
    return b"XYZ " + bytes(4) + _fixed(values)


def _fixed(values: tuple[float, float, float]) -> bytes:
    return struct.pack(">3i", *(round(value * 65536) for value in values))


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"wtpt": _xyz(_D50), **tags}
    table, data = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(data), b"", 0x02400000, kind, space, connection)
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(4 * 7) + _fixed(_D50)
    return header.ljust(128, b"\0") + table + data


def srgb_encoded(linear: float) -> int:
    """IEC 61966-2-1: linear light in 0-1 to an 8-bit sRGB value."""
    value = 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
    return round(255 * value)
