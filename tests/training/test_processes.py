"""Several processes train one adapter as one process with the larger batch would; the first one writes."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdlora.adapter_file import read_adapter
from sdlora.checkpoint import read_latest_checkpoint
from sdlora.config import to_toml
from sdlora.errors import NonFiniteError, TrainingError
from sdlora.events import CheckpointSaved, Event, RunFinished, StepDone, ValidationDone, from_json
from sdlora.families import components_from_pipeline
from sdlora.processes import Processes
from tests.tiny import tiny_sd1
from tests.training.helpers import make_config, make_trainer, make_training_set, write_pictures


@dataclass
class Meeting:
    """Where threads that stand for processes add up their buckets."""

    count: int
    buckets: dict[int, Tensor] = field(default_factory=dict)
    values: list[Any] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.count, timeout=60)


@dataclass(frozen=True)
class Threads(Processes):
    """Processes that are threads of this one, so that a test needs no launcher."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def _sum(self, bucket: Tensor) -> None:
        self.meeting.buckets[self.rank] = bucket.clone()
        self.meeting.barrier.wait()
        bucket.copy_(torch.stack([self.meeting.buckets[rank] for rank in range(self.count)]).sum(0))
        if self.is_main:
            self.meeting.sizes.append(bucket.numel())
        self.meeting.barrier.wait()

    def from_main(self, value: Any) -> Any:
        if self.is_main:
            self.meeting.values.append(value)
        self.meeting.barrier.wait()
        return self.meeting.values[-1]


def run_together(folder: Path, count: int, *, stop_at: int | None = None, **settings: Any) -> list[list[Event]]:
    """The events of each of `count` processes; the second one is asked to stop in step `stop_at`."""
    meeting = Meeting(count)

    def work(rank: int) -> list[Event]:
        components = components_from_pipeline(pipelines[rank])
        held_out = make_training_set(components, seed=7) if settings.get("validation") else None
        trainer = make_trainer(
            folder,
            components=components,
            validation_set=held_out,
            processes=Threads(rank, count, meeting),
            **settings,
        )
        if stop_at is not None and rank == 1:
            seen = iter(range(1, 100))
            trainer._unet.register_forward_pre_hook(
                lambda *_: trainer.request_stop() if next(seen) == stop_at else None
            )
        events: list[Event] = []
        try:
            events += trainer.run()
        finally:
            if not events or not isinstance(events[-1], RunFinished):
                meeting.barrier.abort()
        return events

    pipelines = [tiny_sd1() for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work, rank) for rank in range(count)]
    failures = [error for future in futures if (error := future.exception()) is not None]
    for error in failures:
        # Where one fails, the others only miss it.
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    events = [future.result() for future in futures]
    payload = sum(p.numel() for p in read_back(folder))
    assert set(meeting.sizes) == {payload + 3}, "only the adapter's gradients and three numbers travel, in one bucket"
    return events


def read_back(folder: Path) -> list[Tensor]:
    adapter = read_adapter(folder / "ink.safetensors")
    return [tensor for pair in adapter.unet.values() for tensor in (pair.down, pair.up)]


def losses_of(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepDone)]


def train_settings(batch_size: int, **more: Any) -> dict[str, Any]:
    return {"exposures": 3, "batch_size": batch_size, "learning_rate": 1e-2, **more}


def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    one = list(make_trainer(tmp_path / "one", train=train_settings(4)).run())
    two = run_together(tmp_path / "two", 2, train=train_settings(2))
    assert losses_of(two[0]) == losses_of(two[1])
    assert losses_of(two[0]) == pytest.approx(losses_of(one), rel=1e-5)
    for left, right in zip(read_back(tmp_path / "one"), read_back(tmp_path / "two"), strict=True):
        assert torch.allclose(left, right, atol=2e-3)


@pytest.mark.slow
def test_three_processes_share_two_batches_of_two(tmp_path: Path) -> None:
    """Shares that are not even, and sizes that differ."""
    components = components_from_pipeline(tiny_sd1())
    training_set = make_training_set(components, sizes_hw=[(64, 64), (64, 128), (64, 64), (128, 64)])
    settings: dict[str, Any] = {"training_set": training_set}
    one = list(make_trainer(tmp_path / "one", train=train_settings(6), **settings).run())
    three = run_together(tmp_path / "three", 3, train=train_settings(2), **settings)
    assert losses_of(three[0]) == pytest.approx(losses_of(one), rel=1e-5)


def test_they_stop_together_and_any_number_of_them_goes_on(tmp_path: Path) -> None:
    settings = train_settings(2, exposures=6)
    whole = losses_of(list(make_trainer(tmp_path / "whole", train=train_settings(4, exposures=6)).run()))
    parts = run_together(tmp_path / "parts", 2, stop_at=3, train=settings)
    assert losses_of(parts[0]) == losses_of(parts[1]) == pytest.approx(whole[:3], rel=1e-5)
    assert isinstance(parts[1][-1], RunFinished) and parts[1][-1].stopped_early
    # One process alone takes the same pictures a step, in two passes.
    checkpoint = read_latest_checkpoint(tmp_path / "parts" / "state", say=print)
    rest = list(make_trainer(tmp_path / "parts", train=settings, checkpoint=checkpoint).run())
    assert losses_of(rest) == pytest.approx(whole[3:], rel=1e-4)


def test_only_the_first_one_saves_and_all_hear_its_measurements(tmp_path: Path) -> None:
    measured = {"path": "others", "timesteps": 1}
    events = run_together(tmp_path / "two", 2, train=train_settings(2, save_every=1), validation=measured)
    heard = [[event for event in of_one if isinstance(event, ValidationDone)] for of_one in events]
    assert heard[0] == heard[1] and len(heard[0]) == 4
    saved = [[event.step for event in of_one if isinstance(event, CheckpointSaved)] for of_one in events]
    assert saved == [[1, 2, 3], []]
    assert len(list((tmp_path / "two" / "checkpoints").iterdir())) == 3


def test_a_bad_number_in_one_stops_all(tmp_path: Path) -> None:
    components = components_from_pipeline(tiny_sd1())
    training_set = make_training_set(components)
    training_set.examples[3].views[0].latents.mean.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"NaN or Inf (for 3\.png|in another process)"):
        run_together(tmp_path, 2, train=train_settings(2), training_set=training_set)


def test_more_processes_than_pictures_a_step_are_refused() -> None:
    with pytest.raises(TrainingError, match="too few for 3 processes"):
        Processes(0, 3).part([1, 2])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_the_launchers_start_processes_that_train_one_adapter(tmp_path: Path, launcher: str) -> None:
    tiny_sd1().save_pretrained(tmp_path / "base")
    data = write_pictures(tmp_path / "data", count=4)

    def config(name: str, batch_size: int) -> str:
        made = make_config(
            model={"base": str(tmp_path / "base"), "precision": "fp32"},
            data={"path": data, "trigger": "ink style"},
            output={"dir": tmp_path / name, "name": "ink"},
            train=train_settings(batch_size, exposures=6),
        )
        path = tmp_path / f"{name}.toml"
        path.write_text(to_toml(made), encoding="utf-8")
        return str(path)

    def start(name: str, batch_size: int, *before: str) -> str:
        command = [sys.executable, *before, "-m", "sdlora", "train", "--config", config(name, batch_size)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout

    start("one", 4)
    options = {
        "torch.distributed.run": ["--standalone", "--nproc_per_node", "2"],
        # Its way with GPUs; where there are none, the processes meet on CPUs.
        "accelerate.commands.launch": ["--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"],
    }[launcher]
    told = start("two", 2, "-m", launcher, *options)
    assert len(re.findall("pictures seen", told)) == 1, "one of them talks"
    assert "at 4 a step that is 6 steps" in told
    curves = []
    for name in ("one", "two"):
        lines = (tmp_path / name / "ink" / "events.jsonl").read_text(encoding="utf-8").splitlines()
        curves.append(losses_of([from_json(line) for line in lines]))
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert len(curves[0]) == 6
