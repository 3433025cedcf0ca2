"""One picture's style is named right on subjects never seen, also where styles are alike."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sdlora.fidelity import StyleClassifier, nearest_style
from tests.fidelity.art import Drawings, load, recompressed, softened


def tinted(images: Drawings) -> Drawings:
    """As another artist's slightly other colours: all reds down, all blues up by a little."""
    shift = np.array([-14, 0, 12])
    inked = [np.asarray(image).astype(int) for image in images]
    return [
        Image.fromarray(
            np.where(array.min(-1, keepdims=True) < 245, (array + shift).clip(0, 255), array).astype(np.uint8)
        )
        for array in inked
    ]


@pytest.fixture(scope="module")
def classifier() -> StyleClassifier:
    blob = load("blob-emoji")
    return StyleClassifier({"blob": blob, "tinted": tinted(blob), "contrast": load("high-contrast")})


@pytest.fixture(scope="module")
def heldout() -> dict[str, Drawings]:
    blob = load("blob-emoji/heldout")[:20]
    return {"blob": blob, "tinted": tinted(blob), "contrast": load("high-contrast/heldout")[:20]}


@pytest.mark.parametrize("change", [list, lambda i: softened(i, 0.7), recompressed], ids=["as is", "soft", "jpeg"])
def test_styles_are_told_apart_on_subjects_never_seen(classifier, heldout, change) -> None:
    right = [name == style for style, images in heldout.items() for name in classifier.nearest_of(change(images))]
    assert np.mean(right) >= 0.9
    assert classifier.nearest_of(change(heldout["contrast"])) == ["contrast"] * 20


def test_one_picture_is_named_as_it_is_among_many(classifier, heldout) -> None:
    image = heldout["contrast"][3]
    assert classifier.nearest(image) == "contrast"
    assert nearest_style(image, {"a": heldout["blob"][:5], "b": heldout["contrast"][5:10]}) == "b"


def test_an_empty_picture_is_given_some_style(classifier) -> None:
    assert classifier.nearest(Image.new("RGB", (64, 64), "white")) in classifier.styles


def test_one_style_or_an_empty_one_is_refused(heldout) -> None:
    with pytest.raises(ValueError, match="two or more"):
        StyleClassifier({"blob": heldout["blob"]})
    with pytest.raises(ValueError, match="at least one"):
        StyleClassifier({"blob": heldout["blob"][:2], "none": []})
