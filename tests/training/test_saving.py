"""Saves are written beside the loop: they do not hold it up, hold their own step, and their errors end the run."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora import trainer as trainer_module
from sdlora.adapter_file import read_adapter
from sdlora.background import Background
from sdlora.checkpoint import Checkpoint, read_latest_checkpoint, write_checkpoint
from sdlora.errors import CheckpointError
from sdlora.events import CheckpointSaved, RunFinished, StepDone
from sdlora.lora.plan import layer_name
from sdlora.ranking import read_events
from sdlora.run_dir import RunDir
from sdlora.training import resume_run, train_adapter
from tests.tiny import tiny_sd1
from tests.training.helpers import make_config, make_trainer, write_pictures

SECONDS = 20.0
SETTINGS: dict[str, Any] = {"train": {"exposures": 3, "batch_size": 2, "save_every": 2}}  # 6 steps, saves after 2, 4, 6


def hold_states(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[int]]:
    """Keeps every state from the disk until the event is set; the steps whose states were let through in time."""
    let_through, in_time = threading.Event(), []

    def write(folder: Path, checkpoint: Checkpoint) -> Path:
        if let_through.wait(SECONDS):
            in_time.append(checkpoint.step)
        return write_checkpoint(folder, checkpoint)

    monkeypatch.setattr(trainer_module, "write_checkpoint", write)
    return let_through, in_time


def test_steps_go_on_while_a_save_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_through, in_time = hold_states(monkeypatch)
    steps_by_then, saved_after = 0, {}
    for event in make_trainer(tmp_path, **SETTINGS).run():
        if isinstance(event, StepDone):
            steps_by_then = event.step
            if event.step == 4:
                let_through.set()
        if isinstance(event, CheckpointSaved):
            assert Path(event.path).is_file()
            saved_after[event.step] = steps_by_then
    assert saved_after[2] >= 4  # told when it is on the disk, two steps later here
    assert in_time[:2] == [2, 4]


def product(weights: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor:
    return (weights[f"{layer}.up"] @ weights[f"{layer}.down"]).detach()


def test_what_is_written_is_of_its_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_through, _ = hold_states(monkeypatch)
    run = make_trainer(tmp_path, **SETTINGS)
    kept: dict[str, torch.Tensor] = {}
    for event in run.run():
        if isinstance(event, StepDone) and event.step == 2:
            kept = {name: value.detach().clone() for name, value in run._named.items()}
        if isinstance(event, StepDone) and event.step == 3:
            assert any(not torch.equal(kept[name], value) for name, value in run._named.items())
            let_through.set()
        if isinstance(event, CheckpointSaved) and event.step == 2:
            state = read_latest_checkpoint(tmp_path / "state", say=print)
            assert state.step == 2
            assert all(torch.equal(state.tensors[f"lora/{name}"], value) for name, value in kept.items())
            for part, module, pair in read_adapter(event.path).pairs():
                change = pair.up.float() @ pair.down.float()
                then, now = (product(weights, layer_name(part, module)) for weights in (kept, run._named))
                assert (change - then).norm() < 0.01 * then.norm() < (change - now).norm()
            return
    pytest.fail("the save of step 2 was not told")


def test_a_save_that_fails_ends_the_run_with_the_adapter_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = [2]

    def write(folder: Path, checkpoint: Checkpoint) -> Path:
        if checkpoint.step in full:
            full.clear()
            raise CheckpointError("the disk is full")
        return write_checkpoint(folder, checkpoint)

    monkeypatch.setattr(trainer_module, "write_checkpoint", write)
    with pytest.raises(CheckpointError, match="the disk is full") as caught:
        for event in make_trainer(tmp_path, **SETTINGS).run():
            assert not isinstance(event, CheckpointSaved)
    assert "is saved" in caught.value.__notes__[0]
    last = read_latest_checkpoint(tmp_path / "state", say=print)
    assert 2 <= last.step < 6
    assert read_adapter(tmp_path / "ink.safetensors").metadata["sdlora.steps"] == str(last.step)


def test_a_save_that_a_kill_left_untold_is_told_at_resume(tmp_path: Path) -> None:
    tiny_sd1().save_pretrained(tmp_path / "base")
    config = make_config(
        model={"base": str(tmp_path / "base"), "precision": "fp32"},
        data={"path": write_pictures(tmp_path / "data"), "trigger": "ink style"},
        output={"dir": tmp_path, "name": "ink"},
        train={"exposures": 2, "save_every": 1},
    )
    run = RunDir(train_adapter(config).parent, "ink")
    whole = [event.step for event in read_events(run) if isinstance(event, CheckpointSaved)]
    lines = run.events_path.read_text().splitlines(keepends=True)
    untold = [line for line in lines if json.loads(line)["event"] not in ("CheckpointSaved", "RunFinished")]
    run.events_path.write_text("".join(untold))
    facts = json.loads((run.state_dir / f"step-{max(whole) + 1:06d}" / "state.json").read_text())
    assert facts["trainer"]["finished"]
    resume_run(run.root, overrides=["train.exposures=3"], allow_change=True)
    events = read_events(run)
    assert [event.step for event in events if isinstance(event, CheckpointSaved)][: len(whole)] == whole
    assert isinstance(events[-1], RunFinished)


def test_work_waits_for_the_one_before_and_its_error_is_raised_once() -> None:
    done: list[str] = []
    gate = threading.Event()

    def first() -> None:
        gate.wait(SECONDS)
        done.append("first")

    def broken() -> None:
        raise OSError("broken")

    work = Background("test")
    work.start(first)
    assert work.is_busy and not done
    gate.set()
    work.start(lambda: done.append("second"))
    work.wait()
    assert done == ["first", "second"] and not work.is_busy
    work.start(broken)
    with pytest.raises(OSError, match="broken"):
        work.wait()
    work.wait()
    work.close()
