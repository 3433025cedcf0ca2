"""Pixels as the VAE gets them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdlora.data.buckets import CropPlan, make_buckets, plan_crop
from sdlora.data.dataset import ImageCaption
from sdlora.data.pixels import load_pixels
from sdlora.errors import DatasetError
from tests.data.files import drawing, quadrants


def test_a_picture_of_its_buckets_size_keeps_every_pixel(tmp_path: Path) -> None:
    image = drawing(5, size_hw=(128, 128))
    image.save(tmp_path / "a.png")
    example = ImageCaption(tmp_path / "a.png", "a", (128, 128))
    pixel_values = load_pixels(example, plan_crop((128, 128), make_buckets(128)), background=(0, 0, 0))
    assert pixel_values.dtype == np.float32
    assert pixel_values.shape == (3, 128, 128)
    assert pixel_values.min() >= -1
    assert pixel_values.max() <= 1
    np.testing.assert_allclose((pixel_values.transpose(1, 2, 0) + 1) * 127.5, np.asarray(image), atol=1e-4)


def test_black_is_minus_one_and_white_is_one(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (0, 0, 32, 64))
    image.save(tmp_path / "a.png")
    example = ImageCaption(tmp_path / "a.png", "a", (64, 64))
    pixel_values = load_pixels(example, CropPlan((64, 64), (64, 64), (0, 0)))
    assert (pixel_values[:, 0, 0], pixel_values[:, 0, 63]) == (pytest.approx([1] * 3), pytest.approx([-1] * 3))


def test_the_crop_is_taken_where_the_plan_says(tmp_path: Path) -> None:
    quadrants((64, 128)).save(tmp_path / "a.png")
    example = ImageCaption(tmp_path / "a.png", "a", (64, 128))
    right = load_pixels(example, CropPlan((64, 64), (64, 128), (0, 64)))
    assert (right[0, :32] == -1).all()  # green above, so no red
    assert (right[1] == 1).all()
    lower = load_pixels(example, CropPlan((64, 64), (128, 256), (64, 0)))
    assert (lower[2, 8:] == 1).all()  # blue below
    assert lower.shape == (3, 64, 64)


def test_transparent_parts_take_the_background(tmp_path: Path) -> None:
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "a.png")
    example = ImageCaption(tmp_path / "a.png", "a", (64, 64))
    pixel_values = load_pixels(example, CropPlan((64, 64), (64, 64), (0, 0)), background=(0, 255, 0))
    assert pixel_values[:, 3, 3].tolist() == [-1, 1, -1]


def test_a_file_that_changed_since_the_scan_is_an_error(tmp_path: Path) -> None:
    drawing(size_hw=(64, 80)).save(tmp_path / "a.png")
    example = ImageCaption(tmp_path / "a.png", "a", (80, 64))
    with pytest.raises(DatasetError, match=r"a\.png: changed its size"):
        load_pixels(example, CropPlan((64, 64), (64, 64), (0, 0)))
