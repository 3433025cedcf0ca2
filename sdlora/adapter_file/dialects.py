"""Tensor names of the known adapter dialects, each taken apart into part, module path and role.

kohya            lora_unet_<path>.lora_down.weight | .lora_up.weight | .alpha   (diffusers' or Stability's words)
PEFT             unet.<path>.lora_A.weight | .lora_B.weight                      (also base_model.model.<path>)
old diffusers    unet.<path>.lora.down.weight, <attention>.processor.to_q_lora.down.weight, ...lora_linear_layer...
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from sdlora.adapter_file.keys import flat_key, from_stability, module_path, part_of_path, text_module_path
from sdlora.adapter_file.types import Part

__all__ = ["Role", "TensorName", "parse_tensor_name", "unsupported_method"]

Role = Literal["down", "up", "alpha"]


@dataclass(frozen=True)
class TensorName:
    """One tensor of an adapter file: which factor of which layer."""

    part: Part
    path: str
    role: Role
    dialect: Literal["kohya", "peft", "diffusers"]


_KOHYA = re.compile(r"lora_(unet|te|te1|te2)_([A-Za-z0-9_]+)\.(lora_down\.weight|lora_up\.weight|alpha)")
_KOHYA_PARTS: dict[str, Part] = {
    "unet": "unet",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
}
_KOHYA_ROLES: dict[str, Role] = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}
_DOTTED = re.compile(
    r"(?:base_model\.model\.)?(?:(?P<part>unet|text_encoder_2|text_encoder)\.)?(?P<path>.+?)"
    r"(?:\.lora_(?P<ab>[AB])(?:\.[A-Za-z0-9_-]+)?\.weight"
    r"|(?:\.lora|_lora|\.lora_linear_layer)\.(?P<updown>up|down)\.weight"
    r"|(?:\.lora|_lora|\.lora_linear_layer)?\.(?P<alpha>alpha))"
)
_OLD_TEXT_WORDS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

_METHODS = (
    (re.compile(r"\.dora_scale$|lora_magnitude_vector"), "DoRA"),
    (re.compile(r"\.hada_(w|t)"), "LoHa"),
    (re.compile(r"\.lokr_(w|t)"), "LoKr"),
    (re.compile(r"\.lora_mid\."), "LoCon with a CP decomposition"),
    (re.compile(r"\.oft_|\.oft_blocks|^oft_"), "OFT"),
    (re.compile(r"\.diff(_b)?$"), "full-difference"),
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
    """The name of the method whose tensors are called so, when it is one that plain LoRA cannot express."""
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
    return _checked(part, path, _KOHYA_ROLES[match[3]], "kohya")


def _parse_dotted(name: str) -> TensorName | None:
    match = _DOTTED.fullmatch(name)
    if match is None:
        return None
    path = match["path"]
    part = cast(Part | None, match["part"] or part_of_path(path))
    if part is None:
        return None
    path = _attention_processor_path(path, part)
    if match["ab"]:
        return _checked(part, path, "down" if match["ab"] == "A" else "up", "peft")
    return _checked(part, path, cast(Role, match["updown"] or match["alpha"]), "diffusers")


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
