"""The unbiased distance is none for one style, whatever is drawn in it, and the gap closed is told by it."""

from __future__ import annotations

import numpy as np
import pytest

from sdlora.fidelity import (
    MEASURES,
    measure_distances,
    pool_features,
    squared_measures,
    squared_style_distance,
    style_features,
    style_gap_closed,
)
from sdlora.fidelity.gap import SQUARES
from tests.fidelity.art import FOLDERS, load


def test_other_subjects_of_one_style_are_at_no_distance_on_average(each) -> None:
    random = np.random.default_rng(0)
    for style, features in each.items():
        unbiased, plain = [], []
        for _ in range(6):
            order = random.permutation(80)
            one, two = ([features[i] for i in half] for half in (order[:40], order[40:]))
            unbiased.append([square / SQUARES[name] for name, square in squared_measures(one, two).items()])
            distances = measure_distances(pool_features(one), pool_features(two))
            plain.append([distance**2 / SQUARES[name] for name, distance in distances.items()])
        assert np.abs(np.mean(unbiased, axis=0)).max() < 0.2, style
        # The plain distance of the same sets is never 0: what they show is measured as well.
        assert abs(np.mean(unbiased)) < np.mean(plain) / 2, style


def test_the_same_subjects_in_two_styles_are_far_apart_in_every_measure(each) -> None:
    across = squared_measures(each["blob"][:40], each["contrast"][:40])
    within = squared_measures(each["blob"][:40], each["blob"][40:])
    assert across.keys() == set(MEASURES)
    for name in MEASURES:
        assert across[name] > 3 * abs(within[name]), name


def test_it_is_symmetric_and_the_same_every_time(each) -> None:
    a, b = each["blob"][:10], each["contrast"][:10]
    assert squared_style_distance(a, b) == pytest.approx(squared_style_distance(b, a), rel=1e-6)
    assert squared_measures(a, b) == squared_measures(a, b)


def test_the_subjects_that_two_sets_share_do_not_make_them_nearer(each) -> None:
    # All of the same pictures: the plain distance is 0, this one is as if they were others of the style.
    assert abs(squared_style_distance(each["contrast"][:40], each["contrast"][:40])) < 0.05


def test_the_style_itself_closes_the_gap_with_other_subjects_too(each) -> None:
    without, reference = each["blob"][40:], each["contrast"][40:]
    assert style_gap_closed(each["contrast"][:40], without, reference) > 0.85
    assert style_gap_closed(without, without, reference) == 0
    mixed = [*each["contrast"][:20], *without[20:]]
    assert 0.2 < style_gap_closed(mixed, without, reference) < 0.8
    assert style_gap_closed(without, mixed, reference) < 0


def test_pictures_and_features_measure_alike() -> None:
    pictures = {style: load(folder)[:6] for style, folder in FOLDERS.items()}
    features = {style: [style_features([image]) for image in images] for style, images in pictures.items()}
    assert squared_measures(*pictures.values()) == squared_measures(*features.values())


def test_sets_that_do_not_fit_and_gaps_that_are_not_there_are_refused(each) -> None:
    with pytest.raises(ValueError, match="same subjects"):
        squared_measures(each["blob"][:5], each["blob"][:6])
    with pytest.raises(ValueError, match="at least four"):
        squared_measures(each["blob"][:3], each["contrast"][:3])
    constant = [each["blob"][0]] * 8
    with pytest.raises(ValueError, match="no gap"):
        style_gap_closed(each["blob"][:8], constant, constant)
