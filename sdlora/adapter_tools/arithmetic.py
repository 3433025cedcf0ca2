"""Adding, shrinking and comparing adapters, from their factors alone: the dense change of a layer is never formed.

The singular values of up @ down are those of a small core, R_up @ R_down^T of the QR decompositions up = Q_up R_up and
down^T = Q_down R_down (Golub and Van Loan, Matrix Computations, 5.4): rank x rank numbers instead of out x in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.adapter_file import PARTS, AdapterWeights, LoraPair, Part, fold
from sdlora.errors import AdapterError

__all__ = ["Resized", "core_svd", "difference", "energy_rank", "merge_adapters", "resize_adapter"]

Parts = dict[Part, dict[str, LoraPair]]


@dataclass(frozen=True, eq=False)
class Resized:
    """An adapter of lower rank, and how much of each layer's change was lost."""

    parts: Parts
    errors: Mapping[str, float]
    """By "part.path": Frobenius norm of what was cut off, as a share of the layer's whole change (0..1)."""

    @property
    def error(self) -> float:
        """The largest of them."""
        return max(self.errors.values())


def merge_adapters(adapters: Sequence[tuple[AdapterWeights, float]]) -> Parts:
    """One adapter that at weight 1 does what these do together at their weights; exact.

    The factors stand side by side, so a layer's rank is the sum of the ranks; `resize_adapter` brings it down. Adapters
    of weight 0 are left out.

    Raises:
        AdapterError: all weights are 0, two adapters see one layer in different shapes, or one is a DoRA.
    """
    _refuse_dora(weights for weights, _ in adapters)
    stacked: dict[tuple[Part, str], list[tuple[Tensor, Tensor]]] = {}
    for weights, adapter_weight in adapters:
        if adapter_weight == 0:
            continue
        for part, path, pair in weights.pairs():
            stacked.setdefault((part, path), []).append(_flat(*fold(pair, weight=adapter_weight), pair))
    if not stacked:
        raise AdapterError("All weights are 0: there is nothing to merge.")
    merged: Parts = {part: {} for part in PARTS}
    for (part, path), factors in stacked.items():
        shapes = {(down.shape[1:], up.shape[0]) for down, up in factors}
        if len(shapes) > 1:
            raise AdapterError(f"{part}.{path} has other shapes in one adapter than in another: made for other models.")
        down = torch.cat([down for down, _ in factors])
        up = torch.cat([up for _, up in factors], dim=1)
        merged[part][path] = LoraPair(down=down, up=up, alpha=float(len(down)))
    return merged


def resize_adapter(weights: AdapterWeights, *, rank: int | None = None, energy: float | None = None) -> Resized:
    """The best adapter of lower rank (Eckart and Young, 1936), layer by layer.

    `rank` is the most that a layer keeps; `energy` in (0, 1] keeps as many singular values as hold that share of the
    sum of squares; with both, the smaller rank counts.

    Raises:
        ValueError: neither is given, or one is out of range.
        AdapterError: it is a DoRA.
    """
    _refuse_dora([weights])
    if rank is None and energy is None:
        raise ValueError("give a rank or a share of the energy")
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise ValueError("the rank must be 1 or more, the energy above 0 and at most 1")
    parts: Parts = {part: {} for part in PARTS}
    errors = {}
    for part, path, pair in weights.pairs():
        up, values, down = core_svd(pair)
        kept = min(energy_rank(values, energy) if energy is not None else len(values), rank or len(values))
        parts[part][path] = _from_svd(up, values, down, kept, pair)
        total = values.square().sum()
        errors[f"{part}.{path}"] = float((values[kept:].square().sum() / total).sqrt()) if total > 0 else 0.0
    return Resized(parts, errors)


def energy_rank(values: Tensor, energy: float) -> int:
    """How many of the descending singular values hold that share of the sum of their squares; at least 1."""
    held = values.square().cumsum(0)
    return min(len(values), int((held < energy * held[-1] * (1 - 1e-12)).sum()) + 1)


def core_svd(pair: LoraPair) -> tuple[Tensor, Tensor, Tensor]:
    """up [out, n], descending values [n] and down [n, in * k * k] of the pair's change, alpha / rank included; fp64.

    n is the rank, or less if a side of the layer is smaller. up @ diag(values) @ down is the change.
    """
    up_q, up_r = torch.linalg.qr(pair.up.flatten(1).double() * pair.scale)
    down_q, down_r = torch.linalg.qr(pair.down.flatten(1).double().T)
    left, values, right = torch.linalg.svd(up_r @ down_r.T, full_matrices=False)
    return up_q @ left, values, right @ down_q.T


def difference(a: AdapterWeights, b: AdapterWeights) -> dict[str, float]:
    """By "part.path", |change of a - change of b| / max(|a|, |b|), Frobenius: 0 is equal, 1 is only in one of them.

    Shapes or layers that only one of them has count as wholly different.

    Raises:
        AdapterError: one is a DoRA.
    """
    _refuse_dora([a, b])
    both: dict[str, list[LoraPair | None]] = {}
    for index, weights in enumerate((a, b)):
        for part, path, pair in weights.pairs():
            both.setdefault(f"{part}.{path}", [None, None])[index] = pair
    return {name: _pair_difference(left, right) for name, (left, right) in sorted(both.items())}


def _refuse_dora(adapters: Iterable[AdapterWeights]) -> None:
    found = next((weights.path for weights in adapters if weights.is_dora), None)
    if found is not None:
        raise AdapterError(
            f"{found} is a DoRA, whose change depends on its base. Put it into the base with `sdlora lora bake`, and "
            "take a plain LoRA out with `sdlora lora extract`."
        )


def _pair_difference(left: LoraPair | None, right: LoraPair | None) -> float:
    if left is None or right is None:
        return 1.0
    shapes = [(pair.up.shape[0], pair.down[0].numel()) for pair in (left, right)]
    if shapes[0] != shapes[1]:
        return 1.0
    # The pair of the difference: factors side by side, the second's sign turned.
    down = torch.cat([pair.down.flatten(1).double() for pair in (left, right)])
    up = torch.cat([left.up.flatten(1).double() * left.scale, -right.up.flatten(1).double() * right.scale], dim=1)
    largest = max(_norm(left), _norm(right))
    gap = float(core_svd(LoraPair(down=down, up=up, alpha=float(len(down))))[1].square().sum().sqrt())
    return gap / largest if largest > 0 else 0.0


def _norm(pair: LoraPair) -> float:
    return float(core_svd(pair)[1].square().sum().sqrt())


def _flat(down: Tensor, up: Tensor, pair: LoraPair) -> tuple[Tensor, Tensor]:
    """1x1 convolutions and Linears are the same thing in different files; here both are Linear."""
    is_linear = pair.down.ndim == 2 or pair.down.shape[2:] == (1, 1)
    return (down.flatten(1), up.flatten(1)) if is_linear else (down, up)


def _from_svd(up: Tensor, values: Tensor, down: Tensor, kept: int, pair: LoraPair) -> LoraPair:
    root = values[:kept].sqrt()
    shape = (kept, *pair.down.shape[1:])
    return LoraPair(
        down=(root[:, None] * down[:kept]).view(shape).float(),
        up=(up[:, :kept] * root).reshape(len(up), kept, *([1] * (pair.up.ndim - 2))).float(),
        alpha=float(kept),
    )
