"""The distances measure style and not subject, and grow with what they are meant to measure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from sdlora.fidelity import (
    MEASURES,
    StyleFeatures,
    measure_distances,
    pool_features,
    style_distance,
    style_features,
)
from sdlora.fidelity.histograms import row_histograms
from tests.fidelity.art import FOLDERS, Drawings, area_under_curve, load, recompressed, softened


@pytest.fixture(scope="module")
def drawings() -> dict[str, Drawings]:
    return {style: load(folder) for style, folder in FOLDERS.items()}


@pytest.fixture(scope="module")
def blob(each) -> StyleFeatures:
    return pool_features(each["blob"][:40])


@pytest.fixture(scope="module")
def contrast(each) -> StyleFeatures:
    return pool_features(each["contrast"][:40])


def test_every_measure_tells_same_style_from_same_subjects(each) -> None:
    random = np.random.default_rng(0)
    same: dict[str, list[float]] = {name: [] for name in MEASURES}
    across: dict[str, list[float]] = {name: [] for name in MEASURES}
    for _ in range(5):
        order = random.permutation(80)
        sets = {
            style: [pool_features([features[i] for i in half]) for half in (order[:40], order[40:])]
            for style, features in each.items()
        }
        for style, other in (("blob", "contrast"), ("contrast", "blob")):
            for name in MEASURES:
                same[name].append(measure_distances(*sets[style])[name])
                across[name].append(measure_distances(sets[style][0], sets[other][0])[name])
    for name in MEASURES:
        assert area_under_curve(same[name], across[name]) == 1, name
        assert max(same[name]) < min(across[name]) / 1.4, name


def test_pooling_the_features_of_each_equals_the_features_of_all(drawings, blob) -> None:
    assert style_distance(style_features(drawings["blob"]), blob) < 1e-3


def test_a_set_has_no_distance_from_itself_and_the_distance_is_symmetric(blob, contrast) -> None:
    assert style_distance(blob, blob) == 0
    assert style_distance(blob, contrast) == style_distance(contrast, blob) > 1


def test_the_same_pictures_measure_the_same_every_time(drawings) -> None:
    first, second = (style_features(drawings["blob"][:3]) for _ in range(2))
    for name in MEASURES:
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_the_distance_to_the_style_shrinks_as_more_pictures_are_drawn_in_it(each, contrast) -> None:
    distances = []
    for share in range(0, 41, 8):
        mixed = pool_features([*each["contrast"][:share], *each["blob"][share:40]])
        distances.append(style_distance(mixed, contrast))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == 0


def test_a_picture_blended_into_the_style_comes_nearer(drawings, each) -> None:
    reference = pool_features(each["contrast"][:10])
    pairs = list(zip(drawings["blob"][:10], drawings["contrast"][:10], strict=True))
    distances = [style_distance([Image.blend(a, b, share) for a, b in pairs], reference) for share in (0.5, 0.8, 0.95)]
    assert distances == sorted(distances, reverse=True)


def test_the_palette_moves_away_as_the_colours_fade_and_hardly_by_blur(drawings, each) -> None:
    images, reference = drawings["blob"][:10], pool_features(each["blob"][:10])

    def palette(changed: Drawings) -> float:
        return measure_distances(changed, reference)["palette"]

    faded = [palette([ImageEnhance.Color(image).enhance(left) for image in images]) for left in (0.9, 0.6, 0)]
    assert faded == sorted(faded)
    assert palette(softened(images, 0.7)) < faded[-1] / 3


def test_patches_and_texture_move_away_as_the_blur_grows(drawings, each) -> None:
    images, reference = drawings["contrast"][:10], pool_features(each["contrast"][:10])
    distances = [measure_distances(softened(images, sigma), reference) for sigma in (0.7, 1.5, 4)]
    for name in ("patches", "texture"):
        values = [distance[name] for distance in distances]
        assert values == sorted(values), name


def test_a_slightly_soft_or_recompressed_set_keeps_its_style(drawings, each, contrast) -> None:
    images, reference = drawings["blob"][:20], pool_features(each["blob"][:20])
    assert style_distance(softened(images, 0.7), reference) < 0.3
    assert style_distance(recompressed(images), reference) < 0.2


def test_size_does_not_matter(drawings, each) -> None:
    images, reference = drawings["blob"][:5], pool_features(each["blob"][:5])
    for size, resample in ((128, Image.Resampling.BOX), (512, Image.Resampling.NEAREST)):
        resized = [image.resize((size, size), resample) for image in images]
        assert style_distance(resized, reference) < 0.02, size


def test_transparency_is_white(drawings) -> None:
    image = drawings["blob"][0]
    clear = Image.new("RGBA", image.size, (0, 0, 0, 0))
    clear.paste(image, mask=Image.fromarray((np.asarray(image).min(axis=2) < 255).astype(np.uint8) * 255))
    assert style_distance([clear], [image]) == 0


def test_empty_pictures_have_a_distance_too(drawings) -> None:
    empty = [Image.new("RGB", (128, 128), "white")]
    assert style_distance(empty, empty) == 0
    assert np.isfinite(style_distance(empty, drawings["blob"][:2]))


def test_the_palette_distance_of_single_colours_grows_to_one() -> None:
    def disc(grey: int) -> Drawings:
        array = np.full((128, 128, 3), 255, dtype=np.uint8)
        array[32:96, 32:96] = grey
        return [Image.fromarray(array)]

    distances = [measure_distances(disc(0), disc(grey))["palette"] for grey in (10, 40, 80, 170)]
    assert distances == sorted(distances)
    assert 0 < distances[0] < 0.5
    assert distances[-1] == pytest.approx(1, abs=0.1)


def test_the_area_between_cumulative_histograms_is_the_wasserstein_distance() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(0, 0.6, (3, 500)), random.normal(0.4, 1.0, (3, 500))
    truth = np.abs(np.sort(a.clip(-4, 4)) - np.sort(b.clip(-4, 4))).mean(axis=1)
    rows = [row_histograms(torch.from_numpy(x).float(), torch.ones(500), reach=4, step=0.125).cumsum(1) for x in (a, b)]
    assert ((rows[0] - rows[1]).abs().sum(1) * 0.125).numpy() == pytest.approx(truth, abs=0.01)


def test_no_pictures_are_refused(blob) -> None:
    with pytest.raises(ValueError, match="at least one"):
        style_distance([], blob)
