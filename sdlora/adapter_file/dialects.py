"""Tensor names of the known adapter dialects, each taken apart into part, module path and role.

kohya            lora_unet_<path>.lora_down.weight | .lora_up.weight | .alpha   (diffusers' or Stability's words)
                 and LyCORIS' further tensors: .lora_mid.weight .hada_w1_a ... .lokr_w1 ... .diff .dora_scale
PEFT             unet.<path>.lora_A.weight | .lora_B.weight | .lora_magnitude_vector   (also base_model.model.<path>)
old diffusers    unet.<path>.lora.down.weight, <attention>.processor.to_q_lora.down.weight, ...lora_linear_layer...
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from sdlora.adapter_file.keys import flat_key, from_stability, module_path, part_of_path, text_module_path
from sdlora.adapter_file.types import Part

__all__ = ["Role", "TensorName", "parse_tensor_name", "unsupported_method"]

Role = str
"""Which tensor of a layer: "down", "up", "mid", "alpha", "dora_scale", or LyCORIS' own: "hada_w1_a", "lokr_w2", ..."""


@dataclass(frozen=True)
class TensorName:
    """One tensor of an adapter file: which factor of which layer."""

    part: Part
    path: str
    role: Role
    dialect: Literal["kohya", "peft", "diffusers"]


_KOHYA = re.compile(
    r"(lora_unet|lora_te|lora_te1|lora_te2|lycoris)_([A-Za-z0-9_]+)\."
    r"((?:lora_down|lora_up|lora_mid)\.weight|alpha|dora_scale|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2"
    r"|diff)"
)
_KOHYA_PARTS: dict[str, Part] = {
    "lora_unet": "unet",
    "lycoris": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
}
_KOHYA_ROLES: dict[str, Role] = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid"}
_DOTTED = re.compile(
    r"(?:base_model\.model\.)?(?:(?P<part>unet|text_encoder_2|text_encoder)\.)?(?P<path>.+?)"
    r"(?:\.lora_(?P<ab>[AB])(?:\.[A-Za-z0-9_-]+)?\.weight"
    r"|\.(?P<dora>lora_magnitude_vector)(?:\.[A-Za-z0-9_-]+){0,2}"
    r"|(?:\.lora|_lora|\.lora_linear_layer)\.(?P<updown>up|down)\.weight"
    r"|(?:\.lora|_lora|\.lora_linear_layer)?\.(?P<alpha>alpha))"
)
_OLD_TEXT_WORDS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

_METHODS = (
    (re.compile(r"^(?!lora_|lycoris_).*\.(hada|lokr)_"), "LoHa or LoKr in PEFT's own layout"),
    (re.compile(r"\.diff_b$|\.[wb]_norm$"), "full-difference with biases or norms"),
    (re.compile(r"\.oft_|\.oft_blocks|^oft_"), "OFT"),
    (re.compile(r"\.(a1|a2|b1|b2)\.weight$"), "GLoRA"),
    (re.compile(r"\.on_input$"), "IA3"),
    (re.compile(r"\.lora_(A|B)(\.[A-Za-z0-9_-]+)?\.bias$|\.lora_(up|down)\.bias$"), "LoRA with biases"),
    (re.compile(r"\.lora_embedding_(A|B)"), "token-embedding LoRA"),
    (
        re.compile(r"double_blocks|single_blocks|joint_blocks|single_transformer|^transformer\.|^lora_te3_"),
        "transformer-model (such as Flux or SD 3)",
    ),
)


def unsupported_method(name: str) -> str | None:
    """The name of the method whose tensors are called so, when it is one that is not read."""
    return next((method for pattern, method in _METHODS if pattern.search(name)), None)


def parse_tensor_name(name: str) -> TensorName | None:
    """What the tensor is; None for a name of no known dialect or a module that Stable Diffusion does not have."""
    return _parse_kohya(name) or _parse_dotted(name)


def _parse_kohya(name: str) -> TensorName | None:
    match = _KOHYA.fullmatch(name)
    if match is None:
        return None
    part, flat = _KOHYA_PARTS[match[1]], match[2]
    path = module_path(flat)
    if path is None and part == "unet":
        path = from_stability(flat)
    return _checked(part, path, _KOHYA_ROLES.get(match[3], match[3]), "kohya")


def _parse_dotted(name: str) -> TensorName | None:
    match = _DOTTED.fullmatch(name)
    if match is None:
        return None
    path = match["path"]
    part = cast(Part | None, match["part"] or part_of_path(path))
    if part is None:
        return None
    path = _attention_processor_path(path, part)
    if match["ab"] or match["dora"]:
        return _checked(part, path, {"A": "down", "B": "up"}.get(match["ab"], "dora_scale"), "peft")
    return _checked(part, path, match["updown"] or match["alpha"], "diffusers")


def _attention_processor_path(path: str, part: Part) -> str:
    """Names from the time when LoRA lived in attention processors, as the layers are called now."""
    parent, _, word = path.rpartition(".")
    if part == "unet":
        parent = parent.removesuffix(".processor")
        return f"{parent}.to_out.0" if word == "to_out" else f"{parent}.{word}" if parent else path
    return f"{parent}.{_OLD_TEXT_WORDS.get(word, word)}" if parent else path


def _checked(
    part: Part, path: str | None, role: Role, dialect: Literal["kohya", "peft", "diffusers"]
) -> TensorName | None:
    if path is None or module_path(flat_key(path)) != path:
        return None
    belongs_to_unet = part_of_path(path) == "unet"
    if part_of_path(path) is None or belongs_to_unet != (part == "unet"):
        return None
    return TensorName(part, path if part == "unet" else text_module_path(path), role, dialect)
