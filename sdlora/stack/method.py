"""Ways to put adapters together: the sum of their changes, and others that need no training either.

- sum: every change, added up.
- orthogonal: from each adapter's change what lies in the output space of those before it is taken away, by
  Gram-Schmidt on the columns of up (as in Orthogonal Adaptation, arXiv 2312.02432, but after training).
- switch: one adapter in a step, in turn (LoRA Switch, arXiv 2402.16843, section 3.2); `switch:3` changes every 3 steps.
- composite: the U-Net runs once for each adapter, and the predictions are averaged (LoRA Composite, there).
- k-lora: in each layer the content or the style adapter, by the sum of the largest entries of their changes, the style
  gaining from step to step (arXiv 2502.18461, equations 1 to 10); two adapters, content first.

The text encoders, which are read before the first step, get the sum in the last three.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from sdlora.adapter_file import LoraPair
from sdlora.errors import AdapterError

__all__ = ["METHODS", "Method", "choice_ratios", "choice_threshold", "orthogonalised", "parse_method"]

METHODS = ("sum", "orthogonal", "switch", "composite", "k-lora")

_ALPHA, _BETA = 1.5, 0.5
"""Slope and start of the ramp that favours the style, as in the paper."""
_NEGLIGIBLE = 1e-10

Place = TypeVar("Place")


@dataclass(frozen=True)
class Method:
    """One of `METHODS`; `every` is the number of steps of one adapter's turn, for "switch" alone."""

    name: str = "sum"
    every: int = 1

    def __str__(self) -> str:
        return f"{self.name}:{self.every}" if self.every > 1 else self.name

    @property
    def is_constant(self) -> bool:
        """Whether it does the same in every step, so that it can be merged."""
        return self.name in ("sum", "orthogonal")

    def turn(self, adapter: int, adapters: int, step: int) -> float:
        """1 if it is this adapter's turn, else 0."""
        return float(self.name != "switch" or step // self.every % adapters == adapter)


def parse_method(text: str) -> Method:
    """`sum`, `orthogonal`, `switch`, `switch:3`, `composite` or `k-lora`.

    Raises:
        AdapterError: there is no such method.
    """
    name, colon, every = text.partition(":")
    if name not in METHODS or (colon and (name != "switch" or not every.isdecimal() or int(every) < 1)):
        raise AdapterError(f"No method is called {text!r}. Known: {', '.join(METHODS)}, switch:3 (every 3 steps).")
    return Method(name, int(every) if colon else 1)


def orthogonalised(pairs: Sequence[LoraPair]) -> list[LoraPair]:
    """One layer's pairs, each without what lies in the output space of those before it: up - Q (Q^T up)."""
    result = []
    basis: Tensor | None = None
    for pair in pairs:
        up = pair.up.flatten(1).double()
        size = up.norm()
        if basis is not None:
            up = up - basis @ (basis.T @ up)
        left, values, _ = torch.linalg.svd(up, full_matrices=False)
        new = left[:, values > _NEGLIGIBLE * size]
        basis = new if basis is None else torch.cat([basis, new], dim=1)
        result.append(replace(pair, up=up.to(pair.up.dtype).view_as(pair.up)))
    return result


def choice_ratios(layers: Mapping[Place, tuple[tuple[LoraPair, float], tuple[LoraPair, float]]]) -> dict[Place, float]:
    """By layer S_c / (gamma S_s), from the (pair, strength) of content and style.

    S is the sum of the K largest entries of |strength * dW|, K = rank_c * rank_s; gamma the ratio of the sums over all
    entries of all layers.
    """
    sums: dict[Place, list[float]] = {}
    totals = [0.0, 0.0]
    for place, both in layers.items():
        entries = [_entries(pair, strength) for pair, strength in both]
        count = min(both[0][0].rank * both[1][0].rank, len(entries[0]))
        sums[place] = [float(values.topk(count).values.sum()) for values in entries]
        totals = [total + float(values.sum()) for total, values in zip(totals, entries, strict=True)]
    gamma = totals[0] / totals[1] if totals[1] else 0.0
    return {
        place: content / (gamma * style) if gamma * style else float("inf") for place, (content, style) in sums.items()
    }


def choice_threshold(step: int, steps: int) -> float:
    """A layer takes the content while its ratio is above this, which grows with the share of the steps."""
    return _ALPHA * (step / (steps - 1) if steps > 1 else 0.0) + _BETA


def _entries(pair: LoraPair, strength: float) -> Tensor:
    return (pair.up.flatten(1).float() @ pair.down.flatten(1).float() * (strength * pair.scale)).abs().flatten()
