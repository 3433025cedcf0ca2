"""From the command line to files: what other tools read in them, drawing again, previews, stopping, sharing out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sd_parsers import ParserManager

from sdlora import embedded
from sdlora.errors import GenerationError
from sdlora.generation import Generator
from sdlora.generation.files import preview_files
from sdlora.picture_file import AdapterRecord, Recipe, read_recipe, save_picture
from sdlora.request import GenerationRequest
from tests.adapters.builders import random_pairs, write
from tests.generation.test_workflows import pixels, run
from tests.tiny import tiny_sd1

QUICK = ("--steps", 2, "--guidance", 3)


def recipe(**changes: object) -> Recipe:
    given = {
        "prompt": "a (red:1.2) fox, by the lake",
        "negative_prompt": "grey, flat",
        "seed": 7,
        "num_inference_steps": 20,
        "guidance_scale": 6.5,
        "height": 512,
        "width": 768,
        "scheduler": "dpm++2m-karras",
        "base": "some:base, 1.5",
        "precision": "float16",
        "versions": {"sdlora": "0.1.0"},
    }
    return Recipe(**(given | changes))


def test_another_program_reads_our_pictures(tmp_path: Path) -> None:
    full = recipe(
        clip_skip=2,
        init_image="start.png",
        init_hash="0" * 64,
        strength=0.6,
        hires_scale=2.0,
        hires_strength=0.45,
        hires_steps=10,
        hires_upscaler="lanczos",
        adapters=(AdapterRecord("ink: fine", 0.8, "ink.safetensors", "ab" * 32),),
    )
    path = save_picture(Image.new("RGB", (8, 8)), tmp_path / "fox.png", full)
    info = ParserManager().parse(path)
    assert [prompt.value for prompt in info.prompts] == ["a (red:1.2) fox, by the lake <lora:ink: fine:0.8>"]
    assert [prompt.value for prompt in info.negative_prompts] == ["grey, flat"]
    (sampler,) = info.samplers
    assert sampler.name == "DPM++ 2M Karras"
    assert sampler.parameters == {"steps": "20", "cfg_scale": "6.5", "seed": "7"}
    assert sampler.model.name == "some base  1.5"
    expected = {
        "Size": "768x512",
        "Clip skip": "2",
        "Denoising strength": "0.45",
        "Hires upscale": "2",
        "Hires steps": "10",
        "Hires upscaler": "Lanczos",
    }
    assert expected.items() <= info.metadata.items()
    assert 'Lora hashes: "ink  fine: abababababab"' in full.parameters()
    assert read_recipe(path) == full


def test_a_recipe_from_before_is_still_read_and_taken_as_plain_text(tmp_path: Path) -> None:
    path = save_picture(Image.new("RGB", (8, 8)), tmp_path / "fox.png", recipe())
    with Image.open(path) as image:
        record = json.loads(image.info["sdlora"])
    older = ("clip_skip", "prompt_syntax", "init_image", "init_hash", "strength", "vae_tiling", "hires_scale")
    for name in (*older, "hires_strength", "hires_steps", "hires_upscaler"):
        del record[name]
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_itxt("sdlora", json.dumps(record))
    Image.new("RGB", (8, 8)).save(path, pnginfo=texts)
    request = read_recipe(path).request()
    request.check()
    assert request.prompt_syntax == "plain" and request.scheduler == "dpm++2m-karras"


def test_again_draws_what_was_drawn_over_a_picture(base: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.png"
    Image.effect_noise((40, 32), 80).convert("RGB").save(start)
    options = ("--init", start, "--strength", 0.9, "--hires", 1.5, "--clip-skip", 2, "--vae-tiling")
    out = tmp_path / "out"
    run("generate", "a (red:1.3) fox", "--base", base, "--out", out, "--sampler", "Euler a", *options, *QUICK)
    (drawn,) = out.glob("*.png")
    assert read_recipe(drawn).scheduler == "euler-a" and pixels(drawn).shape == (48, 64, 3)
    with pytest.raises(GenerationError, match=r"was drawn over start\.png, which was not found"):
        run("again", drawn, "--base", base, "--out", tmp_path / "again")
    other = tmp_path / "other.png"
    Image.new("RGB", (40, 32)).save(other)
    with pytest.raises(GenerationError, match="its pixels differ"):
        run("again", drawn, "--base", base, "--init", other)
    start.rename(tmp_path / "renamed.png")
    output = run("again", drawn, "--base", base, "--init", tmp_path / "renamed.png", "--out", tmp_path / "again")
    assert "The same picture, to the last pixel." in output


def test_stopping_keeps_what_is_done_and_says_so(base: Path, tmp_path: Path, monkeypatch) -> None:
    from sdlora import workflows

    written = workflows.save_picture

    def stop_at_the_third(image: Image.Image, path: Path, recipe: Recipe) -> Path:
        if recipe.seed == 2:
            raise KeyboardInterrupt
        return written(image, path, recipe)

    monkeypatch.setattr(workflows, "save_picture", stop_at_the_third)
    output = run("generate", "a fox", "-n", 4, "--base", base, "--out", tmp_path, *QUICK, code=130)
    assert "Stopped. 2 of 4 pictures are done and stay." in output
    assert [read_recipe(path).seed for path in sorted(tmp_path.glob("*.png"))] == [0, 1]


def test_a_preview_shows_the_work_and_goes_with_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, Path, np.ndarray]] = []
    path = tmp_path / "preview.png"
    generator = Generator.from_base("tiny", precision="fp32")
    generator.on_step = lambda step: seen.append((step.step, path, pixels(path) if path.exists() else np.zeros(0)))
    request = GenerationRequest(prompt="fox, flat style", num_inference_steps=8, guidance_scale=3.0, scheduler="euler")
    with preview_files(generator, tmp_path, every=4):
        (drawn,) = generator.draw(request)
    assert [step for step, _, _ in seen] == list(range(1, 9))
    assert [image.shape for _, _, image in seen] == [(0,)] * 3 + [(16, 16, 3)] * 5
    assert not path.exists()
    final = np.asarray(drawn.image.resize((16, 16), Image.Resampling.BOX)).astype(float)
    assert np.corrcoef(final.ravel(), seen[-1][2].ravel())[0, 1] > 0.85


def test_a_broken_choice_of_previews_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(GenerationError, match="not every 0"),
        preview_files(Generator(tiny_sd1()), tmp_path, every=0),
    ):
        pass


@pytest.mark.slow
def test_two_processes_draw_the_files_of_one(base: Path, tmp_path: Path) -> None:
    lora = write(tmp_path / "ink.safetensors", random_pairs(tiny_sd1().unet))
    (tmp_path / "prompts.txt").write_text(f"a fox\nan owl <lora:{lora}:0.7>\na cat\na cat\n")
    command = [sys.executable, "-m", "sdlora", "generate", "--prompts", str(tmp_path / "prompts.txt"), "-n", "3"]
    # Four jobs of three pictures in two batches each: shared out one by one, or joined, they would be cut otherwise.
    command += ["--base", str(base), "--sampler", "Euler a", "--batch-size", "2", *map(str, QUICK)]
    subprocess.run([*command, "--out", str(tmp_path / "one")], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = [
        subprocess.Popen(
            [*command, "--out", str(tmp_path / "two")],
            env=os.environ
            | {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in together] == [0, 0]
    one, two = (sorted((tmp_path / name).glob("*.png")) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 12
    assert all((pixels(a) == pixels(b)).all() for a, b in zip(one, two, strict=True))
    assert [read_recipe(path) for path in one] == [read_recipe(path) for path in two]


@pytest.mark.slow
def test_the_embedded_base_takes_its_own_steps_unless_the_scheduler_has_some(tmp_path: Path) -> None:
    for name, options, steps in (("own", (), embedded.NUM_INFERENCE_STEPS), ("lcm", ("--sampler", "LCM"), 4)):
        run("generate", "fox", "--base", "tiny", "--out", tmp_path / name, "--height", 32, "--width", 32, *options)
        (path,) = (tmp_path / name).glob("*.png")
        assert read_recipe(path).num_inference_steps == steps
