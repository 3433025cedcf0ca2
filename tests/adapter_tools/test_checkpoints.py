"""Adapters in single-file checkpoints, against weights merged by hand in the models that the files hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sdlora.adapter_file import LoraPair, read_adapter
from sdlora.cli_lora import app
from sdlora.errors import AdapterError, AdapterMismatchError, ModelError
from sdlora.families import load_pipeline
from tests.adapters.builders import TEXT, hand_merged, random_pairs, write
from tests.families.original import pipeline_of, write_original

UNET = ("attn2.to_k", "attn2.to_v", "attn1.to_out.0", "ff.net.0.proj", "proj_in", "resnets.0.conv1", "conv_shortcut")


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def adapter_for(folder: Path, family: str, pipeline) -> tuple[Path, dict[str, dict[str, LoraPair]]]:
    parts = {
        "unet": random_pairs(pipeline.unet, targets=UNET, alpha=2.0),
        "text_encoder": random_pairs(pipeline.text_encoder, targets=TEXT, seed=1, alpha=1.0),
    }
    if family == "sdxl":
        parts["text_encoder_2"] = random_pairs(pipeline.text_encoder_2, targets=(*TEXT, "text_projection"), seed=2)
    more = {part: pairs for part, pairs in parts.items() if part != "unet"}
    return write(folder / "ink.safetensors", parts["unet"], family=family, **more), parts


# SDXL has both kinds of text encoders; the others take as long again.
@pytest.mark.parametrize(
    "family", [pytest.param("sd1", marks=pytest.mark.slow), pytest.param("sd2", marks=pytest.mark.slow), "sdxl"]
)
def test_a_baked_checkpoint_is_the_base_with_the_weights_merged_by_hand(tmp_path: Path, family: str) -> None:
    pipeline = pipeline_of(family)
    header = {"modelspec.prediction_type": "epsilon", "modelspec.hash_sha256": "0x00"}
    base = write_original(tmp_path / "base.safetensors", pipeline, family, header)
    adapter, parts = adapter_for(tmp_path, family, pipeline)
    before = base.read_bytes()
    run("bake", tmp_path / "baked.safetensors", f"{adapter}:0.5", "--base", base)
    assert base.read_bytes() == before
    expected = hand_merged(pipeline, *((part, pairs, 0.5) for part, pairs in parts.items()))
    baked = load_pipeline(str(tmp_path / "baked.safetensors"), weight_dtype=torch.float32, device="cpu")
    changed = 0
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(expected, part, None) is None:
            continue
        ours, truth = getattr(baked, part).state_dict(), getattr(expected, part).state_dict()
        old = getattr(pipeline, part).state_dict()
        for name, tensor in truth.items():
            assert torch.allclose(ours[name], tensor, atol=1e-5), f"{part}.{name}"
            changed += not torch.equal(ours[name], old[name])
    assert changed == sum(map(len, parts.values()))
    with safe_open(tmp_path / "baked.safetensors", "pt") as file:
        assert file.metadata() == {"modelspec.prediction_type": "epsilon"}


def test_every_tensor_that_no_adapter_touches_keeps_its_bits_and_fp16_stays_fp16(tmp_path: Path) -> None:
    pipeline = pipeline_of("sd1")
    base = write_original(tmp_path / "full.safetensors", pipeline, "sd1")
    half = {name: t.half() if t.is_floating_point() else t for name, t in load_file(base).items()}
    half["model_ema.diffusion_modelout2bias"] = torch.tensor([float("nan")])
    save_file(half, tmp_path / "base.safetensors")
    pairs = random_pairs(pipeline.unet, targets=("attn2.to_q",), alpha=4.0)
    adapter = write(tmp_path / "ink.safetensors", pairs)
    assert "16 tensors" in run("bake", tmp_path / "baked.safetensors", adapter, "--base", tmp_path / "base.safetensors")
    baked = load_file(tmp_path / "baked.safetensors")
    assert list(baked) == list(load_file(tmp_path / "base.safetensors"))
    differing = [k for k, t in baked.items() if t.numpy().tobytes() != half[k].numpy().tobytes()]
    assert len(differing) == 16 and all(".attn2.to_q." in name for name in differing)
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"
    pair = read_adapter(adapter).unet["mid_block.attentions.0.transformer_blocks.0.attn2.to_q"]
    assert torch.equal(baked[name], (half[name].float() + pair.up @ pair.down).half())


def test_two_adapters_add_up_and_a_dora_is_worked_out(tmp_path: Path) -> None:
    pipeline = pipeline_of("sd1")
    base = write_original(tmp_path / "base.safetensors", pipeline, "sd1")
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    weight = pipeline.unet.get_submodule(path).weight.detach()
    plain = LoraPair(torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2), 2.0)
    dora = LoraPair(plain.down, plain.up, 2.0, torch.full((weight.shape[0], 1), 3.0))
    for name, pair in (("plain", plain), ("dora", dora)):
        write(tmp_path / f"{name}.safetensors", {path: pair})
    run(
        "bake",
        tmp_path / "b.safetensors",
        *(tmp_path / f"{n}.safetensors:0.5" for n in ("plain", "dora")),
        "--base",
        base,
    )
    turned = weight + plain.up @ plain.down
    expected = weight + 0.5 * plain.up @ plain.down + 0.5 * (3 * turned / turned.norm(dim=1, keepdim=True) - weight)
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_q.weight"
    assert torch.allclose(load_file(tmp_path / "b.safetensors")[name], expected, atol=1e-4)


def test_what_cannot_be_baked_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    base = write_original(tmp_path / "base.safetensors", pipeline_of("sd1"), "sd1")
    target = tmp_path / "baked.safetensors"
    other = write(tmp_path / "sd2.safetensors", random_pairs(pipeline_of("sd2").unet, targets=("attn2.to_k",)))
    with pytest.raises(AdapterMismatchError, match="made for"):
        run("bake", target, other, "--base", base)
    pairs = random_pairs(pipeline_of("sd1").unet, targets=("attn2.to_q",))
    ink = write(tmp_path / "ink.safetensors", pairs)
    half = {k: t.half() if t.is_floating_point() else t for k, t in load_file(base).items()}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(AdapterError, match=r"is not finite in torch\.float16"):
        run("bake", target, f"{ink}:1e6", "--base", tmp_path / "half.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(base.read_bytes()[:-9])
    with pytest.raises(ModelError, match="Fetch it again"):
        run("bake", target, ink, "--base", tmp_path / "cut.safetensors")
    with pytest.raises(AdapterError, match="is there already"):
        run("bake", ink, ink, "--base", base)
    assert not target.exists() and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_memory_stays_near_one_tensor(tmp_path: Path) -> None:
    """400 MB beside a small model: the process grows by a tenth of that."""
    base = write_original(tmp_path / "small.safetensors", pipeline_of("sd1"), "sd1")
    big = {f"ballast.{n}": torch.arange(2_500_000.0) for n in range(40)}
    save_file({**load_file(base), **big}, tmp_path / "base.safetensors")
    ink = write(tmp_path / "ink.safetensors", random_pairs(pipeline_of("sd1").unet))
    code = (
        "import resource, sys; from pathlib import Path; from sdlora.adapter_file import read_adapter;"
        "from sdlora.adapter_tools import bake_checkpoint; base, ink, small, target = map(Path, sys.argv[1:]);"
        "weights = [(read_adapter(ink), 1.0)]; bake_checkpoint(small, target.with_name('warm.safetensors'), weights);"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; bake_checkpoint(base, target, weights);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", code, tmp_path / "base.safetensors", ink, base, tmp_path / "baked.safetensors"]
    grown_kb = int(subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout)
    assert grown_kb < 40_000
    with safe_open(tmp_path / "baked.safetensors", "pt") as baked:
        assert all(torch.equal(baked.get_tensor(name), tensor) for name, tensor in big.items())
