"""Adapters and single-file checkpoints, one tensor at a time: put the one into the other, or take it out of two.

A checkpoint of SDXL has 7 GB; what is held in memory here is near the largest of its tensors.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdlora.adapter_file import (
    PARTS,
    AdapterWeights,
    LoraPair,
    Part,
    describe_width,
    unet_path_of_original,
    without_dora,
)
from sdlora.errors import AdapterError, AdapterMismatchError, ModelError
from sdlora.families.base import FamilyName
from sdlora.families.original_names import open_clip_text_name, unet_name
from sdlora.families.single_file import checkpoint_family, require_safetensors, said_prediction_type
from sdlora.run_dir import sync_folder

__all__ = ["CheckpointLayers", "OpenedCheckpoint", "bake_checkpoint", "open_layers"]

_UNET = "model.diffusion_model."
_HUGGING_FACE: Mapping[tuple[FamilyName, Part], str] = {
    ("sd1", "text_encoder"): "cond_stage_model.transformer.text_model.",
    ("sdxl", "text_encoder"): "conditioner.embedders.0.transformer.text_model.",
}
_OPEN_CLIP: Mapping[tuple[FamilyName, Part], str] = {
    ("sd2", "text_encoder"): "cond_stage_model.model.",
    ("sdxl", "text_encoder_2"): "conditioner.embedders.1.model.",
}
_TEXT_LAYERS = (*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_COPY_BYTES = 2**22
# They name the tensors of the file they came from.
_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file; `begin` and `end` count bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class _Place:
    """Where a layer's weight lies in a checkpoint: a tensor, of which OpenCLIP's q, k and v are a third each."""

    name: str
    third: int | None = None
    is_transposed: bool = False


@dataclass(frozen=True, eq=False)
class _Checkpoint:
    path: Path
    family: FamilyName
    entries: Mapping[str, _Entry]
    header: Mapping[str, Any]

    @staticmethod
    def open(path: Path) -> _Checkpoint:
        """
        Raises:
            ModelError: it is no sound checkpoint of SD 1.x, SD 2.x or SDXL.
        """
        require_safetensors(path)
        try:
            # The library sees to it that the layout is sound.
            with safe_open(path, framework="pt"):
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read as a safetensors checkpoint: {error}. Fetch it again.") from error
        entries = {
            name: _Entry(e["dtype"], tuple(e["shape"]), *(8 + length + offset for offset in e["data_offsets"]))
            for name, e in header.items()
            if name != "__metadata__"
        }
        return _Checkpoint(path, checkpoint_family(path, entries), entries, header)

    @property
    def width(self) -> int:
        """Of the text embeddings."""
        return self.entries[f"{_UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]

    def place(self, part: Part, path: str) -> _Place | None:
        """Where the layer of an adapter lies; None if this checkpoint has no such layer."""
        found = self._place(part, path)
        return found if found is not None and found.name in self.entries else None

    def _place(self, part: Part, path: str) -> _Place | None:
        if part == "unet":
            levels = [n for n in range(4) if f"{_UNET}output_blocks.{3 * n}.1.proj_in.weight" in self.entries]
            return _Place(_UNET + unet_name(f"{path}.weight", up_blocks_with_attention=frozenset(levels)))
        if (self.family, part) in _HUGGING_FACE:
            return _Place(f"{_HUGGING_FACE[self.family, part]}{path.removeprefix('text_model.')}.weight")
        prefix = _OPEN_CLIP.get((self.family, part))
        if prefix is None:
            return None
        joined = re.fullmatch(r"(.*)self_attn\.([qkv])_proj", path)
        try:
            if joined is None:
                is_projection = path == "text_projection"
                return _Place(prefix + open_clip_text_name(f"{path}.weight"), is_transposed=is_projection)
            layer = open_clip_text_name(f"{joined[1]}mlp.fc1.weight").removesuffix("mlp.c_fc.weight")
        except KeyError:
            return None
        return _Place(f"{prefix}{layer}attn.in_proj_weight", third="qkv".index(joined[2]))


class CheckpointLayers(Mapping[str, Tensor]):
    """The weights of one part of a checkpoint by an adapter's module path, each read when it is asked for."""

    def __init__(self, checkpoint: _Checkpoint, places: Mapping[str, _Place]):
        self._checkpoint, self._places = checkpoint, places

    def only(self, paths: Sequence[str]) -> CheckpointLayers:
        """Those of them that are named."""
        return CheckpointLayers(self._checkpoint, {path: self._places[path] for path in paths if path in self._places})

    def __getitem__(self, path: str) -> Tensor:
        place = self._places[path]
        with self._checkpoint.path.open("rb") as file:
            return _layer(_read(file, self._checkpoint.entries[place.name], self._checkpoint.path), place)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclass(frozen=True, eq=False)
class OpenedCheckpoint:
    """The layers of a checkpoint that an adapter can change, none of them read yet."""

    family: FamilyName
    prediction_type: Literal["epsilon", "v_prediction"] | None
    """As the file says; None of an SD 2.x that does not."""
    layers: Mapping[Part, CheckpointLayers]
    """Linear and convolution layers of the U-Net; of the text encoders those of their transformer."""


def open_layers(path: Path) -> OpenedCheckpoint:
    """What lies where in a checkpoint file.

    Raises:
        ModelError: it is no sound checkpoint of SD 1.x, SD 2.x or SDXL.
    """
    checkpoint = _Checkpoint.open(path)
    unet = {}
    for name, entry in checkpoint.entries.items():
        if name.startswith(_UNET) and name.endswith(".weight") and len(entry.shape) in (2, 4):
            module = unet_path_of_original(name.removeprefix(_UNET).removesuffix(".weight"))
            if module is not None:
                unet[module] = _Place(name)
    layers: dict[Part, CheckpointLayers] = {"unet": CheckpointLayers(checkpoint, unet)}
    for part in PARTS[1:]:
        if places := _text_places(checkpoint, part):
            layers[part] = CheckpointLayers(checkpoint, places)
    said = said_prediction_type(path, checkpoint.family, checkpoint.entries, checkpoint.header.get("__metadata__", {}))
    return OpenedCheckpoint(checkpoint.family, said, layers)


def _text_places(checkpoint: _Checkpoint, part: Part) -> dict[str, _Place]:
    places: list[dict[str, _Place]] = []
    while True:
        paths = [f"text_model.encoder.layers.{len(places)}.{layer}" for layer in _TEXT_LAYERS]
        found = {path: place for path in paths if (place := checkpoint.place(part, path)) is not None}
        if len(found) < len(paths):
            break
        places.append(found)
    # The pipeline of SD 2.x takes the last but one layer; no loader has a place for what changes the last.
    if checkpoint.family == "sd2":
        places = places[:-1]
    return {path: place for layer in places for path, place in layer.items()}


def bake_checkpoint(base: Path, target: Path, adapters: Sequence[tuple[AdapterWeights, float]]) -> int:
    """Writes the checkpoint with the adapters at their weights in it; returns how many tensors changed.

    Each change is added in fp32 and rounded once to the tensor's own format; every other tensor keeps its bytes, and
    all keep their order. `target` appears whole or not at all.

    Raises:
        ModelError: the base is no sound checkpoint.
        AdapterMismatchError: an adapter was made for another model.
        AdapterError: the target exists or cannot be written, or a changed weight would not be finite.
    """
    if target.exists():
        raise AdapterError(f"{target} is there already. Choose another name.")
    checkpoint = _Checkpoint.open(base)
    changes: dict[str, list[tuple[_Place, LoraPair, float]]] = {}
    for weights, adapter_weight in adapters:
        for part, path, pair in weights.pairs():
            place = _fitting(checkpoint, weights, part, path, pair)
            changes.setdefault(place.name, []).append((place, pair, adapter_weight))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with base.open("rb") as source, temporary.open("xb") as file:
            file.write(_header(checkpoint))
            for name, entry in sorted(checkpoint.entries.items(), key=lambda item: item[1].begin):
                if name in changes:
                    file.write(_bytes(_changed(_read(source, entry, base), changes[name], name)))
                else:
                    _copy(source, entry, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise AdapterError(f"{target}: cannot be written ({error.strerror}).") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(changes)


def _fitting(checkpoint: _Checkpoint, weights: AdapterWeights, part: Part, path: str, pair: LoraPair) -> _Place:
    place = checkpoint.place(part, path)
    if place is not None:
        rows, *rest = checkpoint.entries[place.name].shape
        if place.third is not None:
            rows //= 3
        columns = torch.Size(rest).numel()
        if place.is_transposed:
            rows, columns = columns, rows
        if (pair.up.shape[0], pair.down[0].numel()) == (rows, columns):
            return place
    width = weights.cross_attention_dim
    other = describe_width(width) if width not in (None, checkpoint.width) else f"a model that has {part}.{path}"
    raise AdapterMismatchError(weights.path, expected=describe_width(checkpoint.width), found=other)


@torch.no_grad()
def _changed(tensor: Tensor, changes: Sequence[tuple[_Place, LoraPair, float]], name: str) -> Tensor:
    base = tensor.float()
    result = base.clone()
    for place, pair, weight in changes:
        layer = _layer(result, place)
        if pair.dora_scale is not None:
            pair = without_dora(pair, _layer(base, place))
        layer += ((weight * pair.scale) * (pair.up.flatten(1).float() @ pair.down.flatten(1).float())).view_as(layer)
    rounded = result.to(tensor.dtype)
    if not torch.isfinite(rounded).all():
        raise AdapterError(f"With these weights {name} is not finite in {tensor.dtype}; lower them.")
    return rounded


def _layer(tensor: Tensor, place: _Place) -> Tensor:
    """The layer's own weight [out, in(, k, k)] as a view of the checkpoint's tensor."""
    rows = len(tensor) // 3
    part = tensor if place.third is None else tensor[place.third * rows : (place.third + 1) * rows]
    return part.T if place.is_transposed else part


def _read(file: BinaryIO, entry: _Entry, path: Path) -> Tensor:
    if entry.dtype not in _DTYPES:
        raise ModelError(f"{path} holds its weights as {entry.dtype}; F16, BF16 or F32 is needed.")
    file.seek(entry.begin)
    content = bytearray(file.read(entry.end - entry.begin))
    return torch.frombuffer(content, dtype=_DTYPES[entry.dtype]).view(entry.shape)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _copy(source: BinaryIO, entry: _Entry, target: BinaryIO) -> None:
    source.seek(entry.begin)
    left = entry.end - entry.begin
    while left:
        block = source.read(min(left, _COPY_BYTES))
        if not block:
            raise OSError(5, "the base ended early")
        target.write(block)
        left -= len(block)


def _header(checkpoint: _Checkpoint) -> bytes:
    """As it was, but for hashes that would be wrong now."""
    header = dict(checkpoint.header)
    texts = header.pop("__metadata__", None)
    if texts is not None:
        header = {"__metadata__": {key: text for key, text in texts.items() if key not in _STALE}, **header}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
