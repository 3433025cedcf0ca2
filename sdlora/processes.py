"""The processes that train one adapter together: what they share, and who writes.

Started by `torchrun` or `accelerate launch`, one process a device. All hold the same weights; each takes its part of a
step's pictures; only the adapter's gradients travel, in one bucket with a few numbers of the step at its end.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed, nn

from sdlora.errors import TrainingError

__all__ = ["ALONE", "Processes", "current_processes", "training_device"]

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process (`rank`) among `count`; on its own it shares nothing and writes everything."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one writes files and talks."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.count == 1

    def part(self, items: Sequence[T]) -> list[T]:
        """This process's share, as even as can be, neighbours together.

        Raises:
            TrainingError: there are fewer items than processes.
        """
        if len(items) < self.count:
            raise TrainingError(
                f"A step has {len(items)} pictures, too few for {self.count} processes. Start fewer of them."
            )
        start, end = (len(items) * rank // self.count for rank in (self.rank, self.rank + 1))
        return list(items[start:end])

    def sum_gradients(self, parameters: Sequence[nn.Parameter], numbers: Tensor) -> Tensor:
        """Adds up the parameters' gradients over all processes, in place, and `numbers` (fp32 [n]); returns these."""
        if self.is_alone:
            return numbers
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        bucket = torch.cat([*(gradient.flatten() for gradient in gradients), numbers])
        self._sum(bucket)
        *summed, numbers = torch.split(bucket, [*(gradient.numel() for gradient in gradients), len(numbers)])
        for parameter, gradient in zip(parameters, summed, strict=True):
            parameter.grad = gradient.view_as(parameter)
        return numbers

    def from_main(self, value: T) -> T:
        """The main process's value, on all."""
        if self.is_alone:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Until all are here."""
        if not self.is_alone:
            distributed.barrier()

    def _sum(self, bucket: Tensor) -> None:
        distributed.all_reduce(bucket)


ALONE = Processes()


def current_processes() -> Processes:
    """Those that this process was started with."""
    state = _state()
    return Processes(state.process_index, state.num_processes)


def training_device() -> torch.device:
    """The device of this process."""
    device: torch.device = _state().device
    return device


def _state() -> PartialState:
    # Without a GPU, accelerate joins the processes only where it is told that the CPU is meant.
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return PartialState(cpu=several and not torch.cuda.is_available())
