"""Finding adapter files again, whatever they are called now."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["find_by_tensor_hash", "tensor_hash"]

_LARGEST = 2 * 2**30
_CHUNK = 2**20


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
