"""What a run needs to go on exactly where it stopped, on disk so that no crash leaves half of it.

    RUN/state/step-000400/  state.safetensors  state.json  manifest.json

Only safetensors and JSON: nothing that could run code. A folder is written under another name, forced to the disk, and
renamed; only then are older ones removed. The manifest holds size and SHA-256 of the two files: what does not fit it is
passed over for the one before, and that is said.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from sdlora.errors import CheckpointError
from sdlora.run_dir import sync_folder

__all__ = ["Checkpoint", "read_latest_checkpoint", "sweep_leftovers", "write_checkpoint"]

SCHEMA = 1
KEPT = 2
_TENSORS, _FACTS, _MANIFEST = "state.safetensors", "state.json", "manifest.json"
_WRITING, _DELETING = ".writing-", ".deleting-"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state after `step` steps: named tensors on the CPU, and everything else as JSON values."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes `folder/step-NNNNNN` and then removes all but the newest two; returns its path.

    Raises:
        CheckpointError: it cannot be written (a full disk, say); the ones before are left as they are.
    """
    target = folder / f"step-{checkpoint.step:06d}"
    temporary = folder / f"{_WRITING}{target.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        contents = {
            _TENSORS: safetensors.torch.save(checkpoint.tensors),
            _FACTS: _to_json(checkpoint.facts),
        }
        listing = {name: {"size": len(data), "sha256": _sha256(data)} for name, data in contents.items()}
        contents[_MANIFEST] = _to_json({"schema": SCHEMA, "step": checkpoint.step, "files": listing})
        for name, data in contents.items():
            _write_through(temporary / name, data)
        sync_folder(temporary)
        _remove(target)
        temporary.rename(target)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{target}: the state of step {checkpoint.step} cannot be written ({error.strerror}). Free some space on "
            "that disk; the state saved before is untouched."
        ) from error
    for old in _saved(folder)[:-KEPT]:
        _remove(old)
    return target


def read_latest_checkpoint(folder: Path, *, say: Callable[[str], None]) -> Checkpoint:
    """The newest state that fits its manifest; `say` hears of every newer one that does not.

    Raises:
        CheckpointError: there is none, or the newest was written by a newer version of sdlora.
    """
    for path in reversed(_saved(folder)):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            say(f"{path} is damaged and passed over ({error}).")
    raise CheckpointError(f"{folder.parent} holds no saved state to go on from. Start it again with `sdlora train`.")


def sweep_leftovers(folder: Path) -> None:
    """Removes what an interrupted write or removal left; only for the holder of the run's lock."""
    for prefix in (_WRITING, _DELETING):
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


def _saved(folder: Path) -> list[Path]:
    """Oldest first."""
    numbered = [(path.name.removeprefix("step-"), path) for path in folder.glob("step-*")]
    return [path for _, path in sorted((int(number), path) for number, path in numbered if number.isdecimal())]


def _read(path: Path) -> Checkpoint:
    manifest = json.loads((path / _MANIFEST).read_bytes())
    if manifest["schema"] > SCHEMA:
        raise CheckpointError(f"{path} was written by a newer sdlora. Update with `pip install -U sdlora`.")
    contents = {name: (path / name).read_bytes() for name in (_TENSORS, _FACTS)}
    for name, data in contents.items():
        known = manifest["files"][name]
        if len(data) != known["size"] or _sha256(data) != known["sha256"]:
            raise ValueError(f"{name} is not what was written")
    return Checkpoint(
        step=manifest["step"],
        tensors=safetensors.torch.load(contents[_TENSORS]),
        facts=json.loads(contents[_FACTS]),
    )


def _to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode("utf-8")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_through(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    """Renames first, so that a half-removed folder is never taken for a whole one."""
    if path.exists():
        doomed = path.with_name(f"{_DELETING}{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
