"""When a run has learnt what it will, and when it copies instead: decided from losses measured with fixed noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import pvariance
from typing import Literal

__all__ = ["best_save", "copying", "has_learnt"]

StopRule = Literal["never", "patience", "plateau", "rise"]

_PLATEAU = 0.15


def has_learnt(held_out: Sequence[float], *, rule: StopRule, after: int, tolerance: float) -> bool:
    """Whether to stop after these losses on held-out pictures, oldest first, the first one before any step.

    "rise": the last one is more than `tolerance` (a share) above the lowest, so that it cannot be the `best_save`.
    "patience": the lowest one is `after` measurements old. "plateau": the variance of the last `after` of them is below
    0.15 of that of all (DVAR, arXiv 2302.04841), asked once there are more than `after`.
    """
    if rule == "rise":
        return best_save(dict(enumerate(held_out)), tolerance=tolerance) != len(held_out) - 1
    if rule == "never" or len(held_out) <= after:
        return False
    if rule == "patience":
        return len(held_out) - 1 - held_out.index(min(held_out)) >= after
    return pvariance(held_out[-after:]) < _PLATEAU * pvariance(held_out)


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
