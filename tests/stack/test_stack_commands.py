"""`sdlora stack ...` and `generate --stack` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sdlora.adapter_file import AdapterMetadata, LoraPair, read_adapter, rewrite_metadata
from sdlora.adapter_weight import AdapterWeight, parse_weight
from sdlora.cli import app
from sdlora.errors import AdapterError, GenerationError
from sdlora.picture_file import read_recipe
from sdlora.stack_file import StackEntry, StackFile, read_stack_file, write_stack_file
from tests.adapters.builders import random_pairs, write
from tests.tiny import tiny_sd1

QUICK = ("--steps", 2, "--guidance", 3)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def pipeline():
    return tiny_sd1()


@pytest.fixture
def loras(pipeline, tmp_path: Path) -> dict[str, Path]:
    files = {}
    for seed, name in enumerate(("ink", "blob")):
        own = {"sdlora.family": "sd1", "sdlora.base": "tiny"}
        metadata = AdapterMetadata(title=name, base_model="tiny", trigger_phrase=f"{name} style")
        pairs = random_pairs(pipeline.unet, seed=seed, rank=3, targets=("attn2.to_k", "attn1.to_q"))
        path = write(tmp_path / f"{name}.safetensors", pairs, metadata=metadata)
        files[name] = rewrite_metadata(path, path, own)
    return files


def dense(pair: LoraPair) -> torch.Tensor:
    return pair.scale * (pair.up.double() @ pair.down.double())


# --- the file -------------------------------------------------------------------------------------------------------


def test_a_stack_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    entries = (
        StackEntry('ink "v1.5" \\ ü', "ink.safetensors", "ab" * 32, parse_weight("0.8:lbw=OUTALL:start=5")),
        StackEntry("blob", "blob.safetensors", "cd" * 32, AdapterWeight(-0.1)),
    )
    stack = StackFile(entries, "some/base", "switch:2")
    assert read_stack_file(write_stack_file(tmp_path / "stack.toml", stack)) == stack
    assert read_stack_file(write_stack_file(tmp_path / "stack.toml", StackFile(entries))) == StackFile(entries)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no = toml = ", "is no stack file"),
        ("format = 2", "of format 1"),
        ("format = 1", "needs name, file"),
        ("format = 1\nadapter = []", "at least one"),
        ('format = 1\n[[adapter]]\nname = "a"\nfile = "a"\ntensor_hash = "b"', "needs name, file"),
        ('format = 1\n[[adapter]]\nname = "a"\nfile = "../a"\ntensor_hash = "b"\nweight = 1', "without its folder"),
        ('format = 1\n[[adapter]]\nname = "a"\nfile = "a"\ntensor_hash = "b"\nweight = "loud"', "not a number"),
    ],
)
def test_a_broken_stack_file_is_told_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "stack.toml").write_text(text, encoding="utf-8")
    with pytest.raises(AdapterError, match=message) as caught:
        read_stack_file(tmp_path / "stack.toml")
    assert str(caught.value).count("\n") == 0 and "stack.toml" in str(caught.value)
    with pytest.raises(AdapterError, match="cannot be read"):
        read_stack_file(tmp_path / "none.toml")


def test_save_and_show_find_the_adapters_by_their_hash_whatever_they_are_called(loras, tmp_path: Path) -> None:
    stack = tmp_path / "sub" / "stack.toml"
    stack.parent.mkdir()
    run("stack", "save", stack, f"{loras['ink']}:0.8:lbw=OUTALL", loras["blob"], "--method", "orthogonal")
    said = read_stack_file(stack)
    assert [(e.name, str(e.weight)) for e in said.adapters] == [("ink", "0.8:lbw=OUTALL"), ("blob", "1")]
    assert (said.base, said.method) == ("tiny", "orthogonal")
    loras["ink"].rename(tmp_path / "other name.safetensors")
    output = run("stack", "show", stack, "--lora-dir", tmp_path)
    assert "other name.safetensors" in output and "0.8:lbw=OUTALL" in output
    (tmp_path / "other name.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"ink\.safetensors \(tensor hash \w{12}\) is nowhere below"):
        run("stack", "show", stack, "--lora-dir", tmp_path)


def test_what_cannot_be_a_stack_is_refused(loras, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="No method is called 'average'"):
        run("stack", "save", tmp_path / "s.toml", loras["ink"], "--method", "average")
    with pytest.raises(GenerationError, match="no such file"):
        run("stack", "save", tmp_path / "s.toml", tmp_path / "none.safetensors")
    assert not (tmp_path / "s.toml").exists()


# --- one ordinary LoRA ----------------------------------------------------------------------------------------------


def saved(tmp_path: Path, *arguments: object) -> Path:
    run("stack", "save", tmp_path / "stack.toml", *arguments)
    return tmp_path / "stack.toml"


def test_export_is_the_exact_sum_with_weights_and_blocks_put_in(loras, tmp_path: Path) -> None:
    stack = saved(tmp_path, f"{loras['ink']}:0.8:lbw=OUT*=1,M00=0.5", f"{loras['blob']}:-0.3")
    target = tmp_path / "both.safetensors"
    run("stack", "export", stack, target, "--dtype", "fp32", "--lora-dir", tmp_path)
    both, ink, blob = (read_adapter(path) for path in (target, loras["ink"], loras["blob"]))
    assert both.unet.keys() == blob.unet.keys()
    for path, pair in both.unet.items():
        factor = 0.8 if path.startswith("up_blocks") else 0.4 if path.startswith("mid_block") else 0.0
        expected = factor * dense(ink.unet[path]) - 0.3 * dense(blob.unet[path])
        assert (dense(pair) - expected).abs().max() < 1e-6
        assert pair.rank == (6 if factor else 3)
    # Ranks differ, and plain diffusers reads those right only with one alpha in the whole file.
    assert {pair.alpha for pair in both.unet.values()} == {6}
    assert both.metadata["modelspec.trigger_phrase"] == "ink style, blob style"


def test_export_writes_over_nothing_unless_told_to(loras, tmp_path: Path) -> None:
    stack, before = saved(tmp_path, loras["ink"], loras["blob"]), loras["ink"].read_bytes()
    with pytest.raises(AdapterError, match="is there already"):
        run("stack", "export", stack, loras["ink"], "--lora-dir", tmp_path)
    assert loras["ink"].read_bytes() == before
    run("stack", "export", stack, loras["ink"], "--overwrite", "--lora-dir", tmp_path)
    assert loras["ink"].read_bytes() != before


def test_export_to_a_rank_reports_the_error_of_each_layer(loras, tmp_path: Path) -> None:
    stack = saved(tmp_path, loras["ink"], loras["blob"])
    target = tmp_path / "small.safetensors"
    output = run("stack", "export", stack, target, "--rank", 2, "--dtype", "fp32", "--lora-dir", tmp_path)
    small, ink, blob = (read_adapter(path) for path in (target, loras["ink"], loras["blob"]))
    for path, pair in small.unet.items():
        whole = dense(ink.unet[path]) + dense(blob.unet[path])
        values = torch.linalg.svdvals(whole)
        best = float((values[2:].square().sum() / values.square().sum()).sqrt())
        assert pair.rank == 2
        assert float((dense(pair) - whole).norm() / whole.norm()) == pytest.approx(best, abs=1e-5)
        assert f"{best:8.2%}  unet.{path}" in output


def test_export_of_an_orthogonal_stack_holds_the_projected_factors(loras, tmp_path: Path) -> None:
    stack = saved(tmp_path, loras["ink"], loras["blob"], "--method", "orthogonal")
    target = tmp_path / "both.safetensors"
    run("stack", "export", stack, target, "--dtype", "fp32", "--lora-dir", tmp_path)
    both, ink, blob = (read_adapter(path).unet for path in (target, loras["ink"], loras["blob"]))
    for path, pair in both.items():
        basis, _ = torch.linalg.qr(ink[path].up.double())
        second = dense(blob[path])
        expected = dense(ink[path]) + second - basis @ (basis.T @ second)
        assert (dense(pair) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((":0@0,1@1",), r"The weight of 'ink' is 0@0,1@1, which varies"),
        (("", "--method", "switch"), "The method is switch"),
    ],
)
def test_what_varies_while_drawing_cannot_be_one_lora(loras, tmp_path: Path, arguments, message) -> None:
    weight, *options = arguments
    stack = saved(tmp_path, f"{loras['ink']}{weight}", loras["blob"], *options)
    with pytest.raises(AdapterError, match=message):
        run("stack", "export", stack, tmp_path / "x.safetensors", "--lora-dir", tmp_path)
    assert not (tmp_path / "x.safetensors").exists()


# --- looking into it, drawing with it -------------------------------------------------------------------------------


def test_inspect_names_the_two_that_meet_and_balances_them(loras) -> None:
    output = run("stack", "inspect", f"{loras['ink']}:2", loras["blob"])
    assert "ink and blob: cosine" in output and "balanced at weight" in output
    report = json.loads(run("stack", "inspect", loras["ink"], loras["ink"], "--json"))
    assert report["names"] == ["ink", "ink-2"]
    assert report["meetings"][0]["cosine"] == pytest.approx(1.0)
    assert report["balanced"] == pytest.approx({"ink": 1.0, "ink-2": 1.0})


def test_generate_draws_with_a_stack_file_and_the_recommended_weight(pipeline, loras, tmp_path: Path) -> None:
    base = tmp_path / "base"
    pipeline.save_pretrained(base)
    stack = saved(tmp_path, f"{loras['ink']}:0@0,0.8@0.5", "--method", "switch")
    rewrite_metadata(loras["blob"], loras["blob"], {"sdlora.recommended_weight": "0.4"})
    arguments = ("--stack", stack, "--lora", loras["blob"], "--base", base, "--lora-dir", tmp_path)
    run("generate", "a fox", *arguments, "--out", tmp_path / "out", *QUICK)
    (picture,) = (tmp_path / "out").glob("*.png")
    recipe = read_recipe(picture)
    assert [(a.name, a.weight) for a in recipe.adapters] == [("ink", "0@0,0.8@0.5"), ("blob", 0.4)]
    assert recipe.method == "switch"
    output = run("again", picture, "--base", base, "--lora-dir", tmp_path, "--out", tmp_path / "again")
    assert "The same picture, to the last pixel." in output


@pytest.mark.slow
def test_calibrate_and_inspect_against_a_base(loras, tmp_path: Path, pipeline) -> None:
    base = tmp_path / "base"
    pipeline.save_pretrained(base)
    # What a script reads is the output alone: loading a base shows bars among the errors.
    result = CliRunner().invoke(app, ["stack", "inspect", str(loras["ink"]), "--base", str(base), "--json"])
    report = json.loads(result.stdout)
    assert all(strength > 0 for strength in report["strengths"].values())
    before = read_adapter(loras["ink"])
    output = run("stack", "calibrate", loras["ink"], "--base", base, "--prompt", "a fox", "--store", *QUICK)
    after = read_adapter(loras["ink"])
    assert f"Recommended weight {after.metadata['sdlora.recommended_weight']}" in output
    assert after.tensor_sha256 == before.tensor_sha256
