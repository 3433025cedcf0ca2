"""What an adapter will be, before anything is attached: its layers, their rank and strength, the size of the file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from sdlora.adapter_file import PARTS, AdapterWeights, LoraPair, Part, read_adapter, resolve_layers
from sdlora.adapter_file.keys import text_module_path
from sdlora.config import LoraSettings
from sdlora.errors import AdapterFileError, ConfigError, NothingToTrainError, Problem
from sdlora.families.base import Components, ModelFamily
from sdlora.lora.targets import matches, target_modules, target_patterns

__all__ = ["AdapterPlan", "LayerPlan", "base_models", "layer_name", "plan_adapter", "plan_layers"]

_BYTES_PER_NUMBER = 2  # fp16
_TEXT_LAYERS = tuple(
    f"*.{layer}" for layer in (*(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
)


@dataclass(frozen=True)
class LayerPlan:
    """The pair of one layer; its change is alpha / rank * up @ down."""

    shape: tuple[int, ...]
    """Of the layer's weight: [out, in] or [out, in, k, k]."""
    rank: int
    alpha: float
    num_lengths: int = 0
    """DoRA's, one a row of the weight."""

    @property
    def num_parameters(self) -> int:
        return self.rank * (self.shape[0] + math.prod(self.shape[1:])) + self.num_lengths


@dataclass(frozen=True)
class AdapterPlan:
    """All layers by part of the base and module path; parts without layers are left out."""

    layers: Mapping[Part, Mapping[str, LayerPlan]]
    start: AdapterWeights | None = None
    """The adapter to go on from, its pairs shaped as the layers are."""

    @property
    def adapts_text(self) -> bool:
        """Whether a text encoder has layers in it, so that captions cannot be encoded once and for all."""
        return any(part != "unet" for part in self.layers)

    @property
    def num_layers(self) -> int:
        return sum(map(len, self.layers.values()))

    @property
    def num_parameters(self) -> int:
        return sum(layer.num_parameters for layers in self.layers.values() for layer in layers.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the tensors in a file in fp16: the factors and one alpha a layer, without the header."""
        # DoRA's lengths are written in fp32.
        return _BYTES_PER_NUMBER * (self.num_parameters + self.num_lengths + self.num_layers)

    def file_bytes_in(self, dtype: str) -> int:
        """The same of a file in "fp16", "bf16" or "fp32"."""
        doubled = self.num_parameters - self.num_lengths + self.num_layers
        return self.file_bytes + (_BYTES_PER_NUMBER * doubled if dtype == "fp32" else 0)

    @property
    def num_lengths(self) -> int:
        """DoRA's, of all layers; 0 for a plain LoRA."""
        return sum(layer.num_lengths for layers in self.layers.values() for layer in layers.values())

    @property
    def alpha(self) -> float | None:
        """The alpha of all layers; None where they differ."""
        alphas = {layer.alpha for layers in self.layers.values() for layer in layers.values()}
        return alphas.pop() if len(alphas) == 1 else None


def base_models(components: Components) -> dict[Part, nn.Module]:
    """The models that an adapter can change, as files call them; text encoders as far as they are still there."""
    return dict(zip(PARTS, (components.unet, *components.text_encoders), strict=False))


def plan_adapter(components: Components, settings: LoraSettings) -> AdapterPlan:
    """The layers that `settings`, or the file they name, choose in this base.

    Raises:
        ConfigError: the targets are for another family, a row of `lora.blocks` matches no layer, or the file to go on
            from does not fit `lora.text_encoder`.
        NothingToTrainError: a target matches no layer, or every layer is left out.
        AdapterFileError: the file to go on from cannot be used.
        AdapterMismatchError: it was made for another base.
    """
    if settings.text_encoder and not components.text_encoders:
        raise ValueError("the text encoders are gone; keep them to adapt them")
    models: dict[Part, nn.Module] = {"unet": components.unet}
    if settings.text_encoder:
        models = base_models(components)
    return plan_layers(models, components.family, settings)


def plan_layers(models: Mapping[Part, nn.Module], family: ModelFamily, settings: LoraSettings) -> AdapterPlan:
    """The same for these models alone, whose weights are not looked at."""
    if settings.init_from is not None:
        return _plan_from_file(models, read_adapter(settings.init_from), dora=settings.dora)
    return _plan_from_settings(models, family, settings)


def layer_name(part: Part, path: str) -> str:
    """One name for a layer wherever it is: in patterns, random choices and saved states."""
    return path if part == "unet" else f"{part}.{text_module_path(path)}"


def _plan_from_file(models: Mapping[Part, nn.Module], start: AdapterWeights, *, dora: bool) -> AdapterPlan:
    """The file's own layers, ranks and alphas."""
    has_text = bool(start.text_encoder or start.text_encoder_2)
    if has_text != (len(models) > 1):
        what = f"{start.path.name} {'adapts' if has_text else 'does not adapt'} the text encoders."
        raise ConfigError("the settings", [Problem("lora.text_encoder", what, f"Set it to {str(has_text).lower()}.")])
    if start.is_dora != dora:
        what = f"{start.path.name} is {'a' if start.is_dora else 'no'} DoRA."
        raise ConfigError("the settings", [Problem("lora.dora", what, f"Set it to {str(start.is_dora).lower()}.")])
    width: int = models["unet"].config.cross_attention_dim  # type: ignore[union-attr, assignment]
    found = resolve_layers(start, models, cross_attention_dim=width)
    layers: dict[Part, dict[str, LayerPlan]] = {}
    pairs: dict[Part, dict[str, LoraPair]] = {}
    for part, model in models.items():
        for path, layer in model.named_modules():
            if layer in found:
                pair = pairs.setdefault(part, {})[path] = found[layer]
                shape = (pair.up.shape[0], *pair.down.shape[1:])
                num_lengths = _checked_lengths(start, path, pair) if dora else 0
                layers.setdefault(part, {})[path] = LayerPlan(shape, pair.rank, pair.alpha, num_lengths)
    shaped = {part: pairs.get(part, {}) for part in PARTS}
    return AdapterPlan(
        layers,
        replace(
            start,
            unet=shaped["unet"],
            text_encoder=shaped["text_encoder"],
            text_encoder_2=shaped["text_encoder_2"],
        ),
    )


def _checked_lengths(start: AdapterWeights, path: str, pair: LoraPair) -> int:
    """How many there are. Raises AdapterFileError if they are none or not of rows, which alone are trained."""
    if pair.dora_scale is None or pair.dora_scale.shape[1] != 1:
        raise AdapterFileError(start.path, f"{path} has no lengths by row; only a DoRA that has can be gone on from.")
    return int(pair.dora_scale.shape[0])


def _plan_from_settings(models: Mapping[Part, nn.Module], family: ModelFamily, settings: LoraSettings) -> AdapterPlan:
    patterns = target_patterns(settings.targets, family)
    chosen: dict[Part, tuple[str, ...]] = {"unet": target_modules(models["unet"], patterns)}
    for part, unread in zip(PARTS[1:], family.unread_text_layers, strict=False):
        if part in models:
            chosen[part] = _text_modules(models[part], unread)
    sizes = _sizes(settings, [layer_name(part, path) for part, paths in chosen.items() for path in paths])
    layers: dict[Part, dict[str, LayerPlan]] = {}
    for part, paths in chosen.items():
        for path in paths:
            rank, alpha = sizes[layer_name(part, path)]
            if rank:
                shape = tuple(models[part].get_submodule(path).weight.shape)  # type: ignore[arg-type]
                layers.setdefault(part, {})[path] = LayerPlan(shape, rank, alpha, shape[0] if settings.dora else 0)
    if not layers:
        raise NothingToTrainError(patterns)
    return AdapterPlan(layers)


def _text_modules(encoder: nn.Module, unread: int) -> tuple[str, ...]:
    """The layers of a text encoder, but for the last ones whose output nobody reads: they could never learn."""
    num_read = encoder.config.num_hidden_layers - unread  # type: ignore[union-attr, operator]
    numbered = [(re.search(r"layers\.(\d+)\.", path), path) for path in target_modules(encoder, _TEXT_LAYERS)]
    return tuple(path for number, path in numbered if number is not None and int(number[1]) < num_read)


def _sizes(settings: LoraSettings, names: list[str]) -> dict[str, tuple[int, float]]:
    """(rank, alpha) of each layer: the last row of `lora.blocks` that matches it counts, else the settings for all."""
    alpha_per_rank = 1.0 if settings.alpha is None else settings.alpha / settings.rank
    general = settings.rank if settings.alpha is None else settings.alpha
    sizes = dict.fromkeys(names, (settings.rank, float(general)))
    problems = []
    for row in settings.blocks:
        alpha = row.rank * alpha_per_rank if row.alpha is None else row.alpha
        found = matches(row.match, names)
        sizes |= dict.fromkeys(found, (row.rank, float(alpha)))
        if not found:
            problems.append(
                Problem("lora.blocks", f"{row.match!r} matches none of the layers that lora.targets chose.")
            )
    if problems:
        raise ConfigError("the settings", problems)
    if settings.rslora:
        return {name: (rank, alpha * math.sqrt(rank)) for name, (rank, alpha) in sizes.items()}
    return sizes
