"""Pictures set aside to measure on. Which ones, their contents decide: neither names, nor order, nor the seed."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from sdlora.data.content import content_hash
from sdlora.data.dataset import ImageDataset
from sdlora.data.names import shown_name
from sdlora.errors import DatasetError, Problem

__all__ = ["split_held_out"]


def split_held_out(
    dataset: ImageDataset, *, share: float = 0.0, count: int = 0
) -> tuple[ImageDataset, ImageDataset | None]:
    """What is trained on, and what is held out: a share of the pictures (at least one) or a number of them, or None
    if both are 0. Copies of one picture stay together.

    Every picture has a fixed rank in [0, 1). A share takes those below it, so that pictures that come or go change
    nothing for the others; a count takes the lowest, so that one that comes replaces at most one.

    Raises:
        DatasetError: nothing would be left to train on, or a picture cannot be read any more.
    """
    if not share and not count:
        return dataset, None
    ranks = [_rank(example.path) for example in dataset.examples]
    lowest = sorted(set(ranks))
    held = {rank for rank in ranks if rank < share or rank == lowest[0]} if share else set(lowest[:count])
    if len(held) == len(lowest):
        what = f"holding out {len(ranks)} of its {len(ranks)} pictures leaves none to train on."
        problem = Problem(shown_name(dataset.root), what, "Lower validation.share or validation.count, or add some.")
        raise DatasetError(shown_name(dataset.root), [problem])
    examples = list(zip(dataset.examples, ranks, strict=True))
    return (
        replace(dataset, examples=tuple(example for example, rank in examples if rank not in held)),
        replace(dataset, examples=tuple(example for example, rank in examples if rank in held)),
    )


def _rank(path: Path) -> float:
    digest = hashlib.sha256(f"held-out {content_hash(path)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64
