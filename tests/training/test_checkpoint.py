"""A state on disk is whole or not there."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from sdlora import checkpoint as module
from sdlora.checkpoint import Checkpoint, read_latest_checkpoint, sweep_leftovers, write_checkpoint
from sdlora.errors import CheckpointError


def state(step: int) -> Checkpoint:
    return Checkpoint(step, {"lora/a.down": torch.full((2, 3), float(step))}, {"trainer": {"step": step}})


def latest(folder: Path) -> tuple[int, list[str]]:
    said: list[str] = []
    return read_latest_checkpoint(folder, say=said.append).step, said


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, state(3))
    read = read_latest_checkpoint(tmp_path, say=print)
    assert (read.step, read.facts) == (3, {"trainer": {"step": 3}})
    assert torch.equal(read.tensors["lora/a.down"], torch.full((2, 3), 3.0))


def test_only_the_newest_two_are_kept_by_number_and_not_by_name(tmp_path: Path) -> None:
    for step in (7, 999_999, 1_000_000):
        write_checkpoint(tmp_path, state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-999999"]
    assert latest(tmp_path)[0] == 1_000_000


def test_a_step_may_be_written_again(tmp_path: Path) -> None:
    for _ in range(2):
        write_checkpoint(tmp_path, state(3))
    assert latest(tmp_path) == (3, [])


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_what_is_damaged_is_passed_over_and_said(tmp_path: Path, name: str, damage: str) -> None:
    write_checkpoint(tmp_path, state(3))
    victim = write_checkpoint(tmp_path, state(6)) / name
    data = victim.read_bytes()
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(data[:-1] if damage == "cut" else data[:9] + bytes([data[9] ^ 1]) + data[10:])
    if (name, damage) == ("manifest.json", "flipped"):
        victim.write_text(json.dumps({"schema": "one"}))
    step, said = latest(tmp_path)
    assert step == 3
    assert len(said) == 1 and "step-000006 is damaged and passed over" in said[0]


def test_unfinished_folders_are_never_taken_and_are_swept(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, state(3))
    for name in (".writing-step-000006", ".deleting-step-000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{")
    (tmp_path / "step-final").mkdir()
    assert latest(tmp_path) == (3, [])
    sweep_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-final"]


@pytest.mark.parametrize("call", range(3))
def test_a_full_disk_at_any_file_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    write_checkpoint(tmp_path, state(3))
    write_checkpoint(tmp_path, state(6))
    real, calls = module._write_through, []

    def full(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) == call + 1:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    monkeypatch.setattr(module, "_write_through", full)
    with pytest.raises(CheckpointError, match=r"step 9 cannot be written \(No space left on device\). Free some space"):
        write_checkpoint(tmp_path, state(9))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000006"]
    assert latest(tmp_path) == (6, [])


def test_a_newer_format_is_not_guessed_at(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, state(3)) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(CheckpointError, match="newer sdlora"):
        latest(tmp_path)


def test_none_at_all_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no saved state"):
        latest(tmp_path / "state")
