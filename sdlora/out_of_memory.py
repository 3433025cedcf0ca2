"""Too little memory, told as what it is: where it happened, what is saved, and what to change, in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sdlora.cheaper import cheaper_settings
from sdlora.config import TrainConfig
from sdlora.errors import MemoryShortError
from sdlora.precision import Precision

__all__ = ["is_out_of_memory", "telling_out_of_memory"]

_CPU_WORDS = ("can't allocate memory", "not enough memory")


@contextmanager
def telling_out_of_memory(
    config: TrainConfig, precision: Precision, *, doing: str, resolution: int, step: int, run: Path | None = None
) -> Iterator[None]:
    """Turns an out-of-memory error of the block into one that helps. `doing` says what the block does; `run` is the
    run's folder, once there is a state to go on from.

    Raises:
        MemoryShortError: the memory did not suffice.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        lines = cheaper_settings(config, precision=precision.name, resolution=resolution, step=step)
        saved = run is not None and any((run / "state").glob("step-*"))
        advice = f"Go on with: sdlora resume {run} and one of these" if saved else "Start again with one of these"
        told = MemoryShortError(doing, [f"{advice}, the cheapest first:", *(f"  {line}" for line in lines)])
        for note in getattr(error, "__notes__", ()):
            told.add_note(note)
        raise told from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or the system could not give the memory that was asked for."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # PyTorch's CPU allocator raises a plain RuntimeError.
    return any(words in str(error) for words in _CPU_WORDS)
