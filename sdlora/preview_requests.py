"""What the training loop asks of whoever draws its previews."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

__all__ = ["Previews"]


class Previews(Protocol):
    """Draws the previews of a run from its saved files."""

    def request(self, step: int, adapter: Path) -> None:
        """Asks for those of `step`, whose adapter lies, complete, at `adapter`."""
        ...

    def ready(self) -> list[tuple[int, Path]]:
        """Step and file of each picture done since the last call; never waits."""
        ...

    def finish(self, is_stopped: Callable[[], bool]) -> Iterator[tuple[int, Path]]:
        """Waits for the rest, unless `is_stopped` says to leave it; the pictures as they are done."""
        ...

    def close(self) -> None:
        """Ends what is being drawn at once. May be called twice; nothing can be asked any more."""
        ...
