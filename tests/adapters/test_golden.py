"""Committed files of every dialect have the effect that golden/make.py worked out for them when it made them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdlora.adapter_file import AdapterWeights, carried_metadata, family_of, read_adapter, write_adapter
from sdlora.stack import AdapterStack

from .builders import predict
from .golden.make import FOLDER, MAKERS

EXPECTED = load_file(FOLDER / "expected.safetensors")
# fp32, and two versions of a processor; the smallest effect is a hundred times as large.
SAME = 2e-4


@pytest.mark.parametrize(
    "name",
    # A pipeline of SDXL takes as long as ten of SD 1.x.
    [pytest.param(name, marks=pytest.mark.slow) if name == "sdxl_diffusers_names" else name for name in MAKERS],
)
def test_a_golden_file_has_the_effect_it_had_when_it_was_made(name: str) -> None:
    pipeline = MAKERS[name][0]()
    base = predict(pipeline)[0]
    AdapterStack(pipeline).load(FOLDER / f"{name}.safetensors")
    effect = predict(pipeline)[0] - base
    assert float(EXPECTED[name].abs().max()) > 0.02
    assert torch.allclose(effect, EXPECTED[name], atol=SAME)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("loha", "dora_by_row", "peft_rslora") else pytest.param(name, marks=pytest.mark.slow)
        for name in MAKERS
    ],
)
def test_a_golden_file_keeps_its_effect_when_we_write_it(tmp_path: Path, name: str) -> None:
    weights = read_adapter(FOLDER / f"{name}.safetensors")
    pipeline = MAKERS[name][0]()
    family = "sdxl" if name.startswith("sdxl") else "sd2" if name.startswith("sd2") else "sd1"
    assert family_of(weights) is None  # narrower than any real model's
    path = write_adapter(
        tmp_path / "ours.safetensors",
        weights.unet,
        family=family,
        metadata=carried_metadata(weights.metadata, title="ours"),
        text_encoder=weights.text_encoder,
        text_encoder_2=weights.text_encoder_2,
        dtype=torch.float32,
    )
    base = predict(pipeline)[0]
    AdapterStack(pipeline).load(path)
    assert torch.allclose(predict(pipeline)[0] - base, EXPECTED[name], atol=SAME)
    assert isinstance(weights, AdapterWeights)


def test_the_files_are_small_and_none_is_forgotten() -> None:
    files = {path.stem: path.stat().st_size for path in FOLDER.glob("*.safetensors")}
    assert files.keys() == {*MAKERS, "expected"} == {*EXPECTED, "expected"}
    assert max(files.values()) < 64 * 2**10 and sum(files.values()) < 2**20


@pytest.mark.slow
def test_the_script_makes_the_committed_files_again(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from tests.adapters.golden import make;"
        "make.FOLDER = pathlib.Path(sys.argv[1]); make.main()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2], check=True)
    for path in FOLDER.glob("*.safetensors"):
        made, kept = load_file(tmp_path / path.name), load_file(path)
        assert made.keys() == kept.keys()
        assert all(torch.allclose(made[key], kept[key], atol=1e-5) for key in kept), path.name
