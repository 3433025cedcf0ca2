"""The Python API: light to import, gentle to a pipeline; every recipe of docs/RECIPES.md runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sdlora
from sdlora import embedded
from sdlora.families import load_pipeline
from sdlora.generation import generator as generator_module
from tests.adapters.builders import random_pairs, write
from tests.tiny import tiny_sd1, tiny_sdxl

ROOT = Path(__file__).parents[2]
RECIPES = dict(
    re.findall(r"^## (.+?)\n.*?```python\n(.*?)```", (ROOT / "docs" / "RECIPES.md").read_text("utf-8"), re.M | re.S)
)
QUICK = {"A picture in a notebook", "Two LoRAs in one file"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipes name: two adapters, a picture, some art."""
    folder = tmp_path_factory.mktemp("recipes")
    unet = load_pipeline(str(embedded.path()), weight_dtype=torch.float32, device="cpu").unet
    for seed, name in enumerate(("ink", "blob")):
        write(folder / f"{name}.safetensors", random_pairs(unet, seed=seed, strength=0.1))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "sketch.png")
    (folder / "my_art").mkdir()
    for index in range(4):
        Image.fromarray(np.roll(pixels, index * 9, 0)).resize((128, 128)).save(folder / "my_art" / f"{index}.png")
        (folder / "my_art" / f"{index}.txt").write_text(f"subject {index}")
    return folder


@pytest.mark.parametrize("title", [pytest.param(t, marks=[pytest.mark.slow] * (t not in QUICK)) for t in RECIPES])
def test_every_recipe_runs(title: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setitem(generator_module._SUITED, "tiny", (4, embedded.GUIDANCE_SCALE))
    code = RECIPES[title].replace("train.exposures=20", "train.exposures=2")
    exec(compile(code, f"docs/RECIPES.md: {title}", "exec"), {"__name__": "recipe"})


def test_the_page_has_the_recipes_it_should() -> None:
    assert len(RECIPES) == 9 and set(RECIPES) >= QUICK


def test_importing_the_package_and_looking_at_its_names_loads_no_model_library() -> None:
    code = (
        "import sys, sdlora; dir(sdlora); sdlora.GenerationRequest; sdlora.TrainConfig; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_every_name_of_the_package_is_there() -> None:
    assert all(getattr(sdlora, name).__name__ == name for name in sdlora.__all__)
    assert set(sdlora.__all__) <= set(dir(sdlora))
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = sdlora.nothing_such


@pytest.mark.parametrize("family", [tiny_sd1, pytest.param(tiny_sdxl, marks=pytest.mark.slow)])
def test_a_pipeline_is_left_as_it_was(family, tmp_path: Path) -> None:
    pipeline = family()
    pipeline.unet.train()
    pipeline.set_progress_bar_config(desc="mine")
    lora = write(
        tmp_path / "ink.safetensors",
        random_pairs(pipeline.unet),
        family="sdxl" if hasattr(pipeline, "text_encoder_2") else "sd1",
    )

    # transformers leaves hooks of its own in an encoder that was asked for hidden states, as diffusers asks of SDXL.
    pipeline.encode_prompt("a fox", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)

    def state() -> list[object]:
        modules = [(name, part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)]
        return [
            *(id(part) for part in pipeline.components.values()),
            dict(pipeline.scheduler.config),
            dict(pipeline.config),
            dict(pipeline._progress_bar_config),
            [type(processor) for processor in pipeline.unet.attn_processors.values()],
            [
                (name, id(m), m.training, len(m._forward_hooks))
                for _, part in modules
                for name, m in part.named_modules()
            ],
            [(t.data_ptr(), t.dtype, t.requires_grad) for _, part in modules for t in part.parameters()],
        ]

    before, tensors = state(), {name: t.clone() for name, t in pipeline.unet.state_dict().items()}
    request = sdlora.GenerationRequest(
        prompt="a (red) fox", num_inference_steps=2, scheduler="Euler a", hires_scale=1.5, height=32, width=32
    )
    with sdlora.Generator(pipeline) as generator:
        generator.stack.load(lora)
        next(generator.draw(request))
    assert state() == before
    assert all(torch.equal(tensors[name], t) for name, t in pipeline.unet.state_dict().items())
