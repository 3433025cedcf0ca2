"""What the tensors of diffusers' and transformers' modules are called in Stability's original checkpoints.

Each function answers for one tensor of our module; a checkpoint is read by asking it for every tensor that the module
has. The U-Net's block numbers are explained in `adapter_file.keys`.
"""

from __future__ import annotations

import re

__all__ = ["OPEN_CLIP_LAYER", "open_clip_text_name", "unet_name", "vae_name"]

_LAYERS_PER_BLOCK = 2
_STEP = _LAYERS_PER_BLOCK + 1
_UNET_OUTER = (
    ("conv_in.", "input_blocks.0.0."),
    ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."),
    ("add_embedding.linear_1.", "label_emb.0.0."),
    ("add_embedding.linear_2.", "label_emb.0.2."),
    ("conv_norm_out.", "out.0."),
    ("conv_out.", "out.2."),
    ("mid_block.resnets.0.", "middle_block.0."),
    ("mid_block.attentions.0.", "middle_block.1."),
    ("mid_block.resnets.1.", "middle_block.2."),
)
_UNET_RESNET = (
    ("norm1.", "in_layers.0."),
    ("conv1.", "in_layers.2."),
    ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."),
    ("conv2.", "out_layers.3."),
    ("conv_shortcut.", "skip_connection."),
)
_UNET_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_VAE_MIDDLE = (
    ("resnets.0.", "block_1."),
    ("resnets.1.", "block_2."),
    ("attentions.0.group_norm.", "attn_1.norm."),
    ("attentions.0.to_q.", "attn_1.q."),
    ("attentions.0.to_k.", "attn_1.k."),
    ("attentions.0.to_v.", "attn_1.v."),
    ("attentions.0.to_out.0.", "attn_1.proj_out."),
)
_VAE_BLOCK = re.compile(r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)")
OPEN_CLIP_LAYER = (
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    ("self_attn.out_proj.", "attn.out_proj."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
)
_OPEN_CLIP_OUTER = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}


def unet_name(name: str, *, up_blocks_with_attention: frozenset[int]) -> str:
    """E.g. "down_blocks.0.resnets.1.conv1.weight" -> "input_blocks.2.0.in_layers.2.weight"."""
    match = _UNET_BLOCK.fullmatch(name)
    if match is None:
        outer = _replaced(name, _UNET_OUTER)
        return _resnet(outer) if name.startswith("mid_block.resnets") else outer
    way, level, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * _STEP}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        place = 2 if level in up_blocks_with_attention else 1
        return f"output_blocks.{level * _STEP + _LAYERS_PER_BLOCK}.{place}.{rest}"
    block = f"input_blocks.{level * _STEP + layer + 1}" if way == "down" else f"output_blocks.{level * _STEP + layer}"
    return f"{block}.1.{rest}" if kind == "attentions" else f"{block}.0.{_replaced(rest, _UNET_RESNET)}"


def vae_name(name: str, *, num_levels: int) -> str:
    """E.g. "decoder.up_blocks.0.resnets.0.conv1.weight" -> "decoder.up.3.block.0.conv1.weight" of four levels."""
    match = _VAE_BLOCK.fullmatch(name)
    if match is not None:
        way, level, kind, layer, rest = match[1], int(match[2]), match[3], match[4], match[5]
        # The decoder's levels count from the finest.
        level = num_levels - 1 - level if way == "decoder.up" else level
        if kind == "resnets":
            return f"{way}.{level}.block.{layer}.{rest.replace('conv_shortcut.', 'nin_shortcut.')}"
        return f"{way}.{level}.{'downsample' if kind == 'downsamplers' else 'upsample'}.{rest}"
    half, _, rest = name.partition(".mid_block.")
    if rest:
        return f"{half}.mid.{_replaced(rest, _VAE_MIDDLE)}"
    return name.replace(".conv_norm_out.", ".norm_out.")


def open_clip_text_name(name: str) -> str:
    """Of a tensor that OpenCLIP keeps as one; q, k and v stand together in "attn.in_proj_weight" and "..._bias"."""
    name = name.removeprefix("text_model.")
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
    if match is not None:
        return f"transformer.resblocks.{match[1]}.{_replaced(match[2], OPEN_CLIP_LAYER)}"
    return _OPEN_CLIP_OUTER[name]


def _resnet(name: str) -> str:
    block, index, rest = name.split(".", 2)
    return f"{block}.{index}.{_replaced(rest, _UNET_RESNET)}"


def _replaced(name: str, starts: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in starts:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
