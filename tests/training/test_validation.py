"""Held-out pictures: measured with fixed noise, they change nothing in the run but which save is its result."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sdlora.adapter_file import read_adapter
from sdlora.checkpoint import read_latest_checkpoint
from sdlora.errors import DatasetError
from sdlora.events import CheckpointSaved, Event, RunFinished, StepDone, ValidationDone
from sdlora.families import components_from_pipeline
from sdlora.trainer import Trainer
from sdlora.training import train_adapter
from tests.tiny import tiny_sd1
from tests.training.helpers import make_config, make_trainer, make_training_set, write_pictures

SIX_STEPS = {"exposures": 3, "batch_size": 2, "save_every": 2}


def validated(folder: Path, **settings: Any) -> Trainer:
    components = components_from_pipeline(tiny_sd1())
    held_out = make_training_set(components, seed=7)
    settings["train"] = SIX_STEPS | settings.get("train", {})
    settings["validation"] = {"timesteps": 1} | settings.get("validation", {})
    return make_trainer(folder, components=components, validation_set=held_out, **settings)


def of(kind: type, events: list[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_it_is_measured_before_the_first_step_and_at_every_save(tmp_path: Path) -> None:
    events = list(validated(tmp_path).run())
    measured = of(ValidationDone, events)
    assert [event.step for event in measured] == [0, 2, 4, 6]
    assert [event.step for event in of(CheckpointSaved, events)] == [2, 4, 6]
    assert len({event.held_out_loss for event in measured}) == 4
    assert all(event.training_loss != event.held_out_loss for event in measured)


def test_it_changes_nothing_in_the_training(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lora": {"rank": 4, "dropout": 0.2}}
    plain = of(StepDone, list(make_trainer(tmp_path / "a", train=SIX_STEPS, **settings).run()))
    with_it = of(StepDone, list(validated(tmp_path / "b", **settings).run()))
    assert [event.loss for event in plain] == [event.loss for event in with_it]


@pytest.mark.slow
def test_the_measure_does_not_depend_on_batch_size_nor_on_the_step(tmp_path: Path) -> None:
    losses = []
    for batch_size, rate in ((2, 1e-12), (1, 1e-12)):
        trainer = validated(tmp_path / str(batch_size), train={"batch_size": batch_size, "learning_rate": rate})
        losses.append([event.held_out_loss for event in of(ValidationDone, list(trainer.run()))])
    # An adapter that does not learn is measured the same each time.
    assert losses[0] == pytest.approx([losses[0][0]] * len(losses[0]), rel=1e-6)
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)


@pytest.mark.parametrize(
    ("lowest", "settings", "best", "published"),
    [(2, {}, 2, 2), (6, {}, 6, 6), (2, {"keep_best": False}, 2, 6), (2, {"tolerance": 2.1}, 4, 4)],
)
def test_the_best_save_becomes_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowest: int, settings: dict[str, Any], best: int, published: int
) -> None:
    trainer = validated(tmp_path, validation=settings)

    def loss(images: Any, count: int) -> float:
        return abs(trainer.state.step - lowest) + 1.0

    monkeypatch.setattr(trainer, "_fixed_loss", loss)
    (finished,) = of(RunFinished, list(trainer.run()))
    assert finished.best_step == best
    result = read_adapter(tmp_path / "ink.safetensors")
    name = f"step-{published:06d}"
    saved = read_adapter(tmp_path / "checkpoints" / name / f"ink-{name}.safetensors")
    assert result.tensor_sha256 == saved.tensor_sha256
    assert (result.metadata["sdlora.steps"], result.metadata["ss_output_name"]) == (str(published), "ink")


def test_what_was_measured_survives_a_stop(tmp_path: Path) -> None:
    whole = of(RunFinished, list(validated(tmp_path / "whole").run()))
    trainer = validated(tmp_path / "parts")
    for event in trainer.run():
        if isinstance(event, StepDone) and event.step == 3:
            trainer.request_stop()
    checkpoint = read_latest_checkpoint(tmp_path / "parts" / "state", say=print)
    rest = list(validated(tmp_path / "parts", checkpoint=checkpoint).run())
    assert [event.step for event in of(ValidationDone, rest)] == [4, 6]
    assert of(RunFinished, rest)[0].best_step == whole[0].best_step
    hashes = [read_adapter(tmp_path / folder / "ink.safetensors").tensor_sha256 for folder in ("whole", "parts")]
    assert hashes[0] == hashes[1]


def test_a_folder_is_held_out_by_its_path(tmp_path: Path) -> None:
    tiny_sd1().save_pretrained(tmp_path / "base")
    data = write_pictures(tmp_path / "data")
    config = make_config(
        model={"base": str(tmp_path / "base"), "precision": "fp32"},
        data={"path": data, "trigger": "ink style"},
        output={"dir": tmp_path, "name": "ink"},
        validation={"path": write_pictures(tmp_path / "others", count=2)},
    )
    events: list[Event] = []
    train_adapter(config, observers=[events.append])
    assert len(of(ValidationDone, events)) == 2
    same = config.model_copy(update={"validation": config.validation.model_copy(update={"path": data})})
    with pytest.raises(DatasetError, match="trained on"):
        train_adapter(same)
    shutil.rmtree(tmp_path / "others")
    with pytest.raises(DatasetError, match="does not exist"):
        train_adapter(config)
