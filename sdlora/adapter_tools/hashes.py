"""The names that sites and tools know a file by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FileHashes", "file_hashes"]

_LEGACY_BEGIN, _LEGACY_LENGTH = 2**20, 2**16


@dataclass(frozen=True)
class FileHashes:
    """Hex digests of one .safetensors file."""

    sha256: str
    """Of the whole file; changes with every edit of the header."""
    tensor_sha256: str
    """Of the bytes after the header; kohya's and A1111's `sshs_model_hash`. Survives renaming and header edits."""
    auto_v1: str
    """Civitai's and A1111's old 8 digits, of 64 KiB at 1 MiB; the same for every file smaller than that."""

    @property
    def auto_v2(self) -> str:
        """Civitai's 10 digits."""
        return self.sha256[:10]

    @property
    def auto_v3(self) -> str:
        """Civitai's and A1111's 12 digits."""
        return self.tensor_sha256[:12]


def file_hashes(path: Path) -> FileHashes:
    """Read the file once; it must be a sound .safetensors file (`read_adapter` checks that)."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    legacy = content[_LEGACY_BEGIN : _LEGACY_BEGIN + _LEGACY_LENGTH]
    return FileHashes(
        sha256=hashlib.sha256(content).hexdigest(),
        tensor_sha256=hashlib.sha256(memoryview(content)[start:]).hexdigest(),
        auto_v1=hashlib.sha256(legacy).hexdigest()[:8],
    )
