"""Finding adapter files again, whatever they are called now, and what lies in a folder of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdlora.adapter_file import family_of, outline_adapter
from sdlora.adapter_tools.hashes import FileHashes, file_hashes
from sdlora.errors import AdapterFileError

__all__ = ["LibraryEntry", "find_by_tensor_hash", "list_library", "tensor_hash", "trigger_of"]

_LARGEST = 2 * 2**30
_CHUNK = 2**20
_MAX_SIDECAR_BYTES = 2**20
_PICTURES = (".png", ".preview.png", ".jpg", ".jpeg", ".webp")

_HASH_KEYS = ("sshs_model_hash", "sshs_legacy_hash")
# Of nothing: AutoV1 and the old hash look at bytes behind the end of files below 1 MiB.
_AUTO_V1_OF_SMALL_FILES = hashlib.sha256().hexdigest()[:8]


@dataclass(frozen=True)
class LibraryEntry:
    """One LoRA of a folder; only its header and its hashes are read."""

    path: Path
    family: str | None
    methods: tuple[str, ...]
    trigger: str | None
    weight: str | None
    """The recommended one, as the header says it."""
    size_bytes: int
    hashes: FileHashes
    picture: Path | None
    """The preview that lies beside it."""
    said_hashes: tuple[str, ...] = ()
    """Those that the header claims, by which A1111 and sites know the file even where they are wrong."""

    def has_hash(self, digits: str) -> bool:
        """Whether one of its hashes begins with these hex digits, as sites and pictures cut them off."""
        digits = digits.lower().removeprefix("0x")
        known = [self.hashes.sha256, self.hashes.tensor_sha256, self.hashes.auto_v1, *self.said_hashes]
        return any(value.startswith(digits) for value in known if value[:8] != _AUTO_V1_OF_SMALL_FILES)


def list_library(folders: Iterable[Path]) -> Iterator[LibraryEntry | AdapterFileError]:
    """Every .safetensors file below the folders, by name; the reason where one is no sound LoRA."""
    for path in sorted({path for folder in folders for path in _files(folder)}):
        try:
            outline = outline_adapter(path)
        except AdapterFileError as error:
            yield error
            continue
        yield LibraryEntry(
            path=path,
            family=family_of(outline),
            methods=outline.methods,
            trigger=trigger_of(path, outline.metadata),
            weight=outline.metadata.get("sdlora.recommended_weight"),
            size_bytes=path.stat().st_size,
            hashes=file_hashes(path),
            said_hashes=tuple(outline.metadata[key].lower() for key in _HASH_KEYS if outline.metadata.get(key)),
            picture=next((p for end in _PICTURES if (p := path.with_name(path.stem + end)).is_file()), None),
        )


def trigger_of(path: Path, metadata: Mapping[str, str]) -> str | None:
    """The phrase that calls the adapter: by its header, else by the JSON beside it that A1111 writes."""
    said = metadata.get("modelspec.trigger_phrase")
    sidecar = path.with_suffix(".json")
    if said or not sidecar.is_file() or sidecar.stat().st_size > _MAX_SIDECAR_BYTES:
        return said
    try:
        beside = json.loads(sidecar.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError, OSError):
        return None
    text = beside.get("activation text") if isinstance(beside, dict) else None
    return text if isinstance(text, str) and text else None


def find_by_tensor_hash(digest: str, folders: Iterable[Path], *, name: str = "") -> Path | None:
    """The first file below the folders whose tensor bytes have this SHA-256; those called `name` are tried first."""
    candidates = sorted({path for folder in folders for path in _files(folder)}, key=lambda p: (p.name != name, p))
    return next((path for path in candidates if tensor_hash(path) == digest), None)


def tensor_hash(path: Path) -> str | None:
    """SHA-256 of the bytes after the header; None if this is no safetensors file."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            start = file.read(9)
            if start[8:] != b"{":
                return None
            file.seek(8 + int.from_bytes(start[:8], "little"))
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except (OSError, ValueError, OverflowError):
        return None
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*.safetensors") if folder.is_dir() else ():
        # Base models are no adapters, and take long to read.
        if path.is_file() and path.stat().st_size <= _LARGEST:
            yield path
