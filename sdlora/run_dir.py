"""The folder of one run: what its files are called, and how they are written so that none is ever half there.

outputs/NAME[-2]/  config.toml  dataset.json  events.jsonl  NAME.safetensors  ranking.json  .lock
    checkpoints/step-000400/NAME-step-000400.safetensors    the adapter, to draw with
    state/step-000400/                                      what is needed to go on exactly (checkpoint.py)
    previews/step-000400/0.png
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sdlora.errors import ConfigError, Problem

__all__ = ["RunDir", "create_run_dir", "run_of_preview", "sync_folder", "write_text_atomic"]

_MAX_SAME_NAME = 10_000


@dataclass(frozen=True)
class RunDir:
    """The names of a run's files. Makes no folder by itself."""

    root: Path
    name: str

    @property
    def config_path(self) -> Path:
        """The resolved settings."""
        return self.root / "config.toml"

    @property
    def dataset_path(self) -> Path:
        """Which pictures and captions it was started with."""
        return self.root / "dataset.json"

    @property
    def state_dir(self) -> Path:
        """What is needed to go on."""
        return self.root / "state"

    @property
    def lock_path(self) -> Path:
        """Held by the process that works in this folder; let go of by the system when it dies."""
        return self.root / ".lock"

    @property
    def events_path(self) -> Path:
        """One line of JSON per event."""
        return self.root / "events.jsonl"

    @property
    def ranking_path(self) -> Path:
        """Its saves, the best first."""
        return self.root / "ranking.json"

    @property
    def adapter_path(self) -> Path:
        """The result of the run."""
        return self.root / f"{self.name}.safetensors"

    def checkpoint_dir(self, step: int) -> Path:
        """The folder of what is saved at a step; folders sort by step."""
        return self.root / "checkpoints" / f"step-{step:06d}"

    def checkpoint_adapter_path(self, step: int) -> Path:
        """The adapter saved at a step. Its name is unique, as generation tools go by file names."""
        return self.checkpoint_dir(step) / f"{self.name}-step-{step:06d}.safetensors"

    def saved_steps(self) -> list[int]:
        """The steps whose adapter is there, ascending."""
        numbers = [folder.name.removeprefix("step-") for folder in (self.root / "checkpoints").glob("step-*")]
        steps = sorted(int(number) for number in numbers if number.isdecimal())
        return [step for step in steps if self.checkpoint_adapter_path(step).is_file()]

    def preview_path(self, step: int, index: int) -> Path:
        """The picture of preview prompt `index` at a step."""
        return self.root / "previews" / f"step-{step:06d}" / f"{index}.png"

    def drawn_previews(self, step: int) -> dict[int, Path]:
        """The pictures drawn with the adapter saved at a step, by their prompts' index.

        One that is older than the file is of another adapter: the run went on from a state before it.
        """
        adapter = self.checkpoint_adapter_path(step)
        if not adapter.is_file():
            return {}
        saved = adapter.stat().st_mtime_ns
        pictures = [path for path in self.preview_path(step, 0).parent.glob("*.png") if path.stem.isdecimal()]
        return {int(path.stem): path for path in sorted(pictures) if path.stat().st_mtime_ns >= saved}

    def undrawn_steps(self, num_prompts: int) -> list[int]:
        """The saved steps that lack a preview of one of so many prompts, ascending."""
        return [step for step in self.saved_steps() if not self.drawn_previews(step).keys() >= set(range(num_prompts))]


def run_of_preview(picture: Path) -> Path | None:
    """The folder of the run that a picture is a preview of."""
    parents = picture.resolve().parents
    is_preview = len(parents) > 2 and parents[1].name == "previews" and (parents[2] / "config.toml").is_file()
    return parents[2] if is_preview else None


def create_run_dir(parent: Path, name: str) -> RunDir:
    """A new, empty run folder `parent/name`, or `parent/name-2`, `-3`, ... if that has something in it.

    Raises:
        ConfigError: the folder cannot be made.
    """
    for number in range(1, _MAX_SAME_NAME):
        root = parent / (name if number == 1 else f"{name}-{number}")
        try:
            root.mkdir(parents=True, exist_ok=True)
            if not any(root.iterdir()):
                return RunDir(root, name)
        except FileExistsError:
            # A file of that name.
            continue
        except OSError as error:
            problem = Problem("output.dir", f"{root} cannot be made ({error.strerror}).", "Choose another folder.")
            raise ConfigError("the settings", [problem]) from error
    raise ConfigError("the settings", [Problem("output.name", f"{parent} is full of runs called {name!r}.")])


def write_text_atomic(path: Path, text: str) -> None:
    """Writes UTF-8 text with plain line ends; a reader finds the old file or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes the renames in a folder survive a power cut; Windows cannot open folders and needs no such call."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    # The only portable way to read the umask is to set it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
