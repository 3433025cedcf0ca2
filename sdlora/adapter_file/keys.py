"""Module paths and the names that adapter files give them. Strings only.

Files in kohya's dialect join a path's words with underscores, so "attn2.to_out.0" becomes "attn2_to_out_0". The way
back needs to know which words hold an underscore themselves; the modules of Stable Diffusion use few, listed here.

SDXL files of kohya name blocks as Stability's own code does: input_blocks, middle_block, output_blocks. Each level has
`layers_per_block` resnets on the way down, followed by a downsampler, and one more on the way up:

    down_blocks.i.resnets.j        input_blocks.{1 + i * (L + 1) + j}.0
    down_blocks.i.attentions.j     input_blocks.{1 + i * (L + 1) + j}.1
    down_blocks.i.downsamplers.0   input_blocks.{(i + 1) * (L + 1)}.0         (its convolution is called op)
    mid_block                      middle_block.0 (resnet), .1 (attention), .2 (resnet)
    up_blocks.i.resnets.j          output_blocks.{i * (L + 1) + j}.0
    up_blocks.i.attentions.j       output_blocks.{i * (L + 1) + j}.1
    up_blocks.i.upsamplers.0       output_blocks.{i * (L + 1) + L}.{2 after an attention, else 1}

L is 2 in every model whose files use these names.
"""

from __future__ import annotations

import functools
import re

__all__ = [
    "flat_key",
    "from_stability",
    "module_path",
    "part_of_path",
    "text_module_path",
    "to_stability",
    "unet_path_of_original",
]

_UNET_ROOTS = "down_blocks up_blocks mid_block conv_in conv_out time_embedding add_embedding"
_UNET_WORDS = (
    "resnets attentions transformer_blocks downsamplers upsamplers attn1 attn2 to_q to_k to_v to_out ff net proj "
    "proj_in proj_out conv conv1 conv2 conv_shortcut time_emb_proj linear_1 linear_2"
)
_TEXT_ROOTS = "text_model text_projection"
_TEXT_WORDS = "encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2"
_WORDS = sorted(f"{_UNET_ROOTS} {_UNET_WORDS} {_TEXT_ROOTS} {_TEXT_WORDS}".split(), key=len, reverse=True)
_NEXT_WORD = re.compile(rf"({'|'.join(_WORDS)}|\d{{1,3}})(?:_|$)")

_STABILITY_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
_STABILITY_OUTER = {
    "conv_in": "input_blocks_0_0",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
    "conv_out": "out_2",
}
_MIDDLE = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}
_DIFFUSERS_RESNET = {name: path for path, name in _STABILITY_RESNET.items()}
_DIFFUSERS_OUTER = {name: path for path, name in _STABILITY_OUTER.items()}
_DIFFUSERS_MIDDLE = {index: path for path, index in _MIDDLE.items()}

_SDXL_UP_BLOCKS_WITH_ATTENTION = frozenset({0, 1})


def flat_key(path: str) -> str:
    """The path with underscores for dots, as kohya's dialect writes it."""
    return path.replace(".", "_")


@functools.lru_cache(maxsize=2**14)
def module_path(flat: str) -> str | None:
    """The dotted path of an underscored one, in diffusers' or CLIP's words; None where a word is unknown."""
    words, position = [], 0
    while position < len(flat):
        match = _NEXT_WORD.match(flat, position)
        if match is None:
            return None
        words.append(match[1])
        position = match.end()
    return ".".join(words) if words and not flat.endswith("_") else None


def text_module_path(path: str) -> str:
    """The path with "text_model." in front, which transformers gives some CLIP classes and leaves out of others."""
    return f"text_model.{path}" if path.startswith("encoder.") else path


def part_of_path(path: str) -> str | None:
    """ "unet" or "text_encoder" by the path's first word; None if it starts neither."""
    root = path.split(".", 1)[0]
    if root in _UNET_ROOTS.split():
        return "unet"
    return "text_encoder" if root in (*_TEXT_ROOTS.split(), "encoder") else None


def to_stability(
    path: str,
    *,
    layers_per_block: int = 2,
    up_blocks_with_attention: frozenset[int] = _SDXL_UP_BLOCKS_WITH_ATTENTION,
) -> str:
    """Stability's underscored name of a diffusers U-Net path; the defaults are SDXL's. Raises ValueError if none."""
    if path in _STABILITY_OUTER:
        return _STABILITY_OUTER[path]
    step = layers_per_block + 1
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", path)
    if match is not None:
        way, level, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if kind == "downsamplers":
            return f"input_blocks_{(level + 1) * step}_0_op"
        if kind == "upsamplers":
            return (
                f"output_blocks_{level * step + layers_per_block}_{2 if level in up_blocks_with_attention else 1}_conv"
            )
        index = level * step + layer + (1 if way == "down" else 0)
        side = "input" if way == "down" else "output"
        return f"{side}_blocks_{index}_{_inner_to_stability(kind, rest, path)}"
    match = re.fullmatch(r"mid_block\.((resnets|attentions)\.\d)\.(.+)", path)
    if match is not None and match[1] in _MIDDLE:
        inner = _inner_to_stability(match[2], match[3], path).split("_", 1)[1]
        return f"middle_block_{_MIDDLE[match[1]]}_{inner}"
    raise ValueError(f"{path!r} has no place in a Stability U-Net.")


def _inner_to_stability(kind: str, rest: str, path: str) -> str:
    if kind == "attentions":
        return f"1_{flat_key(rest)}"
    if rest not in _STABILITY_RESNET:
        raise ValueError(f"{path!r} has no place in a Stability U-Net.")
    return f"0_{_STABILITY_RESNET[rest]}"


def from_stability(flat: str, *, layers_per_block: int = 2) -> str | None:
    """The diffusers path of Stability's underscored name; None if it is not such a name."""
    if flat in _DIFFUSERS_OUTER:
        return _DIFFUSERS_OUTER[flat]
    match = re.fullmatch(r"(input|output)_blocks_(\d{1,3})_([012])_(.+)", flat)
    if match is not None:
        index, inner, rest = int(match[2]) - (match[1] == "input"), int(match[3]), match[4]
        level, layer = divmod(index, layers_per_block + 1)
        block = f"{'down' if match[1] == 'input' else 'up'}_blocks.{level}"
        if rest == "op" and match[1] == "input" and inner == 0 and layer == layers_per_block:
            return f"{block}.downsamplers.0.conv"
        if rest == "conv" and match[1] == "output" and inner > 0 and layer == layers_per_block:
            return f"{block}.upsamplers.0.conv"
        down_has_no_such_layer = match[1] == "input" and layer == layers_per_block
        if inner == 2 or level < 0 or down_has_no_such_layer:
            return None
        return _inner_from_stability(f"{block}.{'attentions' if inner else 'resnets'}.{layer}", rest)
    match = re.fullmatch(r"middle_block_([012])_(.+)", flat)
    return _inner_from_stability(f"mid_block.{_DIFFUSERS_MIDDLE[int(match[1])]}", match[2]) if match else None


def unet_path_of_original(name: str) -> str | None:
    """The diffusers path of a module of Stability's U-Net, "input_blocks.1.1.proj_in"; None if it is none."""
    return from_stability(flat_key(name))


def _inner_from_stability(block: str, rest: str) -> str | None:
    inner = module_path(rest) if ".attentions." in block else _DIFFUSERS_RESNET.get(rest)
    return None if inner is None else f"{block}.{inner}"
