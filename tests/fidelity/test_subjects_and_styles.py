"""Subjects are found again among their true drawings; styles are told apart; colours are CIELAB."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sdlora.fidelity import StyleClassifier, rgb_to_lab, subject_ranks, subject_topk
from tests.fidelity.test_distance import load


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((119, 119, 119), (50.03, 0, 0)),
    ],
)
def test_lab_equals_published_values(rgb: tuple[int, int, int], lab: tuple[float, float, float]) -> None:
    assert rgb_to_lab(np.array(rgb) / 255) == pytest.approx(np.array(lab), abs=0.02)


def test_a_softened_drawing_is_nearest_to_its_own() -> None:
    drawings = load("blob-emoji")
    soft = [image.resize((128, 128)).filter(ImageFilter.GaussianBlur(2)) for image in drawings]
    assert subject_topk(soft, drawings, k=1) == 1
    assert subject_topk(soft, drawings, k=1, edges=True) == 1


def test_edges_find_a_subject_across_styles_better_than_chance_and_than_colours() -> None:
    blob, contrast = load("blob-emoji"), load("high-contrast")
    by_edges = subject_topk(contrast, blob, k=5, edges=True)
    assert by_edges > 2 * 5 / len(blob)
    assert by_edges > subject_topk(contrast, blob, k=5)


def test_a_rank_counts_the_nearer_candidates() -> None:
    shades = [Image.new("RGB", (128, 128), (value, value, value)) for value in (0, 100, 255)]
    assert subject_ranks([shades[1], shades[1], shades[0]], shades) == [2, 1, 3]
    assert subject_topk([shades[1], shades[1], shades[0]], shades, k=2) == pytest.approx(2 / 3)


def test_every_picture_needs_its_own_candidate() -> None:
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="its own"):
        subject_ranks([picture], [picture, picture])


def test_the_two_styles_are_told_apart_on_subjects_never_seen() -> None:
    classifier = StyleClassifier({"blob": load("blob-emoji"), "contrast": load("high-contrast")})
    told = classifier.nearest_of([*load("blob-emoji/heldout"), *load("high-contrast/heldout")])
    right = [name == true for name, true in zip(told, ["blob"] * 40 + ["contrast"] * 40, strict=True)]
    assert sum(right) >= 76
