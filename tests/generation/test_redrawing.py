"""Drawing over pictures and enlarging: the same as diffusers' own pipelines, whatever the family."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from PIL import Image, ImageOps

from sdlora.errors import GenerationError
from sdlora.generation import Generator
from sdlora.picture_file import read_recipe, save_picture
from sdlora.request import GenerationRequest
from tests.tiny import tiny_sdxl

QUICK = {"num_inference_steps": 4, "guidance_scale": 3.0}
REQUEST = GenerationRequest(prompt="a fox", negative_prompt="grey", seed=5, **QUICK)


def picture(width: int = 40, height: int = 32) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def image_to_image(pipeline, image, strength: float, generator: torch.Generator) -> Image.Image:
    """What diffusers' own pipeline draws over an image, or over latents."""
    parts = dict(pipeline.components)
    if "text_encoder_2" in parts:
        theirs = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    else:
        theirs = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    result = theirs("a fox", image=image, strength=strength, negative_prompt="grey", generator=generator, **QUICK)
    return result.images[0]


@pytest.fixture(scope="module")
def sdxl():
    return tiny_sdxl()


def test_a_picture_is_drawn_over_as_diffusers_does(tiny_pipeline, sdxl) -> None:
    for pipeline in (tiny_pipeline, sdxl):
        request = dataclasses.replace(REQUEST, init_image=picture(), strength=0.6)
        drawn = next(Generator(pipeline).draw(request))
        expected = image_to_image(pipeline, picture(), 0.6, torch.Generator().manual_seed(5))
        assert drawn.image.size == (40, 32)
        assert np.array_equal(pixels(drawn.image), pixels(expected))
        assert drawn.recipe.strength == 0.6


@pytest.mark.parametrize("upscaler", ["latent", pytest.param("lanczos", marks=pytest.mark.slow)])
def test_enlarging_is_drawing_enlarging_and_drawing_over(tiny_pipeline, upscaler: str) -> None:
    request = dataclasses.replace(
        REQUEST, height=32, width=32, hires_scale=1.5, hires_strength=0.5, hires_upscaler=upscaler
    )
    drawn = next(Generator(tiny_pipeline).draw(request))
    generator = torch.Generator().manual_seed(5)
    theirs = tiny_pipeline.__class__(**tiny_pipeline.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    kind = "latent" if upscaler == "latent" else "pil"
    first = theirs("a fox", negative_prompt="grey", height=32, width=32, generator=generator, output_type=kind, **QUICK)
    if upscaler == "latent":
        larger = torch.nn.functional.interpolate(first.images, size=(6, 6), mode="bilinear")
    else:
        larger = first.images[0].resize((48, 48), Image.Resampling.LANCZOS)
    assert drawn.image.size == (48, 48)
    assert np.array_equal(pixels(drawn.image), pixels(image_to_image(tiny_pipeline, larger, 0.5, generator)))
    assert (drawn.recipe.height, drawn.recipe.hires_scale, drawn.recipe.hires_upscaler) == (32, 1.5, upscaler)


@pytest.mark.slow
def test_enlarging_works_with_sdxl_and_any_scheduler(sdxl) -> None:
    request = dataclasses.replace(REQUEST, height=32, width=32, hires_scale=2.0, scheduler="DPM++ SDE Karras")
    drawn = list(Generator(sdxl).draw(dataclasses.replace(request, num_images=2, batch_size=2)))
    alone = next(Generator(sdxl).draw(dataclasses.replace(request, seed=6)))
    assert [p.image.size for p in drawn] == [(64, 64)] * 2
    assert np.abs(pixels(drawn[1].image) - pixels(alone.image)).max() <= 1


def test_files_are_turned_upright_and_scaled_down_to_what_the_base_draws(tiny_pipeline, tmp_path: Path) -> None:
    large = picture(256, 128)
    exif = Image.Exif()
    exif[0x0112] = 6
    large.save(tmp_path / "photo.png", exif=exif)
    drawn = next(Generator(tiny_pipeline).draw(dataclasses.replace(REQUEST, init_image=tmp_path / "photo.png")))
    # 64 x 64 pixels in the shape of the upright picture, 1 to 2.
    assert drawn.image.size == (48, 88)
    upright = ImageOps.fit(large.transpose(Image.Transpose.ROTATE_270), (48, 88), Image.Resampling.LANCZOS)
    expected = image_to_image(tiny_pipeline, upright, 0.6, torch.Generator().manual_seed(5))
    assert np.array_equal(pixels(drawn.image), pixels(expected))
    assert drawn.recipe.init_image == "photo.png"


def test_the_recipe_draws_it_again_and_a1111_can_read_it(tiny_pipeline, tmp_path: Path) -> None:
    picture().save(tmp_path / "start.png")
    request = dataclasses.replace(
        REQUEST, init_image=tmp_path / "start.png", hires_scale=1.5, hires_steps=3, clip_skip=2, height=32, width=32
    )
    drawn = next(Generator(tiny_pipeline).draw(request))
    path = save_picture(drawn.image, tmp_path / "out.png", drawn.recipe)
    again = next(Generator(tiny_pipeline).draw(read_recipe(path).request(tmp_path / "start.png")))
    assert np.array_equal(pixels(again.image), pixels(drawn.image))
    text = drawn.recipe.parameters()
    for expected in ("Clip skip: 2", "Denoising strength: 0.5", "Hires upscale: 1.5", "Hires steps: 3", "Size: 32x32"):
        assert expected in text


def test_a_broken_picture_is_one_sentence(tiny_pipeline, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(GenerationError, match=r"broken\.png.*header cannot be read") as caught:
        next(Generator(tiny_pipeline).draw(dataclasses.replace(REQUEST, init_image=tmp_path / "broken.png")))
    assert "\n" not in str(caught.value)
