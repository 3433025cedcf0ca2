"""Where the parts meet: from options to files. The only modules that know everybody are this one and `demo`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from sdlora import embedded
from sdlora.adapter_file import read_adapter
from sdlora.config import DEFAULT_BASE, TrainConfig
from sdlora.data.dataset import ImageDataset
from sdlora.generation import Generator
from sdlora.picture_file import save_picture
from sdlora.progress import terminal_progress
from sdlora.request import GenerationRequest
from sdlora.training import resume_run, train_adapter

__all__ = ["generate_files", "resume_with_progress", "train_with_progress"]


def generate_files(
    request: GenerationRequest,
    adapters: Sequence[tuple[Path, float]],
    *,
    base: str | None,
    precision: str,
    out_dir: Path,
    warn: Callable[[str], None],
) -> Iterator[Path]:
    """Draw the pictures and yield each file's path as it is written. Nothing existing is overwritten.

    `adapters` are files and their weights. Base None: the one that every adapter says it was trained on if that is the
    embedded base, else the default base.

    Raises:
        GenerationError: the request is out of range.
        ModelError: the base cannot be had.
        AdapterError: an adapter cannot be used.
    """
    base = base or _base_of_adapters(adapters) or DEFAULT_BASE
    generator = Generator.from_base(base, precision=precision, warn=warn)
    names = [generator.stack.load(path) for path, _ in adapters]
    generator.stack.set_adapters(names, [weight for _, weight in adapters])
    if base == "tiny":
        request = request.with_defaults(embedded.NUM_INFERENCE_STEPS, embedded.GUIDANCE_SCALE)
    index = _next_index(out_dir)
    for offset, picture in enumerate(generator.draw(request)):
        path = out_dir / f"{index + offset:05d}-seed{picture.recipe.seed}.png"
        yield save_picture(picture.image, path, picture.recipe)


def _base_of_adapters(adapters: Sequence[tuple[Path, float]]) -> str | None:
    """ "tiny" if every adapter says that it was trained on the embedded base."""
    bases = {read_adapter(path).metadata.get("sdlora.base") for path, _ in adapters}
    return "tiny" if bases == {"tiny"} else None


def _next_index(folder: Path) -> int:
    numbers = [int(match[1]) for path in folder.glob("*.png") if (match := re.match(r"(\d{5})-", path.name))]
    return max(numbers, default=0) + 1


def train_with_progress(
    config: TrainConfig, dataset: ImageDataset, *, say: Callable[[str], None], stream: TextIO
) -> Path:
    """Train as `config` says, with a progress bar on `stream`; returns the adapter's path.

    Raises:
        ModelError: the base cannot be had or used here.
        TrainingError: training cannot start or go on.
    """
    with terminal_progress(stream) as progress:
        path = train_adapter(config, dataset=dataset, observers=[progress], say=say)
    _tell_how_to_draw(path, say)
    return path


def resume_with_progress(
    run: Path, overrides: Sequence[str], *, allow_change: bool, say: Callable[[str], None], stream: TextIO
) -> Path:
    """Go on with the run in a folder, with a progress bar on `stream`; returns the adapter's path.

    Raises:
        CheckpointError: there is nothing to go on from, or something changed that must not.
        DatasetError, ModelError, TrainingError: as in `train_with_progress`.
    """
    with terminal_progress(stream) as progress:
        path = resume_run(run, overrides=overrides, allow_change=allow_change, observers=[progress], say=say)
    _tell_how_to_draw(path, say)
    return path


def _tell_how_to_draw(path: Path, say: Callable[[str], None]) -> None:
    say(f'{path} ({path.stat().st_size / 1024:.0f} kB). Draw with it: sdlora generate "..." --lora {path}')
