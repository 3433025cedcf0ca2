"""Subjects are found again among their true drawings; colours are CIELAB."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from sdlora.fidelity import rgb_to_lab, subject_ranks, subject_topk
from tests.fidelity.art import load, softened


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


@pytest.mark.parametrize("edges", [False, True])
def test_a_softened_drawing_is_nearest_to_its_own(edges: bool) -> None:
    drawings = load("blob-emoji")
    assert subject_topk(softened(drawings, 2), drawings, k=1, edges=edges) == 1


def test_edges_do_not_ask_which_side_is_dark() -> None:
    drawings = load("high-contrast")
    negatives = [ImageOps.invert(image) for image in drawings]
    assert subject_topk(negatives, drawings, k=1, edges=True) > 0.9
    assert subject_topk(negatives, drawings, k=1) < 0.3


def test_edges_find_a_subject_across_styles_better_than_chance_and_than_colours() -> None:
    blob, contrast = load("blob-emoji"), load("high-contrast")
    by_edges = subject_topk(contrast, blob, k=5, edges=True)
    assert by_edges > 4 * 5 / len(blob)
    assert by_edges > subject_topk(contrast, blob, k=5)


def test_a_rank_counts_the_nearer_candidates() -> None:
    shades = [Image.new("RGB", (128, 128), (value, value, value)) for value in (0, 100, 255)]
    assert subject_ranks([shades[1], shades[1], shades[0]], shades) == [2, 1, 3]
    assert subject_topk([shades[1], shades[1], shades[0]], shades, k=2) == pytest.approx(2 / 3)


def test_every_picture_needs_its_own_candidate() -> None:
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="its own"):
        subject_ranks([picture], [picture, picture])
