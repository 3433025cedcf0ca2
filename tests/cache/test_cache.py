"""The disk cache by itself: safe against damage and company, cleared without touching anything else."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdlora.cache import CacheUsage, DiskCache, cache_folder, cache_key, cache_usage, prune_cache
from sdlora.cli import app

KEYS = [cache_key("entry", n) for n in range(4)]


def entries(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_what_was_written_is_read_and_nothing_else(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.write("latents", KEYS[0], b"first")
    cache.write("latents", KEYS[0], b"second")
    assert DiskCache(tmp_path).read("latents", KEYS[0]) == b"second"
    assert cache.read("captions", KEYS[0]) is None
    assert cache.read("latents", KEYS[1]) is None
    assert len(entries(tmp_path)) == 1
    assert cache.notes() == []


def test_every_part_of_a_key_counts_and_so_does_their_order() -> None:
    keys = {cache_key("a", 1), cache_key("a", 2), cache_key(1, "a"), cache_key("a1"), cache_key("a", 1, "")}
    assert len(keys) == 5


@pytest.mark.parametrize("damage", [b"", b"short", None, "flip"])
def test_a_damaged_entry_is_not_there_and_that_is_said(tmp_path: Path, damage: bytes | str | None) -> None:
    cache = DiskCache(tmp_path)
    cache.write("latents", KEYS[0], b"0123456789" * 100)
    (path,) = entries(tmp_path)
    whole = path.read_bytes()
    if damage is None:
        path.write_bytes(whole[:-1])
    elif damage == "flip":
        path.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    else:
        path.write_bytes(damage)
    assert cache.read("latents", KEYS[0]) is None
    (note,) = cache.notes()
    assert note == f"1 entry of the cache {tmp_path} had been damaged and came anew."
    cache.write("latents", KEYS[0], b"again")
    assert cache.read("latents", KEYS[0]) == b"again"


def test_a_place_that_cannot_be_written_is_told_once_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = DiskCache(tmp_path / "file")
    for key in KEYS:
        assert cache.read("latents", key) is None
        cache.write("latents", key, b"data")
    (note,) = cache.notes()
    assert "cannot be written (" in note and "data.cache_dir" in note


def test_a_write_that_fails_half_way_leaves_the_entry_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(tmp_path)
    cache.write("latents", KEYS[0], b"sound")

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    cache.write("latents", KEYS[0], b"never")
    assert [path.name for path in entries(tmp_path)] == [KEYS[0]]
    assert cache.read("latents", KEYS[0]) == b"sound"
    assert "No space left" in cache.notes()[0]


def test_many_may_write_and_read_one_cache_at_once(tmp_path: Path) -> None:
    def work(number: int) -> bool:
        cache = DiskCache(tmp_path)
        key = KEYS[number % len(KEYS)]
        cache.write("latents", key, key.encode() * 1000)
        return cache.read("latents", key) == key.encode() * 1000 and not cache.notes()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))


def filled(root: Path) -> DiskCache:
    """Four entries of 132 bytes, last used 3, 2, 1 and 0 days ago."""
    cache = DiskCache(root)
    for days, key in zip((3, 2, 1, 0), KEYS, strict=True):
        cache.write("latents" if days > 1 else "captions", key, bytes(100))
        path = next(root.rglob(key))
        used = time.time() - days * 86400 - 60
        os.utime(path, (used, used))
    return cache


def test_it_is_pruned_by_age_and_by_size_and_what_was_read_counts_as_used(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    assert cache_usage(tmp_path) == {"latents": CacheUsage(2, 264), "captions": CacheUsage(2, 264)}
    cache.read("latents", KEYS[0])
    assert prune_cache(tmp_path, max_age_days=1.5) == CacheUsage(1, 132)
    assert prune_cache(tmp_path, max_bytes=300) == CacheUsage(1, 132)
    assert {path.name for path in entries(tmp_path)} == {KEYS[0], KEYS[3]}


def test_clearing_touches_nothing_but_entries(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "holiday.png").write_bytes(b"mine")
    (tmp_path / "latents" / "notes.txt").write_bytes(b"mine")
    abandoned = tmp_path / "latents" / "ab" / ".writing-123"
    abandoned.parent.mkdir(exist_ok=True)
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    answer = CliRunner().invoke(app, ["data", "cache", "--dir", str(tmp_path), "--clear"])
    assert answer.exit_code == 0
    assert "Removed 4 entries, 0.0 MB." in answer.output and "latents: 0 entries" in answer.output
    assert [path.name for path in entries(tmp_path)] == ["holiday.png", "notes.txt"]


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path / "environment"))
    assert cache_folder(tmp_path / "chosen") == tmp_path / "chosen"
    assert cache_folder() == tmp_path / "environment"
    monkeypatch.delenv("SDLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == tmp_path / "xdg" / "sdlora"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "sdlora"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "sdlora"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "sdlora" / "cache"
