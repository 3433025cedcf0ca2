"""Module paths and their names in files, checked on every layer of the real topologies."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)

from sdlora.adapter_file.dialects import parse_tensor_name, unsupported_method
from sdlora.adapter_file.keys import flat_key, from_stability, module_path, text_module_path, to_stability
from tests.tiny import tiny_sd1, tiny_sd2, tiny_sdxl

from .builders import layers_of


@pytest.mark.parametrize("build", [tiny_sd1, tiny_sd2, tiny_sdxl])
def test_every_layer_of_a_unet_is_found_again_from_its_underscored_name(build) -> None:
    paths = list(layers_of(build().unet, None))
    assert len(paths) > 200
    assert [module_path(flat_key(path)) for path in paths] == paths


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2"])
def test_every_layer_of_a_text_encoder_is_found_again_from_its_underscored_name(encoder) -> None:
    paths = [text_module_path(path) for path in layers_of(getattr(tiny_sdxl(), encoder), None)]
    assert [module_path(flat_key(path)) for path in paths] == paths
    assert "text_model.encoder.layers.1.self_attn.out_proj" in paths


def test_every_sdxl_layer_has_one_stability_name_and_comes_back_from_it() -> None:
    paths = list(layers_of(tiny_sdxl().unet, None))
    names = [to_stability(path) for path in paths]
    assert len(set(names)) == len(paths)
    assert [from_stability(name) for name in names] == paths


def test_stability_names_of_attention_and_resnet_layers_are_those_that_diffusers_understands() -> None:
    unet = tiny_sdxl().unet
    # Its block mapping leaves the words inside a block to a later function; only those are replaced here.
    paths = [path for path in layers_of(unet, None) if "_blocks." in path or path.startswith("mid_block")]
    named = {f"lora_unet_{to_stability(path)}.lora_down.weight": torch.tensor(i) for i, path in enumerate(paths)}
    theirs = _maybe_map_sgm_blocks_to_diffusers(dict(named), unet.config)
    back = {
        int(value): key.removeprefix("lora_unet_").removesuffix(".lora_down.weight") for key, value in theirs.items()
    }
    words = {
        "in_layers_2": "conv1",
        "out_layers_3": "conv2",
        "emb_layers_1": "time_emb_proj",
        "skip_connection": "conv_shortcut",
        "_op": "_conv",
        "input_blocks": "down_blocks",
        "middle_block": "mid_block",
        "output_blocks": "up_blocks",
    }
    for index, path in enumerate(paths):
        name = back[index]
        for stability_word, diffusers_word in words.items():
            name = name.replace(stability_word, diffusers_word)
        assert name == flat_key(path)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("conv_in", "input_blocks_0_0"),
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        ),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks_3_0_op"),
        ("mid_block.attentions.0.proj_in", "middle_block_1_proj_in"),
        ("mid_block.resnets.1.conv1", "middle_block_2_in_layers_2"),
        ("up_blocks.0.attentions.2.proj_out", "output_blocks_2_1_proj_out"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks_5_2_conv"),
        ("add_embedding.linear_2", "label_emb_0_2"),
    ],
)
def test_stability_names_known_from_published_sdxl_files(path, name) -> None:
    assert to_stability(path) == name
    assert from_stability(name) == path


@pytest.mark.parametrize(
    "name", ["input_blocks_9_9_x", "input_blocks_0_1_proj_in", "middle_block_7_proj_in", "out_3", ""]
)
def test_a_name_that_no_stability_unet_has_is_not_translated(name) -> None:
    assert from_stability(name) is None


@pytest.mark.parametrize(
    "path", ["down_blocks.0.sculptures.0", "mid_block.resnets.7.conv1", "down_blocks.0.resnets.0.x"]
)
def test_a_path_without_a_stability_name_is_an_error(path) -> None:
    with pytest.raises(ValueError, match="no place"):
        to_stability(path)


@pytest.mark.parametrize("flat", ["", "_", "down_blocks_", "down__blocks", "to_qq", "conv_in_9999", "unknown_0"])
def test_unknown_words_give_no_path(flat) -> None:
    assert module_path(flat) is None


BLOCK = "mid_block.attentions.0.transformer_blocks.0.attn2"
FLAT = "mid_block_attentions_0_transformer_blocks_0_attn2"
TEXT_LAYER = "text_model.encoder.layers.0.self_attn"


@pytest.mark.parametrize(
    ("name", "part", "path", "role"),
    [
        (f"lora_unet_{FLAT}_to_out_0.lora_up.weight", "unet", f"{BLOCK}.to_out.0", "up"),
        ("lora_unet_middle_block_1_transformer_blocks_0_attn2_to_q.alpha", "unet", f"{BLOCK}.to_q", "alpha"),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha", "text_encoder", f"{TEXT_LAYER}.q_proj", "alpha"),
        ("lora_te2_text_projection.lora_down.weight", "text_encoder_2", "text_projection", "down"),
        (f"unet.{BLOCK}.to_k.lora_A.weight", "unet", f"{BLOCK}.to_k", "down"),
        (f"base_model.model.{BLOCK}.to_k.lora_B.default.weight", "unet", f"{BLOCK}.to_k", "up"),
        (f"base_model.model.{TEXT_LAYER}.q_proj.lora_A.weight", "text_encoder", f"{TEXT_LAYER}.q_proj", "down"),
        (
            "text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight",
            "text_encoder",
            "text_model.encoder.layers.0.mlp.fc1",
            "down",
        ),
        (f"unet.{BLOCK}.to_out.0.lora.up.weight", "unet", f"{BLOCK}.to_out.0", "up"),
        (f"{BLOCK}.processor.to_out_lora.down.weight", "unet", f"{BLOCK}.to_out.0", "down"),
        (f"unet.{BLOCK}.processor.to_v_lora.up.weight", "unet", f"{BLOCK}.to_v", "up"),
        (f"unet.{BLOCK}.to_v.lora_magnitude_vector", "unet", f"{BLOCK}.to_v", "dora_scale"),
        (f"base_model.model.{BLOCK}.to_v.lora_magnitude_vector.default.weight", "unet", f"{BLOCK}.to_v", "dora_scale"),
        (f"lora_unet_{FLAT}_to_v.lokr_w2_b", "unet", f"{BLOCK}.to_v", "lokr_w2_b"),
        (f"lycoris_{FLAT}_to_v.lora_mid.weight", "unet", f"{BLOCK}.to_v", "mid"),
        (f"text_encoder.{TEXT_LAYER}.to_out_lora.up.weight", "text_encoder", f"{TEXT_LAYER}.out_proj", "up"),
        (f"text_encoder.{TEXT_LAYER}.q_proj.lora_linear_layer.up.weight", "text_encoder", f"{TEXT_LAYER}.q_proj", "up"),
    ],
)
def test_names_of_every_dialect_are_taken_apart(name, part, path, role) -> None:
    parsed = parse_tensor_name(name)
    assert parsed is not None
    assert (parsed.part, parsed.path, parsed.role) == (part, path, role)


@pytest.mark.parametrize(
    "name",
    [
        "bundle_emb.style.string_to_param.*",
        "lora_unet_.alpha",
        "lora_te_down_blocks_0_resnets_0_conv1.alpha",
        "unet.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "lora_unet_input_blocks_99_7_x.alpha",
        "model.diffusion_model.out.2.weight",
        "unet.lora_A.weight",
    ],
)
def test_foreign_names_are_not_taken(name) -> None:
    assert parse_tensor_name(name) is None


def test_diffusers_reads_the_same_layer_from_a_kohya_name() -> None:
    key = f"lora_unet_{FLAT}_to_k"
    tensors = {f"{key}.lora_down.weight": torch.ones(1, 4), f"{key}.lora_up.weight": torch.ones(4, 1)}
    theirs, _ = _convert_non_diffusers_lora_to_diffusers(dict(tensors))
    ours = parse_tensor_name(f"{key}.lora_down.weight")
    assert ours is not None
    assert {parse_tensor_name(name).path for name in theirs} == {ours.path}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (f"lora_unet_{FLAT}_to_k.hada_w1_a", None),
        (f"unet.{BLOCK}.to_k.hada_w1_a", "LoHa or LoKr in PEFT's own layout"),
        (f"lora_unet_{FLAT}_to_k.oft_blocks", "OFT"),
        (f"lora_unet_{FLAT}_to_k.diff_b", "full-difference with biases or norms"),
        (f"unet.{BLOCK}.to_k.lora_B.bias", "LoRA with biases"),
        ("lora_unet_double_blocks_0_img_attn_proj.alpha", "transformer-model (such as Flux or SD 3)"),
        (f"lora_unet_{FLAT}_to_k.lora_up.weight", None),
        (f"unet.{BLOCK}.to_k.lora_B.weight", None),
    ],
)
def test_methods_that_are_not_read_are_named(name, method) -> None:
    assert unsupported_method(name) == method
