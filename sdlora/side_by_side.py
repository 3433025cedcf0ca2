"""One prompt and seed with different weights, in one batch: what a row of a comparison is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from PIL import Image

from sdlora.adapter_weight import AdapterWeight
from sdlora.generation import Generator
from sdlora.request import GenerationRequest

__all__ = ["draw_side_by_side"]


def draw_side_by_side(
    generator: Generator, prompt: str, seed: int, weights: Sequence[Mapping[str, float]], request: GenerationRequest
) -> list[Image.Image]:
    """A picture for each set of weights (adapter's name in the stack -> weight, unlisted ones off).

    At most `request.batch_size` are computed at once, each row of the batch with its own weights, which is exact: they
    are multiplied in between the two factors of every layer. The stack's weights are afterwards as before.

    Raises:
        GenerationError: the request is out of range.
        AdapterError: no adapter has one of the names.
    """
    size = min(request.batch_size, len(weights))
    pictures = []
    for start in range(0, len(weights), size):
        part = weights[start : start + size]
        names = dict.fromkeys(name for row in weights for name in row)
        images = {name: AdapterWeight(images=tuple(row.get(name, 0.0) for row in part)) for name in names}
        with generator.stack.applied(images):
            batch = generator.draw_many(
                [prompt] * len(part), [seed] * len(part), replace(request, batch_size=len(part))
            )
            pictures += [picture.image for picture in batch]
    return pictures
