"""Reading: every dialect gives the same pairs, every bad file one sentence."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sdlora.adapter_file import LoraPair, read_adapter
from sdlora.errors import AdapterError, AdapterFileError

from .builders import (
    attention_processor_tensors,
    kohya_tensors,
    old_diffusers_tensors,
    peft_metadata,
    peft_tensors,
    save,
    simple_pairs,
)

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q"


def assert_same_pairs(path: Path, pairs: dict[str, LoraPair], *, alpha: float | None = None) -> None:
    read = read_adapter(path).unet
    assert read.keys() == pairs.keys()
    for name, pair in pairs.items():
        assert torch.equal(read[name].down, pair.down)
        assert torch.equal(read[name].up, pair.up)
        assert read[name].alpha == (pair.alpha if alpha is None else alpha)


# --- dialects -------------------------------------------------------------------------------------------------------


def test_kohya_files_give_their_alpha(tmp_path) -> None:
    pairs = simple_pairs(alpha=1.5)
    assert_same_pairs(save(tmp_path / "a.safetensors", kohya_tensors(pairs)), pairs)


def test_a_kohya_file_with_stability_names_gives_diffusers_paths(tmp_path) -> None:
    pairs = simple_pairs()
    tensors = {
        name.replace("down_blocks_0_attentions_0", "input_blocks_1_1"): tensor
        for name, tensor in kohya_tensors(pairs).items()
    }
    assert_same_pairs(save(tmp_path / "a.safetensors", tensors), pairs)


def test_a_kohya_file_without_alpha_means_alpha_equal_to_the_rank(tmp_path) -> None:
    pairs = simple_pairs(rank=4)
    tensors = {name: tensor for name, tensor in kohya_tensors(pairs).items() if not name.endswith("alpha")}
    assert_same_pairs(save(tmp_path / "a.safetensors", tensors), pairs, alpha=4.0)


@pytest.mark.parametrize("prefix", ["unet.", "base_model.model.", ""])
def test_peft_files_take_alpha_from_the_header(tmp_path, prefix) -> None:
    pairs = simple_pairs(alpha=1.5)
    path = save(tmp_path / "a.safetensors", peft_tensors(pairs, prefix), peft_metadata(pairs))
    assert_same_pairs(path, pairs)


def test_peft_alpha_patterns_are_honoured(tmp_path) -> None:
    pairs = simple_pairs(alpha=4.0)
    name = f"{BLOCK}.to_k"
    pairs[name] = LoraPair(down=pairs[name].down, up=pairs[name].up, alpha=1.0)
    assert_same_pairs(save(tmp_path / "a.safetensors", peft_tensors(pairs), peft_metadata(pairs)), pairs)


def test_the_scale_of_rslora_becomes_an_ordinary_alpha(tmp_path) -> None:
    pairs = simple_pairs(rank=4)
    config = {"unet.lora_alpha": 3.0, "unet.use_rslora": True}
    path = save(tmp_path / "a.safetensors", peft_tensors(pairs), {"lora_adapter_metadata": json.dumps(config)})
    assert read_adapter(path).unet[f"{BLOCK}.to_q"].scale == pytest.approx(3.0 / math.sqrt(4))


def test_a_folder_saved_by_peft_takes_alpha_from_its_configuration(tmp_path) -> None:
    pairs = simple_pairs(alpha=1.5)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 1.5, "r": 4}))
    path = save(tmp_path / "adapter_model.safetensors", peft_tensors(pairs, "base_model.model."))
    assert_same_pairs(path, pairs)


def test_peft_files_that_say_nothing_mean_alpha_equal_to_the_rank(tmp_path) -> None:
    pairs = simple_pairs(rank=4)
    assert_same_pairs(save(tmp_path / "a.safetensors", peft_tensors(pairs)), pairs, alpha=4.0)


def test_a_header_of_peft_does_not_change_a_kohya_file(tmp_path) -> None:
    pairs = simple_pairs(alpha=1.5)
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 4000})}
    assert_same_pairs(save(tmp_path / "a.safetensors", kohya_tensors(pairs), metadata), pairs)


@pytest.mark.parametrize("build", [old_diffusers_tensors, attention_processor_tensors])
def test_older_diffusers_files_are_read(tmp_path, build) -> None:
    pairs = simple_pairs(rank=4)
    assert_same_pairs(save(tmp_path / "a.safetensors", build(pairs)), pairs, alpha=4.0)


def test_alpha_may_be_an_integer_or_one_element(tmp_path) -> None:
    pairs = simple_pairs(alpha=2.0)
    tensors = kohya_tensors(pairs)
    tensors[f"{KEY}.alpha"] = torch.tensor([2])
    assert_same_pairs(save(tmp_path / "a.safetensors", tensors), pairs)


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(path: Path, match: str) -> None:
    with pytest.raises(AdapterFileError, match=match) as caught:
        read_adapter(path)
    assert caught.value.path == path
    assert "\n" not in str(caught.value)
    assert len(caught.value.reason) < 400


class _Sentinel:
    def __init__(self, target: Path):
        self._target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._target,)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_raw_pickle_is_refused_and_not_run_whatever_it_is_called(tmp_path, protocol) -> None:
    path = tmp_path / "ink.safetensors"
    path.write_bytes(pickle.dumps({"a": _Sentinel(tmp_path / "ran")}, protocol=protocol))
    refused(path, "pickle checkpoint" if protocol else "pickle checkpoint|not a safetensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_torch_checkpoint_is_refused(tmp_path, is_zip) -> None:
    path = tmp_path / "ink.safetensors"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=is_zip)
    refused(path, "pickle checkpoint")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"\n  <html lang='en'>", "web page"),
        (b'{"error": "Unauthorized"}', "JSON text"),
        (b"\x10\x00", "only 2 bytes"),
        (bytes(range(200, 250)), "not a safetensors file"),
        ((2**24).to_bytes(8, "little") + b'{"a":1}', "claims 16,777,216 bytes"),
        ((900).to_bytes(8, "little") + b'{"a":1}', "truncated inside its header"),
    ],
)
def test_a_file_that_is_something_else_is_named(tmp_path, content, match) -> None:
    path = tmp_path / "ink.safetensors"
    path.write_bytes(content)
    refused(path, match)


def test_a_missing_file_a_folder_and_a_pipe_are_named(tmp_path) -> None:
    refused(tmp_path / "none.safetensors", "no such file")
    refused(tmp_path, "this is a folder")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        refused(tmp_path / "pipe", "not a regular file")


def test_a_truncated_file_and_an_appended_one_are_named(tmp_path) -> None:
    path = save(tmp_path / "a.safetensors", kohya_tensors(simple_pairs()))
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    refused(path, "100 bytes are missing")
    path.write_bytes(content + b"PK\x03\x04")
    refused(path, "4 bytes follow")


def with_header(path: Path, entries: object | str, data: bytes = b"\0" * 64) -> Path:
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[Any], span: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ("{" + "[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON|malformed"),
        ('{"a": NaN}', "the number NaN"),
        ('{"a": 1, "a": 1}', "'a' twice"),
        ('{"__metadata__": {"k": "1", "k": "2"}}', "'k' twice"),
        ("{}", "no tensors"),
        ({"__metadata__": {"a": 1}}, "not texts"),
        ({"__metadata__": ["a"], "b": entry([16], [0, 64])}, "not texts"),
        ({"a": 3}, "malformed"),
        ({"a": {**entry([16], [0, 64]), "more": 1}}, "malformed"),
        ({"a": entry([True], [0, 64])}, "malformed"),
        ({"a": entry([16], [0.0, 64])}, "malformed"),
        ({"a": entry([-16], [0, 64])}, "malformed"),
        ({"a": entry([65_537, 1], [0, 262_148])}, "shape"),
        ({"a": entry([0, 4], [0, 0])}, "shape"),
        ({"a": entry([1, 1, 1, 1, 16], [0, 64])}, "shape"),
        ({"a": entry([16], [0, 60])}, "its shape needs 64"),
        ({"a": entry([8], [0, 64], "F64")}, "type F64"),
        ({"a": entry([64], [0, 64], "F8_E4M3")}, "type F8_E4M3"),
        ({"../a": entry([16], [0, 64])}, "not a tensor name"),
        ({"a\0": entry([16], [0, 64])}, "not a tensor name"),
        ({"a" * 513: entry([16], [0, 64])}, "not a tensor name"),
        ({"a": entry([8], [0, 32]), "b": entry([8], [16, 48])}, "overlaps"),
        ({"a": entry([8], [0, 32]), "b": entry([4], [48, 64])}, "hole"),
        ({f"t{i}": entry([1], [4 * i, 4 * i + 4]) for i in range(20_001)}, "20,001 tensors"),
    ],
    ids=lambda value: None if not isinstance(value, str) else value[:24],
)
def test_a_header_that_breaks_the_rules_is_refused(tmp_path, header, match) -> None:
    refused(with_header(tmp_path / "ink.safetensors", header), match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({f"{KEY}.dora_scale": torch.ones(32)}, "DoRA lengths of .*to_q do not fit"),
        ({f"{KEY}.dora_scale": torch.ones(5, 1)}, "DoRA lengths of .*to_q do not fit"),
        ({f"{KEY}.hada_w1_a": torch.ones(4, 4)}, "incomplete set of tensors"),
        ({f"{KEY}.lokr_w1": torch.ones(4, 4)}, "incomplete set of tensors"),
        ({f"{KEY}.diff": torch.ones(4, 4)}, "incomplete set of tensors"),
        ({f"{KEY}.diff_b": torch.ones(4)}, "full-difference with biases"),
        ({f"{KEY}.oft_blocks": torch.ones(4, 4)}, "OFT"),
        ({"unet.mid_block.attentions.0.proj_in.hada_w1_a": torch.ones(4, 4)}, "LoHa or LoKr in PEFT's own layout"),
        ({"bundle_emb.ink.string_to_param": torch.ones(4)}, "not part of a LoRA: bundle_emb.ink"),
        ({f"{KEY}.lora_up.weight": None}, r"attn2\.to_q has .* its up factor is missing"),
        ({f"{KEY}.lora_down.weight": None, f"{KEY}.lora_up.weight": None}, "down and up factor is missing"),
        ({f"{KEY}.lora_up.weight": torch.ones(32, 5)}, r"do not fit: down \[4, 32\], up \[32, 5\]"),
        ({f"{KEY}.lora_up.weight": torch.ones(32, 4, 1, 1)}, "do not fit"),
        (
            {f"{KEY}.lora_down.weight": torch.ones(4, 32, 5, 5), f"{KEY}.lora_up.weight": torch.ones(32, 4, 1, 1)},
            "not fit",
        ),
        ({f"{KEY}.lora_down.weight": torch.ones(513, 8), f"{KEY}.lora_up.weight": torch.ones(8, 513)}, "rank 513"),
        ({f"{KEY}.alpha": torch.ones(2)}, "not one number"),
        ({f"{KEY}.alpha": torch.tensor(0.0)}, "alpha 0 at rank 4"),
        ({f"{KEY}.alpha": torch.tensor(-4.0)}, "alpha -4 at rank 4"),
        ({f"{KEY}.alpha": torch.tensor(4000.0)}, "alpha 4000 at rank 4; alpha must lie between 0 and 16 times"),
        ({f"{KEY}.alpha": torch.tensor(float("nan"))}, "NaN or infinite"),
        ({f"{KEY}.lora_up.weight": torch.full((32, 4), float("nan"))}, "NaN or infinite numbers in lora_unet"),
        ({f"{KEY}.lora_down.weight": torch.full((4, 32), float("inf"))}, "NaN or infinite"),
        ({f"unet.{BLOCK}.to_q.lora_A.weight": torch.ones(4, 32)}, "the same tensor of one layer"),
        ({f"{KEY}.lora_up.weight": torch.ones(32, 4, dtype=torch.float64)}, "type F64"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_lora_that_is_not_sound_is_refused(tmp_path, change, match) -> None:
    tensors = {**kohya_tensors(simple_pairs()), **change}
    path = tmp_path / "ink.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    refused(path, match)


def test_a_whole_model_or_another_architecture_is_refused_by_name(tmp_path) -> None:
    refused(
        save(tmp_path / "a.safetensors", {"conv_in.weight": torch.ones(4, 4)}), "none of its tensors belongs to a LoRA"
    )
    flux = {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(4, 4)}
    refused(save(tmp_path / "b.safetensors", flux), "transformer-model")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ("[", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"unet.use_dora": true}', "says DoRA, but .* has no lora_magnitude_vector"),
        ('{"unet.lora_alpha": "4"}', "not a number"),
        ('{"unet.lora_alpha": NaN}', "not a number"),
        ('{"unet.lora_alpha": 1e400}', "not a number"),
        ('{"unet.lora_alpha": ' + "9" * 500 + "}", "not a number"),
        ('{"unet.lora_alpha": 4000}', "alpha 4000 at rank 4"),
        ('{"unet.alpha_pattern": 3}', "not an object"),
    ],
)
def test_a_hostile_peft_configuration_is_refused(tmp_path, config, match) -> None:
    metadata = {"lora_adapter_metadata": config}
    refused(save(tmp_path / "a.safetensors", peft_tensors(simple_pairs()), metadata), match)


def test_nothing_is_read_after_a_bad_header(tmp_path, monkeypatch) -> None:
    """The tensors of a refused file are never loaded, however sound their bytes are."""

    def never(content: bytes) -> dict[str, torch.Tensor]:
        raise AssertionError("loaded")

    monkeypatch.setattr("safetensors.torch.load", never)
    tensors = {**kohya_tensors(simple_pairs()), "foreign": torch.ones(2)}
    refused(save(tmp_path / "a.safetensors", tensors), "not part of a LoRA")


# --- fuzz -----------------------------------------------------------------------------------------------------------


def valid_bytes() -> bytes:
    buffer = io.BytesIO()
    from safetensors.torch import save as to_bytes

    buffer.write(to_bytes(kohya_tensors(simple_pairs(rank=1)), {"a": "b"}))
    return buffer.getvalue()


VALID = valid_bytes()
LENGTH = int.from_bytes(VALID[:8], "little")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def read_or_refuse(content: bytes, folder: Path) -> None:
    """The only outcomes: an adapter, or an AdapterError of one line."""
    path = folder / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        read_adapter(path)
    except AdapterError as error:
        assert "\n" not in str(error)


quickly = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quickly
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_flipped_bytes_never_cause_another_error(tmp_path, flips) -> None:
    content = bytearray(VALID)
    for position, value in flips:
        # Most flips into the header, where they matter.
        content[position if position % 4 == 0 else position % (LENGTH + 8)] = value
    read_or_refuse(bytes(content), tmp_path)


@quickly
@given(st.integers(0, len(VALID)), st.binary(max_size=40))
def test_cut_and_continued_files_never_cause_another_error(tmp_path, cut, rest) -> None:
    read_or_refuse(VALID[:cut] + rest, tmp_path)


@quickly
@given(
    st.dictionaries(st.text(max_size=12) | st.sampled_from([f"{KEY}.alpha", "__metadata__"]), json_values, max_size=4)
)
@example({f"{KEY}.alpha": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}})
def test_headers_of_any_json_never_cause_another_error(tmp_path, header) -> None:
    text = json.dumps(header).encode()
    read_or_refuse(len(text).to_bytes(8, "little") + text + b"\0" * 4, tmp_path)


@quickly
@given(
    st.sampled_from(["dtype", "shape", "data_offsets"]),
    json_values | st.lists(st.integers(0, 2**33), max_size=5),
    st.integers(0, 5),
)
def test_one_changed_field_never_causes_another_error(tmp_path, field, value, index) -> None:
    header = json.loads(VALID[8 : 8 + LENGTH])
    names = [name for name in header if name != "__metadata__"]
    header[names[index % len(names)]][field] = value
    text = json.dumps(header).encode()
    read_or_refuse(len(text).to_bytes(8, "little") + text + VALID[8 + LENGTH :], tmp_path)


def test_the_fuzzed_file_is_sound_when_left_alone(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(VALID)
    assert len(read_adapter(path).unet) == 2
