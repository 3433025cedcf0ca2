"""A run's numbers to TensorBoard, Weights & Biases or Trackio, by accelerate's trackers. Off unless asked for.

Numbers and choices only: never a caption, a prompt, a path, a picture or a token.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from accelerate import PartialState
from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

from sdlora.config import TrainConfig
from sdlora.errors import TrainingError
from sdlora.events import Event, StepDone, ValidationDone
from sdlora.run_dir import RunDir

__all__ = ["TrackerObserver", "require_tracker", "told_settings", "tracker_for"]

_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
_TOLD_SECTIONS = ("train", "lora", "objective", "optimizer")
_PROJECT = "sdlora"
# What would send the command line, the host, the code and the installed packages along.
_WANDB_QUIET = {"x_disable_meta": True, "x_save_requirements": False, "disable_git": True, "console": "off"}


class TrackerObserver:
    """Passes on steps and validations; `close` when the run is over."""

    def __init__(self, tracker: Any, config: TrainConfig):
        self._tracker = tracker
        tracker.start()
        tracker.store_init_configuration(told_settings(config))

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone):
            values = {
                "loss": event.loss,
                "learning_rate": event.learning_rate,
                "grad_norm": event.grad_norm,
                "images_per_second": event.images_per_second,
                "skipped": event.skipped,
            }
        elif isinstance(event, ValidationDone):
            values = {
                "held_out_loss": event.held_out_loss,
                "training_loss": event.training_loss,
                "copying": event.copying,
            }
        else:
            return
        self._tracker.log({name: value for name, value in values.items() if value is not None}, step=event.step)

    def close(self) -> None:
        """Sends or writes what is left."""
        self._tracker.finish()


def tracker_for(config: TrainConfig, run_dir: RunDir) -> TrackerObserver | None:
    """The tracker that `output.tracker` asks for; None for "none".

    Raises:
        TrainingError: its package is not installed.
    """
    name = config.output.tracker
    if name == "none":
        return None
    require_tracker(name)
    # accelerate's trackers ask it which process they are in.
    PartialState()
    if name == "tensorboard":
        return TrackerObserver(TensorBoardTracker("tensorboard", str(run_dir.root)), config)
    if name == "wandb":
        return TrackerObserver(WandBTracker(_PROJECT, settings=dict(_WANDB_QUIET), save_code=False), config)
    return TrackerObserver(TrackioTracker(_PROJECT), config)


def require_tracker(name: str) -> None:
    """
    Raises:
        TrainingError: the tracker's package is not installed.
    """
    if name != "none" and not any(importlib.util.find_spec(package) for package in _PACKAGES[name]):
        raise TrainingError(f'{name} is not installed. `pip install sdlora[{name}]`, or output.tracker = "none".')


def told_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that leave this computer: numbers and choices of four sections."""
    told: dict[str, Any] = {}
    for section, values in config.model_dump(mode="json").items():
        if section not in _TOLD_SECTIONS:
            continue
        for name, value in values.items():
            if isinstance(value, bool | int | float) or (isinstance(value, str) and name != "targets"):
                told[f"{section}.{name}"] = value
    return told
