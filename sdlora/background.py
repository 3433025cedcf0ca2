"""Work beside the training loop, in a thread: one piece at a time, its errors raised where somebody waits for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["Background"]


class Background:
    """A thread for pieces of work of which each waits for the one before.

    The interpreter does not end before a piece that was begun is done.
    """

    def __init__(self, name: str):
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._work: Future[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a piece of work is not done yet."""
        return self._work is not None and not self._work.done()

    def start(self, work: Callable[[], None]) -> None:
        """Begins with it and returns at once, or when the piece before is done; raises what that one raised."""
        self.wait()
        self._work = self._executor.submit(work)

    def wait(self) -> None:
        """Returns when nothing is left to do; raises what the work raised, once."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def close(self) -> None:
        """Waits without raising; nothing can be begun any more."""
        self._executor.shutdown()
