"""What a set of weighted adapters comes to: one low-rank term for each layer, and the dials of what varies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from sdlora.adapter_file import LoraPair, Part
from sdlora.adapter_weight import AdapterWeight
from sdlora.errors import AdapterError
from sdlora.stack.dial import Dial, StepDial
from sdlora.stack.live import LiveDelta, Term
from sdlora.stack.method import Method, choice_ratios, orthogonalised

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
    method: Method,
) -> Plan:
    """One term for each layer that an adapter changes; `pipeline` tells steps and guidance when they are needed.

    Raises:
        AdapterError: weights for different numbers of images, factors that are not finite in a layer's type, or
            adapters that the method cannot put together.
    """
    if method.name == "sum":
        # By content and not by time of loading: sums in floating point depend on their order, results must not.
        adapters = sorted(adapters, key=lambda item: (item[0].tensor_sha256, str(item[1])))
    unet_dial, text_dial = _dials([weight for _, weight in adapters], pipeline, method)
    terms: dict[nn.Module, list[Term]] = {}
    for number, (adapter, weight) in enumerate(adapters):
        for layer, pair in adapter.layers.items():
            strength = weight.of_layer(*places[layer])
            if strength != 0:
                terms.setdefault(layer, []).append(Term(pair, strength, number))
    if method.name == "orthogonal":
        terms = {layer: _orthogonalised(found) for layer, found in terms.items()}
    ratios = _ratios(terms, places, len(adapters)) if method.name == "k-lora" else {}
    dials = {layer: unet_dial if places[layer][0] == "unet" else text_dial for layer in terms}
    deltas = {layer: LiveDelta.of(layer, found, dials[layer], ratios.get(layer)) for layer, found in terms.items()}
    return Plan(deltas, unet_dial)


def _orthogonalised(terms: Sequence[Term]) -> list[Term]:
    pairs = orthogonalised([term.pair for term in terms])
    return [replace(term, pair=pair) for term, pair in zip(terms, pairs, strict=True)]


def _ratios(
    terms: Mapping[nn.Module, Sequence[Term]], places: Mapping[nn.Module, Place], adapters: int
) -> dict[nn.Module, float]:
    """What the layers of the U-Net that both adapters change choose by; the others have no choice."""
    if adapters > 2:
        raise AdapterError(f"k-lora puts exactly two adapters together, first content, then style; {adapters} are on.")
    both = {
        layer: ((found[0].pair, found[0].strength), (found[1].pair, found[1].strength))
        for layer, found in terms.items()
        if places[layer][0] == "unet" and len(found) == 2
    }
    return choice_ratios(both)


def _dials(
    weights: Sequence[AdapterWeight], pipeline: Callable[[], Any], method: Method
) -> tuple[StepDial | None, Dial | None]:
    """The U-Net's and the text encoders'. What is read before the first step can only depend on the image."""
    if not weights or (method.is_constant and not any(weight.varies for weight in weights)):
        return None, None
    counts = sorted({len(weight.images) for weight in weights if weight.images})
    if len(counts) > 1:
        raise AdapterError(f"One adapter has weights for {counts[0]} images of a batch, another for {counts[1]}.")
    rows = [[w.images[image] if w.images else 1.0 for w in weights] for image in range(counts[0] if counts else 0)]
    return StepDial(weights, pipeline, method), Dial(rows) if rows else None
