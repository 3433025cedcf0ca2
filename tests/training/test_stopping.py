"""When a run ends by itself, what counts as copying, and the ranked list of its saves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from statistics import pvariance
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from sdlora import cli
from sdlora.adapter_file import read_adapter
from sdlora.checkpoint import read_latest_checkpoint
from sdlora.config import load_config
from sdlora.errors import ConfigError
from sdlora.events import CheckpointSaved, Event, PreviewReady, RunFinished, StepDone, ValidationDone, from_json
from sdlora.families import components_from_pipeline
from sdlora.length import plan_length
from sdlora.ranking import rank_saves
from sdlora.stopping import best_save, copying, has_learnt
from sdlora.trainer import Trainer
from sdlora.training import resume_run, train_adapter
from tests.tiny import tiny_sd1
from tests.training.helpers import make_config, make_trainer, make_training_set, write_pictures

WHITE = (255, 255, 255)


def test_patience_counts_measurements_since_the_lowest() -> None:
    losses = [5.0, 4.0, 3.0, 3.5, 3.2]
    assert not has_learnt(losses, rule="patience", after=3, tolerance=0.0)
    assert has_learnt([*losses, 3.1], rule="patience", after=3, tolerance=0.0)
    assert not has_learnt([*losses, 2.9], rule="patience", after=3, tolerance=0.0)
    assert not has_learnt([*losses, 3.1], rule="never", after=3, tolerance=0.0)
    assert not has_learnt([1.0, 2.0, 3.0], rule="patience", after=3, tolerance=0.0)


def test_a_plateau_is_where_the_last_measurements_vary_little_beside_all() -> None:
    falling = [5.0, 4.0, 3.0, 2.0, 1.0]
    assert not has_learnt(falling, rule="plateau", after=3, tolerance=0.0)
    flat = [*falling, 0.9, 0.95, 0.9]
    assert pvariance(flat[-3:]) / pvariance(flat) < 0.15
    assert has_learnt(flat, rule="plateau", after=3, tolerance=0.0)


def test_a_rise_counts_from_what_is_tolerated() -> None:
    losses = [5.0, 2.0, 2.1]
    assert not has_learnt([*losses, 2.2], rule="rise", after=3, tolerance=0.1)
    assert has_learnt([*losses, 2.21], rule="rise", after=3, tolerance=0.1)
    assert not has_learnt([*losses, 2.21], rule="rise", after=3, tolerance=0.2)
    assert not has_learnt([5.0], rule="rise", after=3, tolerance=0.1)


def test_the_best_save_is_the_latest_that_is_near_enough() -> None:
    losses = {10: 0.6, 20: 0.5, 30: 0.52, 40: 0.55, 50: 0.56}
    assert best_save(losses, tolerance=0.1) == 40
    assert best_save(losses, tolerance=0.0) == 20
    assert best_save({}, tolerance=0.1) is None


def test_copying_is_what_fell_further_on_the_own_pictures() -> None:
    both = {"own_before": 2.0, "held_out_before": 4.0, "held_out_now": 3.0}
    assert copying(own_now=1.5, **both) == pytest.approx(0.0)  # a quarter on both
    assert copying(own_now=1.0, **both) == pytest.approx(0.25)


def test_stopping_needs_held_out_pictures_and_saves_more_often() -> None:
    with pytest.raises(ConfigError, match=r"validation\.stop needs held-out pictures"):
        load_config(None, ["data.path=x", "validation.stop=patience"])
    for source in ("path=y", "share=0.2", "count=2"):
        config = load_config(None, ["data.path=x", "validation.stop=patience", f"validation.{source}"])
        assert len(plan_length(40, config).save_steps) == 20
    assert len(plan_length(40, load_config(None, ["data.path=x"])).save_steps) == 5


def stopping(folder: Path, losses: list[float], *, stop: str = "patience", **settings: Any) -> Trainer:
    """A run of ten steps, saved at each, whose held-out losses are given."""
    components = components_from_pipeline(tiny_sd1())
    held_out = make_training_set(components, seed=7)
    trainer = make_trainer(
        folder,
        components=components,
        validation_set=held_out,
        train={"exposures": 5, "batch_size": 2, "save_every": 1},
        validation={"path": "others", "timesteps": 1, "stop": stop, "stop_after": 2},
        **settings,
    )
    # Held-out pictures and own ones are measured in turn.
    trainer._fixed_loss = lambda images, count: (  # type: ignore[method-assign]
        losses[trainer.state.step] if images is held_out else 1.0
    )
    return trainer


LOSSES = [5.0, 4.0, 3.0, 3.5, 3.4, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_a_run_ends_itself_and_its_best_save_is_the_result(tmp_path: Path) -> None:
    events = list(stopping(tmp_path, LOSSES).run())
    finished = events[-1]
    assert isinstance(finished, RunFinished)
    assert (finished.step, finished.best_step, finished.converged, finished.stopped_early) == (4, 2, True, False)
    assert read_adapter(tmp_path / "ink.safetensors").metadata["sdlora.steps"] == "2"
    copied = [event.copying for event in events if isinstance(event, ValidationDone)]
    assert copied[0] is None
    assert copied[1] == pytest.approx(-0.2)  # own pictures stand still, held-out ones fall by a fifth


def test_a_run_that_ends_itself_is_the_whole_run_up_to_there(tmp_path: Path) -> None:
    list(stopping(tmp_path / "short", LOSSES).run())
    # Falling to the end.
    whole = stopping(tmp_path / "whole", [float(11 - step) for step in range(11)])
    events = list(whole.run())
    assert isinstance(events[-1], RunFinished) and events[-1].step == 10
    hashes = [
        read_adapter(tmp_path / folder / "checkpoints" / name / f"ink-{name}.safetensors").tensor_sha256
        for name in ("step-000002", "step-000004")
        for folder in ("short", "whole")
    ]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]


@pytest.mark.parametrize("stop", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_stop_by_hand_does_not_change_where_it_ends(tmp_path: Path, stop: int) -> None:
    list(stopping(tmp_path / "whole", LOSSES).run())
    first = stopping(tmp_path / "parts", LOSSES)
    for event in first.run():
        if isinstance(event, StepDone) and event.step == stop:
            first.request_stop()
    checkpoint = read_latest_checkpoint(tmp_path / "parts" / "state", say=print)
    assert checkpoint.facts["trainer"]["finished"] is False
    rest = list(stopping(tmp_path / "parts", LOSSES, checkpoint=checkpoint).run())
    assert isinstance(rest[-1], RunFinished) and rest[-1].converged and rest[-1].step == 4
    hashes = [read_adapter(tmp_path / folder / "ink.safetensors").tensor_sha256 for folder in ("whole", "parts")]
    assert hashes[0] == hashes[1]


def test_a_run_that_ended_itself_is_finished_and_killed_before_its_result_is_not(tmp_path: Path) -> None:
    tiny_sd1().save_pretrained(tmp_path / "base")
    config = make_config(
        model={"base": str(tmp_path / "base"), "precision": "fp32"},
        data={"path": write_pictures(tmp_path / "data"), "trigger": "ink style"},
        output={"dir": tmp_path, "name": "ink"},
        # Hardly anything is learnt, so that the first measurements are the lowest or the last ones hardly differ.
        train={"exposures": 12, "batch_size": 3, "learning_rate": 1e-12, "save_every": 1},
        validation={"path": write_pictures(tmp_path / "others", count=2), "stop": "patience", "stop_after": 2},
    )
    events: list[Event] = []
    path = train_adapter(config, observers=[events.append])
    assert isinstance(events[-1], RunFinished) and events[-1].converged and events[-1].step < 12
    said: list[str] = []
    assert resume_run(path.parent, say=said.append) == path
    assert "is finished" in said[0]
    # A kill between the last state and the result: the state of the save says that the run is not finished.
    latest = path.parent / "state" / f"step-{events[-1].step:06d}"
    facts = json.loads((latest / "state.json").read_text())
    facts["trainer"]["finished"] = False
    rewrite(latest, facts)
    path.unlink()
    resume_run(path.parent)
    assert path.exists()
    ranking = json.loads((path.parent / "ranking.json").read_text())
    assert ranking[0]["held_out_loss"] == min(save["held_out_loss"] for save in ranking)
    assert "lowest held-out loss" in ranking[0]["reason"]
    result = CliRunner().invoke(cli.app, ["runs", "rank", str(path.parent), "--json"])
    assert json.loads(result.output) == ranking


@pytest.mark.parametrize(("optimizer", "told"), [("adamw", True), ("adamw-schedulefree", False)])
def test_a_rate_that_would_still_fall_is_told(tmp_path: Path, optimizer: str, told: bool) -> None:
    config = make_config(
        data={"path": write_pictures(tmp_path / "data"), "trigger": "ink style"},
        output={"dir": tmp_path, "name": "ink"},
        train={"exposures": 1},
        optimizer={"name": optimizer},
        validation={"count": 1, "stop": "patience", "timesteps": 1},
    )
    said: list[str] = []
    train_adapter(config, components=components_from_pipeline(tiny_sd1()), say=said.append)
    assert any("its learning rate has hardly fallen" in line for line in said) == told


def test_a_rise_ends_the_run_and_the_latest_good_save_is_its_result(tmp_path: Path) -> None:
    trainer = stopping(tmp_path, [2.0, 1.0, 1.02, 1.1, 1.15, *[9.0] * 6], stop="rise")
    finished = list(trainer.run())[-1]
    assert isinstance(finished, RunFinished) and finished.converged
    assert (finished.step, finished.best_step) == (4, 3)
    assert read_adapter(tmp_path / "ink.safetensors").metadata["sdlora.steps"] == "3"


def rewrite(state: Path, facts: dict[str, Any]) -> None:
    """Puts other facts into a saved state, with a manifest that fits."""
    data = json.dumps(facts).encode()
    (state / "state.json").write_bytes(data)
    manifest = json.loads((state / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (state / "manifest.json").write_text(json.dumps(manifest))


def validated(step: int, held_out: float, own: float) -> ValidationDone:
    return ValidationDone(step=step, held_out_loss=held_out, training_loss=own)


def test_saves_are_ranked_by_held_out_loss_and_told_why() -> None:
    events: list[Event] = [validated(0, 1.0, 1.0)]
    for step, held_out, own in ((10, 0.8, 0.8), (20, 0.75, 0.5), (30, 0.752, 0.74)):
        events += [validated(step, held_out, own), CheckpointSaved(step=step, path=f"{step}.safetensors")]
    ranked = rank_saves(events, [], background=WHITE, tolerance=0.0)
    assert [save.step for save in ranked] == [20, 30, 10]
    assert ranked[0].reason.startswith("lowest held-out loss (0.7500); copies: the loss fell 25% further")
    assert ranked[1].reason == "held-out loss 0.3% above the lowest (0.7520)"
    assert ranked[2].reason == "held-out loss 6.7% above the lowest (0.8000)"
    assert ranked[0].copying == pytest.approx(0.25)
    nearly = rank_saves(events, [], background=WHITE, tolerance=0.01)
    assert [save.step for save in nearly] == [30, 20, 10]
    assert nearly[0].reason == "the latest that is near enough: held-out loss 0.3% above the lowest (0.7520)"


def test_without_held_out_pictures_the_style_of_the_previews_decides(tmp_path: Path) -> None:
    def picture(name: str, colour: tuple[int, int, int]) -> Path:
        image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
        Image.blend(image, Image.new("RGB", (64, 64), colour), 0.7).save(tmp_path / name)
        return tmp_path / name

    style = [picture(f"style{n}.png", (200 + n, 30, 30)) for n in range(3)]
    events: list[Event] = []
    for step, colour in ((1, (30, 30, 200)), (2, (205, 32, 30)), (3, (30, 200, 30))):
        events.append(CheckpointSaved(step=step, path=f"{step}.safetensors"))
        events.append(PreviewReady(step=step, path=str(picture(f"{step}.png", colour))))
    ranked = rank_saves(events, style, background=WHITE, tolerance=0.0)
    assert ranked[0].step == 2
    assert "previews: the nearest:" in ranked[0].reason
    assert ranked[0].style_distance == min(save.style_distance or 9.0 for save in ranked)


def test_without_any_measure_the_latest_is_first() -> None:
    events = [CheckpointSaved(step=1, path="1"), RunFinished(step=2, path="2", seconds=1.0)]
    assert [(save.step, save.reason) for save in rank_saves(events, [], background=WHITE, tolerance=0.0)] == [
        (2, "the latest"),
        (1, "an earlier save; nothing was measured"),
    ]


def test_events_of_before_the_new_fields_are_still_read() -> None:
    old = '{"event": "ValidationDone", "step": 2, "held_out_loss": 0.5, "training_loss": 0.4}'
    assert from_json(old) == validated(2, 0.5, 0.4)
