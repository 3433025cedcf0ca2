"""Fewer ranks where there is more noise: T-LoRA (arXiv 2507.05964, sec. 3.2), against copying from few pictures."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["RankMask", "active_ranks"]


def active_ranks(timesteps: Tensor, rank: int, min_rank: int, num_train_timesteps: int) -> Tensor:
    """How many ranks work at these timesteps, int64 [b]: r(t) = floor((r - r_min) (T - t) / T) + r_min."""
    min_rank = min(min_rank, rank)
    return (rank - min_rank) * (num_train_timesteps - timesteps) // num_train_timesteps + min_rank


class RankMask:
    """In training lets each example through the first r(t) ranks alone; in evaluation through all.

    Put `timesteps` [b] before a forward pass. They stay until the next one: gradient checkpointing computes again in
    the backward pass.
    """

    def __init__(self, downs: Iterable[nn.Module], *, min_rank: int, num_train_timesteps: int):
        self.timesteps: Tensor | None = None
        self._min_rank, self._num_train_timesteps = min_rank, num_train_timesteps
        for down in downs:
            down.register_forward_hook(self._mask)

    def _mask(self, down: nn.Module, inputs: tuple[Tensor, ...], hidden: Tensor) -> Tensor:
        """`hidden`: [b, ..., r] of a Linear, [b, r, h, w] of a convolution."""
        if not down.training:
            return hidden
        assert self.timesteps is not None
        axis = 1 if isinstance(down, nn.Conv2d) else hidden.ndim - 1
        rank = hidden.shape[axis]
        active = active_ranks(self.timesteps, rank, self._min_rank, self._num_train_timesteps)
        mask = torch.arange(rank, device=hidden.device) < active[:, None]
        return hidden * mask.view([-1 if n == 0 else rank if n == axis else 1 for n in range(hidden.ndim)])
