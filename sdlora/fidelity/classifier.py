"""Which of several known styles one picture is drawn in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from sdlora.fidelity.features import colour_weights
from sdlora.fidelity.histograms import colour_histogram
from sdlora.fidelity.pictures import even_regions, halve, ink, lab_pictures

__all__ = ["StyleClassifier", "nearest_style"]

COLOUR_STEP = 4.0
FRAME_CENTRES = torch.arange(0, 40, 2.0)
CHUNK = 16
WEIGHTS = (0.5, 0.2, 0.3)
"""Of the evened colours, of the colours as they are, and of the frame."""


class StyleClassifier:
    """Tells styles by their exact colours and by how a drawing sits in its frame.

    Of a single picture those two say most: a set has one palette, whatever it draws, and one margin. Kernel ridge
    regression on one-hot styles, which is discriminant analysis in the kernel's space (Mika et al., 1999), so that what
    differs between subjects of one style counts little.
    """

    def __init__(self, references: Mapping[str, Sequence[Image.Image]], *, ridge: float = 0.05):
        """`references` holds true drawings of each style, the more the better; about 12 ms each.

        Raises:
            ValueError: fewer than two styles, or one without drawings.
        """
        if len(references) < 2:
            raise ValueError("telling styles apart needs two or more")
        self.styles = tuple(references)
        blocks = [_describe(images) for images in references.values()]
        self._blocks = tuple(torch.cat(rows) for rows in zip(*blocks, strict=True))
        centred = [rows - rows.mean(0) for rows in self._blocks]
        self._spread = [float(rows.square().sum(1).mean()) or 1.0 for rows in centred]
        sizes = [len(images) for images in references.values()]
        target = torch.eye(len(sizes)).repeat_interleave(torch.tensor(sizes), dim=0) - 1 / len(sizes)
        kernel = self._kernel(self._blocks) + ridge * torch.eye(sum(sizes))
        self._coefficients = torch.linalg.solve(kernel, target)

    def nearest(self, image: Image.Image) -> str:
        """The style that the picture is nearest to."""
        return self.nearest_of([image])[0]

    def nearest_of(self, images: Sequence[Image.Image]) -> list[str]:
        """The nearest style of each picture."""
        scores = self._kernel(_describe(images)) @ self._coefficients
        return [self.styles[index] for index in scores.argmax(1).tolist()]

    def _kernel(self, blocks: Sequence[Tensor]) -> Tensor:
        """[N, references]: a Gaussian of the weighted distances in each block."""
        distance = torch.zeros(len(blocks[0]), len(self._blocks[0]))
        for rows, known, spread, weight in zip(blocks, self._blocks, self._spread, WEIGHTS, strict=True):
            distance += weight / spread * torch.cdist(rows, known).square()
        return torch.exp(-distance / 2)


def nearest_style(image: Image.Image, references: Mapping[str, Sequence[Image.Image]]) -> str:
    """The style of one picture; for many, keep a `StyleClassifier`."""
    return StyleClassifier(references).nearest(image)


def _describe(images: Sequence[Image.Image]) -> tuple[Tensor, Tensor, Tensor]:
    """Per picture the square roots of two colour histograms, and where the drawing begins on each side."""
    chunks = []
    for start in range(0, max(len(images), 1), CHUNK):
        lab = lab_pictures(images[start : start + CHUNK])
        plain = halve(lab)
        chunks.append((_colours(even_regions(plain)), _colours(plain), _frame(lab)))
    evened, plain_colours, frame = (torch.cat(rows) for rows in zip(*chunks, strict=True))
    return evened, plain_colours, frame


def _colours(lab: Tensor) -> Tensor:
    pairs = zip(lab.flatten(2).mT, colour_weights(lab).flatten(1), strict=True)
    return torch.stack([colour_histogram(colours, weights, step=COLOUR_STEP) for colours, weights in pairs]).sqrt()


def _frame(lab: Tensor) -> Tensor:
    """[N, 7 * centres]: the four margins, the least of them, how far off the middle the drawing is; in soft bins."""
    inked = ink(lab) > 0.8
    sides = [inked.sum(2) >= 2, inked.sum(2).flip(1) >= 2, inked.sum(1) >= 2, inked.sum(1).flip(1) >= 2]
    margins = torch.stack([torch.where(s.any(1), s.float().argmax(1), 64).float() for s in sides], dim=1)
    top, bottom, left, right = margins.unbind(1)
    lengths = torch.stack([top, bottom, left, right, margins.amin(1), (top - bottom).abs(), (left - right).abs()], 1)
    return torch.exp(-(lengths[:, :, None] - FRAME_CENTRES).square() / 4.5).flatten(1)
