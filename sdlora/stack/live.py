"""One forward hook a layer, whose low-rank term holds the factors of all adapters side by side.

So a stack of five costs what a single adapter of their summed rank costs. Where weights vary, what varies is multiplied
in between the two factors, on the axis of the rank: one small product more, however many adapters there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdlora.adapter_file import LoraPair, fold, is_finite
from sdlora.errors import AdapterError
from sdlora.stack.dial import Dial, Layout

__all__ = ["LiveDelta", "Term", "layer_weight"]


@dataclass(frozen=True, eq=False)
class Term:
    """What one adapter adds to one layer at all times."""

    pair: LoraPair
    strength: float
    """The part of its weight that never varies."""
    adapter: int
    """Its number in the dial."""


class LiveDelta:
    """A forward hook that adds one low-rank term to the output of a Linear or Conv2d."""

    def __init__(
        self, down: Tensor, up: Tensor, layout: Layout = (), dial: Dial | None = None, ratio: float | None = None
    ):
        self._down = down  # [sum of ranks, in(, k, k)], fp32
        self._up = up  # [out, sum of ranks(, 1, 1)], fp32, strengths and scales folded in
        self._placed = (down, up)
        self._layout, self._dial, self._ratio = layout, dial, ratio

    @staticmethod
    def of(layer: nn.Module, terms: Sequence[Term], dial: Dial | None, ratio: float | None = None) -> LiveDelta:
        """The adapters' factors side by side; `ratio` is what a layer chooses by under k-lora.

        Raises AdapterError if they are not finite in the layer's type.
        """
        factors = [fold(term.pair, weight=term.strength) for term in terms]
        delta = LiveDelta(
            _beside([down for down, _ in factors], dim=0),
            _beside([up for _, up in factors], dim=1),
            tuple((term.adapter, term.pair.rank) for term in terms),
            dial,
            ratio,
        )
        weight = layer_weight(layer)
        if weight.dtype in (torch.float16, torch.bfloat16, torch.float32) and weight.device.type != "meta":
            placed = delta._place(weight.device, weight.dtype)
            if not all(map(is_finite, placed)):
                raise AdapterError(f"With these weights an adapter is not finite in {weight.dtype}; lower them.")
        return delta

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        down, up = self._place(output.device, output.dtype)
        # Offloading may leave the input on another device, and layer-wise casting in another type.
        hidden = inputs[0].to(output.device, output.dtype)
        if isinstance(layer, nn.Conv2d):
            hidden = self._dialled(F.conv2d(hidden, down, None, layer.stride, layer.padding, layer.dilation), axis=1)
            return output + F.conv2d(hidden, up)
        return output + F.linear(self._dialled(F.linear(hidden, down), axis=-1), up)

    def _dialled(self, hidden: Tensor, axis: int) -> Tensor:
        return hidden if self._dial is None else hidden * self._dial.factors(self._layout, hidden, axis, self._ratio)

    def dense(self) -> Tensor:
        """The full matrix of the term, [out, in * k * k], in fp32."""
        return self._up.flatten(1) @ self._down.flatten(1)

    def _place(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        down = self._placed[0]
        if down.device != device or down.dtype != dtype:
            # From the fp32 factors each time: a pipeline that went through fp16 gets its precision back.
            self._placed = (self._down.to(device, dtype), self._up.to(device, dtype))
        return self._placed


def _beside(factors: Sequence[Tensor], *, dim: int) -> Tensor:
    return factors[0] if len(factors) == 1 else torch.cat(list(factors), dim=dim)


def layer_weight(layer: nn.Module) -> Tensor:
    """The weight of a Linear or Conv2d."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
