"""A folder of what can always be computed again, shared by all runs of a user. Loads no model library.

    CACHE/latents/3f/3f09...e2    CACHE/captions/a1/a1c4...77

An entry is named by the SHA-256 of all that it depends on, so that it never grows stale: what changes gets another
name. It begins with the SHA-256 of its own contents, so that a damaged one is noticed. It is written under another
name and renamed: several processes may use one cache at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

__all__ = ["CacheKind", "CacheUsage", "DiskCache", "cache_folder", "cache_key", "cache_usage", "prune_cache"]

CacheKind: TypeAlias = Literal["latents", "captions"]

_DIGEST_SIZE = 32
_KEY = re.compile(r"[0-9a-f]{64}")
_WRITING = ".writing-"
_ABANDONED_SECONDS = 3600.0


def cache_folder(chosen: Path | None = None) -> Path:
    """The folder chosen, else the one in the environment variable SDLORA_CACHE, else the system's place for caches."""
    from_environment = os.environ.get("SDLORA_CACHE")
    if chosen is not None or from_environment:
        return Path(chosen or from_environment or "").expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "sdlora" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "sdlora"
    # XDG Base Directory Specification 0.8: a relative path is invalid and ignored.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "sdlora"


def cache_key(*parts: object) -> str:
    """The name of what these parts determine (SHA-256, 64 hexadecimal digits)."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()


class DiskCache:
    """Bytes by kind and key. It never fails: what cannot be read is not there, what cannot be written is not kept."""

    def __init__(self, root: Path):
        self.root = root
        self.hits = self.misses = self.damaged = 0
        self._write_error = ""

    def read(self, kind: CacheKind, key: str) -> bytes | None:
        """The entry, or None if it is not there or damaged."""
        path = _entry_path(self.root, kind, key)
        try:
            stored = path.read_bytes()
        except OSError:
            self.misses += 1
            return None
        digest, data = stored[:_DIGEST_SIZE], stored[_DIGEST_SIZE:]
        if hashlib.sha256(data).digest() != digest:
            self.damaged += 1
            return None
        self.hits += 1
        # Pruning goes by when an entry was last used.
        with contextlib.suppress(OSError):
            os.utime(path)
        return data

    def write(self, kind: CacheKind, key: str, data: bytes) -> None:
        """Keeps the entry; after a failure no other is tried."""
        if self._write_error:
            return
        path = _entry_path(self.root, kind, key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not forced to the disk: what a power cut leaves of it is noticed when it is read.
            temporary = path.with_name(f"{_WRITING}{uuid.uuid4().hex}")
            try:
                temporary.write_bytes(hashlib.sha256(data).digest() + data)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            self._write_error = error.strerror or str(error)

    def notes(self) -> list[str]:
        """What a user should know of how it went, in sentences."""
        notes = []
        if self.damaged:
            entries = "1 entry" if self.damaged == 1 else f"{self.damaged} entries"
            notes.append(f"{entries} of the cache {self.root} had been damaged and came anew.")
        if self._write_error:
            notes.append(
                f"The cache {self.root} cannot be written ({self._write_error}): the next run encodes again what this "
                "one did. Free some space, or choose another place with data.cache_dir."
            )
        return notes


@dataclass(frozen=True)
class CacheUsage:
    """How many entries, and their bytes in sum."""

    entries: int
    size_bytes: int


def cache_usage(root: Path) -> dict[CacheKind, CacheUsage]:
    """What lies in a cache, by kind; nothing if there is none."""
    usage = {}
    for kind in get_args(CacheKind):
        sizes = [entry.size for entry in _entries(root, kind)]
        usage[kind] = CacheUsage(len(sizes), sum(sizes))
    return usage


def prune_cache(root: Path, *, max_age_days: float | None = None, max_bytes: int | None = None) -> CacheUsage:
    """Removes entries not used for so many days, then those not used for longest until no more than `max_bytes` are
    left; returns what was removed. Nothing but entries of a cache is ever touched, and those in use are made again."""
    now = time.time()
    entries = sorted((entry for kind in get_args(CacheKind) for entry in _entries(root, kind)), key=lambda e: e.used)
    left = sum(entry.size for entry in entries)
    removed = []
    for entry in entries:
        too_old = max_age_days is not None and now - entry.used > max_age_days * 86400
        if too_old or (max_bytes is not None and left > max_bytes):
            with contextlib.suppress(FileNotFoundError):
                entry.path.unlink()
            left -= entry.size
            removed.append(entry.size)
    for abandoned in root.glob(f"*/??/{_WRITING}*"):
        if now - abandoned.stat().st_mtime > _ABANDONED_SECONDS:
            abandoned.unlink(missing_ok=True)
    return CacheUsage(len(removed), sum(removed))


@dataclass(frozen=True)
class _Entry:
    path: Path
    size: int
    used: float
    """Seconds since the epoch."""


def _entry_path(root: Path, kind: CacheKind, key: str) -> Path:
    return root / kind / key[:2] / key


def _entries(root: Path, kind: CacheKind) -> Iterator[_Entry]:
    for path in (root / kind).glob("??/*"):
        if _KEY.fullmatch(path.name):
            # Another process may remove it meanwhile.
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                yield _Entry(path, status.st_size, status.st_mtime)
