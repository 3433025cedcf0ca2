"""Random choices from counters: who asks for what, and the how-manieth time, decides the number.

No global generator is read or moved, and no state has to be kept: a run that stops and goes on draws the same numbers,
and so does one with other batches. Everything is drawn on the CPU, so that devices agree.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

__all__ = ["counter_generator", "counter_seed", "counter_uniform", "spread_timesteps"]

# The fractional part of the golden ratio: multiples of it, modulo 1, leave no gap for long in any window of them.
_GOLDEN = 0.6180339887498949


def counter_seed(seed: int, purpose: str, *counters: int | str) -> int:
    """A 63-bit number that depends on every argument (SHA-256)."""
    key = "\x1f".join([str(seed), purpose, *map(str, counters)])
    return int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "big") >> 1


def counter_generator(seed: int, purpose: str, *counters: int | str) -> torch.Generator:
    """A CPU generator of its own for this purpose and these counters."""
    return torch.Generator("cpu").manual_seed(counter_seed(seed, purpose, *counters))


def counter_uniform(seed: int, purpose: str, *counters: int | str) -> float:
    """One number in [0, 1)."""
    return (counter_seed(seed, purpose, *counters) >> 10) / 2.0**53


def spread_timesteps(
    exposures: Tensor,
    *,
    seed: int,
    num_train_timesteps: int,
    span: tuple[float, float] = (0.0, 1.0),
    bias: Literal["none", "noisy", "clean"] = "none",
) -> Tensor:
    """Timesteps for these exposure numbers, int64, uniform over [0, num_train_timesteps).

    `span` keeps to a part of the schedule; `bias` "noisy" makes a timestep as likely as it is high in the span (density
    2 u), "clean" the reverse.

    Neighbouring exposures get timesteps far apart (an additive golden-ratio sequence with a seeded start), so that
    every batch, of any size, holds easy and hard ones. Which image meets which is left to the shuffled order.
    """
    start = counter_uniform(seed, "timesteps")
    position = torch.remainder(start + exposures.double() * _GOLDEN, 1.0)
    if bias != "none":
        position = position.sqrt() if bias == "noisy" else 1 - position.sqrt()
    position = span[0] + (span[1] - span[0]) * position
    return (position * num_train_timesteps).long().clamp_(max=num_train_timesteps - 1)
