"""Memory layout and compiled blocks: the same training, and a base that is given back as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora import unet_modes
from sdlora.events import StepDone
from sdlora.families import components_from_pipeline
from tests.tiny import tiny_sd1
from tests.training.helpers import make_trainer


def losses(folder: Path, components: Any, **model: Any) -> list[float]:
    train = {"exposures": 3, "learning_rate": 1e-2}
    events = make_trainer(folder, components=components, train=train, model=model).run()
    return [event.loss for event in events if isinstance(event, StepDone)]


@pytest.mark.slow
def test_channels_last_is_the_same_training_and_is_taken_back(tmp_path: Path) -> None:
    plain = losses(tmp_path / "a", components_from_pipeline(tiny_sd1()))
    components = components_from_pipeline(tiny_sd1())
    seen: list[bool] = []
    weight = components.unet.conv_in.weight

    def look(*_: object) -> None:
        seen.append(weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous())

    components.unet.conv_in.register_forward_pre_hook(look)
    assert losses(tmp_path / "b", components, channels_last=True) == pytest.approx(plain, rel=1e-4)
    assert seen and all(seen)
    assert components.unet.conv_in.weight.is_contiguous()


@pytest.mark.slow
def test_compiled_blocks_are_the_same_training_and_are_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = losses(tmp_path / "a", components_from_pipeline(tiny_sd1()))
    # The graphs are the real ones; only the C++ compiler is left out.
    monkeypatch.setattr(unet_modes, "_BACKEND", "aot_eager")
    torch._dynamo.reset()
    components = components_from_pipeline(tiny_sd1())
    compiled: list[int] = []

    def look(*_: object) -> None:
        compiled.append(sum(module._compiled_call_impl is not None for module in components.unet.modules()))

    components.unet.conv_in.register_forward_pre_hook(look)
    assert losses(tmp_path / "b", components, compile=True) == pytest.approx(plain, rel=1e-4)
    # SD 1.x has 16 transformer blocks.
    assert set(compiled) == {16}
    assert all(module._compiled_call_impl is None for module in components.unet.modules())
