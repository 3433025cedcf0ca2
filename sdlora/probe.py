"""A few real steps on made-up pictures of the largest size: what they take in memory and time on this machine."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sdlora.config import TrainConfig, ValidationConfig
from sdlora.events import StepDone
from sdlora.families import Components, PromptEmbeds
from sdlora.precision import Precision
from sdlora.prepare import LatentDistribution, PreparedExample, TrainingSet, View
from sdlora.run_dir import RunDir
from sdlora.trainer import Trainer

__all__ = ["Probed", "fitting_config", "memory_layouts", "probe_steps"]

_STEPS = 4


@dataclass(frozen=True)
class Probed:
    """What one step took."""

    seconds: float
    """The median, without the first."""
    peak_bytes: int | None
    """The most that PyTorch held on the GPU; None on a CPU."""


def probe_steps(
    config: TrainConfig, components: Components, precision: Precision, *, target_hw: tuple[int, int]
) -> Probed:
    """Trains four steps on random latents of that size (in pixels) in a temporary folder; the base stays as it is.

    Raises:
        torch.OutOfMemoryError: they do not fit.
    """
    per_step = config.train.batch_size * config.train.gradient_accumulation
    settings = {
        "train": config.train.model_copy(update={"exposures": _STEPS, "log_every": 1, "save_every": None}),
        "validation": ValidationConfig(),
    }
    config = config.model_copy(update=settings)
    training_set = _made_up(components, target_hw, per_step)
    on_gpu = components.unet.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = [time.perf_counter()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            config=config,
            components=components.without_encoders(keep_text=config.lora.text_encoder),
            training_set=training_set,
            run_dir=RunDir(Path(folder), "probe"),
            precision=precision,
        )
        times += [time.perf_counter() for event in trainer.run() if isinstance(event, StepDone)]
    seconds = [end - start for start, end in itertools.pairwise(times[1:])]
    return Probed(statistics.median(seconds), torch.cuda.max_memory_allocated() if on_gpu else None)


def memory_layouts(config: TrainConfig) -> Sequence[TrainConfig]:
    """The same run laid out for less and less memory: smaller batches, more of them; then with checkpointing."""
    train, total = config.train, config.train.batch_size * config.train.gradient_accumulation
    layouts = []
    for checkpointing in sorted({config.model.gradient_checkpointing, True}):
        for size in range(train.batch_size, 0, -1):
            if total % size:
                continue
            update = {"batch_size": size, "gradient_accumulation": total // size}
            model = config.model.model_copy(update={"gradient_checkpointing": checkpointing})
            layouts.append(config.model_copy(update={"train": train.model_copy(update=update), "model": model}))
    return layouts


def fitting_config(
    config: TrainConfig, components: Components, precision: Precision, *, target_hw: tuple[int, int]
) -> tuple[TrainConfig, Probed] | None:
    """The first of `memory_layouts` whose steps fit the GPU, and what they took; None if none does."""
    for layout in memory_layouts(config):
        try:
            return layout, probe_steps(layout, components, precision, target_hw=target_hw)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return None


def _made_up(components: Components, target_hw: tuple[int, int], count: int) -> TrainingSet:
    captions = components.family.encode_prompts(components, ["a picture"]).to("cpu", torch.float32)
    factor = components.default_resolution // int(components.unet.config.sample_size)
    shape = (4, target_hw[0] // factor, target_hw[1] // factor)
    example = PreparedExample(
        name="made up",
        views=(View(LatentDistribution(mean=torch.zeros(shape), std=torch.ones(shape))),),
        mirrored_views=(),
        caption_rows=(1,),
        original_hw=target_hw,
        target_hw=target_hw,
    )
    rows = PromptEmbeds.concat([captions, captions])
    examples = tuple(replace(example, name=f"made up {n}") for n in range(count))
    return TrainingSet(examples, rows, ("", "a picture"), max(target_hw))
