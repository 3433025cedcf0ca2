"""When a run has learnt what it will, and when it copies instead: decided from losses measured with fixed noise."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import pvariance
from typing import Literal

__all__ = ["copying", "has_learnt"]

StopRule = Literal["never", "patience", "plateau"]

_PLATEAU = 0.15


def has_learnt(held_out: Sequence[float], *, rule: StopRule, after: int) -> bool:
    """Whether to stop after these losses on held-out pictures, oldest first, the first one before any step.

    "patience": the lowest one is `after` measurements old. "plateau": the variance of the last `after` of them is below
    0.15 of that of all (DVAR, arXiv 2302.04841), asked once there are more than `after`.
    """
    if rule == "never" or len(held_out) <= after:
        return False
    if rule == "patience":
        return len(held_out) - 1 - held_out.index(min(held_out)) >= after
    return pvariance(held_out[-after:]) < _PLATEAU * pvariance(held_out)


def copying(*, own_before: float, own_now: float, held_out_before: float, held_out_now: float) -> float:
    """How much further the loss fell on the run's own pictures than on held-out ones, as a share of where it began.

    About 0 while a style is learnt, which serves both; what grows beyond it was learnt of the single pictures.
    """
    return (own_before - own_now) / own_before - (held_out_before - held_out_now) / held_out_before
