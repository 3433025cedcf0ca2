"""Where previews are drawn: another GPU, the run's own, or the CPU, as the memory is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdlora.drawing_memory import drawing_bytes
from sdlora.errors import GenerationError
from sdlora.previews.place import Memory, Place, choose_place, place_beside

GB = 10**9
SD15, SDXL = 1_066_000_000, 3_468_000_000


def choose(*gpus: float, trained_on: set[int], ram: float = 64, total: float = 24) -> Place:
    return choose_place(
        {n: Memory(int(free * GB), int(total * GB)) for n, free in enumerate(gpus)},
        Memory(int(ram * GB), 64 * GB),
        trained_on=trained_on,
        on_gpu=5 * GB,
        on_cpu=8 * GB,
        cores=16,
    )


@pytest.mark.parametrize(
    ("gpus", "trained_on", "place"),
    [
        ((), set(), Place("cpu", 4)),
        ((20,), {0}, Place("cuda:0", None)),
        # A tenth of 24 GB stays free.
        ((7.5,), {0}, Place("cuda:0", None)),
        ((7.3,), {0}, Place("cpu", 8)),
        ((20, 9), {0}, Place("cuda:1", None)),
        ((20, 5), {0}, Place("cuda:0", None)),
        ((9, 9, 12), {0, 1}, Place("cuda:2", None)),
        ((9, 10), {0, 1}, Place("cuda:1", None)),
        # A run on the CPU, of a machine with a GPU.
        ((9,), set(), Place("cuda:0", None)),
    ],
)
def test_the_place_with_room(gpus: tuple[float, ...], trained_on: set[int], place: Place) -> None:
    assert choose(*gpus, trained_on=trained_on) == place


def test_too_little_memory_everywhere_is_told_with_the_way_out() -> None:
    with pytest.raises(GenerationError, match=r"takes about 8\.0 GB of memory, and 7\.0 GB are free. .*between"):
        choose(5, trained_on={0}, ram=7)


def test_the_run_keeps_at_least_a_core_on_small_machines() -> None:
    assert choose_place({}, Memory(64 * GB, 64 * GB), trained_on=set(), on_gpu=1, on_cpu=1, cores=2).threads == 1


@pytest.mark.parametrize(
    ("environment", "run_device", "asked", "expected"),
    [
        ({}, "cuda", {0, 1, 2}, "cuda:0"),
        ({}, "cuda:0", {0, 1, 2}, "cuda:1"),
        ({}, "cpu", {0, 1, 2}, "cuda:1"),
        ({"LOCAL_WORLD_SIZE": "2"}, "cuda:0", {0, 2}, "cuda:2"),
        ({"LOCAL_WORLD_SIZE": "3"}, "cuda:0", {0}, "cuda:0"),
    ],
)
def test_the_devices_of_the_run_are_known(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], run_device: str, asked: set[int], expected: str
) -> None:
    """To ask a device makes a context on it, which takes memory from the process that trains there."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    frees: dict[int, Any] = {0: (80 * GB, 80 * GB), 1: (81 * GB, 81 * GB), 2: (79 * GB, 80 * GB)}
    told = set()

    def mem_get_info(device: int) -> Any:
        told.add(device)
        return frees[device]

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    assert place_beside(torch.device(run_device), parameters=SD15, resolution=512).device == expected
    assert told == asked


def test_the_need_is_of_the_size_that_the_models_are() -> None:
    """fp16: SD 1.5 is 2.1 GB of weights, SDXL 6.9 GB; to draw with them cards of 6 and 16 GB are known to do."""
    assert 3.5 * GB < drawing_bytes(SD15, 2, 512) < 6 * GB
    assert 10 * GB < drawing_bytes(SDXL, 2, 1024) < 16 * GB
