"""Around the drawing of many files: processes that share the work, and pictures of the one that is being drawn."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import PartialState
from PIL import Image

from sdlora.errors import GenerationError
from sdlora.generation.drawing import StepDrawn
from sdlora.generation.generator import Generator

__all__ = ["Share", "preview_files", "share_out"]

T = TypeVar("T")


@dataclass(frozen=True)
class Share(Generic[T]):
    """What this process does, on which device (None: the usual one), and the how-manieth process it is."""

    items: Sequence[T]
    device: str | None
    process: int


def share_out(items: Sequence[T]) -> Share[T]:
    """This process's part of the items, in order; all of them unless accelerate or torchrun started several.

    Returns in all processes at once, so that what each looked up before is what all saw. On a CPU a process keeps its
    number of threads, and with it the bits it draws.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Share(items, None, 0)
    threads = torch.get_num_threads()
    state: Any = PartialState(cpu=not torch.cuda.is_available())
    # accelerate gives the processes other numbers of threads, and sums are rounded by how they are cut into threads.
    torch.set_num_threads(threads)
    with state.split_between_processes(list(items)) as part:
        # accelerate gives the last item to processes for which none is left.
        mine: list[T] = part if state.process_index < len(items) else []
    state.wait_for_everyone()
    # Not "cpu:0": that moves the weights to other addresses, and kernels round by the alignment of their operands.
    device = "cpu" if state.device.type == "cpu" else str(state.device)
    return Share(mine, device, state.process_index)


@contextmanager
def preview_files(generator: Generator, folder: Path, *, every: int | None, process: int = 0) -> Iterator[None]:
    """Inside, every so many steps the pictures in work are in FOLDER/preview.png, small and rough; then it goes.

    Raises:
        GenerationError: `every` is below 1.
    """
    if every is None:
        yield
        return
    if every < 1:
        raise GenerationError(f"A preview can be made every 1 step or more, not every {every}.")
    path = folder / (f"preview-{process + 1}.png" if process else "preview.png")
    on_step = generator.on_step

    def after_step(step: StepDrawn) -> None:
        if step.step % every == 0:
            _write_row(generator.approximate(step.latents), path)
        on_step(step)

    generator.on_step = after_step
    try:
        yield
    finally:
        generator.on_step = on_step
        path.unlink(missing_ok=True)


def _write_row(images: Sequence[Image.Image], path: Path) -> None:
    row = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    row.save(temporary, format="PNG")
    temporary.replace(path)
