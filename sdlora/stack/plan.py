"""What a set of weighted adapters comes to: one low-rank term for each layer, and the dials of what varies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sdlora.adapter_file import LoraPair, Part
from sdlora.adapter_weight import AdapterWeight
from sdlora.errors import AdapterError
from sdlora.stack.dial import Dial, StepDial
from sdlora.stack.live import LiveDelta, Term

__all__ = ["LoadedAdapter", "Place", "Plan", "make_plan"]

Place = tuple[Part, str]
"""Where a layer is: the model, and the path in it."""


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """A file matched with the layers it changes."""

    path: Path
    tensor_sha256: str
    layers: Mapping[nn.Module, LoraPair]


@dataclass(frozen=True, eq=False)
class Plan:
    """How the adapters are to be applied."""

    deltas: Mapping[nn.Module, LiveDelta] = field(default_factory=dict)
    unet_dial: StepDial | None = None
    """None: nothing varies, and the deltas can be merged."""


def make_plan(
    adapters: Sequence[tuple[LoadedAdapter, AdapterWeight]],
    places: Mapping[nn.Module, Place],
    pipeline: Callable[[], Any],
) -> Plan:
    """One term for each layer that an adapter changes; `pipeline` tells steps and guidance when they are needed.

    Raises:
        AdapterError: weights for different numbers of images, or factors that are not finite in a layer's type.
    """
    # By content and not by time of loading: sums in floating point depend on their order, results must not.
    ordered = sorted(adapters, key=lambda item: (item[0].tensor_sha256, str(item[1])))
    weights = [weight for _, weight in ordered]
    unet_dial, text_dial = _dials(weights, pipeline)
    terms: dict[nn.Module, list[Term]] = {}
    for number, (adapter, weight) in enumerate(ordered):
        for layer, pair in adapter.layers.items():
            strength = weight.of_layer(*places[layer])
            if strength != 0:
                terms.setdefault(layer, []).append(Term(pair, strength, number))
    dials = {layer: unet_dial if places[layer][0] == "unet" else text_dial for layer in terms}
    return Plan({layer: LiveDelta.of(layer, found, dials[layer]) for layer, found in terms.items()}, unet_dial)


def _dials(weights: Sequence[AdapterWeight], pipeline: Callable[[], Any]) -> tuple[StepDial | None, Dial | None]:
    """The U-Net's and the text encoders'. What is read before the first step can only depend on the image."""
    if not any(weight.varies for weight in weights):
        return None, None
    counts = sorted({len(weight.images) for weight in weights if weight.images})
    if len(counts) > 1:
        raise AdapterError(f"One adapter has weights for {counts[0]} images of a batch, another for {counts[1]}.")
    rows = [[w.images[image] if w.images else 1.0 for w in weights] for image in range(counts[0] if counts else 0)]
    return StepDial(weights, pipeline), Dial(rows) if rows else None
