"""Find the layers of a real model that an adapter changes, or say in one sentence whose they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from sdlora.adapter_file.dora import without_dora
from sdlora.adapter_file.keys import flat_key, text_module_path
from sdlora.adapter_file.reader import name_some
from sdlora.adapter_file.types import AdapterWeights, LoraPair, Part
from sdlora.errors import AdapterFileError, AdapterMismatchError

__all__ = ["adaptable_layers", "describe_width", "resolve_layers", "walk_modules"]

_KNOWN_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}


def adaptable_layers(part: Part, model: nn.Module) -> dict[str, nn.Module]:
    """All Linear and Conv2d layers of a model by underscored path, which is how every dialect can name them."""
    return {
        flat_key(path if part == "unet" else text_module_path(path)): module
        for path, module in walk_modules(model)
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }


def walk_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What `named_modules` yields, in its order, in a tenth of its time: a load walks through the whole model."""
    seen: set[nn.Module] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        prefix = f"{path}." if path else ""
        children = [(prefix + name, child) for name, child in module._modules.items() if child is not None]
        waiting += reversed(children)


def describe_width(cross_attention_dim: int) -> str:
    """The family for people: "SD 1.x (cross-attention width 768)"."""
    family = _KNOWN_WIDTHS.get(cross_attention_dim, "a Stable Diffusion")
    return f"{family} (cross-attention width {cross_attention_dim})"


def resolve_layers(
    weights: AdapterWeights, models: Mapping[Part, nn.Module], *, cross_attention_dim: int
) -> dict[nn.Module, LoraPair]:
    """The pair of every layer that the adapter changes, shaped as the layer's own weight; DoRA is worked out on it.

    Raises AdapterFileError for DoRA on a base whose weights cannot be read, AdapterMismatchError if a layer is missing
    or has another shape: half an adapter is not the adapter.
    """
    found: dict[nn.Module, LoraPair] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    layers = {part: adaptable_layers(part, model) for part, model in models.items()}
    for part, path, pair in weights.pairs():
        layer = layers.get(part, {}).get(flat_key(path))
        fitted = None if layer is None else _fit(pair, layer)
        if fitted is not None and fitted.dora_scale is not None:
            fitted = without_dora(fitted, _readable_weight(layer, weights.path))
        if layer is None:
            missing.append(f"{part}.{path}")
        elif fitted is None:
            misshapen.append(f"{part}.{path}")
        else:
            found[layer] = fitted
    if missing or misshapen:
        other = _describe_adapter(weights, missing, misshapen, models, cross_attention_dim)
        raise AdapterMismatchError(weights.path, expected=describe_width(cross_attention_dim), found=other)
    return found


def _fit(pair: LoraPair, layer: nn.Module) -> LoraPair | None:
    """The pair in the layer's own number of axes; a 1x1 convolution and a Linear are the same thing."""
    shape = tuple(layer.weight.shape)  # type: ignore[arg-type]
    kernel = shape[2:] or (1, 1)
    pair_kernel = tuple(pair.down.shape[2:]) or (1, 1)
    if pair.down.shape[1] != shape[1] or pair.up.shape[0] != shape[0] or pair_kernel != kernel:
        return None
    axes = (1, 1) if len(shape) == 4 else ()
    return dataclasses.replace(
        pair,
        down=pair.down.reshape(pair.rank, shape[1], *shape[2:]),
        up=pair.up.reshape(shape[0], pair.rank, *axes),
    )


def _readable_weight(layer: nn.Module | None, path: Path) -> Tensor:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
        reason = "this is a DoRA, which needs the base's own weights, and these are quantised or not loaded yet."
        raise AdapterFileError(path, reason)
    return weight


def _describe_adapter(
    weights: AdapterWeights,
    missing: list[str],
    misshapen: list[str],
    models: Mapping[Part, nn.Module],
    cross_attention_dim: int,
) -> str:
    width = weights.cross_attention_dim
    if width is not None and width != cross_attention_dim:
        return describe_width(width)
    absent = next(
        (part for part in ("text_encoder", "text_encoder_2") if weights.part(part) and part not in models), None
    )
    if absent is not None:
        return f"a model with a {absent}"
    if missing:
        return f"a model that has the layers {name_some(missing)}"
    return f"a model in which {name_some(misshapen)} have other shapes"
