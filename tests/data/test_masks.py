"""Masks: found by name, checked with the folder, and cut exactly as their pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from sdlora.data.buckets import CropPlan
from sdlora.data.dataset import ImageCaption, scan_dataset
from sdlora.data.masks import load_mask, pool_mask
from sdlora.data.pixels import load_pixels
from sdlora.errors import DatasetError, Problem
from tests.data.files import save_drawing


def save_mask(path: Path, grey: int | np.ndarray = 255, *, size_hw: tuple[int, int] = (64, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(size_hw, grey, dtype=np.uint8) if isinstance(grey, int) else grey
    Image.fromarray(pixels).save(path)
    return path


def problems(root: Path, masks: str | Path) -> dict[str, Problem]:
    with pytest.raises(DatasetError) as caught:
        scan_dataset(root, trigger="ink", masks=str(masks))
    assert all(problem.what and problem.remedy for problem in caught.value.problems)
    return {problem.where: problem for problem in caught.value.problems}


def test_masks_are_found_by_stem_in_the_same_folders_and_are_not_trained_on(tmp_path: Path) -> None:
    for seed, name in enumerate(("a.png", "sub/b.png")):
        save_drawing(tmp_path / name, seed)
        save_mask((tmp_path / "masks" / name).with_suffix(".bmp"))
    dataset = scan_dataset(tmp_path, trigger="ink", masks=str(tmp_path / "masks"))
    found = {e.path.relative_to(tmp_path).as_posix(): e.mask for e in dataset.examples}
    assert found == {"a.png": tmp_path / "masks/a.bmp", "sub/b.png": tmp_path / "masks/sub/b.bmp"}
    assert "left out: masks/" in dataset.layout
    assert [e.mask for e in scan_dataset(tmp_path / "sub", trigger="ink").examples] == [None]


def test_every_fault_of_the_masks_is_in_the_one_error_of_the_dataset(tmp_path: Path) -> None:
    data, masks = tmp_path / "data", tmp_path / "masks"
    for seed, name in enumerate(("black", "broken", "missing", "fine", "small", "twice")):
        save_drawing(data / f"{name}.png", seed)
    (data / "text.png").write_text("no picture")
    save_mask(masks / "black.png", 0)
    (masks / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("fine.png", "twice.png", "twice.bmp"):
        save_mask(masks / name)
    save_mask(masks / "small.png", size_hw=(32, 64))
    found = problems(data, masks)
    assert "has no mask" in found["missing.png"].what and "masks/missing.png" in found["missing.png"].remedy
    assert "is 64 x 32, but small.png is 64 x 64" in found[(masks / "small.png").as_posix()].what
    assert "2 masks: twice.bmp, twice.png" in found["twice.png"].what
    assert "black everywhere" in found[(masks / "black.png").as_posix()].what
    assert "header cannot be read" in found[(masks / "broken.png").as_posix()].what
    assert "text.png" in found and len(found) == 6


def test_a_folder_that_holds_no_masks_is_told(tmp_path: Path) -> None:
    save_drawing(tmp_path / "data" / "a.png")
    assert "is not a folder" in problems(tmp_path / "data", tmp_path / "none")["data.masks"].what
    assert "dataset folder itself" in problems(tmp_path / "data", tmp_path / "data")["data.masks"].what
    assert "none of them has any" in problems(tmp_path / "data", "alpha")["data.masks"].what


def test_masks_without_pictures_are_a_warning(tmp_path: Path) -> None:
    save_drawing(tmp_path / "data" / "a.png")
    for name in "ab":
        save_mask(tmp_path / "masks" / f"{name}.png")
    warnings = scan_dataset(tmp_path / "data", trigger="ink", masks=str(tmp_path / "masks")).warnings
    assert any("without a picture of the same name, ignored: b.png" in problem.what for problem in warnings)


offsets = st.tuples(st.integers(0, 16), st.integers(0, 32))


@settings(max_examples=20, deadline=None)
@given(offsets)
def test_a_mask_is_cut_where_its_picture_is(tmp_path_factory: pytest.TempPathFactory, offset: tuple[int, int]) -> None:
    """The picture is its own mask: what is cut out must be the same, value for value."""
    path = tmp_path_factory.mktemp("masks") / "a.png"
    grey = np.random.default_rng(0).integers(0, 256, (80, 96), dtype=np.uint8)
    Image.fromarray(grey).save(path)
    mask = save_mask(path.with_name("mask.png"), grey)
    plan = CropPlan(bucket_hw=(64, 64), resized_hw=(80, 96), crop_top_left_yx=offset)
    pixels = load_pixels(ImageCaption(path, "a", (80, 96)), plan)
    np.testing.assert_allclose(load_mask(path, mask, (80, 96), plan), (pixels[0] + 1) / 2, atol=1e-6)


def test_a_mask_is_resized_as_its_picture_is(tmp_path: Path) -> None:
    ramp = np.add.outer(np.arange(160) // 2, np.arange(128)).astype(np.uint8)
    path, mask = save_mask(tmp_path / "a.png", ramp), save_mask(tmp_path / "mask.png", ramp)
    plan = CropPlan(bucket_hw=(64, 64), resized_hw=(100, 80), crop_top_left_yx=(20, 8))
    pixels = load_pixels(ImageCaption(path, "a", (160, 128)), plan)
    np.testing.assert_allclose(load_mask(path, mask, (160, 128), plan), (pixels[0] + 1) / 2, atol=1.5 / 255)


def test_hard_edges_do_not_overstep_when_resized(tmp_path: Path) -> None:
    grey = np.zeros((128, 128), dtype=np.uint8)
    grey[:, 64:] = 255
    mask = save_mask(tmp_path / "mask.png", grey)
    cut = load_mask(tmp_path / "a.png", mask, (128, 128), CropPlan((64, 64), (64, 64), (0, 0)))
    assert cut[:, :31].max() == 0 and cut[:, 33:].min() == 1


@pytest.mark.parametrize("orientation", [1, 6])
def test_transparency_is_turned_upright_with_its_picture(tmp_path: Path, orientation: int) -> None:
    image = Image.new("RGBA", (96, 64), (10, 20, 30, 255))
    image.paste((0, 0, 0, 0), (0, 0, 96, 16))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    (example,) = scan_dataset(tmp_path, trigger="ink", masks="alpha").examples
    assert example.mask == example.path
    height, width = example.size_hw
    plan = CropPlan(example.size_hw, example.size_hw, (0, 0))
    mask = load_mask(example.path, example.mask, example.size_hw, plan)
    expected = np.ones((height, width))
    if orientation == 1:
        expected[:16] = 0
    else:
        expected[:, -16:] = 0  # turned a quarter clockwise: what was on top is on the right
    np.testing.assert_array_equal(mask, expected)


def test_pooling_takes_the_mean_of_each_block() -> None:
    mask = np.random.default_rng(0).random((16, 24)).astype(np.float32)
    pooled = pool_mask(mask, (2, 3))
    assert pooled.shape == (2, 3)
    np.testing.assert_allclose(pooled[1, 2], mask[8:, 16:].mean(), rtol=1e-6)
    np.testing.assert_allclose(pooled[0, 1], mask[:8, 8:16].mean(), rtol=1e-6)
