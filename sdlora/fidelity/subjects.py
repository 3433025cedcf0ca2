"""Is it still the same subject? Which of many true drawings a generated picture is nearest to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sdlora.fidelity.pictures import blur, halve, lab_pictures

__all__ = ["subject_ranks", "subject_topk"]


def subject_ranks(
    generated: Sequence[Image.Image], candidates: Sequence[Image.Image], *, edges: bool = False
) -> list[int]:
    """For each generated picture the rank, from 1, of its own candidate (the one at its index) among all.

    The distance is Euclidean on CIELAB, blurred, at 32 pixels; or with `edges` on normalised blurred
    maps of where the luminance has edges and in which direction, which asks for no colours and works across styles.

    Raises:
        ValueError: the numbers of pictures differ, or there are none.
    """
    if len(generated) != len(candidates):
        raise ValueError(f"{len(generated)} pictures and {len(candidates)} candidates: each needs its own")
    describe = _edge_maps if edges else _thumbnails
    distances = torch.cdist(describe(lab_pictures(generated)), describe(lab_pictures(candidates)))
    own = distances.diagonal()[:, None]
    ranks: list[int] = ((distances < own).sum(1) + 1).tolist()
    return ranks


def subject_topk(
    generated: Sequence[Image.Image], candidates: Sequence[Image.Image], *, k: int, edges: bool = False
) -> float:
    """Share, in [0, 1], of the generated pictures whose own candidate is among the `k` nearest."""
    ranks = subject_ranks(generated, candidates, edges=edges)
    return sum(rank <= k for rank in ranks) / len(ranks)


def _thumbnails(lab: Tensor) -> Tensor:
    return blur(F.avg_pool2d(lab, 4), 1.0).flatten(1)


def _edge_maps(lab: Tensor) -> Tensor:
    """[N, 4 * 31 * 31]: strength of the edges in four directions; which side is dark does not matter."""
    grey = blur(halve(lab[:, :1]), 1.0)
    across, down = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2], grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
    strength = torch.hypot(across, down)
    # A faint edge and a black one are both an edge.
    strength = strength / (strength + 10)
    direction = 2 * torch.atan2(down, across)
    turns = [strength * (1 + torch.cos(direction - turn * math.pi / 2)) / 2 for turn in range(4)]
    # Wide enough that the two sides of a stroke and the one edge of a fill fall together.
    maps = halve(blur(torch.cat(turns, dim=1), 2.0)).flatten(1)
    centred = maps - maps.mean(1, keepdim=True)
    norms: Tensor = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    return centred / norms.clamp(min=1e-8)
