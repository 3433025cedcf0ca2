"""Looking at every picture of a folder once: does it decode, is its shape usable, does it resemble another one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from sdlora.data.colour import ColourNote
from sdlora.data.decode import SUFFIXES, decode_with_notes, read_header
from sdlora.data.folder import FolderListing
from sdlora.data.names import counted, list_names, shown_name
from sdlora.data.similar import Fingerprint, fingerprint, group_lookalikes
from sdlora.errors import DatasetError, Problem

__all__ = ["Inspection", "inspect_images"]

_MIN_SIDE = 64
_MAX_ASPECT_RATIO = 4


@dataclass
class Inspection:
    """What the pictures themselves say; one without a size is among the problems."""

    sizes_hw: dict[Path, tuple[int, int]] = field(default_factory=dict)
    transparent: set[Path] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


@dataclass
class _Findings:
    prints: dict[str, Fingerprint] = field(default_factory=dict)
    notes: dict[ColourNote, list[str]] = field(default_factory=dict)


def inspect_images(
    listing: FolderListing, *, background: tuple[int, int, int], max_pixels: int, decode: bool
) -> Inspection:
    """Decode every picture of `listing`, or with `decode` False read its header only, and collect what is wrong."""
    inspection, findings = Inspection(), _Findings()
    for image in listing.images:
        path, shown = image.path, listing.shown(image.path)
        try:
            if decode:
                image_format, size_hw = _look(path, shown, findings, background=background, max_pixels=max_pixels)
                if shown in findings.notes.get(ColourNote.TRANSPARENT, ()):
                    inspection.transparent.add(path)
            else:
                image_format, size_hw = read_header(path, max_pixels=max_pixels)
        except DatasetError as error:
            inspection.problems += [replace(problem, where=shown) for problem in error.problems]
            continue
        inspection.sizes_hw[path] = size_hw
        inspection.problems += _shape_problems(shown, size_hw)
        if path.suffix.lower() not in SUFFIXES[image_format]:
            what = f"is a {image_format} file by its content and is read as that."
            inspection.warnings.append(Problem(shown, what, f"Rename it to end in {SUFFIXES[image_format][0]}."))
    root = shown_name(listing.root)
    inspection.warnings += _note_warnings(findings, root, background) + _lookalike_warnings(findings, root)
    return inspection


def _look(
    path: Path, shown: str, findings: _Findings, *, background: tuple[int, int, int], max_pixels: int
) -> tuple[str, tuple[int, int]]:
    decoded = decode_with_notes(path, background=background, max_pixels=max_pixels)
    findings.prints[shown] = fingerprint(decoded.image)
    for note in decoded.notes:
        findings.notes.setdefault(note, []).append(shown)
    return decoded.format, (decoded.image.height, decoded.image.width)


def _shape_problems(shown: str, size_hw: tuple[int, int]) -> list[Problem]:
    size = f"{size_hw[1]} x {size_hw[0]} pixels"
    if min(size_hw) < _MIN_SIDE:
        what = f"is only {size}; the shorter side must have {_MIN_SIDE}."
        return [Problem(shown, what, "Use a larger original or remove it.")]
    if max(size_hw) > _MAX_ASPECT_RATIO * min(size_hw):
        what = f"is {size}, longer than {_MAX_ASPECT_RATIO} : 1; most of it would be cut off."
        return [Problem(shown, what, "Crop the part that matters.")]
    return []


def _note_warnings(findings: _Findings, root: str, background: tuple[int, int, int]) -> list[Problem]:
    consequences = {
        ColourNote.TRANSPARENT: f"laid on the background colour {background}",
        ColourNote.NO_CMYK_PROFILE: "so that colours are approximate",
        ColourNote.BAD_PROFILE: "read as sRGB",
    }
    return [
        Problem(root, f"{counted(names, 'picture')} with {note}, {consequences[note]}: {list_names(names)}.")
        for note, names in findings.notes.items()
    ]


def _lookalike_warnings(findings: _Findings, root: str) -> list[Problem]:
    names = list(findings.prints)
    warnings = []
    for group in group_lookalikes(list(findings.prints.values())):
        what = f"{len(group)} pictures look (almost) the same: {list_names(names[i] for i in group)}."
        warnings.append(Problem(root, what, "Keep one, unless it is meant to count more."))
    return warnings
