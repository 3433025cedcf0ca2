"""A folder of pictures and captions, checked as a whole before any model is loaded.

Everything that is wrong comes in one error. The folder is only ever read.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdlora.config import DataConfig
from sdlora.data.buckets import make_buckets, plan_crop
from sdlora.data.captions import compose_caption
from sdlora.data.decode import MAX_PIXELS, SUFFIXES
from sdlora.data.folder import FolderListing, list_folder
from sdlora.data.inspection import Inspection, inspect_images
from sdlora.data.masks import OWN_TRANSPARENCY, MaskPairing, pair_masks
from sdlora.data.names import counted, list_names, shown_name
from sdlora.data.pairing import Pairing, pair_captions
from sdlora.data.similar import group_same_captions
from sdlora.errors import DatasetError, Problem

__all__ = ["ImageCaption", "ImageDataset", "compose_caption", "enlarged_images", "scan_configured", "scan_dataset"]

_LAYOUTS = "images with .txt captions beside them, metadata.jsonl or metadata.csv, or kohya N_name folders"


@dataclass(frozen=True)
class ImageCaption:
    """One picture of the dataset.

    `caption` is None if there is none, which only a trigger allows, and "" if it is empty. `size_hw` is in pixels after
    EXIF rotation. `repeats` is how often the picture is shown in an epoch, `weight` how much an exposure counts. `mask`
    is the file that says which parts are learnt: the picture's own where its transparency does, None where all are.
    """

    path: Path
    caption: str | None
    size_hw: tuple[int, int]
    repeats: int = 1
    weight: float = 1.0
    mask: Path | None = None


@dataclass(frozen=True)
class ImageDataset:
    """The pictures of a folder, in the order of their names, what layout was found, and what a user should know."""

    root: Path
    layout: str
    examples: tuple[ImageCaption, ...]
    warnings: tuple[Problem, ...]


def scan_dataset(
    root: Path,
    *,
    trigger: str | None = None,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    decode: bool = True,
    masks: str | None = None,
) -> ImageDataset:
    """Find, read and check every picture and caption below `root`.

    Captions: same-stem .txt or .caption files, metadata.jsonl, metadata.csv; folders may nest, and kohya's `N_name`
    repeats its pictures N times. Folders named heldout, test, val, reg and the like are left out, which `layout` says.
    `trigger` makes captions optional; it is not put into them (`compose_caption` does that). `background` (sRGB, 0-255)
    is what transparent parts are laid on. `decode` False judges pictures by their headers only and compares none.
    `masks` is the folder with the pictures' masks, or "alpha" for their transparency.
    Raises `DatasetError` with all problems of the folder.
    """
    _require_folder(root)
    mask_folder = Path(masks) if masks is not None and masks != OWN_TRANSPARENCY else None
    listing = list_folder(root, leave_out=mask_folder)
    pairing = pair_captions(listing)
    inspection = inspect_images(listing, background=background, max_pixels=max_pixels, decode=decode)
    masking = MaskPairing()
    if mask_folder is not None:
        masking = pair_masks(listing, mask_folder, inspection.sizes_hw, max_pixels=max_pixels, decode=decode)
    elif masks is not None:
        masking = _own_masks(listing, inspection, decode=decode)
    problems = listing.problems + pairing.problems + inspection.problems + masking.problems
    if not (trigger and trigger.strip()):
        problems += _missing_captions(listing, pairing)
    if not listing.images and not problems:
        problems.append(_no_images(listing))
    if problems:
        raise DatasetError(shown_name(root), sorted(problems, key=lambda p: (p.where != shown_name(root), p.where)))
    examples = tuple(
        ImageCaption(
            image.path,
            pairing.captions.get(image.path),
            inspection.sizes_hw[image.path],
            image.repeats,
            weight=pairing.weights.get(image.path, 1.0),
            mask=masking.masks.get(image.path),
        )
        for image in listing.images
    )
    warnings = (*listing.warnings, *pairing.warnings, *inspection.warnings, *masking.warnings)
    warnings += tuple(_caption_warnings(examples, root))
    return ImageDataset(root, _layout(listing, pairing), examples, warnings)


def scan_configured(settings: DataConfig) -> ImageDataset:
    """`scan_dataset` as the settings of a run want it."""
    return scan_dataset(
        settings.path, trigger=settings.trigger, background=settings.background_rgb, masks=settings.masks
    )


def enlarged_images(dataset: ImageDataset, *, resolution: int) -> tuple[Problem, ...]:
    """A warning naming the pictures that training at `resolution` enlarges to more than twice their area, or nothing.

    Raises `ValueError` if `resolution` is below 1.
    """
    buckets = make_buckets(resolution, step=min(64, resolution))
    small = []
    for example in dataset.examples:
        (height, width), resized = example.size_hw, plan_crop(example.size_hw, buckets).resized_hw
        if resized[0] * resized[1] > 2 * height * width:
            small.append(f"{shown_name(example.path, dataset.root)} ({width} x {height})")
    if not small:
        return ()
    what = f"{counted(small, 'picture')} enlarged to more than twice the area: {list_names(small)}."
    remedy = f"Larger originals, or a resolution below {resolution}, give a sharper result."
    return (Problem(shown_name(dataset.root), what, remedy),)


def _require_folder(root: Path) -> None:
    try:
        if stat.S_ISDIR(root.stat().st_mode):
            return
        what, remedy = "is not a folder.", f"Give the folder that holds {_LAYOUTS}."
    except FileNotFoundError:
        what, remedy = "does not exist.", "Check the spelling of the dataset folder."
    except OSError as error:
        what, remedy = f"cannot be opened: {error.strerror}.", "Check its name and its permissions."
    raise DatasetError(shown_name(root), [Problem(shown_name(root), what, remedy)])


def _own_masks(listing: FolderListing, inspection: Inspection, *, decode: bool) -> MaskPairing:
    if decode and inspection.sizes_hw and not inspection.transparent:
        what = f'masks are the pictures\' transparency ("{OWN_TRANSPARENCY}"), and none of them has any.'
        problem = Problem("data.masks", what, "Give the folder with the masks, or leave the setting out.")
        return MaskPairing(problems=[problem])
    return MaskPairing(masks={image.path: image.path for image in listing.images})


def _no_images(listing: FolderListing) -> Problem:
    aside = f" ({list_names(listing.left_out)} is never trained on)" if listing.left_out else ""
    remedy = f"Give a folder with {_LAYOUTS}; formats: {', '.join(SUFFIXES)}."
    return Problem(shown_name(listing.root), f"holds no pictures to train on{aside}.", remedy)


def _missing_captions(listing: FolderListing, pairing: Pairing) -> list[Problem]:
    missing = [i.path for i in listing.images if i.path not in pairing.captions and i.path not in pairing.unreadable]
    if len(missing) == len(listing.images) > 1 and not pairing.sources:
        what = f"none of its {len(missing)} pictures has a caption: {list_names(map(listing.shown, missing))}."
        remedy = 'Give a trigger phrase (--trigger "my style"), or put a .txt file of the same name beside each.'
        return [Problem(shown_name(listing.root), what, remedy)]
    table = next((f" or a row in {source}" for source in sorted(pairing.sources) if source.startswith("metadata")), "")
    return [
        Problem(
            listing.shown(path),
            "has no caption.",
            f"Add {shown_name(path.with_suffix('.txt').name)}{table}, or give a trigger phrase (--trigger).",
        )
        for path in missing
    ]


def _caption_warnings(examples: Sequence[ImageCaption], root: Path) -> list[Problem]:
    captions = {shown_name(example.path, root): example.caption for example in examples}
    warnings = []
    missing = [name for name, caption in captions.items() if caption is None]
    if 0 < len(missing) < len(captions):
        what = (
            f"{counted(missing, 'picture')} without a caption, trained with the trigger alone: {list_names(missing)}."
        )
        warnings.append(Problem(shown_name(root), what))
    empty = [name for name, caption in captions.items() if caption == ""]
    if empty:
        what = f"{counted(empty, 'picture')} with an empty caption: {list_names(empty)}."
        warnings.append(Problem(shown_name(root), what, "Write what they show, or leave it so on purpose."))
    for names in group_same_captions(captions):
        what = f"{len(names)} pictures have the same caption {_quoted(captions[names[0]])}: {list_names(names)}."
        warnings.append(Problem(shown_name(root), what, "Say in what they differ, if they do."))
    return warnings


def _quoted(caption: str | None) -> str:
    text = shown_name(caption or "")
    return f'"{text}"' if len(text) <= 60 else f'"{text[:57]}..."'


def _layout(listing: FolderListing, pairing: Pairing) -> str:
    """E.g. "40 images with .txt captions; left out: heldout/"."""
    sources = " and ".join(sorted(pairing.sources))
    text = f"{counted(listing.images, 'image')} {f'with {sources} captions' if sources else 'without captions'}"
    if listing.repeat_folders:
        folders = [f"{name} x {repeats}" for name, repeats in listing.repeat_folders.items()]
        text += f", in kohya repeat folders ({list_names(folders)})"
    elif any(image.path.parent != listing.root for image in listing.images):
        text += ", in nested folders"
    if listing.left_out:
        text += f"; left out: {list_names(listing.left_out)}"
    return text
