"""Is it still the same subject? Which of many true drawings a generated picture is nearest to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sdlora.fidelity.pictures import luminance, to_lab, to_pixels

__all__ = ["subject_ranks", "subject_topk"]


def subject_ranks(
    generated: Sequence[Image.Image], candidates: Sequence[Image.Image], *, edges: bool = False
) -> list[int]:
    """For each generated picture the rank, from 1, of its own candidate (the one at its index) among all.

    The distance is Euclidean on CIELAB at 32 pixels, or with `edges` one minus the correlation of the blurred edge
    strength of the luminance, which does not ask for the same colours and so works across styles.

    Raises:
        ValueError: the numbers of pictures differ, or there are none.
    """
    if len(generated) != len(candidates):
        raise ValueError(f"{len(generated)} pictures and {len(candidates)} candidates: each needs its own")
    describe = _edge_map if edges else _thumbnail
    distances = torch.cdist(describe(to_pixels(generated)), describe(to_pixels(candidates)))
    own = distances.diagonal()[:, None]
    ranks: list[int] = ((distances < own).sum(1) + 1).tolist()
    return ranks


def subject_topk(
    generated: Sequence[Image.Image], candidates: Sequence[Image.Image], *, k: int, edges: bool = False
) -> float:
    """Share, in [0, 1], of the generated pictures whose own candidate is among the `k` nearest."""
    ranks = subject_ranks(generated, candidates, edges=edges)
    return sum(rank <= k for rank in ranks) / len(ranks)


def _thumbnail(pixels: Tensor) -> Tensor:
    return F.avg_pool2d(to_lab(pixels), 4).flatten(1)


def _edge_map(pixels: Tensor) -> Tensor:
    grey = F.avg_pool2d(luminance(pixels), 2)
    horizontal = grey[..., 1:, 1:] - grey[..., 1:, :-1]
    vertical = grey[..., 1:, 1:] - grey[..., :-1, 1:]
    strength = (horizontal.square() + vertical.square()).sqrt()
    # Wide enough that a stroke's two sides and a shape's one edge fall together.
    blurred = F.avg_pool2d(F.avg_pool2d(strength, 7, stride=2, padding=3), 3, stride=1, padding=1).flatten(1)
    centred = blurred - blurred.mean(1, keepdim=True)
    norms: Tensor = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    return centred / norms.clamp(min=1e-8)
