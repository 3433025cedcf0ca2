"""The embedded base is an ordinary Stable Diffusion, small enough to ship, and adapters made on it work elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer

from sdlora import embedded
from sdlora.config import load_config
from sdlora.generation import Generator, initial_noise
from sdlora.request import GenerationRequest
from sdlora.training import train_adapter

DATASETS = Path(__file__).parents[2] / "datasets"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA trained for a few steps, hard enough to change every picture."""
    settings = {
        "data.path": str(DATASETS / "high-contrast"),
        "data.trigger": "high contrast style",
        "model.base": "tiny",
        "model.precision": "fp32",
        "train.exposures": 1,
        "train.batch_size": 8,
        "train.learning_rate": 5e-3,
        "output.dir": str(tmp_path_factory.mktemp("runs")),
    }
    return train_adapter(load_config(None, [f"{key}={value!r}" for key, value in settings.items()]))


def test_plain_diffusers_loads_it_with_standard_classes() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(embedded.path())
    classes = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
        "scheduler": DDIMScheduler,
    }
    assert {name: type(getattr(pipeline, name)) for name in classes} == classes
    assert pipeline.tokenizer.model_max_length == 77
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.vae_scale_factor == 8


def test_its_weights_are_fp16_safetensors_and_small() -> None:
    files = [path for path in embedded.path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32 * 2**20
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3
    assert not [path.name for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".py")]
    for path in weights:
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(key).get_dtype() for key in file.keys() if "position_ids" not in key}  # noqa: SIM118
        assert kinds == {"F16"}


def test_its_card_tells_the_measured_bars() -> None:
    bars = json.loads((embedded.path() / "bars.json").read_text(encoding="utf-8"))
    card = embedded.model_card()
    assert all(f"{value}" in card for value in (bars["vae"]["noto-v1"]["psnr"], bars["subjects"]["top1"]))


def test_it_knows_the_subjects_of_both_datasets() -> None:
    known = set(embedded.subjects())
    for folder in ("blob-emoji", "high-contrast"):
        captions = {path.read_text(encoding="utf-8").strip() for path in (DATASETS / folder).rglob("*.txt")}
        assert len(captions) == 80
        assert captions <= known


def test_a_lora_trained_here_gives_the_same_picture_in_plain_diffusers(adapter: Path) -> None:
    prompt, steps, guidance = "fox, high contrast style", 6, 3.0
    generator = Generator.from_base("tiny", precision="fp32")
    request = GenerationRequest(prompt=prompt, num_inference_steps=steps, guidance_scale=guidance, seed=7)
    without = np.asarray(next(generator.draw(request)).image).astype(int)
    generator.stack.load(adapter)
    ours = np.asarray(next(generator.draw(request)).image).astype(int)

    plain = StableDiffusionPipeline.from_pretrained(embedded.path(), torch_dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(adapter.parent, weight_name=adapter.name)
    theirs = plain(
        prompt, latents=initial_noise(7, 4, 16, 16), num_inference_steps=steps, guidance_scale=guidance
    ).images[0]
    assert np.abs(ours - without).max() > 20, "the adapter changes nothing: the comparison would be empty"
    assert np.abs(ours - np.asarray(theirs).astype(int)).max() <= 1


def test_training_leaves_the_shipped_files_alone(adapter: Path) -> None:
    generator = Generator.from_base("tiny", precision="fp32")
    before = generator.stack.base_checksum()
    generator.stack.load(adapter)
    next(generator.draw(GenerationRequest(prompt="fox", num_inference_steps=1)))
    generator.stack.unload()
    assert generator.stack.base_checksum() == before


def test_its_files_name_no_folder_of_the_machine_it_was_made_on() -> None:
    for path in embedded.path().rglob("*.json"):
        assert "_name_or_path" not in path.read_text(encoding="utf-8"), path.name
