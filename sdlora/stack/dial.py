"""How strongly each adapter acts in the forward pass that is under way, where that is not always the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sdlora.adapter_weight import AdapterWeight
from sdlora.errors import AdapterError

__all__ = ["Dial", "Layout", "StepDial"]

Layout: TypeAlias = tuple[tuple[int, int], ...]
"""Of one layer: (number of the adapter, rank), in the order in which the factors stand side by side."""


class Dial:
    """One factor for each row of the batch and each adapter."""

    def __init__(self, rows: Sequence[Sequence[float]]):
        self._rows: Tensor
        self._spread: dict[tuple[object, ...], Tensor] = {}
        self.turn(rows)

    def turn(self, rows: Sequence[Sequence[float]]) -> None:
        """Set the factors, [batch, adapters]; a single row counts for every row of the batch."""
        self._rows = torch.tensor(rows, dtype=torch.float32)
        self._spread.clear()

    def factors(self, layout: Layout, hidden: Tensor, axis: int) -> Tensor:
        """The factors on the rank axis of `hidden`, shaped to be multiplied with it.

        Layers of one layout share the tensor, so that what varies is put in place once a forward pass and not once a
        layer.

        Raises:
            AdapterError: the batch has another number of rows.
        """
        key = (layout, hidden.ndim, axis, hidden.dtype, hidden.device)
        if key not in self._spread:
            columns = [self._rows[:, adapter, None].expand(-1, rank) for adapter, rank in layout]
            spread = torch.cat(columns, dim=1).to(hidden.device, hidden.dtype)
            shape = [len(spread), *[1] * (hidden.ndim - 1)]
            shape[axis] = spread.shape[1]
            self._spread[key] = spread.reshape(shape)
        factors = self._spread[key]
        if len(factors) not in (1, len(hidden)):
            raise AdapterError(
                f"The weights are for {len(factors)} images of a batch, but {len(hidden)} are computed at once. Give "
                "one prompt for each image, and no more images than weights."
            )
        return factors


class StepDial(Dial):
    """The dial of a U-Net, turned before each of its forward passes."""

    def __init__(self, weights: Sequence[AdapterWeight], pipeline: Callable[[], Any]):
        self._weights, self._pipeline = weights, pipeline
        super().__init__([[1.0] * len(weights)])

    def before_unet(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook: finds the step by the timestep, and the images and branches by the batch."""
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        step, steps = self._step(timestep)
        images = max(len(weight.images) for weight in self._weights)
        self.turn(
            [
                [weight.of_step(step, steps) * weight.of_row(image, is_cond=is_cond) for weight in self._weights]
                for image, is_cond in batch_rows(len(sample), images, is_guided=self._is_guided)
            ]
        )

    @property
    def _is_guided(self) -> bool:
        # Before its first call a pipeline has no guidance to tell.
        return bool(getattr(self._pipeline(), "do_classifier_free_guidance", False))

    def _step(self, timestep: Tensor | float) -> tuple[int, int]:
        """(step, steps), counted on the scheduler's whole schedule, so that image-to-image begins inside it."""
        if not any(weight.curve or weight.start or weight.stop is not None for weight in self._weights):
            return 0, 1
        times = self._pipeline().scheduler.timesteps
        now = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        return int((times.double().cpu() - now).abs().argmin()), len(times)


def batch_rows(batch: int, images: int, *, is_guided: bool) -> list[tuple[int, bool]]:
    """(image, whether it is the conditional branch) of every row of a U-Net's batch.

    Pipelines put the unconditional branch first: [uncond of each image, cond of each image]. Without weights per image
    (`images` 0) all rows of a branch are alike.

    Raises:
        AdapterError: the batch is not one or two rows an image.
    """
    if not images:
        half = batch // 2 if is_guided and batch % 2 == 0 else 0
        return [(0, row >= half) for row in range(batch)]
    if batch not in (images, 2 * images):
        raise AdapterError(
            f"{images} weights per image are given, but the batch has {batch // (1 + is_guided)} images."
        )
    return [(row % images, row >= batch - images) for row in range(batch)]
