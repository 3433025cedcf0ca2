"""A run's numbers in TensorBoard, read back by its own reader; and what must never leave the computer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import TrackioTracker, WandBTracker

from sdlora import trackers
from sdlora.errors import TrainingError
from sdlora.events import Event, StepDone, ValidationDone
from sdlora.run_dir import RunDir
from sdlora.trackers import require_tracker, told_settings, tracker_for
from sdlora.training import train_adapter
from tests.tiny import tiny_sd1
from tests.training.helpers import make_config, write_pictures


def test_tensorboard_holds_the_numbers_of_the_run_and_nothing_private(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tiny_sd1().save_pretrained(tmp_path / "base")
    config = make_config(
        model={"base": str(tmp_path / "base"), "precision": "fp32"},
        data={"path": write_pictures(tmp_path / "secret pictures"), "trigger": "my secret style"},
        output={"dir": tmp_path, "name": "ink", "tracker": "tensorboard"},
        train={"exposures": 1, "batch_size": 1},
        validation={"path": write_pictures(tmp_path / "others", count=1), "timesteps": 1},
    )
    events: list[Event] = []
    path = train_adapter(config, observers=[events.append])
    logs = path.parent / "tensorboard"
    found = reader.EventAccumulator(str(logs))
    found.Reload()
    for name, kind, of in (
        ("loss", StepDone, "loss"),
        ("learning_rate", StepDone, "learning_rate"),
        ("held_out_loss", ValidationDone, "held_out_loss"),
    ):
        told = [(event.step, getattr(event, of)) for event in events if isinstance(event, kind)]
        read = [(scalar.step, scalar.value) for scalar in found.Scalars(name)]
        assert [step for step, _ in read] == [step for step, _ in told]
        assert [value for _, value in read] == pytest.approx([value for _, value in told], rel=1e-6)
    content = b"".join(file.read_bytes() for file in logs.rglob("*") if file.is_file())
    assert b"train.learning_rate" in content
    for private in ("secret", "thing 0", "0.png", str(tmp_path)):
        assert private.encode() not in content


def test_only_numbers_and_choices_of_the_training_are_told() -> None:
    config = make_config(
        data={"path": "pictures", "trigger": "ink style"},
        lora={"rank": 4, "targets": ["my.*.pattern"]},
        preview={"prompts": ["a secret"]},
        output={"name": "private"},
    )
    told = told_settings(config)
    assert told["lora.rank"] == 4 and told["optimizer.name"] == "adamw" and told["train.learning_rate"] == 1e-3
    assert {name.split(".")[0] for name in told} == {"train", "lora", "objective", "optimizer"}
    assert "lora.targets" not in told


def test_nothing_is_tracked_unless_asked_for(tmp_path: Path) -> None:
    assert tracker_for(make_config(), RunDir(tmp_path, "ink")) is None


@pytest.mark.parametrize(("name", "tracker_class"), [("wandb", WandBTracker), ("trackio", TrackioTracker)])
def test_the_other_trackers_get_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tracker_class: Any
) -> None:
    logged: list[tuple[dict[str, float], int]] = []
    options: list[dict[str, Any]] = []
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda package: object())
    monkeypatch.setattr(tracker_class, "start", lambda self: options.append(self.init_kwargs))
    monkeypatch.setattr(tracker_class, "store_init_configuration", lambda self, values: None)
    monkeypatch.setattr(tracker_class, "log", lambda self, values, step: logged.append((values, step)))
    observer = tracker_for(make_config(output={"tracker": name}), RunDir(tmp_path, "ink"))
    assert observer is not None
    observer(ValidationDone(step=3, held_out_loss=0.5, training_loss=0.25))
    assert logged == [({"held_out_loss": 0.5, "training_loss": 0.25}, 3)]
    if name == "wandb":
        assert options[0]["settings"]["x_disable_meta"] is True and options[0]["save_code"] is False


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_told_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(TrainingError, match=rf"{name} is not installed. `pip install sdlora\[{name}\]`"):
        require_tracker(name)
    require_tracker("none")
