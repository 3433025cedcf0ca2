"""`sdlora lora ...` as a user runs it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from sdlora.adapter_file import AdapterMetadata, LoraPair, read_adapter, write_adapter
from sdlora.cli_lora import app
from sdlora.errors import AdapterError, AdapterFileError
from tests.adapters.builders import (
    TEXT,
    draw,
    kohya_tensors,
    old_diffusers_tensors,
    peft_metadata,
    peft_tensors,
    random_pairs,
    save,
    simple_pairs,
)
from tests.adapters.builders import (
    difference as largest,
)
from tests.adapters.golden.make import FOLDER as GOLDEN
from tests.tiny import tiny_sd1

INK = AdapterMetadata(
    title="ink", base_model="some/base", trigger_phrase="ink style", resolution=(64, 96), own={"sdlora.steps": "7"}
)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def dense(pair: LoraPair) -> torch.Tensor:
    return pair.scale * pair.up.double() @ pair.down.double()


@pytest.fixture
def ink(tmp_path: Path) -> Path:
    pairs = simple_pairs(alpha=1.0, width=768)
    return write_adapter(tmp_path / "ink.safetensors", pairs, family="sd1", metadata=INK, dtype=torch.float32)


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    pairs = simple_pairs(rank=6, width=768)
    metadata = AdapterMetadata(title="blob", base_model="some/base", trigger_phrase="blob style")
    return write_adapter(tmp_path / "blob.safetensors", pairs, family="sd1", metadata=metadata, dtype=torch.float32)


def test_inspect_tells_what_a_file_is(ink: Path) -> None:
    text = run("inspect", ink)
    for part in (
        "LoRA for sd1, kohya keys, float32",
        "rank 4, alpha 4",
        "2 attn2",
        "trigger: ink style",
        "ComfyUI: yes",
    ):
        assert part in text
    assert f"AutoV2 {hashlib.sha256(ink.read_bytes()).hexdigest()[:10]}" in text
    assert "AutoV1 e3b0c442" in text  # a file below 1 MiB


def test_inspect_of_a_folder_goes_on_after_a_bad_file_and_ends_with_its_code(ink: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"<html>")
    lines = [json.loads(line) for line in run("inspect", "--json", tmp_path, code=5).splitlines()]
    assert lines[0] == {"path": str(tmp_path / "bad.safetensors"), "error": lines[0]["error"]}
    assert "web page" in lines[0]["error"]
    assert (lines[1]["family"], lines[1]["ranks"], lines[1]["dialects"]) == ("sd1", [4], ["kohya"])
    assert lines[1]["hashes"]["tensor_sha256"] == read_adapter(ink).tensor_sha256
    with pytest.raises(AdapterError, match=r"no \.safetensors file"):
        run("inspect", tmp_path / "datasets", code=5) if (tmp_path / "datasets").mkdir() else run(
            "inspect", tmp_path / "datasets"
        )


def test_the_norms_of_blocks_are_those_of_the_dense_changes(ink: Path) -> None:
    (line,) = run("inspect", "--json", ink).splitlines()
    (block,) = json.loads(line)["blocks"]
    expected = sum(float(dense(pair).square().sum()) for _, _, pair in read_adapter(ink).pairs()) ** 0.5
    assert (block["block"], block["layers"]) == ("unet.down_blocks.0", 2)
    assert block["norm"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kohya mixed alpha", {"diffusers": "wrong strength", "ComfyUI": "yes", "InvokeAI": "yes"}),
        ("peft", {"diffusers": "yes", "ComfyUI": "nothing", "A1111 / Forge": "nothing", "InvokeAI": "refuses"}),
        ("old diffusers", {"diffusers": "yes", "kohya sd-scripts": "nothing"}),
        ("kohya with metadata", {"diffusers": "refuses", "ComfyUI": "yes"}),
        ("queries only", {"diffusers": "yes", "InvokeAI": "refuses"}),
    ],
)
def test_inspect_knows_what_the_tools_will_do(tmp_path: Path, name: str, expected: dict[str, str]) -> None:
    pairs = simple_pairs(alpha=4.0, width=768)
    first, second = pairs
    path = tmp_path / "a.safetensors"
    match name:
        case "kohya mixed alpha":
            pairs[second] = LoraPair(pairs[second].down, pairs[second].up, 1.0)
            save(path, kohya_tensors(pairs))
        case "peft":
            save(path, peft_tensors(pairs), peft_metadata(pairs))
        case "old diffusers":
            save(path, old_diffusers_tensors(pairs))
        case "kohya with metadata":
            save(path, kohya_tensors(pairs), peft_metadata(pairs))
        case "queries only":
            save(path, kohya_tensors({first: pairs[first]}))
    (line,) = run("inspect", "--json", path).splitlines()
    verdicts = {tool["tool"]: tool["loads"] for tool in json.loads(line)["tools"]}
    assert expected.items() <= verdicts.items()


@pytest.mark.parametrize("form", ["peft", "diffusers"])
def test_convert_there_and_back_is_the_identity(ink: Path, tmp_path: Path, form: str) -> None:
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    run("convert", ink, there, "--format", form, "--dtype", "fp32")
    run("convert", there, back, "--dtype", "fp32")
    assert read_adapter(back).tensor_sha256 == read_adapter(ink).tensor_sha256
    metadata = read_adapter(back).metadata
    assert (metadata["modelspec.trigger_phrase"], metadata["modelspec.resolution"]) == ("ink style", "96x64")
    assert (metadata["sdlora.steps"], metadata["ss_sd_model_name"]) == ("7", "some/base")


@pytest.mark.parametrize("form", ["kohya", "peft", "diffusers"])
def test_every_dialect_draws_the_same_in_plain_diffusers(tmp_path: Path, form: str) -> None:
    original = write_adapter(
        tmp_path / "ink.safetensors",
        random_pairs(tiny_sd1().unet, alpha=1.0),
        family="sd1",
        metadata=INK,
        text_encoder=random_pairs(tiny_sd1().text_encoder, targets=TEXT, alpha=2.0, seed=1),
        dtype=torch.float32,
    )
    run("convert", original, tmp_path / "other.safetensors", "--format", form, "--dtype", "fp32")
    pictures = []
    for path in (original, tmp_path / "other.safetensors"):
        pipeline = tiny_sd1()
        pipeline.load_lora_weights(str(path))
        pictures.append(draw(pipeline))
    assert largest(*pictures) < 1e-4
    assert largest(pictures[0], draw(tiny_sd1())) > 0.01


def test_merge_is_the_weighted_sum_and_names_both_triggers(ink: Path, blob: Path, tmp_path: Path) -> None:
    target = tmp_path / "both.safetensors"
    run("merge", target, f"{ink}:0.7", f"{blob}:0.5", "--dtype", "fp32")
    a, b, both = (read_adapter(path) for path in (ink, blob, target))
    for path, pair in both.unet.items():
        assert pair.rank == 10
        assert torch.allclose(dense(pair), 0.7 * dense(a.unet[path]) + 0.5 * dense(b.unet[path]), atol=1e-6)
    assert both.metadata["modelspec.trigger_phrase"] == "ink style, blob style"
    assert "at most" in run("merge", target, ink, blob, "--rank", "3", "--overwrite")
    assert {pair.rank for _, _, pair in read_adapter(target).pairs()} == {3}


def test_adapters_of_two_families_do_not_merge(ink: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "sd2.safetensors", simple_pairs(width=1024), family="sd2", metadata=INK)
    with pytest.raises(AdapterError, match="different models: sd1, sd2"):
        run("merge", tmp_path / "both.safetensors", ink, other)


def test_resize_says_what_was_lost(ink: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.safetensors"
    assert "Lost of each layer's change" in run("resize", ink, target, "--rank", 2, "--dtype", "fp32")
    assert {pair.rank for _, _, pair in read_adapter(target).pairs()} == {2}
    with pytest.raises(AdapterError, match="give a rank"):
        run("resize", ink, tmp_path / "other.safetensors")


def test_diff_is_silent_about_rounding_and_loud_about_change(ink: Path, blob: Path, tmp_path: Path) -> None:
    run("convert", ink, tmp_path / "half.safetensors")
    assert "largest difference 0.0" in run("diff", ink, tmp_path / "half.safetensors")
    assert "down_blocks" in run("diff", ink, blob, code=1)


def test_metadata_is_shown_set_removed_and_stripped_and_the_tensors_stay(ink: Path, tmp_path: Path) -> None:
    before, tensors = ink.read_bytes(), read_adapter(ink).tensor_sha256
    target = tmp_path / "new.safetensors"
    assert "modelspec.trigger_phrase = ink style" in run("metadata", ink)
    run("metadata", ink, "--set", "modelspec.author=me = I", "--remove", "sdlora.steps", "--out", target)
    metadata = read_adapter(target).metadata
    assert metadata["modelspec.author"] == "me = I" and "sdlora.steps" not in metadata
    assert ink.read_bytes() == before
    run("metadata", target, "--strip")
    assert set(read_adapter(target).metadata) == {
        *("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_base_model_version"),
        *("ss_v2", "modelspec.architecture", "sdlora.family", "sshs_model_hash", "sshs_legacy_hash"),
    }
    assert read_adapter(target).tensor_sha256 == tensors
    with safe_open(target, "pt") as file:
        assert file.metadata()["sshs_model_hash"] == tensors


def test_a_file_that_tells_no_family_is_converted_once_it_does(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", kohya_tensors(simple_pairs(width=99)))
    with pytest.raises(AdapterError, match=r"--set sdlora\.family=sd1"):
        run("convert", path, tmp_path / "b.safetensors")
    run("metadata", path, "--set", "sdlora.family=sd1")
    run("convert", path, tmp_path / "b.safetensors")


def test_a_damaged_file_is_refused_by_every_tool_and_nothing_is_written(ink: Path, tmp_path: Path) -> None:
    ink.write_bytes(ink.read_bytes()[:-4])
    target = tmp_path / "new.safetensors"
    for command in (
        ("convert", ink, target),
        ("resize", ink, target, "--rank", 2),
        ("merge", target, ink),
        ("metadata", ink, "--set", "a=b", "--out", target),
    ):
        with pytest.raises(AdapterFileError, match="truncated"):
            run(*command)
        assert not target.exists()


def test_bake_extract_and_verify_agree(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_sd1().save_pretrained(base)
    pairs = random_pairs(tiny_sd1().unet, alpha=1.0)
    ink = write_adapter(tmp_path / "ink.safetensors", pairs, family="sd1", metadata=INK, dtype=torch.float32)
    assert "The same." in run("verify", ink, "--base", base)
    run("bake", tmp_path / "baked", f"{ink}:0.5", "--base", base)
    assert "layers; lost" in run(
        *("extract", tmp_path / "baked", base, tmp_path / "again.safetensors"),
        *("--rank", 4, "--targets", "cross-attention"),
    )
    original, again = read_adapter(ink), read_adapter(tmp_path / "again.safetensors")
    assert original.unet.keys() == again.unet.keys()
    for path, pair in original.unet.items():
        assert torch.allclose(dense(again.unet[path]), 0.5 * dense(pair), atol=2e-3 * float(dense(pair).abs().max()))
    with pytest.raises(AdapterError, match="is there already"):
        run("bake", tmp_path / "baked", ink, "--base", base)


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")
def test_verify_compares_the_text_encoders_too(tmp_path: Path) -> None:
    """Alphas that differ are lost by diffusers on text encoders, and nowhere else in this file."""
    base = tmp_path / "base"
    tiny_sd1().save_pretrained(base)
    unet = kohya_tensors(random_pairs(tiny_sd1().unet, alpha=4.0))
    text = random_pairs(tiny_sd1().text_encoder, targets=TEXT, alpha=lambda path: 1.0 if "fc1" in path else 4.0)
    text = {f"text_model.{path.removeprefix('text_model.')}": pair for path, pair in text.items()}
    mixed = save(tmp_path / "mixed.safetensors", unet | kohya_tensors(text, "lora_te_"))
    run("metadata", mixed, "--set", "sdlora.family=sd1")
    said = run("verify", mixed, "--base", base, code=1)
    assert "Not the same" in said and "text encoder: largest change" in said
    # Written by us it is the same there, for every part.
    run("convert", mixed, tmp_path / "ours.safetensors", "--dtype", "fp32")
    assert "The same." in run("verify", tmp_path / "ours.safetensors", "--base", base)


def test_what_diffusers_refuses_is_one_sentence_of_verify(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_sd1().save_pretrained(base)
    loha, plain = tmp_path / "loha.safetensors", tmp_path / "plain.safetensors"
    loha.write_bytes((GOLDEN / "loha.safetensors").read_bytes())
    with pytest.raises(
        AdapterError, match=r"we load it, diffusers does not \(.*\)\. `sdlora lora convert --format peft`"
    ):
        run("verify", loha, "--base", base)
    run("metadata", loha, "--set", "sdlora.family=sd1")
    run("convert", loha, plain, "--format", "peft", "--dtype", "fp32")
    assert "The same." in run("verify", plain, "--base", base)


def test_loha_and_lokr_become_plain_loras_of_a_rank_and_what_is_lost_is_told(tmp_path: Path) -> None:
    """LoKr of full rank is read as a matrix; the file that `resize` makes of it is small, and diffusers loads it."""
    for name in ("loha", "lokr"):
        source, target = tmp_path / f"{name}.safetensors", tmp_path / f"plain-{name}.safetensors"
        source.write_bytes((GOLDEN / f"{name}.safetensors").read_bytes())
        run("metadata", source, "--set", "sdlora.family=sd1")
        whole = read_adapter(source)
        said = run("resize", source, target, "--rank", 2, "--dtype", "fp32")
        lost = []
        for part, path, pair in read_adapter(target).pairs():
            before = whole.part(part)[path]
            values = torch.linalg.svdvals(
                before.scale * before.up.flatten(1).double() @ before.down.flatten(1).double()
            )
            gap = before.scale * before.up.flatten(1).double() @ before.down.flatten(1).double()
            gap -= pair.scale * pair.up.flatten(1).double() @ pair.down.flatten(1).double()
            assert pair.rank <= 2
            assert float(gap.norm()) == pytest.approx(float(values[2:].norm()), rel=1e-4, abs=1e-6)
            lost.append(float(values[2:].norm() / values.norm()))
        assert f"{max(lost):.1%} at most" in said and max(lost) > 0.01
        (line,) = run("inspect", "--json", target).splitlines()
        assert json.loads(line)["methods"] == ["LoRA"]
        assert {tool["tool"]: tool["loads"] for tool in json.loads(line)["tools"]}["diffusers"] == "yes"


def test_a_dora_says_the_way_out_of_every_tool_that_needs_its_base(tmp_path: Path) -> None:
    dora = GOLDEN / "dora_by_row.safetensors"
    for command in (
        ("resize", dora, tmp_path / "a.safetensors", "--rank", 2),
        ("merge", tmp_path / "a.safetensors", dora),
        ("diff", dora, dora),
    ):
        with pytest.raises(AdapterError, match="Put it into the base with `sdlora lora bake`"):
            run(*command)
    assert not (tmp_path / "a.safetensors").exists()
