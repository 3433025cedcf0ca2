"""The gate of docs/FIDELITY.md, on eight real styles of the same subjects.

`SDLORA_ART=WORK/art pytest -m slow -s tests/fidelity` after `tools/embedded_base/art.py --out WORK`; five minutes.
"""

from __future__ import annotations

import numpy as np
import pytest

from sdlora.fidelity import (
    MEASURES,
    StyleClassifier,
    StyleFeatures,
    measure_distances,
    pool_features,
    squared_measures,
    style_distance,
    style_features,
    subject_topk,
)
from sdlora.fidelity.gap import SQUARES
from tests.fidelity.art import BASE_STYLES, Drawings, area_under_curve, real_art, recompressed, softened

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
TRIALS, UNBIASED_TRIALS, FOLDS = 40, 12, 5


@pytest.fixture(scope="module")
def art() -> dict[str, Drawings]:
    found = real_art()
    if found is None:
        pytest.skip("SDLORA_ART names no folder of drawings")
    return found


@pytest.fixture(scope="module")
def each(art) -> dict[str, list[StyleFeatures]]:
    return {style: [style_features([image]) for image in images] for style, images in art.items()}


@pytest.mark.parametrize("size", [20, 40, 80])
def test_every_measure_tells_same_style_from_same_subjects(each, size: int) -> None:
    random = np.random.default_rng(0)
    count = len(next(iter(each.values())))
    unbiased = [f"{name}, unbiased" for name in (*MEASURES, "together")]
    same: dict[str, list[float]] = {name: [] for name in (*MEASURES, "together", *unbiased)}
    across: dict[str, list[float]] = {name: [] for name in same}
    for trial in range(TRIALS):
        order = random.permutation(count)
        halves = order[:size], order[size : 2 * size]
        sets = {s: [pool_features([f[i] for i in half]) for half in halves] for s, f in each.items()}
        for style in sets:
            for other in sets:
                kept, second = (same, sets[style][1]) if other == style else (across, sets[other][0])
                for name, value in measure_distances(sets[style][0], second).items():
                    kept[name].append(value)
                kept["together"].append(style_distance(sets[style][0], second))
                if trial >= UNBIASED_TRIALS:
                    continue
                one, two = ([each[style][i] for i in halves[0]], [each[other][i] for i in halves[other == style]])
                squares = squared_measures(one, two)
                for name, square in squares.items():
                    kept[f"{name}, unbiased"].append(square)
                kept["together, unbiased"].append(sum(squares[n] / SQUARES[n] for n in MEASURES) / len(MEASURES))
    for name in same:
        auc, middle = area_under_curve(same[name], across[name]), np.median(across[name])
        ours = np.mean(same[name])
        print(f"{size} pictures, {name}: AUC {auc:.3f}, median of two styles {middle:.4f}, mean of one {ours:.4f}")
        assert auc >= 0.9 or size < 40, name


def test_one_picture_is_named_right_on_subjects_never_seen(art) -> None:
    count = len(art[BASE_STYLES[0]])
    fold = np.random.default_rng(0).permutation(count) % FOLDS
    right: dict[str, list[bool]] = {"as is": [], "blur 0.7": [], "jpeg 90": []}
    for number in range(FOLDS):
        classifier = StyleClassifier(
            {s: [image for image, f in zip(art[s], fold, strict=True) if f != number] for s in BASE_STYLES}
        )
        for style in BASE_STYLES:
            unseen = [image for image, f in zip(art[style], fold, strict=True) if f == number]
            for name, images in zip(right, (unseen, softened(unseen, 0.7), recompressed(unseen)), strict=True):
                right[name] += [told == style for told in classifier.nearest_of(images)]
    for name, hits in right.items():
        print(f"{name}: {np.mean(hits):.3f} of {len(hits)} named right")
        assert np.mean(hits) >= 0.96, name


def test_subjects_are_found_across_styles(art) -> None:
    for style in ("noto-v1", "fluent-emoji-high-contrast"):
        shares = {o: subject_topk(art[style][::3], art[o][::3], k=5, edges=True) for o in BASE_STYLES}
        print(style, {other: round(share, 2) for other, share in shares.items()}, "among", len(art[style][::3]))
        assert min(shares.values()) > 0.3
