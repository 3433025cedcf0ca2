"""What a written file holds, and that it appears whole or not at all."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from sdlora.adapter_file import (
    AdapterMetadata,
    LoraPair,
    carried_metadata,
    read_adapter,
    replace_metadata,
    write_adapter,
)
from sdlora.errors import AdapterFileError

from .builders import METADATA, kohya_tensors, peft_metadata, peft_tensors, save, simple_pairs, write

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2"


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def delta(pair: LoraPair) -> torch.Tensor:
    return pair.up.double() @ pair.down.double() * (pair.alpha / pair.down.shape[0])


def test_a_file_holds_exactly_two_factors_and_an_alpha_per_layer_under_kohya_names(tmp_path) -> None:
    tensors = load_file(write(tmp_path / "ink.safetensors", simple_pairs()))
    roles = ("alpha", "lora_down.weight", "lora_up.weight")
    assert set(tensors) == {f"{KEY}_{layer}.{role}" for layer in ("to_q", "to_k") for role in roles}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_tensor_has_the_type_asked_for(tmp_path, dtype) -> None:
    tensors = load_file(write(tmp_path / "ink.safetensors", simple_pairs(), dtype=dtype))
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}


def test_fp16_is_the_default(tmp_path) -> None:
    path = write_adapter(tmp_path / "ink.safetensors", simple_pairs(), family="sd1", metadata=METADATA)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0, 4.0, 16.0])
def test_stored_alpha_is_the_rank_and_a_tool_that_ignores_alpha_gets_the_same_change(tmp_path, alpha) -> None:
    pairs = simple_pairs(rank=4, alpha=alpha)
    tensors = load_file(write(tmp_path / "ink.safetensors", pairs))
    for layer in ("to_q", "to_k"):
        stored = f"{KEY}_{layer}"
        assert tensors[f"{stored}.alpha"].shape == ()
        assert tensors[f"{stored}.alpha"].item() == 4.0
        without_alpha = tensors[f"{stored}.lora_up.weight"].double() @ tensors[f"{stored}.lora_down.weight"].double()
        torch.testing.assert_close(without_alpha, delta(pairs[f"{BLOCK}.{layer}"]), rtol=1e-5, atol=1e-7)


def test_a_bf16_file_keeps_an_odd_rank_above_256_exact(tmp_path) -> None:
    pairs = {f"{BLOCK}.to_q": LoraPair(down=torch.randn(301, 4), up=torch.randn(4, 301), alpha=301.0)}
    path = write(tmp_path / "ink.safetensors", pairs, dtype=torch.bfloat16)
    assert read_adapter(path).unet[f"{BLOCK}.to_q"].alpha == 301.0


def test_what_was_written_is_read_with_its_paths_and_changes(tmp_path) -> None:
    pairs = simple_pairs(alpha=1.0)
    text = {"text_model.encoder.layers.0.mlp.fc1": LoraPair(down=torch.randn(2, 8), up=torch.randn(9, 2), alpha=2.0)}
    read = read_adapter(write(tmp_path / "ink.safetensors", pairs, text_encoder=text))
    assert read.unet.keys() == pairs.keys()
    assert read.text_encoder.keys() == text.keys()
    for path, pair in pairs.items():
        torch.testing.assert_close(delta(read.unet[path]), delta(pair), rtol=1e-5, atol=1e-7)


def test_flattened_text_encoder_paths_are_written_with_their_usual_name(tmp_path) -> None:
    text = {"encoder.layers.0.mlp.fc1": LoraPair(down=torch.randn(2, 8), up=torch.randn(9, 2), alpha=2.0)}
    names = load_file(write(tmp_path / "ink.safetensors", simple_pairs(), text_encoder=text)).keys()
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha" in names


def test_sdxl_files_use_stability_block_names_and_numbered_text_encoders(tmp_path) -> None:
    text = {"text_model.encoder.layers.0.mlp.fc1": LoraPair(down=torch.randn(2, 8), up=torch.randn(9, 2), alpha=2.0)}
    path = tmp_path / "ink.safetensors"
    unet = {"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": simple_pairs()[f"{BLOCK}.to_q"]}
    write(path, unet, family="sdxl", text_encoder=text, text_encoder_2=text)
    assert {name.split(".")[0] for name in load_file(path)} == {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1",
    }


def test_the_header_has_what_a1111_kohya_and_modelspec_readers_need(tmp_path) -> None:
    metadata = AdapterMetadata(
        title="ink style",
        base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        resolution=(512, 768),
        trigger_phrase="ink style",
        date=datetime.date(2030, 1, 2),
        training_alpha=2.0,
        own={"sdlora.steps": "400"},
    )
    path = write_adapter(tmp_path / "ink.safetensors", simple_pairs(), family="sd1", metadata=metadata)
    header = header_of(path)
    expected = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_network_args": "{}",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_output_name": "ink style",
        "ss_sd_model_name": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "ink style",
        "modelspec.resolution": "768x512",
        "modelspec.prediction_type": "epsilon",
        "modelspec.trigger_phrase": "ink style",
        "modelspec.date": "2030-01-02",
        "sdlora.training_alpha": "2.0",
        "sdlora.steps": "400",
    }
    assert expected.items() <= header.items()
    assert "lora_adapter_metadata" not in header


@pytest.mark.parametrize(
    ("family", "prediction_type", "version", "architecture"),
    [
        ("sd1", "epsilon", "sd_v1", "stable-diffusion-v1/lora"),
        ("sd2", "epsilon", "sd_v2", "stable-diffusion-v2-512/lora"),
        ("sd2", "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", "epsilon", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_each_family_is_marked_as_the_tools_expect(tmp_path, family, prediction_type, version, architecture) -> None:
    metadata = AdapterMetadata(title="ink", base_model="base", prediction_type=prediction_type)
    path = write_adapter(tmp_path / "ink.safetensors", simple_pairs(), family=family, metadata=metadata)
    header = header_of(path)
    assert header["ss_base_model_version"] == version
    assert header["modelspec.architecture"] == architecture
    assert header["ss_v2"] == str(family == "sd2")


def test_ranks_that_differ_are_called_dynamic_and_conv_ranks_are_listed(tmp_path) -> None:
    conv = LoraPair(down=torch.randn(2, 4, 3, 3), up=torch.randn(4, 2, 1, 1), alpha=2.0)
    pairs = {**simple_pairs(rank=4), "mid_block.resnets.0.conv1": conv}
    header = header_of(write(tmp_path / "ink.safetensors", pairs))
    assert header["ss_network_dim"] == header["ss_network_alpha"] == "Dynamic"
    assert json.loads(header["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2"}


def test_hashes_are_those_of_the_tensor_bytes(tmp_path) -> None:
    path = write(tmp_path / "ink.safetensors", simple_pairs())
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    digest = hashlib.sha256(data).hexdigest()
    header = header_of(path)
    assert header["sshs_model_hash"] == digest
    assert header["modelspec.hash_sha256"] == f"0x{digest}"
    assert read_adapter(path).tensor_sha256 == digest
    # Known for every file below one MiB: the hash of nothing.
    assert header["sshs_legacy_hash"] == "e3b0c442"


def test_the_old_hash_of_a_large_file_is_that_of_64_kib_at_one_mib_with_the_training_metadata_alone(tmp_path) -> None:
    pairs = {f"{BLOCK}.to_q": LoraPair(down=torch.randn(8, 40_000), up=torch.randn(8, 8), alpha=8.0)}
    path = write(tmp_path / "ink.safetensors", pairs)
    header = header_of(path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    entries["__metadata__"] = {key: value for key, value in entries["__metadata__"].items() if key.startswith("ss_")}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    plain = len(text).to_bytes(8, "little") + text + content[8 + length :]
    assert header["sshs_legacy_hash"] == hashlib.sha256(plain[0x100000:0x110000]).hexdigest()[:8] != "e3b0c442"


def test_the_same_adapter_gives_the_same_bytes(tmp_path) -> None:
    first = write(tmp_path / "a.safetensors", simple_pairs())
    second = write(tmp_path / "b.safetensors", dict(reversed(simple_pairs().items())))
    assert first.read_bytes() == second.read_bytes()


def test_the_header_starts_as_a1111_asserts_and_data_is_aligned(tmp_path) -> None:
    content = write(tmp_path / "ink.safetensors", simple_pairs()).read_bytes()
    assert content[8:10] == b'{"'
    assert int.from_bytes(content[:8], "little") % 8 == 0


@pytest.mark.parametrize("place", ["/home/ann/models/sd15", "C:\\Users\\ann\\sd", "./models/../sd", "~/sd"])
def test_a_place_on_this_machine_is_not_passed_on(tmp_path, place) -> None:
    metadata = AdapterMetadata(title="ink", base_model=place)
    path = write_adapter(tmp_path / "ink.safetensors", simple_pairs(), family="sd1", metadata=metadata)
    assert header_of(path)["ss_sd_model_name"] == "local model"
    assert b"ann" not in path.read_bytes()[:4096]


def test_own_metadata_stays_in_its_namespace() -> None:
    with pytest.raises(ValueError, match=r"sdlora\."):
        AdapterMetadata(title="ink", base_model="base", own={"lora_adapter_metadata": "{}"})


@settings(max_examples=30, deadline=None)
@given(title=st.text(max_size=40), description=st.text(max_size=40))
def test_any_text_survives_in_the_header(tmp_path_factory, title, description) -> None:
    # A lone surrogate is no Unicode text and cannot be in a UTF-8 header.
    title, description = (text.encode("utf-8", "replace").decode() for text in (title, description))
    metadata = AdapterMetadata(title=title, base_model="base", description=description)
    path = tmp_path_factory.mktemp("text") / "ink.safetensors"
    write_adapter(path, simple_pairs(), family="sd1", metadata=metadata)
    assert read_adapter(path).metadata["modelspec.title"] == title
    assert header_of(path).get("modelspec.description", "") == description


@pytest.mark.skipif(os.name != "posix", reason="file modes are a POSIX matter")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask(tmp_path, umask, mode) -> None:
    before = os.umask(umask)
    try:
        path = write(tmp_path / "ink.safetensors", simple_pairs())
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_numbers_that_fp16_cannot_hold_are_refused_and_the_old_file_stays(tmp_path, value) -> None:
    path = write(tmp_path / "ink.safetensors", simple_pairs())
    before = path.read_bytes()
    pairs = simple_pairs()
    pairs[f"{BLOCK}.to_k"].up[0, 0] = value
    with pytest.raises(AdapterFileError, match=r"attn2\.to_k has numbers that are not finite in torch\.float16"):
        write(path, pairs, dtype=torch.float16)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["ink.safetensors"]


def test_an_adapter_without_layers_is_refused(tmp_path) -> None:
    with pytest.raises(AdapterFileError, match="nothing to write"):
        write(tmp_path / "ink.safetensors", {})


def test_a_missing_folder_is_one_clear_sentence(tmp_path) -> None:
    with pytest.raises(AdapterFileError, match="cannot be written: No such file or directory"):
        write(tmp_path / "nowhere" / "ink.safetensors", simple_pairs())


def test_a_disk_that_fails_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch) -> None:
    path = write(tmp_path / "ink.safetensors", simple_pairs())
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AdapterFileError, match="No space left"):
        write(path, simple_pairs(rank=2))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["ink.safetensors"]


def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path, monkeypatch) -> None:
    def flip(handle: int) -> None:
        # Into the last factor's last number, after it was written.
        os.pwrite(handle, b"\x01", os.fstat(handle).st_size - 2)

    monkeypatch.setattr(os, "fsync", flip)
    with pytest.raises(AdapterFileError, match="gave back other numbers"):
        write(tmp_path / "ink.safetensors", simple_pairs())
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_dtype_or_a_second_text_encoder_on_sd1_is_a_programming_error(tmp_path) -> None:
    with pytest.raises(ValueError, match="float64"):
        write(tmp_path / "ink.safetensors", simple_pairs(), dtype=torch.float64)
    with pytest.raises(ValueError, match="second text encoder"):
        write(tmp_path / "ink.safetensors", simple_pairs(), text_encoder_2=simple_pairs())


def test_a_peft_file_rewritten_by_us_keeps_its_strength(tmp_path) -> None:
    pairs = simple_pairs(alpha=1.0)
    foreign = save(tmp_path / "peft.safetensors", peft_tensors(pairs), peft_metadata(pairs))
    path = write(tmp_path / "ours.safetensors", read_adapter(foreign).unet)
    torch.testing.assert_close(
        delta(read_adapter(path).unet[f"{BLOCK}.to_q"]), delta(pairs[f"{BLOCK}.to_q"]), rtol=1e-5, atol=1e-7
    )


def test_a_thumbnail_is_written_as_swarmui_and_a1111_read_it_and_comes_back(tmp_path) -> None:
    metadata = AdapterMetadata(title="ink", base_model="base", thumbnail=b"\xff\xd8 a picture")
    path = write_adapter(tmp_path / "ink.safetensors", simple_pairs(), family="sd1", metadata=metadata)
    header = header_of(path)
    (cover,) = json.loads(header["ssmd_cover_images"])
    assert base64.b64decode(cover) == b"\xff\xd8 a picture"
    assert header["modelspec.thumbnail"] == f"data:image/jpeg;base64,{cover}"
    assert carried_metadata(header, title="ink").thumbnail == b"\xff\xd8 a picture"


def test_a_header_is_replaced_as_a_whole_and_the_tensors_stay(tmp_path) -> None:
    pairs = simple_pairs(rank=4, alpha=2.0, width=768)
    private = {"ss_dataset_dirs": '{"ann": 1}', "ss_tag_frequency": '{"ann": {"fox": 1}}', "ss_output_name": "old"}
    source = save(tmp_path / "a.safetensors", kohya_tensors(pairs), private)
    before = read_adapter(source)
    target = replace_metadata(source, tmp_path / "b.safetensors", AdapterMetadata(title="new", base_model="some/base"))
    after = read_adapter(target)
    assert (after.metadata["ss_output_name"], after.metadata["ss_network_dim"]) == ("new", "4")
    assert b"ann" not in target.read_bytes()
    assert after.tensor_sha256 == before.tensor_sha256 == after.metadata["sshs_model_hash"]
    unknown = save(tmp_path / "c.safetensors", kohya_tensors(simple_pairs(width=99)))
    with pytest.raises(AdapterFileError, match="nothing in the file tells"):
        replace_metadata(unknown, tmp_path / "d.safetensors", METADATA)
