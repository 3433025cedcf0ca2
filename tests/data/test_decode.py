"""Every way a picture file can be odd, against pixels that are known."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdlora.data.colour import ColourNote
from sdlora.data.decode import decode_image, decode_with_notes, read_header
from sdlora.errors import DatasetError, Problem
from tests.data.files import (
    WHITE,
    cyan_is_red_profile,
    drawing,
    encoded,
    grey_tiff,
    linear_brg_profile,
    linear_grey_profile,
    png,
    quadrants,
    srgb_encoded,
)

Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(data: bytes) -> Path:
        path = tmp_path / "picture"
        path.write_bytes(data)
        return path

    return write_file


def pixel(path: Path, *, background: tuple[int, int, int] = WHITE, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = decode_image(path, background=background)
    assert image.mode == "RGB"
    return image.getpixel(at)


def notes(path: Path) -> tuple[ColourNote, ...]:
    return decode_with_notes(path, background=WHITE, max_pixels=10**6).notes


def refusal(path: Path, *, max_pixels: int = 10**6) -> Problem:
    with pytest.raises(DatasetError) as caught:
        decode_image(path, max_pixels=max_pixels)
    (problem,) = caught.value.problems
    assert problem.where == path.as_posix()
    assert problem.remedy
    return problem


# Formats


@pytest.mark.parametrize(
    ("file_format", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)
def test_lossless_formats_give_back_every_pixel_whatever_the_file_is_called(
    file_format: str, options: dict[str, object], write: Write
) -> None:
    path = write(encoded(drawing(1), file_format, **options))
    np.testing.assert_array_equal(np.asarray(decode_image(path)), np.asarray(drawing(1)))
    assert read_header(path, max_pixels=10**6) == (file_format, (64, 64))


def test_jpeg_gives_back_flat_colours_nearly(write: Write) -> None:
    path = write(encoded(Image.new("RGB", (64, 64), (200, 100, 50)), "JPEG", quality=95))
    assert pixel(path) == pytest.approx((200, 100, 50), abs=2)


def test_a_phones_jpeg_with_a_second_view_is_a_jpeg(write: Write) -> None:
    data = encoded(Image.new("RGB", (64, 64), "red"), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 64))])
    path = write(data)
    assert pixel(path) == pytest.approx((255, 0, 0), abs=2)
    assert read_header(path, max_pixels=10**6)[0] == "JPEG"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is a PostScript file."),
        (b"8BPS\0\1" + bytes(40), "is a Photoshop document."),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing."),
        (b"  <!DOCTYPE html><html>404</html>", "is a web page."),
        (b"\0\0\0\x20ftypheic" + bytes(40), "is a HEIC picture."),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer, not the picture."),
        (b"hello", "is no PNG, JPEG, WEBP, BMP or TIFF picture."),
        (b"P6\n1 1\n255\nabc", "is no PNG, JPEG, WEBP, BMP or TIFF picture."),
        (b"", "is empty (0 bytes)."),
        (encoded(drawing(), "PNG")[:12], "begins like PNG, but its header cannot be read."),
    ],
)
def test_what_is_no_accepted_picture_is_called_what_it_is(data: bytes, what: str, write: Write) -> None:
    assert refusal(write(data)).what == what


def frames(file_format: str) -> bytes:
    return encoded(drawing(0), file_format, save_all=True, append_images=[drawing(i) for i in (1, 2, 3)])


@pytest.mark.parametrize(
    ("file_format", "what"),
    [
        ("GIF", "is animated: it has 4 frames."),
        ("WEBP", "is animated: it has 4 frames."),
        ("PNG", "is animated: it has 4 frames."),
        ("TIFF", "holds 4 pages."),
    ],
)
def test_an_animation_is_refused(file_format: str, what: str, write: Write) -> None:
    path = write(frames(file_format))
    assert refusal(path).what == what
    with pytest.raises(DatasetError, match="4 "):
        read_header(path, max_pixels=10**6)


def test_a_still_gif_is_refused_as_a_format(write: Write) -> None:
    assert refusal(write(encoded(drawing(), "GIF"))).what == "is a GIF file."


# Damage


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_a_truncated_file_is_refused(file_format: str, part: float, write: Write) -> None:
    data = encoded(drawing(1, size_hw=(96, 96)), file_format)
    problem = refusal(write(data[: int(len(data) * part)]))
    assert "decoded" in problem.what or "header" in problem.what
    assert "damaged or incomplete" in problem.remedy


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_flipped_bytes_give_pixels_or_one_dataset_error(
    file_format: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged = bytearray(encoded(drawing(1, size_hw=(24, 24)), file_format))
    for _ in range(3):
        place = data.draw(st.integers(0, min(len(damaged), 400) - 1))
        damaged[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("flipped") / "picture"
    path.write_bytes(damaged)
    try:
        image = decode_image(path, max_pixels=10**6)
    except DatasetError as error:
        assert len(error.problems) == 1
    else:
        assert image.mode == "RGB"


def test_a_png_with_a_flipped_byte_among_its_pixels_is_never_taken(write: Write) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "PNG")
    start = data.index(b"IDAT") + 4
    for place in range(start, start + 700, 70):
        damaged = data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        assert "cannot be decoded" in refusal(write(damaged)).what


# Size


def test_a_header_that_claims_a_huge_picture_is_refused_before_decoding(write: Write) -> None:
    bomb = png(np.zeros((1, 1, 3)), colour_type=2, bit_depth=8, size_wh=(60_000, 60_000))
    assert "pixels; the limit is 64 million." in refusal(write(bomb), max_pixels=64_000_000).what


def test_the_pixel_limit_is_ours_and_exact(write: Write) -> None:
    # Only the header is there: reaching the pixels would be another error.
    header_only = png(np.zeros((0, 0)), colour_type=0, bit_depth=8, size_wh=(1000, 101))
    assert (
        refusal(write(header_only), max_pixels=100_999).what == "has 1000 x 101 pixels; the limit is 0.100999 million."
    )
    path = write(encoded(Image.new("L", (1000, 101)), "PNG"))
    assert decode_image(path, max_pixels=101_000).size == (1000, 101)


def test_a_picture_between_our_limit_and_pillows_leaks_no_warning(
    write: Write, recwarn: pytest.WarningsRecorder
) -> None:
    header_only = png(np.zeros((0, 0)), colour_type=0, bit_depth=8, size_wh=(10_000, 10_000))
    assert "has 10000 x 10000 pixels" in refusal(write(header_only), max_pixels=64_000_000).what
    assert not recwarn.list


def test_a_png_whose_text_unpacks_to_megabytes_is_refused(write: Write) -> None:
    text = b"Comment\0\0" + zlib.compress(bytes(4_000_000), 1)
    bomb = png(np.zeros((4, 4)), colour_type=0, bit_depth=8, chunks=[(b"zTXt", text)])
    assert "cannot be decoded" in refusal(write(bomb)).what


# Files that are not files


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.timeout(20)
def test_a_named_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert refusal(tmp_path / "a.png").what == "is not a regular file."


def test_a_folder_is_not_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    assert refusal(tmp_path / "a.png").what == "is not a regular file."


def test_a_file_that_is_not_there_is_a_dataset_error(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "a.png").what


def test_a_file_without_permission_is_said_to_be_so(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(encoded(drawing(), "PNG"))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert refusal(path).what == "may not be read: permission denied."


# Rotation


def rotated_by_exif(orientation: int, file_format: str) -> bytes:
    """`quadrants()` stored the way a camera held like that would, with the tag that undoes it (EXIF 2.32, 4.6.4)."""
    upright = np.asarray(quadrants())
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(file_format, {})
    return encoded(Image.fromarray(np.ascontiguousarray(stored)), file_format, exif=exif, **options)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int, file_format: str, write: Write) -> None:
    path = write(rotated_by_exif(orientation, file_format))
    pixels = np.asarray(decode_image(path)).astype(int)
    np.testing.assert_allclose(pixels, np.asarray(quadrants()), atol=6 if file_format == "JPEG" else 0)
    assert read_header(path, max_pixels=10**6)[1] == (64, 96)


def test_a_turned_picture_is_not_turned_again(write: Write, tmp_path: Path) -> None:
    decode_image(write(rotated_by_exif(6, "PNG"))).save(tmp_path / "again.png")
    np.testing.assert_array_equal(np.asarray(decode_image(tmp_path / "again.png")), np.asarray(quadrants()))


def test_an_orientation_that_does_not_exist_is_ignored(write: Write) -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    assert pixel(write(encoded(quadrants(), "PNG", exif=exif))) == (255, 0, 0)


# Bit depth


@pytest.mark.parametrize("sample", [0, 1000, 40_000, 65_535])
def test_16_bit_grey_is_scaled_and_not_clipped(sample: int, write: Write) -> None:
    level = round(sample / 257)
    pixels = np.full((8, 8), sample)
    strip = pixels.astype("<u2").tobytes()
    assert pixel(write(png(pixels, colour_type=0, bit_depth=16))) == (level,) * 3
    assert pixel(write(grey_tiff(strip, size_hw=(8, 8), bits=16))) == (level,) * 3
    big = pixels.astype(">u2").tobytes()
    assert pixel(write(grey_tiff(big, size_hw=(8, 8), bits=16, big_endian=True))) == (level,) * 3


@pytest.mark.parametrize("sample", [0, 1000, 40_000, 65_535])
def test_16_bit_grey_tiff_where_zero_is_white_is_inverted(sample: int, write: Write) -> None:
    strip = np.full((8, 8), sample, dtype="<u2").tobytes()
    path = write(grey_tiff(strip, size_hw=(8, 8), bits=16, photometric=0))
    assert pixel(path) == (255 - round(sample / 257),) * 3


def test_12_bit_grey_reaches_white(write: Write) -> None:
    # Two samples in three bytes: 0xFFF and 0x800.
    path = write(grey_tiff(b"\xff\xf8\x00" * 32, size_hw=(8, 8), bits=12))
    assert pixel(path, at=(0, 0)) == (255,) * 3
    assert pixel(path, at=(1, 0)) == (round(0x800 / 0xFFF * 255),) * 3


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_and_alpha_are_scaled(colour_type: int, channels: int, write: Write) -> None:
    samples = np.full((8, 8, channels), 40_000)
    if colour_type in (4, 6):
        samples[..., -1] = 65_535
    assert pixel(write(png(samples, colour_type=colour_type, bit_depth=16))) == pytest.approx((156,) * 3, abs=1)


@pytest.mark.parametrize(("dtype", "what"), [(np.float32, "floating-point"), (np.int32, "32-bit")])
def test_samples_without_a_known_range_are_refused(dtype: type, what: str, write: Write) -> None:
    path = write(encoded(Image.fromarray(np.full((8, 8), 1, dtype=dtype)), "TIFF"))
    assert refusal(path).what == f"has {what} samples, whose range is not known."


def test_one_bit_pictures_are_black_and_white(write: Write) -> None:
    image = Image.new("1", (8, 8), 1)
    image.putpixel((3, 3), 0)
    path = write(encoded(image, "PNG"))
    assert (pixel(path), pixel(path, at=(3, 3))) == ((255,) * 3, (0,) * 3)


def test_lab_colours_are_refused_rather_than_guessed(write: Write) -> None:
    assert "colour mode LAB" in refusal(write(encoded(Image.new("LAB", (8, 8)), "TIFF"))).what


# Transparency

GREEN = (0, 200, 0)


def blended(colour: int, background: int, alpha: int) -> int:
    return round((colour * alpha + background * (255 - alpha)) / 255)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("alpha", [0, 1, 100, 254, 255])
def test_rgba_is_laid_on_the_background(alpha: int, file_format: str, write: Write) -> None:
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    path = write(encoded(Image.new("RGBA", (8, 8), (250, 20, 90, alpha)), file_format, **options))
    expected = [blended(c, b, alpha) for c, b in zip((250, 20, 90), GREEN, strict=True)]
    assert pixel(path, background=GREEN) == pytest.approx(expected, abs=1)
    assert notes(path) == ((ColourNote.TRANSPARENT,) if alpha < 255 else ())


@pytest.mark.parametrize("alpha", [0, 100, 255])
def test_grey_with_alpha_is_laid_on_the_background(alpha: int, write: Write) -> None:
    path = write(encoded(Image.new("LA", (8, 8), (90, alpha)), "PNG"))
    assert pixel(path, background=GREEN) == pytest.approx([blended(90, b, alpha) for b in GREEN], abs=1)


def test_a_palette_with_one_transparent_colour(write: Write) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((3, 3), 1)
    path = write(encoded(image, "PNG", transparency=1))
    assert pixel(path, background=GREEN) == (255, 0, 0)
    assert pixel(path, background=GREEN, at=(3, 3)) == GREEN


def test_a_palette_with_degrees_of_transparency(write: Write) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    path = write(encoded(image, "PNG", transparency=bytes([255, 100])))
    expected = [blended(c, b, 100) for c, b in zip((0, 0, 255), GREEN, strict=True)]
    assert pixel(path, background=GREEN) == pytest.approx(expected, abs=1)


def test_a_plain_palette_keeps_its_colours(write: Write) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 12, 34, 56])
    path = write(encoded(image, "PNG"))
    assert pixel(path) == (12, 34, 56)
    assert notes(path) == ()


@pytest.mark.parametrize("bit_depth", [8, 16])
def test_a_grey_level_declared_transparent(bit_depth: int, write: Write) -> None:
    pixels = np.full((8, 8), 200 if bit_depth == 8 else 200 * 257)
    pixels[3, 3] = 7
    path = write(png(pixels, colour_type=0, bit_depth=bit_depth, chunks=[(b"tRNS", b"\0\x07")]))
    assert pixel(path, background=GREEN) == (200, 200, 200)
    assert pixel(path, background=GREEN, at=(3, 3)) == GREEN


def test_a_colour_declared_transparent(write: Write) -> None:
    pixels = np.full((8, 8, 3), (9, 8, 7))
    pixels[3, 3] = (1, 2, 3)
    path = write(png(pixels, colour_type=2, bit_depth=8, chunks=[(b"tRNS", b"\0\1\0\2\0\3")]))
    assert pixel(path, background=GREEN) == (9, 8, 7)
    assert pixel(path, background=GREEN, at=(3, 3)) == GREEN


# Colour profiles


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_an_rgb_profile_is_followed(file_format: str, write: Write) -> None:
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(file_format, {})
    image = Image.new("RGB", (64, 64), (128, 60, 10))
    path = write(encoded(image, file_format, icc_profile=linear_brg_profile(), **options))
    expected = [srgb_encoded(value / 255) for value in (10, 60, 128)]
    assert pixel(path) == pytest.approx(expected, abs=4 if file_format == "JPEG" else 2)
    assert notes(path) == ()


def test_a_grey_profile_is_followed(write: Write) -> None:
    path = write(encoded(Image.new("L", (8, 8), 60), "PNG", icc_profile=linear_grey_profile()))
    assert pixel(path) == pytest.approx([srgb_encoded(60 / 255)] * 3, abs=1)


def test_an_rgb_profile_on_a_grey_picture_is_followed(write: Write) -> None:
    path = write(encoded(Image.new("L", (8, 8), 60), "PNG", icc_profile=linear_brg_profile()))
    assert pixel(path) == pytest.approx([srgb_encoded(60 / 255)] * 3, abs=2)


def test_the_profile_is_for_the_colour_and_the_background_is_srgb(write: Write) -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.putpixel((3, 3), (255, 0, 0, 0))
    path = write(encoded(image, "PNG", icc_profile=linear_brg_profile()))
    assert pixel(path, background=GREEN) == pytest.approx((0, 0, 255), abs=2)
    assert pixel(path, background=GREEN, at=(3, 3)) == GREEN


def test_a_palette_picture_follows_its_profile(write: Write) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0])
    assert pixel(write(encoded(image, "PNG", icc_profile=linear_brg_profile()))) == pytest.approx((0, 0, 255), abs=2)


def test_cmyk_follows_its_profile(write: Write) -> None:
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    image.putpixel((3, 3), (0, 0, 0, 0))
    image.putpixel((4, 4), (0, 0, 0, 255))
    path = write(encoded(image, "TIFF", icc_profile=cyan_is_red_profile()))
    assert pixel(path) == pytest.approx((255, 0, 0), abs=4)
    assert pixel(path, at=(3, 3)) == pytest.approx((255, 255, 255), abs=2)
    assert pixel(path, at=(4, 4)) == pytest.approx((0, 0, 0), abs=2)
    assert notes(path) == ()


def test_a_printers_dark_grey_black_becomes_black(write: Write) -> None:
    image = Image.new("CMYK", (8, 8), (255, 255, 255, 255))
    path = write(encoded(image, "TIFF", icc_profile=cyan_is_red_profile(black_lightness=20)))
    assert pixel(path) == pytest.approx((0, 0, 0), abs=2)


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_cmyk_without_a_profile_is_approximated_and_said(file_format: str, write: Write) -> None:
    path = write(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), file_format))
    assert pixel(path) == pytest.approx((255, 0, 0), abs=2)
    assert notes(path) == (ColourNote.NO_CMYK_PROFILE,)


@pytest.mark.parametrize("profile", [b"not a profile", linear_brg_profile()[:200], cyan_is_red_profile()])
def test_a_profile_that_is_broken_or_for_other_colours_is_ignored_and_said(profile: bytes, write: Write) -> None:
    path = write(encoded(Image.new("RGB", (8, 8), (10, 20, 30)), "PNG", icc_profile=profile))
    assert pixel(path) == (10, 20, 30)
    assert notes(path) == (ColourNote.BAD_PROFILE,)
