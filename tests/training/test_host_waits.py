"""How often a step makes the host wait for the device: once where it is looked at, and not at all where it is not.

Counted on a CPU by the operations that would wait on a GPU: `item`, and copies that leave the tensor's device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdlora import trainer as trainer_module
from sdlora.adapter_file import read_adapter
from sdlora.errors import NonFiniteError
from sdlora.events import StepDone
from sdlora.families import components_from_pipeline
from sdlora.optimizers import build_optimizer, can_guard_itself
from sdlora.trainer import Trainer
from tests.tiny import tiny_sd1
from tests.training.helpers import make_config, make_trainer, make_training_set

SIX_STEPS = {"exposures": 3, "batch_size": 2, "learning_rate": 1e-2}


class Waits(TorchDispatchMode):
    """Counts `item()`; `tolist()` is counted by the fetch it comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def waits_by_step(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each step waits for, once its batches are there: those are made on the CPU."""
    fetches: list[int] = []
    real_read, real_step = trainer_module.read_steps, Trainer._step
    real_batches = Trainer._batches
    made: dict[int, Any] = {}

    def read(steps: Any) -> Any:
        fetches.append(len(steps))
        return real_read(steps)

    def batches(self: Trainer, *args: Any, **options: Any) -> Any:
        yield from made.get(self.state.step) or real_batches(self, *args, **options)

    counts: list[int] = []

    def step(self: Trainer) -> Any:
        first, size = self.state.step * self._examples_per_step, self._examples_per_step
        exposures = [(n, self._entries[self._order.entry(n)]) for n in range(first, first + size)]
        made[self.state.step] = list(real_batches(self, exposures))
        before = len([n for n in fetches if n])
        with Waits() as waits:
            result = real_step(self)
        counts.append(waits.count + len([n for n in fetches if n]) - before)
        return result

    monkeypatch.setattr(trainer_module, "read_steps", read)
    monkeypatch.setattr(Trainer, "_batches", batches)
    monkeypatch.setattr(Trainer, "_step", step)
    # The norm's clipping and the fetch itself are patched or counted; nothing else may wait.
    list(trainer.run())
    return counts


def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's kernel of CUDA devices, which CPUs have too."""

    def build(named: Any, config: Any, *, fused: bool = False) -> Any:
        return build_optimizer(named, config, fused=True)

    monkeypatch.setattr(trainer_module, "build_optimizer", build)


def test_a_step_that_is_looked_at_waits_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused(monkeypatch)
    trainer = make_trainer(tmp_path, train={**SIX_STEPS, "gradient_accumulation": 2, "batch_size": 1})
    # `tolist` of one fetch; the numbers of a list are not fetched one by one.
    assert set(waits_by_step(trainer, monkeypatch)) == {1}


def test_a_step_that_is_not_looked_at_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused(monkeypatch)
    trainer = make_trainer(tmp_path, train={**SIX_STEPS, "log_every": 3})
    assert waits_by_step(trainer, monkeypatch) == [0, 0, 1, 0, 0, 1]


def test_looking_later_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused(monkeypatch)
    curves = []
    for name, every in (("each", 1), ("late", 3)):
        events = list(make_trainer(tmp_path / name, train={**SIX_STEPS, "log_every": every}).run())
        curves.append([event.loss for event in events if isinstance(event, StepDone)])
    each, late = curves
    assert late == [sum(each[:3]) / 3, sum(each[3:]) / 3]
    hashes = {read_adapter(tmp_path / name / "ink.safetensors").tensor_sha256 for name in ("each", "late")}
    assert len(hashes) == 1


@pytest.mark.parametrize("log_every", [1, 6])
def test_a_bad_number_keeps_off_the_weights_and_names_its_step_and_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    fused(monkeypatch)
    components = components_from_pipeline(tiny_sd1())
    settings: dict[str, Any] = {"components": components, "training_set": make_training_set(components)}
    good = make_trainer(tmp_path / "good", train=SIX_STEPS, **settings)
    for event in good.run():
        if isinstance(event, StepDone) and event.step == 3:
            good.request_stop()
    real = Trainer._losses

    def spoilt(self: Trainer, batch: Any, **options: Any) -> Any:
        losses = real(self, batch, **options)
        return losses * float("nan") if self.state.step == 3 else losses

    monkeypatch.setattr(Trainer, "_losses", spoilt)
    trainer = make_trainer(tmp_path / "bad", train={**SIX_STEPS, "log_every": log_every}, **settings)
    with pytest.raises(
        NonFiniteError, match=r"Step 4: the loss is NaN or Inf for \d\.png, \d\.png \(timestep \d+, \d+\)"
    ):
        list(trainer.run())
    assert trainer.state.step == 3
    hashes = {read_adapter(tmp_path / name / "ink.safetensors").tensor_sha256 for name in ("good", "bad")}
    assert len(hashes) == 1


def test_only_the_fused_kernel_guards_itself() -> None:
    named = {"a.up": torch.nn.Parameter(torch.ones(2, 2))}
    config = make_config()
    assert can_guard_itself(build_optimizer(named, config, fused=True))
    assert not can_guard_itself(build_optimizer(named, config))
    assert not can_guard_itself(build_optimizer(named, make_config(optimizer={"name": "lion"})))
