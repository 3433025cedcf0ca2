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

    A layer keeps at most `rank` singular values, and no more than hold `energy` of the sum of squares. The same numbers
    in a coarser format are no change.

    Raises:
        AdapterError: the models have other layers or shapes.
    """
    if tuned.keys() != base.keys():
        odd = sorted(tuned.keys() ^ base.keys())
        raise AdapterError(f"The two models do not have the same layers: {odd[0]} and {len(odd) - 1} more differ.")
    pairs = {}
    for path, weight in tuned.items():
        origin = base[path]
        if weight.shape != origin.shape:
            raise AdapterError(f"{path} is {list(weight.shape)} in one model and {list(origin.shape)} in the other.")
        if _is_rounding(weight, origin):
            continue
        change = weight.float() - origin.float()
        up, values, down = torch.linalg.svd(change.flatten(1), full_matrices=False)
        kept = min(rank, len(values), len(values) if energy is None else energy_rank(values, energy))
        root = values[:kept].sqrt()
        pairs[path] = LoraPair(
            down=(root[:, None] * down[:kept]).reshape(kept, *weight.shape[1:]),
            up=(up[:, :kept] * root).reshape(len(up), kept, *([1] * (weight.ndim - 2))),
            alpha=float(kept),
        )
        tell(path, float((values[kept:].square().sum() / values.square().sum()).sqrt()))
    return pairs


def _is_rounding(left: Tensor, right: Tensor) -> bool:
    """Whether one holds the other's numbers in a coarser format, or in the same."""
    if torch.equal(left.float(), right.float()):
        return True
    for dtype in (torch.float16, torch.bfloat16):
        rounded = left.to(dtype)
        if torch.equal(rounded, right.to(dtype)) and any(
            torch.equal(rounded.float(), t.float()) for t in (left, right)
        ):
            return True
    return False
