"""Look-alikes and repeated captions."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from sdlora.data.similar import fingerprint, group_lookalikes, group_same_captions
from tests.data.files import drawing, encoded

SIZE = (128, 160)


def jpeg(image: Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, "JPEG", quality=40))).convert("RGB")


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.copy(),
        lambda image: image.resize((90, 70)),
        lambda image: image.resize((400, 320)),
        jpeg,
        ImageOps.mirror,
        lambda image: image.point(lambda value: round(value * 0.95)),
    ],
    ids=["copy", "smaller", "larger", "jpeg", "mirrored", "darker"],
)
def test_changed_copies_are_found_among_other_drawings(change: object) -> None:
    originals = [drawing(seed, size_hw=SIZE) for seed in range(12)]
    copies = [change(originals[3]), change(originals[7])]
    assert group_lookalikes([fingerprint(image) for image in originals + copies]) == [[3, 12], [7, 13]]


def test_different_drawings_are_not_look_alikes() -> None:
    assert group_lookalikes([fingerprint(drawing(seed, size_hw=SIZE)) for seed in range(60)]) == []


def test_three_copies_are_one_group() -> None:
    image = drawing(1, size_hw=SIZE)
    prints = [fingerprint(i) for i in (image, drawing(2, size_hw=SIZE), ImageOps.mirror(image), jpeg(image))]
    assert group_lookalikes(prints) == [[0, 2, 3]]


def test_plain_sheets_are_told_apart_by_their_colour() -> None:
    sheets = [Image.new("RGB", SIZE, colour) for colour in ("red", "white", "blue", "white")]
    assert group_lookalikes([fingerprint(sheet) for sheet in sheets]) == [[1, 3]]


def test_the_same_shape_in_another_colour_is_another_picture() -> None:
    pixels = np.full((64, 64, 3), 255, dtype=np.uint8)
    red, green = pixels.copy(), pixels.copy()
    red[8:56, 8:56], green[8:56, 8:56] = (200, 0, 0), (0, 100, 0)
    assert group_lookalikes([fingerprint(Image.fromarray(red)), fingerprint(Image.fromarray(green))]) == []


def test_one_picture_or_none_has_no_look_alike() -> None:
    assert group_lookalikes([]) == []
    assert group_lookalikes([fingerprint(drawing())]) == []


def test_equal_captions_are_grouped_and_empty_ones_are_not() -> None:
    captions = {"a": "Fox", "b": "owl", "c": "fox", "d": "", "e": "", "f": None, "g": None}
    assert group_same_captions(captions) == [["a", "c"]]
