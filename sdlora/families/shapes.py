"""How large the parts of a base are, without loading it: from its configuration files, or those of its kind."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sdlora.families.load import local_base
from sdlora.families.single_file import open_checkpoint

__all__ = ["STANDARD", "BaseShapes", "base_shapes"]

_TEXT_PREFIXES = ("cond_stage_model.", "conditioner.")


@dataclass(frozen=True)
class BaseShapes:
    """The configurations of U-Net and VAE as diffusers has them, and the number of the text encoders' parameters."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_parameters: int
    known: bool = True
    """False: the base is not on this computer, and these are the shapes of its kind."""
    text: tuple[Mapping[str, Any], ...] = ()
    """The configurations of the text encoders as transformers has them."""

    @property
    def vae_factor(self) -> int:
        """Pixels per latent along a side."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def size_step(self) -> int:
        """Picture sides must be multiples of this."""
        return int(self.vae_factor * 2 ** (len(self.unet["block_out_channels"]) - 1))

    @property
    def default_resolution(self) -> int:
        """Side in pixels of the pictures that the base was trained on."""
        return int(self.unet["sample_size"]) * self.vae_factor


def base_shapes(base: str) -> BaseShapes:
    """The shapes of a base (any name that `resolve_base` takes); nothing is downloaded and no weight read.

    Raises:
        ModelError: it is no Hub id and lies nowhere, or is not a model.
    """
    place = local_base(base)
    if place is None:
        return STANDARD["sdxl" if "xl" in base.lower() else "sd2" if "-2" in base else "sd1"]
    path = Path(place)
    if path.is_file():
        checkpoint = open_checkpoint(path)
        text = tuple(config.to_dict() for config in checkpoint.text_configs())
        return BaseShapes(checkpoint.unet_config(), checkpoint.vae_config(), _count(path, _TEXT_PREFIXES), text=text)
    text_files = [file for file in path.glob("text_encoder*/*.safetensors") if ".fp16." not in file.name]
    text_files = text_files or list(path.glob("text_encoder*/*.safetensors"))
    unet, vae = (_config(path / part) for part in ("unet", "vae"))
    text = tuple(_config(folder) for folder in sorted(path.glob("text_encoder*")))
    return BaseShapes(unet, vae, sum(_count(file) for file in text_files), text=text)


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def _count(path: Path, prefixes: tuple[str, ...] = ("",)) -> int:
    """Numbers in the tensors of a file, from its header."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefixes)]  # noqa: SIM118 (it is no dictionary)
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


_VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
_SD1: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SD2: dict[str, Any] = _SD1 | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_SDXL: dict[str, Any] = _SD1 | {
    "sample_size": 128,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def _text(width: int, layers: int, heads: int, activation: str) -> dict[str, Any]:
    return {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": width,
        "hidden_act": activation,
    }


_CLIP_L, _CLIP_H, _CLIP_G = (
    _text(768, 12, 12, "quick_gelu"),
    _text(1024, 23, 16, "gelu"),
    _text(1280, 32, 20, "gelu"),
)
STANDARD: Mapping[str, BaseShapes] = {
    "sd1": BaseShapes(_SD1, _VAE, 123_060_480, known=False, text=(_CLIP_L,)),
    "sd2": BaseShapes(_SD2, _VAE, 340_387_840, known=False, text=(_CLIP_H,)),
    "sdxl": BaseShapes(_SDXL, _VAE, 123_060_480 + 694_659_840, known=False, text=(_CLIP_L, _CLIP_G)),
}
"""The published models' shapes, by family."""
