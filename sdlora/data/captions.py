"""Caption text: bytes to words, and the trigger phrase.

A caption may be missing (None) or empty (""): the first was forgotten, the second was written down.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from sdlora.data.names import shown_name
from sdlora.errors import DatasetError, Problem

__all__ = ["compose_caption", "decode_text", "one_line", "read_caption", "read_text"]

_MAX_CAPTION_BYTES = 64 * 1024


def read_caption(path: Path) -> str:
    """The caption in `path` on one line, "" for a file without words.

    Encodings: see `decode_text`. All lines count: line breaks and runs of blanks become one space.
    Raises `DatasetError` with one problem when the file cannot be read as text.
    """
    return one_line(read_text(path, max_bytes=_MAX_CAPTION_BYTES))


def read_text(path: Path, *, max_bytes: int) -> str:
    """The text of `path`. Raises `DatasetError` with one problem: unreadable, larger than `max_bytes`, not text."""
    try:
        if path.stat().st_size > max_bytes:
            what = f"is larger than {max_bytes // 1024} KiB, so it is hardly a text for training."
            raise _error(path, what, "Shorten it or move it out of the folder.")
        data = path.read_bytes()
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}."
        raise _error(path, what, "Check that the file exists and that you may read it.") from error
    try:
        return decode_text(data)
    except UnicodeDecodeError as error:
        what = f"is not {error.encoding} text: {error.reason} at byte {error.start}."
        raise _error(path, what, "Save it as UTF-8.") from error


def decode_text(data: bytes) -> str:
    """UTF-8 with or without a byte order mark, or UTF-16 with one.

    Raises `UnicodeDecodeError`, whose `start` is the offset in `data`; a NUL counts as an error, since text
    saved as UTF-16 without a mark is valid UTF-8 full of NULs.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16")
        nul, encoding = 2 + len(text.partition("\0")[0].encode("utf-16-le")), "UTF-16"
    else:
        text = _decode_utf8(data)
        nul, encoding = data.find(b"\0"), "UTF-8"
    if "\0" in text:
        raise UnicodeDecodeError(encoding, data, nul, nul + 1, "a zero byte")
    return text


def _decode_utf8(data: bytes) -> str:
    # Not "utf-8-sig": its error offsets do not count the mark.
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        found = f"0x{data[error.start]:02x} is no UTF-8"
        raise UnicodeDecodeError("UTF-8", data, error.start, error.end, found) from None


def one_line(text: str) -> str:
    """`text` with every run of white space, line breaks included, as one space."""
    return " ".join(text.split())


def compose_caption(caption: str | None, trigger: str | None) -> str:
    """The words to train with: "fox" and "blob emoji style" give "fox, blob emoji style".

    A caption without words, missing or empty, gives the trigger alone; a caption that has the trigger already
    stays as it is. Raises `ValueError` if both are missing; an empty caption without a trigger is legal.
    """
    trigger = one_line(trigger or "")
    if caption is None and not trigger:
        raise ValueError("an image without a caption needs a trigger")
    words = one_line(caption or "")
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", words, re.IGNORECASE):
        return words
    words = words.rstrip(" ,;.")
    return f"{words}, {trigger}" if words else trigger


def _error(path: Path, what: str, remedy: str) -> DatasetError:
    return DatasetError(shown_name(path), [Problem(shown_name(path), what, remedy)])
