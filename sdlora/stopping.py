"""When a run has learnt what it will, and when it copies instead: decided from losses measured with fixed noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, pvariance, stdev
from typing import Literal

__all__ = ["best_save", "copying", "has_learnt"]

StopRule = Literal["never", "patience", "plateau", "rise"]

_PLATEAU = 0.15
_BEYOND_DOUBT = 3.0
"""Standard errors."""


def has_learnt(measured: Sequence[Sequence[float]], *, rule: StopRule, after: int) -> bool:
    """Whether to stop after these losses of each held-out picture, oldest first, the first ones before any step.

    "patience": the lowest mean is `after` measurements old. "plateau": the variance of the last `after` means is below
    0.15 of that of all (DVAR, arXiv 2302.04841), asked once there are more than `after`. "rise": the last mean is
    higher than the lowest by three standard errors of the pictures' differences.
    """
    means = [fmean(losses) for losses in measured]
    lowest = means.index(min(means))
    if rule == "rise":
        return _is_above(measured[-1], measured[lowest])
    if rule == "never" or len(means) <= after:
        return False
    if rule == "patience":
        return len(means) - 1 - lowest >= after
    return pvariance(means[-after:]) < _PLATEAU * pvariance(means)


def _is_above(now: Sequence[float], before: Sequence[float]) -> bool:
    differences = [a - b for a, b in zip(now, before, strict=True)]
    # The pictures and their noise are the same ones, so that what differs between pictures falls out.
    error = stdev(differences) / len(differences) ** 0.5
    return bool(fmean(differences) > max(_BEYOND_DOUBT * error, 0.0))


def best_save(held_out: Mapping[int, float], *, tolerance: float) -> int | None:
    """The latest step whose loss is at most `tolerance` (a share) above the lowest; None if there is none.

    A style goes on arriving while the loss on held-out pictures begins to rise (docs/PERFORMANCE.md, Stopping early).
    """
    lowest = min(held_out.values(), default=0.0)
    return max((step for step, loss in held_out.items() if loss <= (1 + tolerance) * lowest), default=None)


def copying(*, own_before: float, own_now: float, held_out_before: float, held_out_now: float) -> float:
    """How much further the loss fell on the run's own pictures than on held-out ones, as a share of where it began.

    About 0 while a style is learnt, which serves both; what grows beyond it was learnt of the single pictures.
    """
    return (own_before - own_now) / own_before - (held_out_before - held_out_now) / held_out_before
