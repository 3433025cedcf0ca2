"""How adapters of one stack meet, from their factors alone: the dense change of a layer is never formed.

The inner product of two changes up1 @ down1 and up2 @ down2 is the sum over (up1^T up2) * (down1 down2^T), rank x rank
numbers; a Gram matrix of them holds every norm and cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.adapter_file import AdapterWeights, LoraPair
from sdlora.adapter_weight import AdapterWeight, block_of
from sdlora.errors import AdapterError

__all__ = ["Meeting", "StackReport", "report_stack"]


@dataclass(frozen=True)
class Meeting:
    """Two adapters in one place (a layer, a block, or the whole model)."""

    place: str
    first: str
    second: str
    cosine: float
    """-1 they cancel each other, 0 they do not meet, 1 they do the same."""
    weight: float
    """Of all the stack's energy, the share that their meeting adds (or, negative, takes away)."""


@dataclass(frozen=True)
class StackReport:
    """What there is to know about a stack before drawing with it. Energy is a squared Frobenius norm."""

    names: tuple[str, ...]
    norms: Mapping[str, float]
    """||w dW|| of each adapter."""
    shares: Mapping[str, Mapping[str, float]]
    """Block -> adapter -> its share of the energy that the adapters bring there, 0..1."""
    meetings: tuple[Meeting, ...]
    """Every two adapters in the whole model."""
    layers: tuple[Meeting, ...]
    """Every two adapters in every layer that both change, the weightiest first."""
    balanced: Mapping[str, float]
    """Weights that make ||w dW|| equal and leave the sum of the energies as it is."""
    strengths: Mapping[str, float]
    """Block -> ||sum of w dW|| / ||W||; empty without a base."""


def report_stack(
    adapters: Mapping[str, tuple[AdapterWeights, AdapterWeight]],
    base_norm: Callable[[str, str], float | None] | None = None,
) -> StackReport:
    """Compare adapters at the weights given; of a weight that varies, what never varies of it.

    `base_norm(part, path)` is the Frobenius norm of the base's own layer, or None where it has no such layer.

    Raises:
        AdapterError: two adapters see one layer in different shapes.
    """
    names = tuple(adapters)
    grams = _grams(adapters)
    if not grams:
        raise AdapterError("With these weights no adapter changes anything: there is nothing to compare.")
    total = torch.stack(list(grams.values())).sum(0)
    energy = float(total.diagonal().sum())
    blocks: dict[str, Tensor] = {}
    for (part, path), gram in grams.items():
        block = _block(part, path)
        blocks[block] = blocks.get(block, 0) + gram
    layers = [
        meeting for (part, path), gram in grams.items() for meeting in _meetings(f"{part}.{path}", names, gram, energy)
    ]
    return StackReport(
        names=names,
        norms=dict(zip(names, total.diagonal().sqrt().tolist(), strict=True)),
        shares={block: _shares(names, gram) for block, gram in sorted(blocks.items())},
        meetings=tuple(_meetings("everywhere", names, total, energy)),
        layers=tuple(sorted(layers, key=lambda meeting: -abs(meeting.weight))),
        balanced=_balanced(adapters, total),
        strengths=_strengths(grams, base_norm) if base_norm is not None else {},
    )


def _grams(adapters: Mapping[str, tuple[AdapterWeights, AdapterWeight]]) -> dict[tuple[str, str], Tensor]:
    """By layer the inner products of the weighted changes, [adapters, adapters], fp64."""
    placed: dict[tuple[str, str], dict[int, tuple[LoraPair, float]]] = {}
    for index, (weights, weight) in enumerate(adapters.values()):
        for part, path, pair in weights.pairs():
            strength = weight.of_layer(part, path)
            if strength != 0:
                placed.setdefault((part, path), {})[index] = (pair, strength * pair.scale)
    grams = {}
    for place, found in placed.items():
        gram = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
        for i, (left, left_scale) in found.items():
            for j, (right, right_scale) in found.items():
                if i <= j:
                    gram[i, j] = gram[j, i] = left_scale * right_scale * _inner(left, right, place)
        grams[place] = gram
    return grams


def _inner(left: LoraPair, right: LoraPair, place: tuple[str, str]) -> float:
    """<up1 @ down1, up2 @ down2>, without alpha and rank."""
    downs, ups = ([getattr(pair, name).flatten(1).double() for pair in (left, right)] for name in ("down", "up"))
    if downs[0].shape[1] != downs[1].shape[1] or len(ups[0]) != len(ups[1]):
        raise AdapterError(f"{'.'.join(place)} has other shapes in one adapter than in another: made for other models.")
    return float(((ups[0].T @ ups[1]) * (downs[0] @ downs[1].T)).sum())


def _block(part: str, path: str) -> str:
    block = block_of(part, path)
    return part if part != "unet" else block if block != "BASE" else "no block"


def _shares(names: Sequence[str], gram: Tensor) -> dict[str, float]:
    energies = gram.diagonal()
    return dict(zip(names, (energies / energies.sum()).tolist(), strict=True))


def _meetings(place: str, names: Sequence[str], gram: Tensor, energy: float) -> list[Meeting]:
    found = []
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            norms = float((gram[i, i] * gram[j, j]).sqrt())
            if norms > 0:
                inner = float(gram[i, j])
                found.append(Meeting(place, first, names[j], inner / norms, 2 * inner / energy))
    return found


def _balanced(adapters: Mapping[str, tuple[AdapterWeights, AdapterWeight]], total: Tensor) -> dict[str, float]:
    energies = total.diagonal()
    acting = energies > 0
    norm = float((energies[acting].mean()).sqrt())
    return {
        name: weight.base * norm / float(energy.sqrt())
        for (name, (_, weight)), energy in zip(adapters.items(), energies, strict=True)
        if energy > 0
    }


def _strengths(
    grams: Mapping[tuple[str, str], Tensor], base_norm: Callable[[str, str], float | None]
) -> dict[str, float]:
    """The sum of a Gram matrix is the energy of the summed changes."""
    changes: dict[str, float] = {}
    bases: dict[str, float] = {}
    for (part, path), gram in grams.items():
        norm = base_norm(part, path)
        if norm is None:
            raise AdapterError(f"The base has no layer {part}.{path}: an adapter was made for another model.")
        block = _block(part, path)
        changes[block] = changes.get(block, 0.0) + max(0.0, float(gram.sum()))
        bases[block] = bases.get(block, 0.0) + norm**2
    return {block: (changes[block] / bases[block]) ** 0.5 for block in sorted(changes) if bases[block] > 0}
