"""The distances measure style and not subject, on the two real styles of the repository."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from sdlora.fidelity import MEASURES, measure_distances, style_distance, style_gap_closed

DATASETS = Path(__file__).parents[2] / "datasets"


def load(folder: str) -> list[Image.Image]:
    """In the order of the file names; both styles show the same subjects in the same order."""
    pictures = []
    for path in sorted((DATASETS / folder).glob("*.png")):
        with Image.open(path) as image:
            pictures.append(image.convert("RGB"))
    return pictures


@pytest.fixture(scope="module")
def blob() -> list[Image.Image]:
    return load("blob-emoji")


@pytest.fixture(scope="module")
def contrast() -> list[Image.Image]:
    return load("high-contrast")


@pytest.fixture(scope="module")
def other_blob() -> list[Image.Image]:
    return load("blob-emoji/heldout")


@pytest.fixture(scope="module")
def other_contrast() -> list[Image.Image]:
    return load("high-contrast/heldout")


def test_each_measure_puts_the_same_style_nearer_than_the_same_subjects(
    blob, contrast, other_blob, other_contrast
) -> None:
    across = measure_distances(blob[:20], contrast[:20])
    colourful = measure_distances(blob[:20], other_blob[:20])
    black = measure_distances(contrast[:20], other_contrast[:20])
    for name in MEASURES:
        assert max(colourful[name], black[name]) < across[name] / 2, name


def test_the_unit_is_the_distance_of_the_two_datasets(blob, contrast) -> None:
    assert style_distance(blob, contrast) == pytest.approx(1, rel=0.02)


def test_a_set_has_no_distance_from_itself_and_the_distance_is_symmetric(blob, contrast) -> None:
    assert style_distance(blob, blob) == 0
    assert style_distance(blob[:20], contrast[:20]) == style_distance(contrast[:20], blob[:20])


def test_the_gap_closes_as_pictures_blend_towards_the_style(blob, contrast, other_contrast) -> None:
    blends = [[Image.blend(a, b, share) for a, b in zip(blob[:20], contrast[:20], strict=True)] for share in (0.3, 1.0)]
    closed = [style_gap_closed(blend, blob[:20], other_contrast) for blend in blends]
    assert closed == sorted(closed)
    assert closed[-1] > 0.6
    assert style_gap_closed(blob[:20], blob[:20], other_contrast) == 0


def test_drifting_away_is_told_as_harm(blob, contrast, other_blob) -> None:
    assert style_gap_closed(contrast[:20], blob[:20], other_blob) < -1


def test_a_recompressed_or_slightly_soft_picture_keeps_its_style(blob, contrast) -> None:
    soft = [image.resize((128, 128)).filter(ImageFilter.GaussianBlur(0.7)) for image in blob[:20]]
    assert style_distance(soft, blob[:20]) < 0.25

    def jpeg(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        return Image.open(buffer)

    assert style_distance([jpeg(image) for image in blob[:20]], blob[:20]) < 0.05


def test_stronger_blur_is_further_away(blob) -> None:
    def blurred(radius: float) -> list[Image.Image]:
        return [image.resize((128, 128)).filter(ImageFilter.GaussianBlur(radius)) for image in blob[:20]]

    distances = [style_distance(blurred(radius), blob[:20]) for radius in (0.5, 2)]
    assert distances == sorted(distances)


def test_size_does_not_matter(blob, contrast) -> None:
    small = [image.resize((128, 128), Image.Resampling.BOX) for image in blob[:20]]
    assert style_distance(small, blob[:20]) < 0.01


def test_an_empty_set_is_refused(blob) -> None:
    with pytest.raises(ValueError, match="at least one"):
        style_distance([], blob)
