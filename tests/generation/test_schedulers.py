"""Schedulers by their names: what is meant, what of the base is kept, and that a picture's noise is its own."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from sdlora.errors import GenerationError
from sdlora.generation import Generator
from sdlora.generation.schedules import give_noise_per_picture, make_scheduler
from sdlora.request import GenerationRequest
from sdlora.schedulers import SCHEDULERS, find_scheduler, scheduler_label
from tests.adapters.builders import random_pairs, write

REQUEST = GenerationRequest(prompt="a fox", num_inference_steps=3, guidance_scale=3.0, height=32, width=32)
NOISY = ("ddpm", "euler-a", "dpm2-a", "dpm++2m-sde-karras", "dpm++sde-karras", "lcm", "tcd")


def some_fast(names: Iterable[str], *fast: str) -> list[object]:
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture
def generator(tiny_pipeline) -> Generator:
    return Generator(tiny_pipeline, base="tiny-test")


def pixels(picture: object) -> np.ndarray:
    return np.asarray(picture.image).astype(int)


@pytest.mark.parametrize(
    ("spelling", "key"),
    [
        ("DPM++ 2M Karras", "dpm++2m-karras"),
        ("dpm++_2m_karras", "dpm++2m-karras"),
        ("DPM++ SDE Karras", "dpm++sde-karras"),
        ("DPM++ 2M SDE Karras", "dpm++2m-sde-karras"),
        ("Euler a", "euler-a"),
        ("euler ancestral", "euler-a"),
        ("PLMS", "pndm"),
        ("UniPC", "unipc"),
        ("ddim", "ddim"),
    ],
)
def test_usual_spellings_are_understood(spelling: str, key: str) -> None:
    assert find_scheduler(spelling) == key


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(GenerationError, match=r"'DPM\+\+ 2M Karas'\. Did you mean 'dpm\+\+2m-karras'\?"):
        find_scheduler("DPM++ 2M Karas")


def test_every_label_and_key_finds_itself_and_classes_have_their_label() -> None:
    assert all(find_scheduler(choice.label) == key == find_scheduler(key) for key, choice in SCHEDULERS.items())
    assert scheduler_label("PNDMScheduler") == "PLMS" and scheduler_label("OddScheduler") == "OddScheduler"


@pytest.mark.parametrize("scheduler", some_fast(SCHEDULERS, "pndm", "heun"))
def test_every_named_scheduler_draws_and_the_pipelines_own_stays(generator, tiny_pipeline, scheduler: str) -> None:
    own, config = tiny_pipeline.scheduler, dict(tiny_pipeline.scheduler.config)
    picture = next(generator.draw(dataclasses.replace(REQUEST, scheduler=scheduler, num_inference_steps=2)))
    assert picture.recipe.scheduler == scheduler
    assert pixels(picture).std() > 0
    assert tiny_pipeline.scheduler is own and dict(own.config) == config


@pytest.mark.parametrize("scheduler", some_fast(NOISY, "euler-a", "dpm++sde-karras"))
def test_noise_of_the_steps_belongs_to_its_picture(generator: Generator, scheduler: str) -> None:
    request = dataclasses.replace(REQUEST, num_images=3, batch_size=3, scheduler=scheduler)
    together = list(generator.draw(request))
    alone = next(generator.draw(dataclasses.replace(request, seed=2, num_images=1)))
    # fp32 sums in another order for another batch size: one level of 255 at most.
    assert np.abs(pixels(together[2]) - pixels(alone)).max() <= 1
    assert not np.array_equal(pixels(together[1]), pixels(together[2]))


@pytest.mark.parametrize("scheduler", some_fast(["euler-a", "dpm++2m-sde", "ddim"], "euler-a"))
def test_a_seed_draws_what_diffusers_draws_with_that_generator(generator, tiny_pipeline, scheduler: str) -> None:
    ours = next(generator.draw(dataclasses.replace(REQUEST, scheduler=scheduler, seed=11)))
    theirs = tiny_pipeline.__class__(**tiny_pipeline.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = make_scheduler(tiny_pipeline.scheduler, scheduler)
    image = theirs(
        "a fox",
        negative_prompt="",
        num_inference_steps=3,
        guidance_scale=3.0,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(11),
    ).images[0]
    assert np.array_equal(pixels(ours), np.asarray(image).astype(int))


def test_the_brownian_noise_is_that_of_diffusers_with_the_pictures_seeds() -> None:
    own = diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    ours = make_scheduler(own, "dpm++sde")
    theirs = diffusers.DPMSolverSDEScheduler.from_config(ours.config, noise_sampler_seed=[3, 4])
    give_noise_per_picture(ours, [3, 4], (4, 8, 8), torch.float32)
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(3)
        sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            sample = scheduler.step(scheduler.scale_model_input(sample, timestep) / 2, timestep, sample).prev_sample
        results.append(sample)
    assert torch.equal(*results)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_schedule_ends_at_a_clean_picture(scheduler: str) -> None:
    """With the true noise predicted at every step, each one ends at the picture the noise was added to."""
    made = make_scheduler(diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False), scheduler)
    picture = torch.full((1, 4, 8, 8), 0.5)
    give_noise_per_picture(made, [0], (4, 8, 8), torch.float32)
    made.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 8, 8, generator=generator) * made.init_noise_sigma
    takes = inspect.signature(made.step).parameters
    for timestep in made.timesteps:
        seen = made.scale_model_input(sample, timestep)
        level = np.interp(float(timestep), np.arange(1000), made.alphas_cumprod.numpy())
        noise = (seen - level**0.5 * picture) / (1 - level) ** 0.5
        options = {"generator": generator} if "generator" in takes else {}
        sample = made.step(noise, timestep, sample, **options).prev_sample
    assert torch.allclose(sample, picture, atol=0.1)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_v_prediction_and_zero_terminal_snr_of_the_base_are_kept(scheduler: str) -> None:
    own = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    made = make_scheduler(own, scheduler)
    assert made.config.prediction_type == "v_prediction"
    assert made.config.get("timestep_spacing", "trailing") == "trailing"
    assert made.alphas_cumprod[-1] <= 2.0**-23
    assert torch.allclose(made.alphas_cumprod[:-1], own.alphas_cumprod[:-1], atol=1e-6)


def test_impossible_numbers_of_steps_are_one_sentence(generator: Generator) -> None:
    with pytest.raises(GenerationError, match=r"51 steps: LCM has 50"):
        next(generator.draw(dataclasses.replace(REQUEST, scheduler="lcm", num_inference_steps=51)))


def test_few_step_schedulers_bring_their_steps_and_guidance_and_work_in_a_stack(
    generator: Generator, tiny_pipeline, tmp_path: Path
) -> None:
    request = GenerationRequest(prompt="a fox", scheduler="LCM", height=32, width=32, num_images=2, batch_size=2)
    plain = next(generator.draw(request))
    assert (plain.recipe.num_inference_steps, plain.recipe.guidance_scale) == (4, 1.0)
    for seed, name in enumerate(("lcm", "ink")):
        path = write(tmp_path / f"{name}.safetensors", random_pairs(tiny_pipeline.unet, seed=seed))
        generator.stack.load(path)
    try:
        generator.stack.set_adapters(["lcm", "ink"], [1.0, 0.7])
        stacked = list(generator.draw(request))
        alone = next(generator.draw(dataclasses.replace(request, seed=1, num_images=1)))
    finally:
        generator.stack.unload()
    assert np.abs(pixels(plain) - pixels(stacked[0])).max() > 1
    assert np.abs(pixels(stacked[1]) - pixels(alone)).max() <= 1
