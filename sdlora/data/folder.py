"""What lies in a dataset folder: pictures, captions, tables and repeat counts. Names and first bytes only.

The user's folder is only ever read.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from sdlora.data.decode import SUFFIXES, sniff_format
from sdlora.data.metadata import METADATA_NAMES
from sdlora.data.names import list_names, name_key, shown_name
from sdlora.errors import Problem

__all__ = ["CAPTION_SUFFIXES", "FolderListing", "FoundImage", "is_orphan_expected", "list_folder"]

CAPTION_SUFFIXES = (".txt", ".caption")

_IMAGE_SUFFIXES = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
# Pictures that a user expects to be trained on, but that are refused: better an error than silence.
_REFUSED_SUFFIXES = (".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".tga", ".ppm", ".pgm")

_LEFT_OUT = frozenset(
    ("heldout", "held-out", "held_out", "holdout", "hold-out", "val", "validation", "test", "eval", "reg")
)
_NO_CAPTION_STEMS = frozenset(
    ("license", "licence", "readme", "notice", "copying", "credits", "authors", "attribution", "changelog", "sources")
)
_SYSTEM_NAMES = frozenset(("__macosx", "@eadir", "thumbs.db", "desktop.ini"))
_SILENT_SUFFIXES = (".md", ".rst", ".html", ".npz", ".safetensors", ".toml", ".yaml", ".yml", ".json", ".pdf")

_REPEAT_FOLDER = re.compile(r"(\d+)_(.*)", re.DOTALL)
_MAX_REPEATS = 1000


@dataclass(frozen=True)
class FoundImage:
    """A file that is, or claims to be, a picture; `repeats` comes from a kohya folder `N_name`."""

    path: Path
    repeats: int


@dataclass
class FolderListing:
    """Everything found below `root`, in the order of names."""

    root: Path
    not_trained_on: Path | None = None
    images: list[FoundImage] = field(default_factory=list)
    caption_files: list[Path] = field(default_factory=list)
    metadata_files: list[Path] = field(default_factory=list)
    repeat_folders: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    outside_links: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def shown(self, path: Path) -> str:
        """`path` relative to the root, for people."""
        return shown_name(path, self.root)

    def problem(self, path: Path, what: str, remedy: str) -> None:
        self.problems.append(Problem(self.shown(path), what, remedy))

    def warn(self, path: Path, what: str, remedy: str = "") -> None:
        self.warnings.append(Problem(self.shown(path), what, remedy))


def list_folder(root: Path, *, leave_out: Path | None = None) -> FolderListing:
    """Walk `root` and its folders. Left out are hidden files, the folder `leave_out`, and folders that are named as not
    for training: heldout, val, validation, test, eval, reg and their spellings. Faults are collected, not raised."""
    listing = FolderListing(root, not_trained_on=leave_out.resolve() if leave_out is not None else None)
    name = next((n for n in (root.name, root.resolve().name) if _REPEAT_FOLDER.fullmatch(n)), "")
    repeats = _repeats(listing, root, name) or 1
    _visit(listing, root, repeats, visited=set())
    if listing.outside_links:
        what = f"links lead out of the folder and were followed: {list_names(listing.outside_links)}."
        listing.warnings.append(Problem(shown_name(root), what))
    if listing.ignored:
        what = f"neither pictures nor captions, ignored: {list_names(listing.ignored)}."
        listing.warnings.append(Problem(shown_name(root), what))
    return listing


def _visit(listing: FolderListing, folder: Path, repeats: int, visited: set[tuple[int, int]]) -> None:
    try:
        status = folder.stat()
        with os.scandir(folder) as entries:
            paths = sorted((Path(entry.path) for entry in entries), key=lambda path: (name_key(path.name), path.name))
    except OSError as error:
        listing.problem(folder, f"cannot be opened: {error.strerror}.", "Change its permissions or take it away.")
        return
    if (status.st_dev, status.st_ino) in visited:
        listing.warn(folder, "is the same folder as another one here; it is used once.")
        return
    visited.add((status.st_dev, status.st_ino))
    for path in paths:
        if not path.name.startswith(".") and path.name.casefold() not in _SYSTEM_NAMES:
            _visit_entry(listing, path, repeats, visited)


def _visit_entry(listing: FolderListing, path: Path, repeats: int, visited: set[tuple[int, int]]) -> None:
    try:
        mode = path.stat().st_mode
        if path.is_symlink() and not path.resolve().is_relative_to(listing.root.resolve()):
            listing.outside_links.append(listing.shown(path))
    except OSError as error:
        broken = "is a link that leads nowhere" if path.is_symlink() else f"cannot be read: {error.strerror}"
        if _is_image_name(path):
            listing.problem(path, f"{broken}.", "Repair or remove it.")
        else:
            listing.warn(path, f"{broken}; it is ignored.")
        return
    if stat.S_ISDIR(mode):
        _visit_folder(listing, path, repeats, visited)
    elif stat.S_ISREG(mode):
        _sort_file(listing, path, repeats)
    else:
        listing.warn(path, "is not a regular file (a pipe, socket or device); it is ignored.")


def _visit_folder(listing: FolderListing, path: Path, repeats: int, visited: set[tuple[int, int]]) -> None:
    if path.name.casefold() in _LEFT_OUT or path.resolve() == listing.not_trained_on:
        listing.left_out.append(f"{listing.shown(path)}/")
        return
    before = len(listing.images)
    _visit(listing, path, _repeats(listing, path, path.name) or repeats, visited)
    if _is_image_name(path) and len(listing.images) == before:
        listing.warn(path, "is named like a picture, but is an empty folder.", "Remove it.")


def _repeats(listing: FolderListing, path: Path, name: str) -> int | None:
    """N of a folder called `N_name`, None for any other folder."""
    match = _REPEAT_FOLDER.fullmatch(name)
    if match is None:
        return None
    repeats = int(match[1][:9])
    if repeats > _MAX_REPEATS:
        what = f"would mean {repeats} repeats by its name; it is taken as an ordinary folder."
        listing.warn(path, what, "Rename it if repeats were meant.")
        return None
    if repeats == 0:
        listing.problem(path, "means 0 repeats by its name.", "Give a number from 1, or rename it.")
        return None
    listing.repeat_folders[shown_name(name) if path == listing.root else listing.shown(path)] = repeats
    return repeats


def _sort_file(listing: FolderListing, path: Path, repeats: int) -> None:
    suffix = path.suffix.lower()
    if _is_image_name(path):
        listing.images.append(FoundImage(path, repeats))
    elif path.name.lower() in METADATA_NAMES:
        listing.metadata_files.append(path)
    elif path.name.lower() == "metadata.parquet":
        listing.problem(path, "is a kind of table that is not read.", "Export it as metadata.jsonl or metadata.csv.")
    elif suffix in CAPTION_SUFFIXES:
        listing.caption_files.append(path)
    elif sniff_format(path) is not None:
        listing.images.append(FoundImage(path, repeats))
    elif suffix not in _SILENT_SUFFIXES and path.stem.casefold() not in _NO_CAPTION_STEMS:
        listing.ignored.append(listing.shown(path))


def _is_image_name(path: Path) -> bool:
    return path.suffix.lower() in (*_IMAGE_SUFFIXES, *_REFUSED_SUFFIXES)


def is_orphan_expected(path: Path) -> bool:
    """Whether a text file without a picture is no wonder: README, LICENSE and the like."""
    return path.stem.casefold() in _NO_CAPTION_STEMS
