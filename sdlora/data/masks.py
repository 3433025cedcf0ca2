"""Which parts of a picture are learnt: a grey picture of the same size, white where it counts, black where not.

Masks lie in a folder of their own, under the names of their pictures, or are the pictures' own transparency. They go
through the same resizing and the same crop as their picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdlora.data.buckets import CropPlan
from sdlora.data.decode import MAX_PIXELS, SUFFIXES, decode_alpha, decode_image, read_header
from sdlora.data.folder import FolderListing
from sdlora.data.names import list_names, name_key, shown_name
from sdlora.errors import DatasetError, Problem

__all__ = ["OWN_TRANSPARENCY", "MaskPairing", "load_mask", "pair_masks", "pool_mask"]

OWN_TRANSPARENCY = "alpha"
"""In place of a folder: each picture's own transparency is its mask."""

_SUFFIXES = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
_Name = tuple[str, ...]


@dataclass
class MaskPairing:
    """Which mask belongs to which picture, and what is wrong with them."""

    masks: dict[Path, Path] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


def pair_masks(
    listing: FolderListing,
    folder: Path,
    sizes_hw: Mapping[Path, tuple[int, int]],
    *,
    max_pixels: int = MAX_PIXELS,
    decode: bool = True,
) -> MaskPairing:
    """Find and check the mask of every picture whose size is known: below `folder` as the picture lies below the root,
    with the same stem. `decode` False looks at sizes only."""
    pairing = MaskPairing()
    if not folder.is_dir() or folder.resolve() == listing.root.resolve():
        what = "is the dataset folder itself." if folder.is_dir() else "is not a folder."
        remedy = "Give a folder that holds only masks."
        pairing.problems.append(Problem("data.masks", f"{shown_name(folder)} {what}", remedy))
        return pairing
    found: dict[_Name, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith("."):
            found.setdefault(_name_below(path, folder), []).append(path)
    for image in listing.images:
        candidates = found.pop(_name_below(image.path, listing.root), [])
        if image.path not in sizes_hw:
            continue
        problem = _fault(image.path, candidates, sizes_hw[image.path], listing, folder, max_pixels, decode)
        if problem is None:
            pairing.masks[image.path] = candidates[0]
        else:
            pairing.problems.append(problem)
    orphans = [shown_name(path, folder) for paths in found.values() for path in paths]
    if orphans:
        what = f"masks without a picture of the same name, ignored: {list_names(orphans)}."
        pairing.warnings.append(Problem(shown_name(folder), what))
    return pairing


def load_mask(
    picture: Path, mask: Path, size_hw: tuple[int, int], plan: CropPlan, *, max_pixels: int = MAX_PIXELS
) -> NDArray[np.float32]:
    """The mask of `picture`, float32 [H, W] in [0, 1], where (H, W) is `plan.bucket_hw`; `mask` is the picture itself
    where its transparency is meant.

    Raises `DatasetError` if the file cannot be read any more or is not of the picture's `size_hw`.
    """
    image = decode_alpha(mask, max_pixels=max_pixels) if mask == picture else _decode_mask(mask, max_pixels)
    if (image.height, image.width) != size_hw:
        what = "changed its size since it was scanned."
        problem = Problem(shown_name(mask), what, "Leave the dataset alone while a run begins; start again.")
        raise DatasetError(shown_name(mask.parent), [problem])
    (height, width), (top, left), (rows, columns) = plan.resized_hw, plan.crop_top_left_yx, plan.bucket_hw
    # Not Lanczos, which oversteps at hard edges.
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
    return resized[top : top + rows, left : left + columns] / np.float32(255)


def pool_mask(mask: NDArray[np.float32], grid_hw: tuple[int, int]) -> NDArray[np.float32]:
    """Means over equal blocks: [H, W] to [h, w], of which H and W are multiples."""
    (height, width), (rows, columns) = mask.shape, grid_hw
    blocks = mask.reshape(rows, height // rows, columns, width // columns)
    pooled: NDArray[np.float32] = blocks.mean(axis=(1, 3), dtype=np.float32)
    return pooled


def _name_below(path: Path, root: Path) -> _Name:
    relative = path.relative_to(root)
    return tuple(name_key(part) for part in (*relative.parent.parts, relative.stem))


def _fault(
    picture: Path,
    candidates: list[Path],
    size_hw: tuple[int, int],
    listing: FolderListing,
    folder: Path,
    max_pixels: int,
    decode: bool,
) -> Problem | None:
    where = listing.shown(picture)
    if not candidates:
        wanted = shown_name((folder / picture.relative_to(listing.root)).with_suffix(".png"))
        return Problem(where, "has no mask.", f"Add {wanted}: white where the picture is learnt, black where not.")
    if len(candidates) > 1:
        names = list_names(shown_name(path, folder) for path in candidates)
        return Problem(where, f"has {len(candidates)} masks: {names}.", "Keep one of them.")
    mask = candidates[0]
    try:
        mask_hw = read_header(mask, max_pixels=max_pixels)[1]
        black = decode and _decode_mask(mask, max_pixels).getextrema() == (0, 0)
    except DatasetError as error:
        return replace(error.problems[0], where=shown_name(mask))
    if mask_hw != size_hw:
        what = f"is {mask_hw[1]} x {mask_hw[0]}, but {where} is {size_hw[1]} x {size_hw[0]}."
        return Problem(shown_name(mask), what, "Make both the same size.")
    if black:
        what = f"is black everywhere: nothing of {where} would be learnt."
        return Problem(shown_name(mask), what, "Paint white what counts, or take the picture away.")
    return None


def _decode_mask(path: Path, max_pixels: int) -> Image.Image:
    return decode_image(path, background=(0, 0, 0), max_pixels=max_pixels).convert("L")
