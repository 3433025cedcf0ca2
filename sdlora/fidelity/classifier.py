"""Which of several known styles one picture is drawn in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image

from sdlora.fidelity.features import picture_vectors

__all__ = ["StyleClassifier"]


class StyleClassifier:
    """Nearest style centroid, in the features' space whitened by the spread inside the styles.

    That is linear discriminant analysis with a shrunk covariance (Friedman, 1989): what differs between subjects of one
    style counts little, what differs between styles counts much.
    """

    def __init__(self, references: Mapping[str, Sequence[Image.Image]], *, shrinkage: float = 0.02):
        """`references` holds at least two true drawings of each style.

        Raises:
            ValueError: fewer than two styles.
        """
        if len(references) < 2:
            raise ValueError("telling styles apart needs two or more")
        self.styles = tuple(references)
        vectors = [picture_vectors(images) for images in references.values()]
        centroids = torch.stack([rows.mean(0) for rows in vectors])
        inside = torch.cat([rows - centre for rows, centre in zip(vectors, centroids, strict=True)])
        # Through the small product of the rows with themselves: the vectors are longer than there are pictures.
        power, mixes = torch.linalg.eigh(inside @ inside.T)
        kept = power > power[-1] * 1e-6
        axes = inside.T @ mixes[:, kept] / power[kept].sqrt()
        variance = power[kept] / len(inside)
        self._axes = axes / (variance + shrinkage * variance.mean()).sqrt()
        self._centroids = centroids @ self._axes

    def nearest(self, image: Image.Image) -> str:
        """The style whose centroid is nearest."""
        return self.nearest_of([image])[0]

    def nearest_of(self, images: Sequence[Image.Image]) -> list[str]:
        """The nearest style of each picture."""
        distances = torch.cdist(picture_vectors(images) @ self._axes, self._centroids)
        return [self.styles[index] for index in distances.argmin(1).tolist()]
