"""Read an adapter file of any known dialect, strictly: every tensor is understood, or the file is refused.

The header is checked, all names are taken apart and all shapes are compared before the tensors are read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sdlora.adapter_file.dialects import Role, TensorName, parse_tensor_name, unsupported_method
from sdlora.adapter_file.peft_config import PeftAlphas
from sdlora.adapter_file.safety import MAX_ALPHA_PER_RANK, MAX_RANK, Header, read_header
from sdlora.adapter_file.types import PARTS, AdapterWeights, LoraPair, Part
from sdlora.errors import AdapterFileError

__all__ = ["file_dialects", "name_some", "read_adapter"]


def read_adapter(path: str | Path) -> AdapterWeights:
    """Read a LoRA in kohya's, PEFT's or diffusers' older dialect; tensors on the CPU in the file's types.

    A missing alpha means alpha = rank, as every other tool takes it. Raises AdapterFileError with one sentence.
    """
    path = Path(path)
    _check_is_file(path)
    try:
        with path.open("rb") as file:
            header = read_header(file, path)
            layers = _layers(path, header)
            file.seek(0)
            content = file.read()
    except OSError as error:
        raise AdapterFileError(path, f"it cannot be read: {error.strerror}.") from error
    tensors = _tensors(path, content, header)
    alphas = PeftAlphas(path, header.metadata)
    parts: dict[Part, dict[str, LoraPair]] = {part: {} for part in PARTS}
    for (part, module), layer in sorted(layers.items()):
        parts[part][module] = _pair(path, part, module, layer, tensors, alphas)
    digest = hashlib.sha256(memoryview(content)[header.size :]).hexdigest()
    return AdapterWeights(**parts, metadata=header.metadata, path=path, tensor_sha256=digest)


def file_dialects(path: str | Path) -> tuple[str, ...]:
    """Which dialects the file's tensor names are in: "kohya", "peft", "diffusers"; most files have one.

    Raises:
        AdapterFileError: the header is not sound.
    """
    path = Path(path)
    _check_is_file(path)
    with path.open("rb") as file:
        names = read_header(file, path).tensors
    parsed = (parse_tensor_name(name) for name in names)
    return tuple(sorted({tensor.dialect for tensor in parsed if tensor is not None and tensor.role != "alpha"}))


@dataclass
class _Layer:
    """The names in the file of one layer's tensors, by role."""

    names: dict[Role, str] = field(default_factory=dict)
    dialect: str = ""


def name_some(names: Iterable[str], *, at_most: int = 3) -> str:
    """ "a, b, c and 5 more", for messages."""
    everything = list(names)
    shown = ", ".join(everything[:at_most])
    return shown if len(everything) <= at_most else f"{shown} and {len(everything) - at_most} more"


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise AdapterFileError(path, "this is a folder; name the .safetensors file in it.")
    if not path.exists():
        raise AdapterFileError(path, "there is no such file.")
    # Opening a pipe would wait for its writer.
    if not path.is_file():
        raise AdapterFileError(path, "this is not a regular file.")


def _layers(path: Path, header: Header) -> dict[tuple[Part, str], _Layer]:
    """Group the tensors by layer and check names, completeness and shapes."""
    method = next((m for m in map(unsupported_method, header.tensors) if m is not None), None)
    if method is not None:
        raise AdapterFileError(path, f"this is a {method} file; only plain LoRA is supported.")
    parsed = {name: parse_tensor_name(name) for name in header.tensors}
    if not any(parsed.values()):
        names = name_some(header.tensors)
        raise AdapterFileError(path, f"none of its tensors belongs to a LoRA for Stable Diffusion: {names}.")
    foreign = [name for name, tensor in parsed.items() if tensor is None]
    if foreign:
        raise AdapterFileError(path, f"it holds tensors that are not part of a LoRA: {name_some(foreign)}.")
    layers: dict[tuple[Part, str], _Layer] = {}
    for name, tensor in parsed.items():
        _add(path, layers, name, tensor)
    for (_, module), layer in layers.items():
        _check_shapes(path, module, layer, header)
    return layers


def _add(path: Path, layers: dict[tuple[Part, str], _Layer], name: str, tensor: TensorName | None) -> None:
    if tensor is None:
        return
    layer = layers.setdefault((tensor.part, tensor.path), _Layer())
    if tensor.role in layer.names:
        raise AdapterFileError(path, f"{layer.names[tensor.role]!r} and {name!r} are the same tensor of one layer.")
    layer.names[tensor.role] = name
    if tensor.role != "alpha":
        layer.dialect = tensor.dialect


def _check_shapes(path: Path, module: str, layer: _Layer, header: Header) -> None:
    missing = [role for role in ("down", "up") if role not in layer.names]
    if missing:
        found = " and ".join(layer.names)
        raise AdapterFileError(path, f"{module} has {found}, but its {' and '.join(missing)} factor is missing.")
    shapes = {role: header.tensors[name].shape for role, name in layer.names.items()}
    down, up = shapes["down"], shapes["up"]
    is_linear = len(down) == 2 and len(up) == 2
    is_conv = len(down) == 4 and len(up) == 4 and down[2] == down[3] and down[2] in (1, 3) and up[2:] == (1, 1)
    if not (is_linear or is_conv) or down[0] != up[1]:
        raise AdapterFileError(path, f"the factors of {module} do not fit: down {list(down)}, up {list(up)}.")
    if down[0] > MAX_RANK:
        raise AdapterFileError(path, f"{module} has rank {down[0]}; at most {MAX_RANK} is read.")
    if math.prod(shapes.get("alpha", ())) != 1:
        raise AdapterFileError(path, f"the alpha of {module} is not one number.")


def _tensors(path: Path, content: bytes, header: Header) -> Mapping[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(content)
    except SafetensorError as error:
        raise AdapterFileError(path, "the safetensors library does not accept this file.") from error
    if tensors.keys() != header.tensors.keys():
        raise AdapterFileError(path, "its header reads differently a second time; it is not taken.")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise AdapterFileError(path, f"NaN or infinite numbers in {name_some(broken)}; the training went wrong.")
    return tensors


def _pair(
    path: Path, part: Part, module: str, layer: _Layer, tensors: Mapping[str, Tensor], alphas: PeftAlphas
) -> LoraPair:
    down, up = tensors[layer.names["down"]], tensors[layer.names["up"]]
    rank = int(down.shape[0])
    alpha: float | None = None
    if "alpha" in layer.names:
        alpha = float(tensors[layer.names["alpha"]].item())
    elif layer.dialect == "peft":
        alpha = alphas.alpha(part, module, rank)
    if alpha is None:
        alpha = float(rank)
    if not 0 < alpha <= MAX_ALPHA_PER_RANK * rank:
        limits = f"between 0 and {MAX_ALPHA_PER_RANK:g} times the rank"
        raise AdapterFileError(path, f"{module} has alpha {alpha:g} at rank {rank}; alpha must lie {limits}.")
    return LoraPair(down=down, up=up, alpha=alpha)
