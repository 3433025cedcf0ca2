"""What a training run tells its watchers: small frozen facts, and their form as lines of JSON.

An observer is any callable that takes an event. `events.jsonl` holds one `to_json` line per event; the field `event`
names the type. Nothing here decides anything: saving and stopping are the trainer's own duty.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeAlias

__all__ = [
    "CheckpointSaved",
    "Event",
    "Observer",
    "PreviewReady",
    "RunFinished",
    "StepDone",
    "ValidationDone",
    "from_json",
    "to_json",
]


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One optimizer step is over.

    `step` counts from 1 to `num_steps`. `loss` is the weighted mean over the step's examples, `learning_rate` the one
    used in it, `grad_norm` the norm before clipping (None: the step was skipped, as its gradients overflowed fp16),
    `seconds` the time since training began, `images_per_second` the rate since the previous event, `skipped` the
    number of skipped steps so far.
    """

    step: int
    num_steps: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    seconds: float
    images_per_second: float
    skipped: int = 0


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """The adapter as it is after `step` steps lies, complete and read back, at `path`."""

    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class PreviewReady:
    """A picture drawn with the adapter of `step` lies at `path`."""

    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class ValidationDone:
    """The mean loss after `step` steps on held-out images and on as many training images, with fixed noise.

    While the style is learnt both fall; when only `training_loss` still falls, the images are being copied: `copying`
    is how much further it fell than the other, as a share of the first measurement (None: there is none).
    """

    step: int
    held_out_loss: float
    training_loss: float
    copying: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunFinished:
    """The run is over and its adapter lies at `path`; `stopped_early` says that fewer steps than planned were made.

    `best_step` is the save that the held-out loss speaks for (None: there were no held-out images); unless the run was
    stopped early or told otherwise, `path` is the adapter of that step. `converged` says that the held-out loss ended
    it (`validation.stop`), which is a whole run.
    """

    step: int
    path: str
    seconds: float
    stopped_early: bool = False
    best_step: int | None = None
    converged: bool = False


Event: TypeAlias = StepDone | CheckpointSaved | PreviewReady | ValidationDone | RunFinished
Observer: TypeAlias = Callable[[Event], None]

_TYPES: dict[str, type[Event]] = {
    kind.__name__: kind for kind in (StepDone, CheckpointSaved, PreviewReady, ValidationDone, RunFinished)
}


def to_json(event: Event) -> str:
    """The event as one line of strict JSON, without the line's end.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps({"event": type(event).__name__, **asdict(event)}, ensure_ascii=False, allow_nan=False)


def from_json(line: str) -> Event:
    """The event that `to_json` wrote.

    Raises:
        ValueError: the line is not JSON, names no known event, or its fields are not those of the event.
    """
    record = json.loads(line)
    if not isinstance(record, dict) or record.get("event") not in _TYPES:
        raise ValueError(f"not an event: {line!r}")
    fields = {name: value for name, value in record.items() if name != "event"}
    try:
        return _TYPES[record["event"]](**fields)
    except TypeError as error:
        raise ValueError(f"not a {record['event']}: {line!r}") from error
