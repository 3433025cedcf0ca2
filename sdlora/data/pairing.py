"""Which caption belongs to which picture: side files of the same stem, and metadata tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from sdlora.data.captions import read_caption
from sdlora.data.folder import FolderListing, is_orphan_expected
from sdlora.data.metadata import MetadataRow, read_metadata
from sdlora.data.names import list_names, name_key, shown_name
from sdlora.errors import DatasetError, Problem

__all__ = ["Pairing", "pair_captions"]


@dataclass
class Pairing:
    """What is known of every picture's caption, and of the weights of those that a table gives one.

    A picture that is in neither `captions` nor `unreadable` has none.
    """

    captions: dict[Path, str] = field(default_factory=dict)
    weights: dict[Path, float] = field(default_factory=dict)
    unreadable: set[Path] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class _Claim:
    text: str | None
    source: str


def pair_captions(listing: FolderListing) -> Pairing:
    """Give every picture of `listing` its caption; two that differ are a problem, as is a row without a picture.

    Names are compared in Unicode NFC and in their own case.
    """
    pairing = Pairing()
    claims: dict[Path, list[_Claim]] = {image.path: [] for image in listing.images}
    _claim_side_files(listing, pairing, claims)
    _claim_table_rows(listing, pairing, claims)
    for path, found in claims.items():
        texts = {claim.text for claim in found if claim.text is not None}
        if len(texts) > 1:
            sources = list_names(sorted(claim.source for claim in found))
            what = f"has {len(texts)} different captions: {sources}."
            pairing.problems.append(Problem(listing.shown(path), what, "Keep one of them."))
            pairing.unreadable.add(path)
        elif texts:
            pairing.captions[path] = texts.pop()
    return pairing


def _claim_side_files(listing: FolderListing, pairing: Pairing, claims: dict[Path, list[_Claim]]) -> None:
    images = _by_stem(claims)
    for file in listing.caption_files:
        paths = images.get((file.parent, name_key(file.stem)), [])
        if not paths:
            if not is_orphan_expected(file):
                what = "is a caption without a picture of the same name; it is ignored."
                pairing.warnings.append(Problem(listing.shown(file), what, _hint(file, listing, claims)))
            continue
        if len(paths) > 1:
            what = f"is the caption of {len(paths)} pictures: {list_names(shown_name(p.name) for p in paths)}."
            pairing.warnings.append(Problem(listing.shown(file), what))
        try:
            text = read_caption(file)
        except DatasetError as error:
            pairing.problems += [replace(problem, where=listing.shown(file)) for problem in error.problems]
            pairing.unreadable.update(paths)
            continue
        pairing.sources.add(file.suffix.lower())
        for path in paths:
            claims[path].append(_Claim(text, listing.shown(file)))


def _by_stem(images: Iterable[Path]) -> dict[tuple[Path, str], list[Path]]:
    found: dict[tuple[Path, str], list[Path]] = {}
    for path in images:
        found.setdefault((path.parent, name_key(path.stem)), []).append(path)
    return found


def _hint(file: Path, listing: FolderListing, claims: dict[Path, list[_Claim]]) -> str:
    """For "fox.png.txt" and "Fox.txt" beside "fox.png": the name it probably should have."""
    wanted = (name_key(file.stem).casefold(), name_key(file.name).casefold())
    for path in claims:
        if path.parent == file.parent and any(
            name in wanted for name in (name_key(path.name).casefold(), name_key(path.stem).casefold())
        ):
            return f"If it belongs to {shown_name(path.name)}, rename it to {shown_name(path.stem + file.suffix)}."
    return ""


def _claim_table_rows(listing: FolderListing, pairing: Pairing, claims: dict[Path, list[_Claim]]) -> None:
    by_key = {_path_key(path.relative_to(listing.root).parts): path for path in claims}
    for table in listing.metadata_files:
        shown = listing.shown(table)
        rows, problems = read_metadata(table, shown=shown)
        pairing.problems += problems
        pairing.sources.add(table.name.lower())
        seen: dict[Path, int] = {}
        for row in rows:
            where = f"{shown}, line {row.line}"
            path = _find(row, table.relative_to(listing.root).parts[:-1], by_key)
            if path is None:
                pairing.problems.append(_no_such_picture(where, row, listing))
            elif path in seen:
                what = f"names {shown_name(row.file_name)} again, after line {seen[path]}."
                pairing.problems.append(Problem(where, what, "Keep one of the rows."))
            else:
                seen[path] = row.line
                claims[path].append(_Claim(row.caption, where))
                _claim_weight(pairing, path, row, where)


def _claim_weight(pairing: Pairing, path: Path, row: MetadataRow, where: str) -> None:
    if row.weight is None:
        return
    if pairing.weights.setdefault(path, row.weight) != row.weight:
        what = f"gives {shown_name(row.file_name)} the weight {row.weight:g}, another table {pairing.weights[path]:g}."
        pairing.problems.append(Problem(where, what, "Keep one of them."))


def _path_key(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(name_key(part) for part in parts)


def _find(row: MetadataRow, folder: tuple[str, ...], by_key: dict[tuple[str, ...], Path]) -> Path | None:
    # A table made on Windows may write "sub\\a.png"; a name that really has a backslash comes first.
    for parts in (PurePosixPath(row.file_name).parts, PureWindowsPath(row.file_name).parts):
        path = by_key.get(_path_key((*folder, *parts)))
        if path is not None:
            return path
    return None


def _no_such_picture(where: str, row: MetadataRow, listing: FolderListing) -> Problem:
    parts = PureWindowsPath(row.file_name).parts
    name = shown_name(row.file_name)
    if ".." in parts or PureWindowsPath(row.file_name).root or PureWindowsPath(row.file_name).drive:
        return Problem(where, f"names {name}, outside the folder.", "Names are relative to the table, without '..'.")
    left_out = next((folder for folder in listing.left_out if "/".join(parts).startswith(folder)), None)
    if left_out is not None:
        return Problem(
            where, f"names {name}, but {left_out} is not trained on.", "Remove the row or rename the folder."
        )
    return Problem(where, f"names {name}, and there is no such picture.", "Correct the name or remove the row.")
