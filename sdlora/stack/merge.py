"""Adapters written into the layers, and the base's own tensors kept meanwhile."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sdlora.adapter_file import is_finite
from sdlora.errors import AdapterError
from sdlora.stack.live import LiveDelta, layer_weight

__all__ = ["MergedLayers"]


class MergedLayers:
    """Which layers hold base + delta, and what they held before.

    Deltas are always added to the kept originals, in fp32, never to what was merged: so any number of changes is exact,
    and what was merged before leaves no trace.
    """

    def __init__(self) -> None:
        self._originals: dict[nn.Module, Tensor] = {}
        self._deltas: Mapping[nn.Module, LiveDelta] = {}

    @torch.no_grad()
    def write(self, deltas: Mapping[nn.Module, LiveDelta]) -> None:
        """Make the layers hold base + these deltas, and every other layer the base.

        Takes memory for another copy of the changed layers. If it fails, everything is as it was.

        Raises:
            AdapterError: the base is quantised, or a merged layer is not finite in its type.
        """
        merged = {layer: _merged(self._original(layer), delta) for layer, delta in deltas.items()}
        added = {layer: layer_weight(layer).detach().clone() for layer in deltas if layer not in self._originals}
        originals = {**self._originals, **added}
        try:
            for layer, original in originals.items():
                layer_weight(layer).copy_(merged.get(layer, original))
        except BaseException:
            # Leaves memory for making the earlier ones again.
            merged.clear()
            self._roll_back(originals)
            raise
        self._originals = {layer: originals[layer] for layer in deltas}
        self._deltas = dict(deltas)

    @torch.no_grad()
    def restore(self) -> None:
        """Give every layer the bits it had."""
        for layer, original in self._originals.items():
            layer_weight(layer).copy_(original)
        self._originals, self._deltas = {}, {}

    def _roll_back(self, originals: Mapping[nn.Module, Tensor]) -> None:
        """The base first, which only takes copying; then, layer by layer, what was merged before."""
        for layer, original in originals.items():
            layer_weight(layer).copy_(original)
        for layer, delta in self._deltas.items():
            layer_weight(layer).copy_(_merged(originals[layer], delta))

    def _original(self, layer: nn.Module) -> Tensor:
        return self._originals.get(layer, layer_weight(layer))


def _merged(weight: Tensor, delta: LiveDelta) -> Tensor:
    """base + delta in the layer's type."""
    if not weight.is_floating_point():
        raise AdapterError("A quantised base cannot be merged into; use the stack without merged().")
    merged = (weight.float() + delta.dense().to(weight.device).view_as(weight)).to(weight.dtype)
    if not is_finite(merged):
        raise AdapterError(f"With these weights a merged layer is not finite in {weight.dtype}; lower them.")
    return merged
