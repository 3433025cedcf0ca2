"""Previews drawn in a process of its own, so that the training loop never waits for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import IO, Any

import sdlora
from sdlora.config import PreviewConfig
from sdlora.errors import GenerationError
from sdlora.previews.drawing import PreviewTask, preview_task
from sdlora.previews.place import Place
from sdlora.run_dir import RunDir

__all__ = ["PreviewsBeside"]

_SHARED_WORK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What processes that train together are told by; the one that draws is none of them."""
_COMMAND = [sys.executable, "-P", "-m", "sdlora.previews.child"]
"""Without the current folder among those that modules are looked for in."""
_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class _Answer:
    """A picture is done, or a task is over, with what went wrong in it."""

    picture: tuple[int, Path] | None = None
    is_last: bool = False
    trouble: str = ""


class PreviewsBeside:
    """Starts the process at the first request, one for a run. See `Previews`.

    A thread waits for the answers. What cannot be drawn is told by `say`, and the run goes on without it.
    """

    def __init__(
        self,
        *,
        base: str,
        settings: PreviewConfig,
        resolution: int,
        run_dir: RunDir,
        place: Callable[[], Place],
        say: Callable[[str], None],
    ):
        """`base` is any name that `Generator.from_base` takes; `place` is asked when the process is started."""
        self._base, self._settings, self._resolution, self._run_dir = base, settings, resolution, run_dir
        self._place, self._say = place, say
        self._tasks, self._answers = SimpleQueue[PreviewTask | None](), SimpleQueue[_Answer]()
        self._open, self._lock, self._is_closed = 0, Lock(), False
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None
        self._resources = ExitStack()
        self._is_unable = False
        self._thread: Thread | None = None

    def request(self, step: int, adapter: Path) -> None:
        """See `Previews`; returns at once."""
        if self._thread is None:
            self._thread = Thread(target=self._serve, name="sdlora-previews", daemon=True)
            self._thread.start()
        self._open += 1
        self._tasks.put(preview_task(self._run_dir, self._settings, step, adapter))

    def ready(self) -> list[tuple[int, Path]]:
        """See `Previews`."""
        pictures = []
        while not self._answers.empty():
            pictures += self._taken(self._answers.get())
        return pictures

    def finish(self, is_stopped: Callable[[], bool]) -> Iterator[tuple[int, Path]]:
        """See `Previews`."""
        yield from self.ready()
        if self._open:
            self._say("Drawing the last previews.")
        while self._open and not is_stopped():
            try:
                yield from self._taken(self._answers.get(timeout=_LOOK_SECONDS))
            except Empty:
                continue
        if self._open:
            self._say(f"Some previews are left out. To draw them: sdlora resume {self._run_dir.root}")

    def close(self) -> None:
        """See `Previews`."""
        with self._lock:
            self._is_closed, process = True, self._process
        if process is not None:
            process.kill()
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join()
        # What was not sent has no reader any more.
        with suppress(BrokenPipeError):
            self._resources.close()

    def _taken(self, answer: _Answer) -> list[tuple[int, Path]]:
        self._open -= answer.is_last
        if answer.trouble and not self._is_closed:
            self._say(answer.trouble)
        return [answer.picture] if answer.picture is not None else []

    def _serve(self) -> None:
        """The thread: one task after the other."""
        for task in iter(self._tasks.get, None):
            trouble = ""
            if not self._is_unable:
                try:
                    trouble = self._draw(task)
                except Exception as error:  # noqa: BLE001 (a thread that ends untold would be waited for in vain)
                    self._is_unable = True
                    trouble = f"No previews from step {task.step} on: {self._reason() or error}"
            self._answers.put(_Answer(is_last=True, trouble=trouble))

    def _draw(self, task: PreviewTask) -> str:
        """Has it drawn, and returns what went wrong; what it raises says that nothing more can be drawn."""
        if self._process is None:
            self._start()
        pictures = [(prompt, str(path.absolute())) for prompt, path in task.pictures]
        self._tell(step=task.step, adapter=str(task.adapter.absolute()), pictures=pictures)
        while True:
            answer = self._hear()
            if "picture" in answer:
                self._answers.put(_Answer((task.step, task.pictures[answer["picture"]][1])))
            else:
                failed = answer.get("failed")
                return f"No preview of step {task.step}: {failed}" if failed else ""

    def _start(self) -> None:
        place = self._place()
        errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed with the rest)
        self._errors = self._resources.enter_context(errors)
        with self._lock:
            if self._is_closed:
                raise GenerationError("the run is over.")
            process = subprocess.Popen(  # noqa: S603 (our own module)
                _COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(place),
                encoding="utf-8",
                **_apart(),
            )
            self._process = self._resources.enter_context(process)
        self._tell(
            base=self._base,
            device=place.device,
            threads=place.threads,
            settings=self._settings.model_dump_json(),
            resolution=self._resolution,
        )
        unable = self._hear().get("unable")
        if unable:
            raise GenerationError(unable)

    def _tell(self, **fields: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(fields)}\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        """
        Raises:
            GenerationError: the process is gone.
        """
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise GenerationError(f"the process that draws them ended by itself ({self._process.wait()}).")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _reason(self) -> str:
        """The last line of a traceback of the process."""
        if self._errors is None or self._process is None or self._process.poll() in (None, 0):
            return ""
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines and "Traceback" in "".join(lines) else ""


def _environment(place: Place) -> dict[str, str]:
    """This process's, in which the same package is found, and few threads."""
    package = str(Path(sdlora.__file__).parents[1])
    known = os.environ.get("PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in _SHARED_WORK}
    environment["PYTHONPATH"] = os.pathsep.join([package, known] if known else [package])
    if place.threads is not None:
        environment |= {"OMP_NUM_THREADS": str(place.threads), "OMP_WAIT_POLICY": "passive"}
    return environment


def _apart() -> dict[str, Any]:
    """Out of the reach of Ctrl-C at the terminal, and behind everything else.

    A group, not a session of its own: Linux would weigh sessions against each other, whatever the priorities in them.
    """
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.IDLE_PRIORITY_CLASS}
    return {"process_group": 0}
