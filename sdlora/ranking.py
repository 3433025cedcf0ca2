"""Which save of a run is best, and why: held-out loss, copying, how near its previews are to the pictures' style."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from sdlora.data.decode import MAX_PIXELS, decode_image
from sdlora.errors import TrainingError
from sdlora.events import CheckpointSaved, Event, PreviewReady, RunFinished, ValidationDone, from_json
from sdlora.fidelity import style_distance, style_features
from sdlora.run_dir import RunDir, write_text_atomic
from sdlora.stopping import best_save, copying

__all__ = ["RankedSave", "rank_saves", "read_events", "write_ranking"]

_PICTURES = 40
_MUCH_COPYING = 0.05


@dataclass(frozen=True)
class RankedSave:
    """One saved adapter and what speaks for or against it."""

    step: int
    path: str
    held_out_loss: float | None
    copying: float | None
    """How much further the loss fell on the run's own pictures than on held-out ones (0 is none)."""
    style_distance: float | None
    """Of its previews from the training pictures: about 1 is another style, smaller is nearer. Of a few previews it
    only compares saves of one run with each other."""
    reason: str


def rank_saves(
    events: Iterable[Event],
    pictures: Sequence[Path],
    *,
    background: tuple[int, int, int],
    tolerance: float,
) -> list[RankedSave]:
    """The saves of a run, the best first: the latest whose held-out loss is at most `tolerance` (a share) above the
    lowest, then by that loss, where it was measured; else by the style of the previews, else the latest. `pictures` are
    those that were trained on; they are only looked at if previews were drawn.

    Raises:
        DatasetError: a picture cannot be read any more.
    """
    saves: dict[int, str] = {}
    measured: dict[int, ValidationDone] = {}
    previews: dict[int, list[Path]] = {}
    for event in events:
        if isinstance(event, CheckpointSaved):
            saves[event.step] = event.path
        elif isinstance(event, RunFinished):
            saves.setdefault(event.step, event.path)
        elif isinstance(event, ValidationDone):
            measured[event.step] = event
        elif isinstance(event, PreviewReady) and Path(event.path).is_file():
            previews.setdefault(event.step, []).append(Path(event.path))
    distances = _distances({step: previews[step] for step in saves if step in previews}, pictures, background)
    first = measured.get(0)
    losses = {step: measured[step].held_out_loss for step in saves if step in measured}
    best, lowest = best_save(losses, tolerance=tolerance), min(losses.values(), default=None)

    def worth(step: int) -> tuple[bool, float, float, int]:
        return step != best, losses.get(step, float("inf")), distances.get(step, float("inf")), -step

    ranked = []
    for step in sorted(saves, key=worth):
        found = measured.get(step)
        copied = _copying(first, found)
        ranked.append(
            RankedSave(
                step=step,
                path=saves[step],
                held_out_loss=found.held_out_loss if found else None,
                copying=copied,
                style_distance=distances.get(step),
                reason=_reason(
                    step, found, lowest, copied, distances, is_best=step == best, is_last=step == max(saves)
                ),
            )
        )
    return ranked


def write_ranking(run_dir: RunDir, ranked: Sequence[RankedSave]) -> Path:
    """Writes `ranking.json` into the run's folder, the best first; returns its path."""
    text = json.dumps([asdict(save) for save in ranked], indent=1, ensure_ascii=False)
    write_text_atomic(run_dir.ranking_path, text)
    return run_dir.ranking_path


def read_events(run_dir: RunDir) -> list[Event]:
    """What the run told, without a last line that was cut off.

    Raises:
        TrainingError: the folder holds no events.
    """
    try:
        lines = run_dir.events_path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TrainingError(f"{run_dir.root} is not the folder of a run: it holds no events.jsonl.") from error
    events = []
    for line in lines:
        try:
            events.append(from_json(line))
        except ValueError:
            continue
    return events


def _copying(first: ValidationDone | None, now: ValidationDone | None) -> float | None:
    if first is None or now is None:
        return None
    return copying(
        own_before=first.training_loss,
        own_now=now.training_loss,
        held_out_before=first.held_out_loss,
        held_out_now=now.held_out_loss,
    )


def _distances(
    previews: dict[int, list[Path]], pictures: Sequence[Path], background: tuple[int, int, int]
) -> dict[int, float]:
    if not previews or not pictures:
        return {}
    every = max(1, len(pictures) // _PICTURES)
    chosen = pictures[::every][:_PICTURES]
    style = style_features([decode_image(path, background=background, max_pixels=MAX_PIXELS) for path in chosen])
    return {step: style_distance([_opened(path) for path in paths], style) for step, paths in previews.items()}


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _reason(
    step: int,
    event: ValidationDone | None,
    lowest: float | None,
    copied: float | None,
    distances: dict[int, float],
    *,
    is_best: bool,
    is_last: bool,
) -> str:
    parts = []
    if event is not None and lowest is not None:
        if event.held_out_loss == lowest:
            loss = f"lowest held-out loss ({lowest:.4f})"
        else:
            loss = f"held-out loss {event.held_out_loss / lowest - 1:.1%} above the lowest ({event.held_out_loss:.4f})"
        parts.append(f"the latest that is near enough: {loss}" if is_best and event.held_out_loss > lowest else loss)
    if copied is not None and copied > _MUCH_COPYING:
        parts.append(f"copies: the loss fell {copied:.0%} further on its own pictures than on held-out ones")
    if step in distances:
        nearest = " the nearest:" if distances[step] == min(distances.values()) else ""
        parts.append(f"previews:{nearest} {distances[step]:.2f} from the pictures' style")
    return "; ".join(parts) or ("the latest" if is_last else "an earlier save; nothing was measured")
