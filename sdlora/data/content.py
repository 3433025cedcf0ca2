"""What a file holds, whatever it is called and wherever it lies."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sdlora.data.names import shown_name
from sdlora.errors import DatasetError, Problem

__all__ = ["content_hash", "require_content"]


def content_hash(path: Path) -> str:
    """SHA-256 of the file's bytes. Raises `DatasetError` if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise _changed(path, f"cannot be read any more: {error.strerror or error}.") from error


def require_content(path: Path, known_hash: str) -> None:
    """Raises `DatasetError` if the file holds something else by now."""
    if content_hash(path) != known_hash:
        raise _changed(path, "changed while it was read.")


def _changed(path: Path, what: str) -> DatasetError:
    problem = Problem(shown_name(path), what, "Leave the dataset alone while a run begins; start again.")
    return DatasetError(shown_name(path.parent), [problem])
