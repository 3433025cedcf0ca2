"""An adapter from two models: what a fine-tuning changed, as the best low-rank approximation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sdlora.adapter_file import LoraPair
from sdlora.adapter_tools.arithmetic import energy_rank
from sdlora.errors import AdapterError

__all__ = ["extract_pairs"]


def extract_pairs(
    tuned: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    *,
    rank: int,
    energy: float | None = None,
    tell: Callable[[str, float], None] = lambda path, error: None,
) -> dict[str, LoraPair]:
    """Pairs by module path for the weights [out, in(, k, k)] that differ between two models; `tell` hears of each the
    share of the change that was lost (Frobenius, 0..1).

    A layer keeps at most `rank` singular values, and no more than hold `energy` of the sum of squares.

    Raises:
        AdapterError: the models have other layers or shapes, or do not differ at all.
    """
    if tuned.keys() != base.keys():
        odd = sorted(tuned.keys() ^ base.keys())
        raise AdapterError(f"The two models do not have the same layers: {odd[0]} and {len(odd) - 1} more differ.")
    pairs = {}
    for path, weight in tuned.items():
        if weight.shape != base[path].shape:
            raise AdapterError(
                f"{path} is {list(weight.shape)} in one model and {list(base[path].shape)} in the other."
            )
        change = weight.float() - base[path].float()
        if not change.any():
            continue
        up, values, down = torch.linalg.svd(change.flatten(1), full_matrices=False)
        kept = min(rank, len(values), len(values) if energy is None else energy_rank(values, energy))
        root = values[:kept].sqrt()
        pairs[path] = LoraPair(
            down=(root[:, None] * down[:kept]).reshape(kept, *weight.shape[1:]),
            up=(up[:, :kept] * root).reshape(len(up), kept, *([1] * (weight.ndim - 2))),
            alpha=float(kept),
        )
        tell(path, float((values[kept:].square().sum() / values.square().sum()).sqrt()))
    if not pairs:
        raise AdapterError("The two models are equal in these layers: there is nothing to extract.")
    return pairs
