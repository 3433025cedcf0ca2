"""Where there is room to draw beside a training run: another GPU, the run's own, or the CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

from sdlora.drawing_memory import drawing_bytes
from sdlora.errors import GenerationError

__all__ = ["Memory", "Place", "choose_place", "place_beside"]

_LEFT_FREE = 0.1
"""Share of a GPU's memory that must stay free, as a run's need is not quite the same in every step."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a device, or of the computer."""

    free: int
    total: int


@dataclass(frozen=True)
class Place:
    """A device, and how many threads compute on it (None: as many as usual)."""

    device: str
    threads: int | None


def place_beside(run_device: torch.device, *, parameters: int, resolution: int) -> Place:
    """The place for drawing squares of `resolution` pixels with a base of that many parameters, as things are now.

    Raises:
        GenerationError: the memory does not suffice anywhere.
    """
    own, trained_on = set[int](), set[int]()
    if run_device.type == "cuda":
        own = {torch.cuda.current_device() if run_device.index is None else run_device.index}
        # The processes of one machine that train together have the first devices.
        trained_on = own | set(range(int(os.environ.get("LOCAL_WORLD_SIZE", "0"))))
    # To ask a device costs memory on it, so those of the other processes are not asked.
    asked = [n for n in range(torch.cuda.device_count()) if n in own or n not in trained_on]
    memory = psutil.virtual_memory()
    return choose_place(
        {n: Memory(*torch.cuda.mem_get_info(n)) for n in asked},
        Memory(memory.available, memory.total),
        trained_on=trained_on,
        on_gpu=drawing_bytes(parameters, 2, resolution),
        on_cpu=drawing_bytes(parameters, 4, resolution),
        cores=os.cpu_count() or 1,
    )


def choose_place(
    gpus: Mapping[int, Memory],
    computer: Memory,
    *,
    trained_on: set[int],
    on_gpu: int,
    on_cpu: int,
    cores: int,
) -> Place:
    """Another GPU with room, else one of the run's with room, else the CPU, of which the run keeps most.

    `on_gpu` and `on_cpu` are the bytes needed there: fp16 and fp32, as `generate` draws.

    Raises:
        GenerationError: the computer's memory does not suffice either.
    """
    roomy = [n for n, memory in gpus.items() if memory.free >= on_gpu + _LEFT_FREE * memory.total]
    if roomy:
        return Place(f"cuda:{min(roomy, key=lambda n: (n in trained_on, -gpus[n].free))}", None)
    if computer.free < on_cpu:
        raise GenerationError(
            f"Drawing beside the training takes about {on_cpu / 1e9:.1f} GB of memory, and {computer.free / 1e9:.1f} "
            'GB are free. preview.where = "between" needs less.'
        )
    # On a GPU the run leaves the CPU mostly idle.
    return Place("cpu", max(1, cores // (2 if trained_on else 4)))
