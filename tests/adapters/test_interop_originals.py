"""Our files in tools that keep Stability's own modules: A1111, Forge and ComfyUI, by a table of names made here.

Those programs cannot be installed as packages. What they do with a kohya file is known: the name before the first dot
is looked up among the underscored names of their modules (A1111 turns diffusers' words into Stability's first, ComfyUI
keeps both in one table), and alpha / rank * up @ down is added at the user's weight. The table is made by walking the
blocks in Stability's order (tests/families/original.py), not by the rules that sdlora writes names with.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sdlora.adapter_file import write_adapter
from tests.families.original import original_unet
from tests.tiny import tiny_sd1, tiny_sd2, tiny_sdxl

from .builders import METADATA, TEXT, hand_merged, layers_of, random_pairs

FAMILIES = {"sd1": tiny_sd1, "sd2": tiny_sd2, "sdxl": tiny_sdxl}
TEXT_PREFIXES = {"sd1": ("lora_te_",), "sd2": ("lora_te_",), "sdxl": ("lora_te1_", "lora_te2_")}
WEIGHT = 0.7


def stability_names(unet: nn.Module) -> dict[str, str]:
    """diffusers' name of every weight -> Stability's, by identity of the tensors in the walk."""
    by_place = {tensor.data_ptr(): name for name, tensor in original_unet(unet).items()}
    return {name: by_place[p.data_ptr()] for name, p in unet.state_dict().items()}


def loader_table(unet: nn.Module) -> dict[str, str]:
    """Every key that a loader of Stability's modules knows, and the weight it stands for."""
    table = {}
    for ours, theirs in stability_names(unet).items():
        for name in (ours, theirs):
            if name.endswith(".weight"):
                table["lora_unet_" + name.removesuffix(".weight").replace(".", "_")] = theirs
    return table


def deltas(path: Path) -> dict[str, Tensor]:
    """Stem of the keys -> the change, as those programs compute it."""
    tensors = load_file(path)
    stems = {key.split(".", 1)[0] for key in tensors}
    assert {key.split(".", 1)[1] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    result = {}
    for stem in stems:
        down, up = tensors[f"{stem}.lora_down.weight"].float(), tensors[f"{stem}.lora_up.weight"].float()
        scale = float(tensors[f"{stem}.alpha"]) / len(down)
        result[stem] = (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:]) * scale
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_a_unet_reaches_its_place_at_the_right_strength(tmp_path: Path, family: str) -> None:
    pipeline = FAMILIES[family]()
    pairs = random_pairs(pipeline.unet, rank=2, alpha=3.0, targets=None)
    path = write_adapter(tmp_path / "ink.safetensors", pairs, family=family, metadata=METADATA, dtype=torch.float32)
    table = loader_table(pipeline.unet)
    weights = {name: tensor.clone() for name, tensor in original_unet(pipeline.unet).items()}
    for stem, delta in deltas(path).items():
        weights[table[stem]] += WEIGHT * delta.view_as(weights[table[stem]])
    expected = original_unet(hand_merged(pipeline, ("unet", pairs, WEIGHT)).unet)
    assert len(pairs) == len(layers_of(pipeline.unet, None)) > 200
    assert all(torch.allclose(weights[name], tensor, atol=1e-5) for name, tensor in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_the_text_encoders_is_called_as_openais_clip_calls_it(tmp_path: Path, family: str) -> None:
    pipeline = FAMILIES[family]()
    encoders = ("text_encoder", "text_encoder_2")[: len(TEXT_PREFIXES[family])]
    parts = {name: random_pairs(getattr(pipeline, name), rank=2, targets=TEXT) for name in encoders}
    unet = random_pairs(pipeline.unet, rank=2, targets=("attn2.to_k",))
    path = write_adapter(tmp_path / "ink.safetensors", unet, family=family, metadata=METADATA, **parts)
    stems = {stem for stem in deltas(path) if not stem.startswith("lora_unet_")}
    layers = ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2")
    assert stems == {
        f"{prefix}text_model_encoder_layers_{number}_{layer}"
        for prefix in TEXT_PREFIXES[family]
        for number in range(2)
        for layer in layers
    }
