"""The schedule-free optimizer: its average is what is saved, it goes on exactly, and looking at it changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdlora.adapter_file import read_adapter
from sdlora.checkpoint import read_latest_checkpoint
from sdlora.events import StepDone
from sdlora.lora import lora_pairs
from sdlora.optimizers import averaged_weights, build_optimizer
from sdlora.schedule_free import AdamWScheduleFree
from tests.training.helpers import make_config, make_trainer

SETTINGS: dict[str, Any] = {
    "train": {"exposures": 3, "batch_size": 2, "learning_rate": 1e-2},
    "optimizer": {"name": "adamw-schedulefree"},
}


def test_the_average_is_that_of_the_paper() -> None:
    """At a constant rate x is the plain mean of all z (section 3 there), wherever the gradients were taken."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    config = make_config(train={"learning_rate": 0.1, "weight_decay": 0.0}, optimizer=SETTINGS["optimizer"])
    optimizer = build_optimizer({"a.up": parameter}, config)
    visited = []
    for _ in range(5):
        parameter.grad = torch.tensor([0.5, -0.5])
        optimizer.step()
        visited.append(optimizer.state[parameter]["z"].clone())
    before = parameter.detach().clone()
    with averaged_weights(optimizer, {"a.up": parameter}):
        assert torch.allclose(parameter, torch.stack(visited).mean(0), atol=1e-5)
    assert torch.equal(parameter, before)


@pytest.mark.slow
def test_the_saved_file_is_the_average_and_saving_changes_nothing(tmp_path: Path) -> None:
    runs = []
    for name, save_every in (("rarely", 10_000), ("often", 1)):
        settings = {**SETTINGS, "train": {**SETTINGS["train"], "save_every": save_every}}
        trainer = make_trainer(tmp_path / name, **settings)
        live: dict[str, Any] = {}
        losses = []
        for event in trainer.run():
            if isinstance(event, StepDone):
                losses.append(event.loss)
                live = lora_pairs(trainer._unet)
        runs.append(losses)
        saved = read_adapter(tmp_path / name / "ink.safetensors").unet
        assert any(not torch.allclose(saved[path].up.float(), live[path].up, atol=1e-3) for path in live)
    assert runs[0] == runs[1]
    hashes = {read_adapter(tmp_path / name / "ink.safetensors").tensor_sha256 for name in ("rarely", "often")}
    assert len(hashes) == 1


def test_it_goes_on_exactly_after_a_stop(tmp_path: Path) -> None:
    list(make_trainer(tmp_path / "whole", **SETTINGS).run())
    trainer = make_trainer(tmp_path / "parts", **SETTINGS)
    for event in trainer.run():
        if isinstance(event, StepDone) and event.step == 3:
            trainer.request_stop()
    checkpoint = read_latest_checkpoint(tmp_path / "parts" / "state", say=print)
    list(make_trainer(tmp_path / "parts", checkpoint=checkpoint, **SETTINGS).run())
    hashes = {read_adapter(tmp_path / name / "ink.safetensors").tensor_sha256 for name in ("whole", "parts")}
    assert len(hashes) == 1


def test_its_rate_rises_and_then_stays(tmp_path: Path) -> None:
    settings = {**SETTINGS, "train": {**SETTINGS["train"], "warmup_fraction": 0.4}}
    events = list(make_trainer(tmp_path, **settings).run())
    rates = [event.learning_rate for event in events if isinstance(event, StepDone)]
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 1e-2, 1e-2])


def test_it_does_not_go_with_other_averages() -> None:
    with pytest.raises(ValueError, match="averages by itself"):
        make_config(optimizer={"name": "adamw-schedulefree", "ema_decay": 0.9})


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_steps_as_the_package_of_the_papers_authors_does(weight_decay: float) -> None:
    schedulefree = pytest.importorskip("schedulefree")
    rates = [1e-3, 5e-3, 1e-2, 1e-2, 4e-3, 1e-2]
    found = []
    for build in (schedulefree.AdamWScheduleFree, AdamWScheduleFree):
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (2,))]
        optimizer = build(parameters, lr=rates[0], weight_decay=weight_decay)
        if build is not AdamWScheduleFree:
            optimizer.train()
        for rate in rates:
            for group in optimizer.param_groups:
                group["lr"] = rate
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        live = [parameter.detach().clone() for parameter in parameters]
        (optimizer.average if build is AdamWScheduleFree else optimizer.eval)()
        found.append((live, [parameter.detach().clone() for parameter in parameters]))
    for theirs, ours in zip(*found, strict=True):
        for a, b in zip(theirs, ours, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(found[1][0][0], found[1][1][0], atol=1e-3)
