"""How strongly each adapter acts in the forward pass that is under way, where that is not always the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sdlora.adapter_weight import AdapterWeight
from sdlora.errors import AdapterError
from sdlora.stack.method import Method, choice_threshold

__all__ = ["Dial", "Layout", "StepDial"]

Layout: TypeAlias = tuple[tuple[int, int], ...]
"""Of one layer: (number of the adapter, rank), in the order in which the factors stand side by side."""


class Dial:
    """One factor for each row of the batch and each adapter."""

    def __init__(self, rows: Sequence[Sequence[float]]):
        self._rows: Tensor
        self._spread: dict[tuple[object, ...], Tensor] = {}
        self.threshold = 0.0
        """Where a layer has a ratio: above it the first adapter acts there, else the second."""
        self.turn(rows)

    def turn(self, rows: Sequence[Sequence[float]]) -> None:
        """Set the factors, [batch, adapters]; a single row counts for every row of the batch."""
        self._rows = torch.tensor(rows, dtype=torch.float32)
        self._spread.clear()

    def factors(self, layout: Layout, hidden: Tensor, axis: int, ratio: float | None = None) -> Tensor:
        """The factors on the rank axis of `hidden`, shaped to be multiplied with it.

        Layers of one layout share the tensor, so that what varies is put in place once a forward pass and not once a
        layer.

        Raises:
            AdapterError: the batch has another number of rows.
        """
        chosen = None if ratio is None else int(ratio <= self.threshold)
        key = (layout, hidden.ndim, axis, hidden.dtype, hidden.device, chosen)
        if key not in self._spread:
            columns = [
                self._rows[:, adapter, None].expand(-1, rank) * float(chosen in (None, adapter))
                for adapter, rank in layout
            ]
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

    def __init__(self, weights: Sequence[AdapterWeight], pipeline: Callable[[], Any], method: Method):
        self._weights, self._pipeline, self._method = weights, pipeline, method
        super().__init__([[1.0] * len(weights)])

    @property
    def is_composite(self) -> bool:
        """Whether `after_unet` has to be a forward hook of the U-Net too."""
        return self._method.name == "composite"

    def before_unet(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A forward pre-hook: finds the step by the timestep, and the images and branches by the batch."""
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        step, steps = self._step(timestep)
        images = max(len(weight.images) for weight in self._weights)
        count, self.threshold = len(self._weights), choice_threshold(step, steps)
        rows = [
            [
                weight.of_step(step, steps)
                * weight.of_row(image, is_cond=is_cond)
                * self._method.turn(number, count, step)
                for number, weight in enumerate(self._weights)
            ]
            for image, is_cond in batch_rows(len(sample), images, is_guided=self._is_guided)
        ]
        if self.is_composite:
            rows = [[f if n == only else 0.0 for n, f in enumerate(row)] for only in range(count) for row in rows]
            args, kwargs = _repeated((args, kwargs), len(sample), count)
        self.turn(rows)
        return args, kwargs

    def after_unet(self, unet: nn.Module, inputs: Any, output: Any) -> Any:
        """A forward hook for composite: the mean of what each adapter predicted alone."""
        is_tuple = isinstance(output, tuple)
        sample = output[0] if is_tuple else output.sample
        mean = sample.unflatten(0, (len(self._weights), -1)).mean(0)
        return (mean, *output[1:]) if is_tuple else type(output)(sample=mean)

    @property
    def _is_guided(self) -> bool:
        # Before its first call a pipeline has no guidance to tell.
        return bool(getattr(self._pipeline(), "do_classifier_free_guidance", False))

    def _step(self, timestep: Tensor | float) -> tuple[int, int]:
        """(step, steps), counted on the scheduler's whole schedule, so that image-to-image begins inside it."""
        needs_none = self._method.is_constant or self.is_composite
        if needs_none and not any(weight.curve or weight.start or weight.stop is not None for weight in self._weights):
            return 0, 1
        # Schedulers that call the U-Net twice in a step list its timestep twice.
        times = self._pipeline().scheduler.timesteps.unique_consecutive()
        now = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        return int((times.double().cpu() - now).abs().argmin()), len(times)


def batch_rows(batch: int, images: int, *, is_guided: bool) -> list[tuple[int, bool]]:
    """(image, whether it is the conditional branch) of every row of a U-Net's batch.

    Pipelines put the unconditional branch first: [uncond of each image, cond of each image]. Without weights per image
    (`images` 0) all rows of a branch are alike.

    Raises:
        AdapterError: the batch is of another number of images.
    """
    found = batch // 2 if is_guided and batch % 2 == 0 else batch
    if images and found != images:
        raise AdapterError(f"Weights for {images} images of a batch are given, but the batch has {found}.")
    return [(row % found if images else 0, row >= batch - found) for row in range(batch)]


def _repeated(value: Any, batch: int, times: int) -> Any:
    """Every tensor of the batch `times` times, one after the other, in whatever holds it."""
    if isinstance(value, Tensor):
        return torch.cat([value] * times) if value.ndim and len(value) == batch else value
    if isinstance(value, dict):
        return {key: _repeated(item, batch, times) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_repeated(item, batch, times) for item in value)
    return value
