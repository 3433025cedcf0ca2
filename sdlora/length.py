"""How long a run is: from exposures per image to steps, warm-up and saves, with the arithmetic in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sdlora.config import TrainConfig

__all__ = ["LengthPlan", "plan_length"]

DEFAULT_SAVES = 5
SAVES_TO_STOP_BY = 20


@dataclass(frozen=True)
class LengthPlan:
    """`steps` optimizer steps, the first `warmup_steps` of them warm-up, a save after each of `save_steps`
    (ascending, the last is `steps`); `explanation` is the arithmetic for a person to read."""

    steps: int
    warmup_steps: int
    save_steps: tuple[int, ...]
    explanation: str


def plan_length(
    num_images_with_repeats: int, config: TrainConfig, *, examples_per_step: int | None = None
) -> LengthPlan:
    """The length of a run over that many images, each counted as often as its folder repeats it.

    `examples_per_step` is what all processes see in a step (None: there is one process).

    Raises:
        ValueError: there are no images.
    """
    if num_images_with_repeats < 1:
        raise ValueError("a run needs at least one image")
    train = config.train
    exposures = num_images_with_repeats * train.exposures
    alone = train.batch_size * train.gradient_accumulation
    per_step = examples_per_step or alone
    steps = math.ceil(exposures / per_step)
    warmup_steps = round(steps * train.warmup_fraction)
    saves = DEFAULT_SAVES if config.validation.stop == "never" else SAVES_TO_STOP_BY
    save_every = train.save_every or math.ceil(steps / saves)
    save_steps = (*range(save_every, steps, save_every), steps)
    accumulated = f" x {train.gradient_accumulation} accumulated" if train.gradient_accumulation > 1 else ""
    explained = f"{train.batch_size}{accumulated}" if per_step == alone else f"{per_step}"
    explanation = (
        f"{num_images_with_repeats} images x {train.exposures} exposures = {exposures} pictures seen; "
        f"at {explained} a step that is {steps} steps, "
        f"{warmup_steps} of them warm-up ({train.warmup_fraction:.0%}), "
        f"with {len(save_steps)} {'save' if len(save_steps) == 1 else 'saves'} (every {min(save_every, steps)} steps)."
    )
    return LengthPlan(steps, warmup_steps, save_steps, explanation)
