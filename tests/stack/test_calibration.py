"""The recommended weight: the knee of a curve, on curves whose knee is known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sdlora.calibration import calibrate, calibration_metadata, effect, recommended_weight, roughness

WEIGHTS = [step / 5 for step in range(9)]


def test_the_knee_of_two_straight_lines_is_where_they_meet() -> None:
    result = calibrate(WEIGHTS, [min(w, 0.6) + 0.05 * w for w in WEIGHTS], [1.0] * 9)
    assert result.recommended == pytest.approx(0.6)
    # Half of the effect at the knee, which is reached on a straight line from 0.
    assert result.usable == (pytest.approx(0.3), 1.6)


def test_a_straight_curve_has_no_knee_and_1_is_recommended() -> None:
    assert calibrate(WEIGHTS, [0.1 * w for w in WEIGHTS], [1.0] * 9).recommended == 1.0


def test_weights_that_tear_the_pictures_are_neither_usable_nor_recommended() -> None:
    result = calibrate(WEIGHTS, [min(w, 0.4) + 0.01 * w for w in WEIGHTS], [1, 1, 1, 1.5, 1.9, 2.1, 3, 5, float("nan")])
    assert result.recommended == pytest.approx(0.4)
    assert result.usable[1] == pytest.approx(0.8)


@pytest.mark.parametrize("weights", [[0.0, 1.0], [0.1, 0.5, 1.0], [0.0, 1.0, 0.5]])
def test_weights_must_ascend_from_0(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="ascend from 0"):
        calibrate(weights, [0.0] * len(weights), [1.0] * len(weights))


def test_effect_and_roughness_of_known_pictures() -> None:
    black, grey = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), (51, 51, 51))
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8)[:, None], (4, 8))).convert("RGB")
    assert effect([black, grey], [black, grey]) == 0
    assert effect([grey, black], [black, black]) == pytest.approx(0.2 / 2**0.5)
    assert roughness([grey]) == 0
    assert roughness([stripes]) == pytest.approx(0.5)  # every step down the picture, none along it


def test_what_is_stored_is_read_again_and_nonsense_is_1() -> None:
    result = calibrate(WEIGHTS, [min(w, 0.6) for w in WEIGHTS], [1.0] * 9)
    header = calibration_metadata(result)
    assert header == {"sdlora.recommended_weight": "0.6", "sdlora.usable_weights": "0.3..1.6"}
    assert recommended_weight(header) == 0.6
    for text in ("loud", "nan", "inf"):
        assert recommended_weight({"sdlora.recommended_weight": text}) == 1.0
    assert recommended_weight({}) == 1.0
