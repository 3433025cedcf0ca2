"""The one length number and what follows from it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.config import TrainConfig
from sdlora.length import plan_length


def config_with(**train: object) -> TrainConfig:
    return TrainConfig.model_validate({"data": {"path": "x"}, "train": train})


def test_the_arithmetic_is_what_it_says() -> None:
    plan = plan_length(40, config_with(exposures=100, batch_size=2, gradient_accumulation=2, warmup_fraction=0.05))
    assert (plan.steps, plan.warmup_steps) == (1000, 50)
    assert plan.save_steps == (200, 400, 600, 800, 1000)
    assert plan.explanation == (
        "40 images x 100 exposures = 4000 pictures seen; at 2 x 2 accumulated a step that is 1000 steps, "
        "50 of them warm-up (5%), with 5 saves (every 200 steps)."
    )


def test_a_chosen_interval_is_kept_and_the_end_is_saved() -> None:
    assert plan_length(10, config_with(exposures=1, batch_size=1, save_every=4)).save_steps == (4, 8, 10)
    assert plan_length(10, config_with(exposures=1, batch_size=1, save_every=99)).save_steps == (10,)


@settings(deadline=None)
@given(
    images=st.integers(1, 500),
    exposures=st.integers(1, 300),
    batch_size=st.integers(1, 16),
    accumulation=st.integers(1, 4),
)
def test_every_image_is_seen_often_enough_and_no_step_is_idle(
    images: int, exposures: int, batch_size: int, accumulation: int
) -> None:
    plan = plan_length(
        images, config_with(exposures=exposures, batch_size=batch_size, gradient_accumulation=accumulation)
    )
    assert 0 <= plan.steps * batch_size * accumulation - images * exposures < batch_size * accumulation
    assert plan.save_steps[-1] == plan.steps
    assert list(plan.save_steps) == sorted(set(plan.save_steps))
    assert 1 <= len(plan.save_steps) <= 5
    assert 0 <= plan.warmup_steps <= plan.steps


def test_no_images_is_wrong_use() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        plan_length(0, config_with())
