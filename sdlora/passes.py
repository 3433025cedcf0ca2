"""A step's numbers while they are on the device, fetched together: reading one makes the host wait for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.errors import NonFiniteError

__all__ = ["ForwardPass", "StepNumbers", "StepRead", "read_steps"]


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """One batch of a step."""

    losses: Tensor
    """fp32 [b], without gradient."""
    share: Tensor
    """Their part of the step's mean loss, fp32 []."""
    names: tuple[str, ...]
    timesteps: Tensor


@dataclass(frozen=True, eq=False)
class StepNumbers:
    """All of a step; `step` counts from 1."""

    step: int
    passes: tuple[ForwardPass, ...]
    grad_norm: Tensor
    """fp32 [], before clipping."""

    @property
    def is_bad(self) -> Tensor:
        """fp32 []: 1 if a loss or the gradient is NaN or infinite, else 0."""
        numbers = torch.cat([*(one.losses for one in self.passes), self.grad_norm.reshape(1)])
        return (~numbers.isfinite()).any().float()


@dataclass(frozen=True)
class StepRead:
    """The same on the host."""

    step: int
    loss: float
    grad_norm: float
    bad: str
    """The images with a loss that is NaN or infinite, and their timesteps; empty if there are none."""

    def require_finite(self) -> None:
        """
        Raises:
            NonFiniteError: a loss is not finite; names the images.
        """
        if self.bad:
            raise NonFiniteError(
                f"Step {self.step}: the loss is NaN or Inf for {self.bad}. The weights of the step before are kept. "
                "Lower train.learning_rate, or use --precision bf16 or fp32."
            )


def read_steps(steps: Sequence[StepNumbers]) -> list[StepRead]:
    """Fetches the numbers of some steps in one transfer."""
    if not steps:
        return []
    tensors = [part for step in steps for part in _parts(step)]
    values = torch.cat(tensors).tolist()
    read = []
    for step in steps:
        size = sum(len(part) for part in _parts(step))
        own, values = values[:size], values[size:]
        shares, grad_norm = own[-1 - len(step.passes) : -1], own[-1]
        read.append(StepRead(step.step, sum(shares), grad_norm, _bad_images(step, own)))
    return read


def _parts(step: StepNumbers) -> list[Tensor]:
    """All losses, then each pass's share, then the norm."""
    shares = torch.stack([one.share for one in step.passes])
    return [*(one.losses for one in step.passes), shares, step.grad_norm.reshape(1)]


def _bad_images(step: StepNumbers, losses: Sequence[float]) -> str:
    names = [name for one in step.passes for name in one.names]
    bad = [n for n, loss in enumerate(losses[: len(names)]) if not math.isfinite(loss)]
    if not bad:
        return ""
    timesteps = torch.cat([one.timesteps for one in step.passes])[bad].tolist()
    return f"{', '.join(names[n] for n in bad)} (timestep {', '.join(map(str, timesteps))})"
