"""Every error a user can cause, as a type with data, a message and an exit code.

    SdloraError                     exit code 1
    ├── ConfigError                 2   all problems of a configuration, not the first
    ├── DatasetError                3   all problems of a dataset folder, each with its file
    ├── ModelError                  4   a base model that cannot be found, read or is not supported
    ├── AdapterError                5   an adapter file or an adapter name
    │   ├── AdapterFileError            the file is unreadable, unsafe or malformed
    │   ├── AdapterMismatchError        the file is sound, but made for another model
    │   ├── UnknownAdapterError         no adapter of that name is loaded
    │   └── DuplicateAdapterError       the name is taken
    ├── TrainingError               6   training cannot start or go on
    │   ├── CheckpointError             a saved state cannot be written, read or gone on from
    │   ├── MemoryShortError            the memory of the GPU or the computer does not suffice
    │   ├── NonFiniteError              a NaN or Inf where training would be spoilt by it
    │   └── NothingToTrainError         no module matches the targets
    └── GenerationError             7   a picture cannot be drawn as asked

A message says what, which file, and what to do. Only `cli.main` catches `SdloraError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "AdapterError",
    "AdapterFileError",
    "AdapterMismatchError",
    "CheckpointError",
    "ConfigError",
    "DatasetError",
    "DuplicateAdapterError",
    "GenerationError",
    "MemoryShortError",
    "ModelError",
    "NonFiniteError",
    "NothingToTrainError",
    "Problem",
    "SdloraError",
    "TrainingError",
    "UnknownAdapterError",
]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where (a file or a setting), what, and the remedy."""

    where: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"{self.where}: {self.what}{remedy}"


class SdloraError(Exception):
    """Base of all errors a user can cause; `exit_code` is the process's."""

    exit_code = 1


class _ProblemsError(SdloraError):
    """A heading and every problem found, one a line."""

    noun = "problem"

    def __init__(self, where: str | Path, problems: Sequence[Problem]):
        self.where, self.problems = str(where), tuple(problems)
        count = len(self.problems)
        plural = self.noun if count == 1 else f"{self.noun}s"
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"{count} {plural} in {self.where}:\n{lines}")


class ConfigError(_ProblemsError):
    """The configuration has unknown, impossible or contradictory settings."""

    exit_code = 2


class DatasetError(_ProblemsError):
    """The dataset folder cannot be trained on as it is."""

    exit_code = 3


class ModelError(SdloraError):
    """The base model cannot be had, read, or is of an unsupported family."""

    exit_code = 4


class AdapterError(SdloraError):
    """Something is wrong with an adapter."""

    exit_code = 5


class AdapterFileError(AdapterError):
    """The adapter file is unreadable, unsafe or malformed."""

    def __init__(self, path: str | Path, reason: str):
        self.path, self.reason = Path(path), reason
        super().__init__(f"{self.path}: {reason}")


class AdapterMismatchError(AdapterError):
    """The adapter was made for another model."""

    def __init__(self, path: str | Path, expected: str, found: str):
        self.path, self.expected, self.found = Path(path), expected, found
        super().__init__(f"{self.path}: made for {found}, but the base model is {expected}.")


class UnknownAdapterError(AdapterError):
    """No adapter of that name is loaded."""

    def __init__(self, name: str, loaded: Sequence[str]):
        self.name, self.loaded = name, tuple(loaded)
        known = ", ".join(map(repr, self.loaded)) or "none"
        super().__init__(f"No adapter is called {name!r}. Loaded: {known}.")


class DuplicateAdapterError(AdapterError):
    """An adapter of that name is loaded already."""

    def __init__(self, name: str):
        self.name = name
        super().__init__(f"An adapter called {name!r} is loaded already. Unload it first or give another name.")


class TrainingError(SdloraError):
    """Training cannot start or go on."""

    exit_code = 6


class CheckpointError(TrainingError):
    """The saved state of a run cannot be written, read, or gone on from."""


class NonFiniteError(TrainingError):
    """A NaN or Inf appeared; training stopped before it could spoil the weights."""


class MemoryShortError(TrainingError):
    """The memory did not suffice; `advice` is what to change, the cheapest first."""

    def __init__(self, doing: str, advice: Sequence[str]):
        self.doing, self.advice = doing, tuple(advice)
        super().__init__("\n".join([f"Out of memory while {doing}.", *self.advice]))


class NothingToTrainError(TrainingError):
    """No module of the model matches a target."""

    def __init__(self, targets: Sequence[str]):
        self.targets = tuple(targets)
        super().__init__(f"No layer of the model matches {', '.join(map(repr, self.targets))}. Check lora.targets.")


class GenerationError(SdloraError):
    """A picture cannot be drawn as asked."""

    exit_code = 7
