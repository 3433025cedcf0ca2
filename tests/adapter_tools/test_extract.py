"""A base plus a known change of known rank, in files and folders of every family: `extract` gives the change back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sdlora.adapter_file import LoraPair, read_adapter
from sdlora.adapter_file.keys import text_module_path
from sdlora.cli_lora import app
from sdlora.errors import AdapterError
from tests.adapters.builders import TEXT, hand_merged, random_pairs
from tests.families.original import pipeline_of, write_original
from tests.tiny import tiny_sd1, tiny_sd2, tiny_sdxl

UNET = ("attn2.to_k", "attn1.to_q")
RANK = 3
TINY = {"sd1": tiny_sd1, "sd2": tiny_sd2, "sdxl": tiny_sdxl}


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def dense(pair: LoraPair) -> torch.Tensor:
    return pair.scale * pair.up.flatten(1).double() @ pair.down.flatten(1).double()


def known_change(pipeline, family: str) -> dict[str, dict[str, LoraPair]]:
    """As large as the layers themselves, in the U-Net and in every text encoder."""
    parts = {"unet": random_pairs(pipeline.unet, targets=UNET, rank=RANK)}
    for seed, part in enumerate(("text_encoder", "text_encoder_2")[: 2 if family == "sdxl" else 1], 1):
        parts[part] = random_pairs(getattr(pipeline, part), targets=TEXT, rank=RANK, seed=seed)
    return parts


def assert_is(found: Path, parts: dict[str, dict[str, LoraPair]], *, tolerance: float = 1e-4) -> None:
    """The same layers, of the same rank, with the same change."""
    adapter = read_adapter(found)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        wanted = {text_module_path(path): pair for path, pair in parts.get(part, {}).items()}
        assert adapter.part(part).keys() == wanted.keys()
        for path, pair in wanted.items():
            got = adapter.part(part)[path]
            assert got.rank == RANK, f"{part}.{path}"
            gap = float((dense(got) - dense(pair)).norm() / dense(pair).norm())
            assert gap < tolerance, f"{part}.{path}: {gap}"


# SDXL has both kinds of text encoders; the others take as long again.
@pytest.mark.parametrize(
    "family", [pytest.param("sd1", marks=pytest.mark.slow), pytest.param("sd2", marks=pytest.mark.slow), "sdxl"]
)
def test_of_two_files_unet_and_text_encoders_come_back(tmp_path: Path, family: str) -> None:
    pipeline = pipeline_of(family, "v_prediction" if family == "sd2" else "epsilon")
    parts = known_change(pipeline, family)
    tuned = hand_merged(pipeline, *((part, pairs, 1.0) for part, pairs in parts.items()))
    marks = {"modelspec.prediction_type": "v"} if family == "sd2" else None
    base = write_original(tmp_path / "base.safetensors", pipeline, family, marks)
    changed = write_original(tmp_path / "tuned.safetensors", tuned, family, marks)
    found = tmp_path / "found.safetensors"
    # Rank 8 is more than the change has: the energy finds out that it is 3.
    said = run("extract", changed, base, found, "--rank", 8, "--energy", 0.999999, "--dtype", "fp32")
    assert f"U-Net: {len(parts['unet'])}, text encoder: {len(parts['text_encoder'])}" in said
    assert_is(found, parts)
    metadata = read_adapter(found).metadata
    assert metadata["sdlora.family"] == family and metadata["sdlora.base_model"] == "local model"
    assert metadata["modelspec.prediction_type"] == ("v" if family == "sd2" else "epsilon")
    run("extract", changed, base, found, "--rank", 3, "--unet-only", "--dtype", "fp32", "--overwrite")
    assert_is(found, {"unet": parts["unet"]})
    if family == "sdxl":
        sd1 = write_original(tmp_path / "sd1.safetensors", pipeline_of("sd1"), "sd1")
        with pytest.raises(AdapterError, match=r"but .* is sd1"):
            run("extract", changed, sd1, tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "family", ["sd1", pytest.param("sd2", marks=pytest.mark.slow), pytest.param("sdxl", marks=pytest.mark.slow)]
)
def test_of_two_folders_unet_and_text_encoders_come_back(tmp_path: Path, family: str) -> None:
    pipeline = TINY[family]()
    parts = known_change(pipeline, family)
    hand_merged(pipeline, *((part, pairs, 1.0) for part, pairs in parts.items())).save_pretrained(tmp_path / "tuned")
    pipeline.save_pretrained(tmp_path / "base")
    found = tmp_path / "found.safetensors"
    run("extract", tmp_path / "tuned", tmp_path / "base", found, "--rank", 3, "--dtype", "fp32")
    assert_is(found, parts)
    assert read_adapter(found).metadata["modelspec.prediction_type"] == ("v" if family == "sd2" else "epsilon")


@pytest.mark.slow
def test_a_tuned_file_and_its_base_as_a_folder_go_together(tmp_path: Path) -> None:
    pipeline = pipeline_of("sd1")
    parts = {"text_encoder": random_pairs(pipeline.text_encoder, targets=TEXT[:2], rank=RANK)}
    tuned = write_original(
        tmp_path / "tuned.safetensors", hand_merged(pipeline, ("text_encoder", parts["text_encoder"], 1.0)), "sd1"
    )
    pipeline.save_pretrained(tmp_path / "base")
    found = tmp_path / "found.safetensors"
    run("extract", tuned, tmp_path / "base", found, "--rank", 3, "--dtype", "fp32")
    assert_is(found, parts)
    with pytest.raises(AdapterError, match="nothing to extract"):
        run("extract", tuned, tmp_path / "base", tmp_path / "none.safetensors", "--unet-only")
    assert not (tmp_path / "none.safetensors").exists()


def test_a_checkpoint_in_half_precision_is_no_tuning_of_the_whole_one(tmp_path: Path) -> None:
    base = write_original(tmp_path / "base.safetensors", pipeline_of("sd1"), "sd1")
    half = {name: t.half() if t.is_floating_point() else t for name, t in load_file(base).items()}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(AdapterError, match="nothing to extract"):
        run("extract", tmp_path / "half.safetensors", base, tmp_path / "none.safetensors")


def test_what_does_not_go_into_the_rank_is_told(tmp_path: Path) -> None:
    pipeline = tiny_sd1()
    pairs = random_pairs(pipeline.text_encoder, targets=("mlp.fc1",), rank=2, alpha=2.0)
    hand_merged(pipeline, ("text_encoder", pairs, 1.0)).save_pretrained(tmp_path / "tuned")
    pipeline.save_pretrained(tmp_path / "base")
    said = run("extract", tmp_path / "tuned", tmp_path / "base", tmp_path / "a.safetensors", "--rank", 1)
    lost = []
    for pair in pairs.values():
        values = torch.linalg.svdvals(dense(pair))
        lost.append(float((values[1:].square().sum() / values.square().sum()).sqrt()))
    assert f"{max(lost):.1%} at most (text_encoder.text_model.encoder.layers." in said
    (line,) = run("inspect", "--json", tmp_path / "a.safetensors").splitlines()
    assert json.loads(line)["parts"] == {"text_encoder": 2}
