"""Optimizers, schedules, averages and limits: against formulas, and each through a run that stops and goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdlora.adapter_file import read_adapter
from sdlora.checkpoint import read_latest_checkpoint
from sdlora.errors import TrainingError
from sdlora.events import StepDone
from sdlora.families import components_from_pipeline
from sdlora.optimizers import AdapterAverage, Lion, build_optimizer, learning_rate_at, limit_norms
from tests.tiny import tiny_sd1
from tests.training.helpers import CalledPreviews, make_config, make_trainer

NAMES = ("adamw", "adafactor", "lion", "prodigy")
SIX_STEPS = {"exposures": 3, "batch_size": 2}


def parameters(rank: int = 3) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.down": nn.Parameter(torch.randn(rank, 8, generator=generator)),
        "a.up": nn.Parameter(torch.randn(6, rank, generator=generator)),
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_goes_on_exactly_after_a_stop(tmp_path: Path, name: str) -> None:
    settings: dict[str, Any] = {
        "train": SIX_STEPS,
        "optimizer": {"name": name, "ema_decay": 0.9, "max_norm": 0.5},
    }
    if name != "prodigy":
        settings["optimizer"]["lora_plus_ratio"] = 4.0
    list(make_trainer(tmp_path / "whole", **settings).run())
    trainer = make_trainer(tmp_path / "parts", **settings)
    for event in trainer.run():
        if isinstance(event, StepDone) and event.step == 3:
            trainer.request_stop()
    checkpoint = read_latest_checkpoint(tmp_path / "parts" / "state", say=print)
    list(make_trainer(tmp_path / "parts", checkpoint=checkpoint, **settings).run())
    hashes = [read_adapter(tmp_path / folder / "ink.safetensors").tensor_sha256 for folder in ("whole", "parts")]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns(tmp_path: Path, name: str) -> None:
    """Fitting one matrix by a product of two."""
    rates = {"adamw": 3e-2, "adafactor": 3e-2, "lion": 1e-2, "prodigy": 1.0}
    named = parameters()
    config = make_config(train={"learning_rate": rates[name], "weight_decay": 0.0}, optimizer={"name": name})
    optimizer = build_optimizer(named, config)
    goal = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (named["a.up"] @ named["a.down"] - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    best = torch.linalg.svdvals(goal)[3:].square().sum().item() / goal.numel()
    assert losses[-1] < best + 0.1 * (losses[0] - best)


def test_lion_steps_as_the_paper_says() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = Lion([parameter], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    weights, momentum = parameter.detach().clone(), torch.zeros(3)
    for number in range(4):
        gradient = torch.tensor([1.0, -1.0, 0.5]) * (-1) ** number
        parameter.grad = gradient.clone()
        optimizer.step()
        direction = (0.9 * momentum + 0.1 * gradient).sign()
        weights = weights - 0.1 * (direction + 0.5 * weights)
        momentum = 0.99 * momentum + 0.01 * gradient
        assert torch.allclose(parameter, weights)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("sdlora.optimizers.importlib.import_module", refuse)
    with pytest.raises(TrainingError, match=r"pip install sdlora\[optimizers\]"):
        build_optimizer(parameters(), make_config(optimizer={"name": "adamw8bit"}))


def test_prodigy_has_one_rate() -> None:
    with pytest.raises(ValueError, match="cannot have a lora_plus_ratio"):
        make_config(optimizer={"name": "prodigy", "lora_plus_ratio": 2.0})


def test_the_up_factors_learn_faster_by_the_ratio(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, optimizer={"lora_plus_ratio": 8.0})
    list(trainer.run())
    rates = {
        name: group["lr"]
        for group in trainer._optimizer.param_groups
        for name, parameter in trainer._named.items()
        if any(parameter is p for p in group["params"])
    }
    assert len(rates) == len(trainer._named)
    ups = {rate for name, rate in rates.items() if name.endswith(".up")}
    downs = {rate for name, rate in rates.items() if name.endswith(".down")}
    assert len(ups) == len(downs) == 1 and ups.pop() == pytest.approx(8 * downs.pop())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [1.0, 0.75, 0.25, 0.0]),
        ("linear", [1.0, 2 / 3, 1 / 3, 0.0]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_schedules_after_the_warm_up(schedule: str, expected: list[float]) -> None:
    def rate(update: int) -> float:
        return learning_rate_at(update, peak=1.0, warmup_steps=10, num_steps=40, schedule=schedule)

    assert [rate(update) for update in (10, 20, 30, 40)] == pytest.approx(expected, abs=1e-9)
    assert rate(4) == pytest.approx(5 / 11)


def test_restarts_begin_at_the_peak_again() -> None:
    rates = [
        learning_rate_at(n, peak=1.0, warmup_steps=0, num_steps=30, schedule="cosine-restarts", restarts=3)
        for n in range(31)
    ]
    assert [rates[n] for n in (0, 10, 20)] == pytest.approx([1, 1, 1])
    assert rates[9] < 0.03 and rates[5] == pytest.approx(0.5) and rates[30] == pytest.approx(0)


@pytest.mark.parametrize("kernel", [0, 3])
def test_only_layers_that_are_too_strong_are_shrunk_to_the_limit(kernel: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (3, 8, kernel, kernel) if kernel else (3, 8)
    ones = (1, 1) if kernel else ()
    named = {
        "strong.down": nn.Parameter(torch.randn(shape, generator=generator)),
        "strong.up": nn.Parameter(torch.randn(6, 3, *ones, generator=generator)),
        "weak.down": nn.Parameter(torch.randn(shape, generator=generator) / 100),
        "weak.up": nn.Parameter(torch.randn(6, 3, *ones, generator=generator)),
    }
    weak = named["weak.down"].detach().clone()

    def norm(layer: str) -> float:
        return float((0.5 * named[f"{layer}.up"].flatten(1) @ named[f"{layer}.down"].flatten(1)).norm().detach())

    assert norm("weak") < 2 < norm("strong")
    assert limit_norms(named, {"strong": 0.5, "weak": 0.5}, 2.0) == 1
    assert norm("strong") == pytest.approx(2.0, rel=1e-5)
    assert torch.equal(named["weak.down"], weak)


def test_a_run_stays_below_its_limit(tmp_path: Path) -> None:
    free = make_trainer(tmp_path / "free", train={"learning_rate": 0.1})
    list(free.run())
    bound = make_trainer(tmp_path / "bound", train={"learning_rate": 0.1}, optimizer={"max_norm": 0.01})
    list(bound.run())

    def largest(folder: str) -> float:
        pairs = read_adapter(tmp_path / folder / "ink.safetensors").unet.values()
        return max(float((pair.scale * pair.up.float() @ pair.down.float()).norm()) for pair in pairs)

    assert largest("bound") <= 0.01 * 1.01 < largest("free")


def test_the_average_is_the_running_mean_and_leaves_the_live_weights_alone() -> None:
    named = parameters()
    average = AdapterAverage(named, decay=0.5)
    shadow = named["a.up"].detach().clone()
    for number in range(1, 6):
        with torch.no_grad():
            named["a.up"].add_(1.0)
        average.update(number)
        decay = min(0.5, (1 + number) / (10 + number))
        shadow = decay * shadow + (1 - decay) * named["a.up"].detach()
    assert torch.allclose(average.shadow["a.up"], shadow)
    live = named["a.up"].detach().clone()
    with average.in_place():
        assert torch.allclose(named["a.up"], shadow)
    assert torch.equal(named["a.up"], live)


def test_with_averaging_the_file_and_the_previews_hold_the_average(tmp_path: Path) -> None:
    previews = CalledPreviews(lambda step: [])
    settings: dict[str, Any] = {"train": {**SIX_STEPS, "learning_rate": 1e-2}}
    trainer = make_trainer(tmp_path / "a", previews=previews, optimizer={"ema_decay": 0.99}, **settings)
    list(trainer.run())
    list(make_trainer(tmp_path / "b", **settings).run())
    averaged, live = (read_adapter(tmp_path / folder / "ink.safetensors") for folder in "ab")
    assert trainer._average is not None
    shadow = trainer._average.shadow
    path, pair = next(iter(averaged.unet.items()))
    expected = shadow[f"{path}.up"] @ shadow[f"{path}.down"]
    changes = [pair.scale * pair.up.float() @ pair.down.float() for pair in (pair, live.unet[path])]
    # Two factors, each rounded to fp16.
    gaps = [float((change - expected).norm() / expected.norm()) for change in changes]
    assert gaps[0] < 2e-3 and gaps[1] > 5 * gaps[0]
    ((_, drawn_with),) = previews.asked
    assert read_adapter(drawn_with).tensor_sha256 == averaged.tensor_sha256


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    losses = []
    for folder, on in (("off", False), ("on", True)):
        components = components_from_pipeline(tiny_sd1())
        trainer = make_trainer(tmp_path / folder, components=components, model={"gradient_checkpointing": on})
        losses.append([event.loss for event in trainer.run() if isinstance(event, StepDone)])
        assert not components.unet.is_gradient_checkpointing
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert all(math.isfinite(loss) for loss in losses[0])
