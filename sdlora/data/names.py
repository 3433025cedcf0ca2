"""File names: how they are compared, and how they are shown in a message. Nothing is opened here."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sized
from pathlib import Path

__all__ = ["counted", "list_names", "name_key", "shown_name"]

_SHOWN = 5


def name_key(name: str) -> str:
    """The form in which names are compared: Unicode NFC, since macOS stores "ü" as "u" and a combining mark."""
    return unicodedata.normalize("NFC", name)


def shown_name(path: Path | str, root: Path | None = None) -> str:
    """`path` for people: relative to `root` if below it, "/" between its parts, on one line, always printable."""
    if isinstance(path, Path):
        below = root is not None and path != root and path.is_relative_to(root)
        path = (path.relative_to(root) if root is not None and below else path).as_posix()
    # A name that is not UTF-8 reaches Python with lone surrogates, which no terminal can print.
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def list_names(names: Iterable[str]) -> str:
    """ "a, b, c, d, e and 3 more"."""
    names = list(names)
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def counted(things: Sized, noun: str) -> str:
    """ "1 picture", "3 pictures"."""
    return f"{len(things)} {noun}" if len(things) == 1 else f"{len(things)} {noun}s"
