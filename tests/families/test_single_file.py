"""Single-file checkpoints: the same model comes out, whichever way it was stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.errors import ModelError
from sdlora.families import base_shapes, load_components, load_pipeline, resolve_base
from sdlora.families.clip import clip_tokenizer
from sdlora.families.single_file import open_checkpoint, probe_prediction_type
from tests.families.original import diffusers_unet, diffusers_vae, pipeline_of, write_original

FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    header = {"modelspec.prediction_type": "epsilon"}
    return {f: write_original(folder / f"{f}.safetensors", pipeline_of(f), f, header) for f in FAMILIES}


def edited(path: Path, target: Path, change, metadata: dict[str, str] | None = None) -> Path:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, target, metadata)
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_comes_back_and_the_pipeline_draws_the_same(files: dict[str, Path], family: str) -> None:
    original = pipeline_of(family)
    pipeline = load_pipeline(str(files[family]), weight_dtype=torch.float32, device="cpu")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if (model := getattr(original, part, None)) is None:
            continue
        state, expected = getattr(pipeline, part).state_dict(), model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected), part
    pictures = []
    for drawer in (original, pipeline):
        drawer.scheduler = original.scheduler
        drawer.set_progress_bar_config(disable=True)
        drawn = drawer(
            *("a fox",),
            num_inference_steps=2,
            height=64,
            width=64,
            output_type="latent",
            generator=torch.Generator().manual_seed(1),
        )
        pictures.append(drawn.images)
    # Products round differently where weights lie otherwise in memory.
    assert torch.allclose(*pictures, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_own_converter_agrees(files: dict[str, Path], family: str) -> None:
    pipeline = load_pipeline(str(files[family]), weight_dtype=torch.float32, device="cpu")
    for part, theirs in (
        ("unet", diffusers_unet(files[family], pipeline.unet)),
        ("vae", diffusers_vae(files[family], pipeline.vae)),
    ):
        ours = getattr(pipeline, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name].reshape(ours[name].shape)) for name in theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_can_be_trained_on(files: dict[str, Path], family: str) -> None:
    components = load_components(str(files[family]), weight_dtype=torch.bfloat16, device="cpu")
    assert (components.family.name, components.prediction_type) == (family, "epsilon")
    assert components.default_resolution == {"sd1": 512, "sd2": 768, "sdxl": 1024}[family]
    assert components.zeros_for_empty_prompt == (family == "sdxl")
    assert components.vae is not None and components.vae.dtype == torch.float32
    assert {p.dtype for p in components.unet.parameters()} == {torch.bfloat16}
    embeds = components.family.encode_prompts(components, ["a fox"])
    assert embeds.is_finite() and len(embeds) == 1


def test_the_tokenizer_gives_the_published_numbers() -> None:
    # From OpenAI's CLIP notebook and the documentation of transformers.
    assert clip_tokenizer()("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert clip_tokenizer()("Hello, world!").input_ids == [49406, 3306, 267, 1002, 256, 49407]
    padded = clip_tokenizer(for_open_clip=True)("a", padding="max_length", max_length=77).input_ids
    assert padded[:4] == [49406, 320, 49407, 0]


def test_a_half_precision_file_is_read_as_asked(files: dict[str, Path], tmp_path: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.half() if tensor.is_floating_point() else tensor

    path = edited(files["sd1"], tmp_path / "half.safetensors", halve)
    pipeline = load_pipeline(str(path), weight_dtype=torch.float32, device="cpu")
    assert pipeline.unet.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float32


@pytest.mark.parametrize(
    ("header", "marks", "expected"),
    [
        ({}, (), ("epsilon", False)),
        ({"modelspec.prediction_type": "v"}, (), ("v_prediction", False)),
        ({}, ("v_pred",), ("v_prediction", False)),
        ({"modelspec.prediction_type": "v"}, ("v_pred", "ztsnr"), ("v_prediction", True)),
    ],
)
def test_the_marks_of_trainers_are_read(
    files: dict[str, Path], tmp_path: Path, header: dict[str, str], marks: tuple[str, ...], expected: tuple[str, bool]
) -> None:
    def mark(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: torch.zeros(0) for name in marks})

    path = edited(files["sdxl"], tmp_path / "a.safetensors", mark, header)
    config = load_pipeline(str(path), weight_dtype=torch.float32, device="cpu").scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == expected


@pytest.mark.parametrize(
    ("header", "marks", "message"),
    [
        ({"modelspec.prediction_type": "epsilon"}, ("v_pred",), "marked for v-prediction, but its header says epsilon"),
        ({}, ("ztsnr",), "which epsilon cannot learn from"),
    ],
)
def test_marks_that_contradict_each_other_are_refused(
    files: dict[str, Path], tmp_path: Path, header: dict[str, str], marks: tuple[str, ...], message: str
) -> None:
    def mark(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: torch.zeros(0) for name in marks})

    path = edited(files["sdxl"], tmp_path / "a.safetensors", mark, header)
    with pytest.raises(ModelError, match=message):
        load_pipeline(str(path), weight_dtype=torch.float32, device="cpu")


def test_an_unmarked_unet_is_asked_what_it_predicts() -> None:
    class Answering(torch.nn.Module):
        config = type("Config", (), {"sample_size": 8, "cross_attention_dim": 4})

        def __init__(self, share: float):
            super().__init__()
            self.share = torch.nn.Parameter(torch.tensor(share))

        def forward(self, noise: torch.Tensor, timestep: int, embeds: torch.Tensor):
            other = torch.randn(noise.shape, generator=torch.Generator().manual_seed(5))
            return type("Output", (), {"sample": self.share * noise + (1 - self.share) * other})

    assert probe_prediction_type(Answering(0.95)) == "epsilon"
    assert probe_prediction_type(Answering(0.05)) == "v_prediction"
    with pytest.raises(ModelError, match="NaN"):
        probe_prediction_type(Answering(float("nan")))


def drop(prefix: str):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return change


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("sd1", drop("first_stage_model."), "holds no VAE"),
        ("sd1", drop("cond_stage_model."), "holds no text encoder"),
        ("sd1", drop("cond_stage_model.transformer.text_model.encoder.layers.0.mlp"), "no complete text encoder"),
        ("sd1", drop("model.diffusion_model.middle_block.1.norm"), "no complete Stable Diffusion: mid_block"),
        ("sd1", drop("model.diffusion_model."), "no Stable Diffusion checkpoint"),
        ("sdxl", drop("conditioner.embedders.0."), "SDXL refiner"),
        (
            "sd1",
            lambda t: t.update({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}),
            "takes 9 channels, not 4",
        ),
    ],
)
def test_what_is_not_whole_or_of_another_kind_is_named(
    files: dict[str, Path], tmp_path: Path, family: str, change, message: str
) -> None:
    path = edited(files[family], tmp_path / "a.safetensors", change)
    with pytest.raises(ModelError, match=message):
        load_components(str(path), weight_dtype=torch.float32, device="cpu")


def test_loras_transformers_pickles_and_broken_files_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    for name, tensors, message in (
        ("lora", {"lora_unet_a.lora_down.weight": torch.zeros(1, 1)}, "is a LoRA, not a base model"),
        ("flux", {"double_blocks.0.img_attn.qkv.weight": torch.zeros(1, 1)}, "transformer model"),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ModelError, match=message):
            open_checkpoint(tmp_path / f"{name}.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.ckpt")
    with pytest.raises(ModelError, match="pickle, which can run code"):
        open_checkpoint(tmp_path / "model.ckpt")
    (tmp_path / "web.safetensors").write_text("<html>not found, log in first</html>")
    with pytest.raises(ModelError, match="not a safetensors file"):
        open_checkpoint(tmp_path / "web.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(files["sd1"].read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        open_checkpoint(cut)


def test_a_file_is_a_base_by_its_path(files: dict[str, Path]) -> None:
    assert resolve_base(str(files["sd1"])) == str(files["sd1"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shapes_of_a_file_are_those_of_its_folder(files: dict[str, Path], tmp_path: Path, family: str) -> None:
    pipeline = load_pipeline(str(files[family]), weight_dtype=torch.float32, device="cpu")
    pipeline.save_pretrained(tmp_path)
    of_file, of_folder = base_shapes(str(files[family])), base_shapes(str(tmp_path))
    encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "hidden_act")
    for shapes in (of_file, of_folder):
        known = [encoder.config.to_dict() for encoder in encoders if encoder is not None]
        assert [[text[size] for size in sizes] for text in shapes.text] == [[c[size] for size in sizes] for c in known]
        assert shapes.text_parameters >= sum(p.numel() for e in encoders if e is not None for p in e.parameters())
    assert of_file.default_resolution == of_folder.default_resolution and of_file.size_step == of_folder.size_step
