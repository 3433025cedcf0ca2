"""Drawing: a seed means one picture, recipes draw it again, impossible requests are refused before any work."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.errors import GenerationError
from sdlora.generation import Generator, initial_noise
from sdlora.picture_file import read_recipe, save_picture
from sdlora.request import GenerationRequest
from tests.adapters.builders import random_pairs, write

REQUEST = GenerationRequest(prompt="a fox", num_inference_steps=2, guidance_scale=3.0)


@pytest.fixture
def generator(tiny_pipeline) -> Generator:
    return Generator(tiny_pipeline, base="tiny-test")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(generator: Generator) -> None:
    first, again = (next(generator.draw(REQUEST)).image for _ in range(2))
    other = next(generator.draw(dataclasses.replace(REQUEST, seed=1))).image
    assert np.array_equal(pixels(first), pixels(again))
    assert not np.array_equal(pixels(first), pixels(other))


def test_seed_0_is_a_seed(generator: Generator) -> None:
    torch.manual_seed(1)
    first = next(generator.draw(REQUEST)).image
    torch.manual_seed(2)
    assert np.array_equal(pixels(first), pixels(next(generator.draw(REQUEST)).image))


def test_drawing_does_not_touch_the_global_random_state(generator: Generator) -> None:
    before = torch.get_rng_state()
    next(generator.draw(dataclasses.replace(REQUEST, scheduler="euler-a")))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("scheduler", [None, "euler-a"])
def test_a_picture_does_not_depend_on_those_beside_it(generator: Generator, scheduler: str | None) -> None:
    request = dataclasses.replace(REQUEST, num_images=3, batch_size=3, scheduler=scheduler)
    together = [picture.image for picture in generator.draw(request)]
    alone = next(generator.draw(dataclasses.replace(request, seed=2, num_images=1))).image
    # fp32 sums in another order for another batch size: one level of 255 at most.
    assert np.abs(pixels(together[2]) - pixels(alone)).max() <= 1


def test_the_picture_is_the_one_the_plain_pipeline_draws(generator: Generator, tiny_pipeline) -> None:
    ours = next(generator.draw(REQUEST)).image
    side = tiny_pipeline.unet.config.sample_size
    plain = tiny_pipeline(
        "a fox", latents=initial_noise(0, 4, side, side), num_inference_steps=2, guidance_scale=3.0
    ).images[0]
    assert np.abs(pixels(ours) - pixels(plain)).max() <= 1


@pytest.mark.parametrize(
    "change",
    [
        {"num_inference_steps": 0},
        {"num_inference_steps": 1001},
        {"guidance_scale": float("nan")},
        {"guidance_scale": -1.0},
        {"num_images": 0},
        {"batch_size": 0},
        {"seed": -1},
        {"height": 100},
        {"width": 0},
        {"scheduler": "magic"},
        {"scheduler": "lcm", "num_inference_steps": 51},
        {"clip_skip": 0},
        {"clip_skip": 99},
        {"prompt_syntax": "loud"},
        {"strength": 0.5},
        {"init_image": Path("nowhere.png")},
        {"init_image": Path(__file__)},
        {"init_image": Image.new("RGB", (8, 8)), "strength": 0.0},
        {"init_image": Image.new("RGB", (8, 8)), "strength": 0.1},
        {"hires_strength": 0.5},
        {"hires_scale": 1.0},
        {"hires_scale": float("nan")},
        {"hires_scale": 2.0, "hires_strength": 1.5},
        {"hires_scale": 2.0, "hires_steps": 0},
        {"hires_scale": 2.0, "hires_upscaler": "magic"},
    ],
    ids=lambda change: ", ".join(change),
)
def test_impossible_requests_are_refused_in_one_sentence(generator: Generator, change: dict[str, object]) -> None:
    with pytest.raises(GenerationError) as caught:
        next(generator.draw(dataclasses.replace(REQUEST, **change)))
    assert "\n" not in str(caught.value)


def test_a_strength_that_leaves_no_step_of_the_bases_own_number_is_refused(generator: Generator) -> None:
    generator.base = "tiny"
    request = GenerationRequest(prompt="a fox", init_image=Image.new("RGB", (8, 8)), strength=0.04)
    with pytest.raises(GenerationError, match="leaves none of 20 steps"):
        next(generator.draw(request))


def test_words_that_are_cut_are_told(tiny_pipeline) -> None:
    told: list[str] = []
    generator = Generator(tiny_pipeline, warn=told.append)
    next(generator.draw(dataclasses.replace(REQUEST, prompt="fox " * 100 + "owl", prompt_syntax="plain")))
    assert len(told) == 1 and "owl" in told[0]


def test_a_picture_of_nan_is_an_error_not_a_black_file(generator: Generator, tiny_pipeline) -> None:
    bias = tiny_pipeline.vae.decoder.conv_out.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(float("nan"))
    try:
        with pytest.raises(GenerationError, match="NaN"):
            next(generator.draw(REQUEST))
    finally:
        with torch.no_grad():
            bias.copy_(kept)


def test_the_recipe_in_the_file_draws_the_picture_again(generator: Generator, tmp_path: Path) -> None:
    request = dataclasses.replace(REQUEST, negative_prompt="a cat", scheduler="ddim", seed=5, height=32, width=24)
    picture = next(generator.draw(request))
    path = save_picture(picture.image, tmp_path / "new" / "fox.png", picture.recipe)
    recipe = read_recipe(path)
    assert recipe == picture.recipe
    with Image.open(path) as stored:
        assert np.array_equal(pixels(stored), pixels(next(generator.draw(recipe.request())).image))


def test_a1111_reads_the_settings(generator: Generator, tmp_path: Path) -> None:
    picture = next(generator.draw(dataclasses.replace(REQUEST, negative_prompt="a cat")))
    path = save_picture(picture.image, tmp_path / "fox.png", picture.recipe)
    with Image.open(path) as stored:
        lines = stored.info["parameters"].splitlines()
    assert lines[:2] == ["a fox", "Negative prompt: a cat"]
    assert lines[2].startswith("Steps: 2, Sampler: ") and "Seed: 0" in lines[2]


def test_a_picture_without_our_recipe_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(GenerationError, match=r"plain\.png"):
        read_recipe(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(GenerationError, match=r"text\.png"):
        read_recipe(tmp_path / "text.png")


def test_pictures_of_one_batch_record_the_weight_each_was_drawn_with(tiny_pipeline, tmp_path: Path) -> None:
    generator = Generator(tiny_pipeline)
    path = write(tmp_path / "ink.safetensors", random_pairs(tiny_pipeline.unet))
    generator.stack.load(path)
    request = dataclasses.replace(REQUEST, num_images=2, batch_size=2)
    try:
        generator.stack.set_weight("ink", "0.5:images=0,2:lbw=OUTALL")
        pictures = list(generator.draw(request))
        assert [picture.recipe.adapters[0].weight for picture in pictures] == ["0:lbw=OUTALL", "1:lbw=OUTALL"]
        assert "<lora:ink:1:lbw=OUTALL>" in pictures[1].recipe.parameters()
        stored = read_recipe(save_picture(pictures[1].image, tmp_path / "fox.png", pictures[1].recipe))
        generator.stack.set_weight("ink", stored.adapters[0].weight)
        alone = next(generator.draw(dataclasses.replace(REQUEST, seed=1))).image
        assert np.abs(pixels(alone) - pixels(pictures[1].image)).max() <= 1
        generator.stack.disable()
        assert next(generator.draw(REQUEST)).recipe.adapters == ()
    finally:
        generator.stack.unload()


@pytest.mark.parametrize("scheduler", ["euler", "heun"])
def test_steps_are_counted_on_the_schedule_that_draws(generator, tiny_pipeline, tmp_path: Path, scheduler: str) -> None:
    request = dataclasses.replace(REQUEST, scheduler=scheduler, num_inference_steps=3)
    base = next(generator.draw(request)).image
    generator.stack.load(write(tmp_path / "ink.safetensors", random_pairs(tiny_pipeline.unet)))
    try:
        generator.stack.set_weight("ink", "30:start=3")
        assert np.abs(pixels(next(generator.draw(request)).image) - pixels(base)).max() <= 1
        generator.stack.set_weight("ink", "30:start=2")
        assert np.abs(pixels(next(generator.draw(request)).image) - pixels(base)).max() > 1
    finally:
        generator.stack.unload()
