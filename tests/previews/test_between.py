"""Previews between two steps: what `generate` draws with the saved file, and a run that does not notice them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from PIL import Image

from sdlora.adapter_file import read_adapter
from sdlora.config import TrainConfig
from sdlora.events import CheckpointSaved, Event, PreviewReady, StepDone
from sdlora.families import components_from_pipeline
from sdlora.generation import Generator
from sdlora.picture_file import read_recipe
from sdlora.prior import base_restored
from sdlora.request import GenerationRequest
from sdlora.training import train_adapter
from sdlora.unet_modes import enter_modes, leave_modes, uncompiled
from tests.training.helpers import TINY, make_config, make_trainer, write_pictures

PROMPTS = ["a fox (running:1.4)", "a [tree]"]
PREVIEW: dict[str, Any] = {"prompts": PROMPTS, "num_inference_steps": 3, "guidance_scale": 5.0, "seed": 7}


def config_for(tmp_path: Path, **sections: Any) -> TrainConfig:
    """Four steps, saves after the second and the last."""
    if not (tmp_path / "data").exists():
        write_pictures(tmp_path / "data", count=4)
    return make_config(
        data={"path": tmp_path / "data", "trigger": "ink style"},
        output={"dir": tmp_path, "name": "ink", **sections.pop("output", {})},
        train={"save_every": 2, "learning_rate": 0.05, "warmup_fraction": 0.0},
        **sections,
    )


def drawn(generator: Generator, adapter: Path, weight: float = 1.0) -> list[Any]:
    """By the public calls alone."""
    generator.stack.load(adapter, "x")
    generator.stack.set_adapters(["x"], [weight])
    pictures = []
    for prompt in PROMPTS:
        request = GenerationRequest(
            prompt=prompt, seed=7, num_inference_steps=3, guidance_scale=5.0, height=64, width=64, prompt_syntax="plain"
        )
        pictures += [np.asarray(picture.image) for picture in generator.draw(request)]
    generator.stack.unload()
    return pictures


def run(config: TrainConfig, **options: Any) -> tuple[Path, list[Event]]:
    events: list[Event] = []
    path = train_adapter(config, observers=[events.append], **options)
    return path, events


def pixels(path: str | Path) -> Any:
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize(
    "sections",
    [
        {"lora": {"rank": 4, "dropout": 0.2}, "optimizer": {"ema_decay": 0.9}},
        {"lora": {"rank": 2, "text_encoder": True}, "model": {"gradient_checkpointing": True}},
        {"lora": {"rank": 2, "dora": True}, "optimizer": {"name": "adamw-schedulefree"}},
    ],
    ids=["dropout and averaging", "text encoder and checkpointing", "DoRA and schedule-free"],
)
def test_a_preview_is_what_generate_draws_and_the_run_is_the_same(tmp_path: Path, sections: Any) -> None:
    pipeline = TINY["sd1"]()
    path, events = run(config_for(tmp_path, preview=PREVIEW, **sections), components=components_from_pipeline(pipeline))
    plain, others = run(config_for(tmp_path, **sections), components=components_from_pipeline(TINY["sd1"]()))
    assert read_adapter(path).tensor_sha256 == read_adapter(plain).tensor_sha256
    losses = [[event.loss for event in told if isinstance(event, StepDone)] for told in (events, others)]
    assert losses[0] == losses[1]
    saves = [event for event in events if isinstance(event, CheckpointSaved)]
    previews = [event for event in events if isinstance(event, PreviewReady)]
    assert [event.step for event in saves] == [2, 4] and [event.step for event in previews] == [2, 2, 4, 4]
    generator = Generator(TINY["sd1"]())
    for save, pair in zip(saves, (previews[:2], previews[2:]), strict=True):
        for expected, preview in zip(drawn(generator, Path(save.path)), pair, strict=True):
            assert (pixels(preview.path) == expected).all(), preview.path
    # Each picture is its own: other steps and other prompts look different.
    assert len({pixels(preview.path).tobytes() for preview in previews}) == 4
    state, expected = pipeline.unet.state_dict(), TINY["sd1"]().unet.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_sdxl_in_another_number_format_too(tmp_path: Path, precision: Any) -> None:
    """Loaded for training VAE and text encoders are fp32; for drawing they are of the U-Net's format."""
    TINY["sdxl"]().save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    preview = {**PREVIEW, "where": "between"}
    path, events = run(config_for(tmp_path, preview=preview, model={"base": base, "precision": precision}))
    plain, _ = run(config_for(tmp_path, model={"base": base, "precision": precision}))
    assert read_adapter(path).tensor_sha256 == read_adapter(plain).tensor_sha256
    previews = [event.path for event in events if isinstance(event, PreviewReady)]
    generator = Generator.from_base(base, precision=precision, device="cpu")
    expected = drawn(generator, path.parent / "checkpoints" / "step-000004" / "ink-step-000004.safetensors")
    assert all((pixels(shown) == truth).all() for shown, truth in zip(previews[2:], expected, strict=True))


def test_the_weight_is_the_recommended_one_and_the_recipe_says_all(tmp_path: Path) -> None:
    config = config_for(tmp_path, preview=PREVIEW, output={"recommended_weight": 0.6})
    _, events = run(config, components=components_from_pipeline(TINY["sd1"](), source="some/base"))
    save = next(event for event in events if isinstance(event, CheckpointSaved))
    preview = next(event for event in events if isinstance(event, PreviewReady))
    assert (pixels(preview.path) == drawn(Generator(TINY["sd1"]()), Path(save.path), 0.6)[0]).all()
    recipe = read_recipe(Path(preview.path))
    (adapter,) = recipe.adapters
    assert (adapter.file, adapter.weight) == (Path(save.path).name, 0.6)
    assert adapter.tensor_hash == read_adapter(Path(save.path)).tensor_sha256
    assert (recipe.prompt, recipe.seed, recipe.base) == (PROMPTS[0], 7, "some/base")
    assert (recipe.num_inference_steps, recipe.guidance_scale, recipe.scheduler) == (3, 5.0, "DDIMScheduler")


def test_the_base_stands_there_without_its_adapter_for_a_while(tmp_path: Path) -> None:
    components = components_from_pipeline(TINY["sd1"]())
    unet, before = components.unet, dict(components.unet.named_modules())
    trainer = make_trainer(tmp_path, components=components, lora={"rank": 2, "dropout": 0.5})
    trainer._adapter.train()
    unet.mid_block.eval()
    wrapped = dict(unet.named_modules())
    modes = {name: module.training for name, module in wrapped.items()}
    with pytest.raises(ZeroDivisionError), base_restored(unet):
        assert dict(unet.named_modules()) == before
        assert not any(module.training for module in unet.modules())
        _ = 1 / 0
    assert dict(unet.named_modules()) == wrapped and list(dict(unet.named_modules())) == list(wrapped)
    assert {name: module.training for name, module in unet.named_modules()} == modes
    assert sum(isinstance(module, LoraLayer) for module in unet.modules()) == 64
    trainer.detach()
    with base_restored(unet):
        assert dict(unet.named_modules()) == before


def test_compiled_blocks_are_left_out_for_a_while() -> None:
    unet = components_from_pipeline(TINY["sd1"]()).unet
    model = make_config(model={"compile": True}).model
    enter_modes(unet, model)
    compiled = {module: module._compiled_call_impl for module in unet.modules() if module._compiled_call_impl}
    assert len(compiled) == 16
    with pytest.raises(ZeroDivisionError), uncompiled(unet):
        assert not any(module._compiled_call_impl for module in unet.modules())
        _ = 1 / 0
    assert {module: module._compiled_call_impl for module in unet.modules() if module._compiled_call_impl} == compiled
    leave_modes(unet, model)
