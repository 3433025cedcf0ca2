"""Watchers of a run: a bar on a terminal, plain lines elsewhere, and `events.jsonl`. They only look on.

Every one is an observer (callable with an event) and a context manager, so that a bar leaves the terminal as it was:

    with terminal_progress(sys.stderr) as progress:
        train_adapter(config, observers=[progress])
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sdlora.events import CheckpointSaved, Event, PreviewReady, RunFinished, StepDone, ValidationDone, to_json

__all__ = ["JsonlWriter", "PictureBar", "PlainProgress", "ProgressBar", "terminal_progress"]

_SMOOTHING = 0.95


class _Watcher:
    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the terminal or the file; may be called twice."""


class _SmoothLoss:
    """Running mean of the loss, which by itself mostly shows which timesteps were drawn."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, loss: float) -> float:
        self._sum = _SMOOTHING * self._sum + (1 - _SMOOTHING) * loss
        self._weight = _SMOOTHING * self._weight + (1 - _SMOOTHING)
        return self._sum / self._weight


class ProgressBar(_Watcher):
    """A bar with the smoothed loss, the rate and the time left, for a terminal."""

    def __init__(self, console: Console):
        self._loss = _SmoothLoss()
        self._task: TaskID | None = None
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f} · {task.fields[rate]:.1f} images/s · left"),
            TimeRemainingColumn(),
            console=console,
        )

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone):
            loss, rate = self._loss.add(event.loss), event.images_per_second
            if self._task is None:
                self._progress.start()
                self._task = self._progress.add_task("training", total=event.num_steps, loss=loss, rate=rate)
            self._progress.update(self._task, completed=event.step, loss=loss, rate=rate)
            return
        if isinstance(event, RunFinished):
            self.close()
        self._progress.console.print(_sentence(event), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


class PlainProgress(_Watcher):
    """About twenty lines of text over a run, for a log file or a pipe."""

    def __init__(self, stream: TextIO, *, num_lines: int = 20):
        self._stream, self._num_lines, self._loss, self._told = stream, num_lines, _SmoothLoss(), 0

    def __call__(self, event: Event) -> None:
        if not isinstance(event, StepDone):
            self._write(_sentence(event))
            return
        loss = self._loss.add(event.loss)
        share = event.step * self._num_lines // event.num_steps
        if share > self._told:
            self._told = share
            left = event.seconds / event.step * (event.num_steps - event.step)
            self._write(
                f"step {event.step}/{event.num_steps}  loss {loss:.4f}  learning rate {event.learning_rate:.2e}  "
                f"{event.images_per_second:.1f} images/s  {_duration(left)} left"
            )

    def _write(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()


class JsonlWriter(_Watcher):
    """Appends each event to a file as a line of JSON, at once, so that a killed run leaves what it told."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def __call__(self, event: Event) -> None:
        self._file.write(f"{to_json(event)}\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class PictureBar(_Watcher):
    """Which picture is being drawn and how far it is, on a terminal; elsewhere nothing."""

    def __init__(self, stream: TextIO, num_pictures: int):
        console = Console(file=stream)
        self._shown = console.is_terminal and not console.is_dumb_terminal
        self._done, self._num_pictures = 0, num_pictures
        self._progress = Progress(
            TextColumn("picture {task.fields[number]} of {task.fields[pictures]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps · left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def step(self, step: int, num_steps: int) -> None:
        """So many steps of the picture in work are done."""
        if not self._shown:
            return
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("drawing", number=1, pictures=self._num_pictures)
        number = min(self._done + 1, self._num_pictures)
        self._progress.update(self._task, completed=step, total=num_steps, number=number)

    def picture_done(self) -> None:
        """One more file is written."""
        self._done += 1

    def close(self) -> None:
        if self._shown:
            self._progress.stop()


def terminal_progress(stream: TextIO) -> ProgressBar | PlainProgress:
    """A bar if the stream is a terminal that can draw one, else plain lines."""
    console = Console(file=stream)
    return ProgressBar(console) if console.is_terminal and not console.is_dumb_terminal else PlainProgress(stream)


def _sentence(event: CheckpointSaved | PreviewReady | ValidationDone | RunFinished) -> str:
    match event:
        case CheckpointSaved():
            return f"step {event.step}: saved {event.path}"
        case PreviewReady():
            return f"step {event.step}: drew {event.path}"
        case ValidationDone():
            return (
                f"step {event.step}: loss on held-out pictures {event.held_out_loss:.4f}, "
                f"on those trained on {event.training_loss:.4f}"
                + (f" (copying {event.copying:+.1%})" if event.copying is not None else "")
            )
        case RunFinished(stopped_early=True):
            return (
                f"Stopped after step {event.step}. What was learnt so far lies in {event.path} and can be used. "
                f"To go on: sdlora resume {Path(event.path).parent}"
            )
        case RunFinished(converged=True):
            return (
                f"Finished after {event.step} steps in {_duration(event.seconds)}, ended by the held-out loss. "
                f"Best save: step {event.best_step}. {event.path}"
            )
        case RunFinished() if event.best_step is not None:
            return (
                f"Finished {event.step} steps in {_duration(event.seconds)}. Best save by the held-out pictures: "
                f"step {event.best_step}. {event.path}"
            )
        case RunFinished():
            return f"Finished {event.step} steps in {_duration(event.seconds)}: {event.path}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
