"""Caption text: bytes to words, the trigger phrase, and what an image's caption may look like from time to time.

A caption may be missing (None) or empty (""): the first was forgotten, the second was written down.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from sdlora.config import DataConfig
from sdlora.data.names import shown_name
from sdlora.errors import DatasetError, Problem

__all__ = ["CaptionRules", "compose_caption", "decode_text", "one_line", "read_caption", "read_text"]

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


def compose_caption(caption: str | None, trigger: str | None, *, prefix: str = "", suffix: str = "") -> str:
    """The words to train with: "fox" and "blob emoji style" give "fox, blob emoji style"; then `prefix` stands before
    that and `suffix` after it.

    A caption without words, missing or empty, gives the trigger alone; one that has the trigger already, be it by its
    prefix or suffix, gets no other. Raises `ValueError` if both are missing; an empty caption without a trigger is
    legal.
    """
    trigger, prefix, suffix = one_line(trigger or ""), one_line(prefix), one_line(suffix)
    if caption is None and not trigger:
        raise ValueError("an image without a caption needs a trigger")
    words = one_line(caption or "")
    if trigger and not _phrase(trigger).search(_joined(prefix, words, suffix)):
        words = words.rstrip(" ,;.")
        words = f"{words}, {trigger}" if words else trigger
    return _joined(prefix, words, suffix)


@dataclass(frozen=True)
class CaptionRules:
    """How the words to train with are made of an image's caption.

    A caption is taken as tags with commas between them where `shuffle_tags` or `tag_dropout` is set: then an image has
    `variants` captions, in which the first `keep_tags` tags, trigger, prefix and suffix always stand where they are.
    """

    trigger: str | None = None
    prefix: str = ""
    suffix: str = ""
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_dropout: float = 0.0
    variants: int = 1

    @staticmethod
    def of(settings: DataConfig) -> CaptionRules:
        """Those of a run."""
        return CaptionRules(
            trigger=settings.trigger,
            prefix=settings.caption_prefix,
            suffix=settings.caption_suffix,
            shuffle_tags=settings.shuffle_tags,
            keep_tags=settings.keep_tags,
            tag_dropout=settings.tag_dropout,
            variants=settings.caption_variants,
        )

    def steady(self) -> CaptionRules:
        """The same without chance."""
        return replace(self, shuffle_tags=False, tag_dropout=0.0, variants=1)

    def compose(self, caption: str | None) -> str:
        """The whole caption; raises `ValueError` as `compose_caption` does."""
        return compose_caption(caption, self.trigger, prefix=self.prefix, suffix=self.suffix)

    def compose_without_trigger(self, caption: str | None) -> str:
        """The caption as it would be in no particular style; "" if nothing is left."""
        words = _joined(one_line(self.prefix), one_line(caption or ""), one_line(self.suffix))
        if self.trigger:
            words = _phrase(one_line(self.trigger)).sub("", words)
            words = re.sub(r"\s*,[\s,]*", ", ", one_line(words)).strip(" ,;")
        return words

    def variations(self, caption: str | None, draw: Callable[[str, int, int], float]) -> tuple[str, ...]:
        """All captions of an image, of which each exposure reads one. `draw` gives a number in [0, 1) for a purpose, a
        variant and a tag."""
        if not (self.shuffle_tags or self.tag_dropout):
            return (self.compose(caption),)
        return tuple(self.compose(self._varied(caption, draw, variant)) for variant in range(self.variants))

    def _varied(self, caption: str | None, draw: Callable[[str, int, int], float], variant: int) -> str | None:
        if caption is None:
            return None
        tags = [tag for part in caption.split(",") if (tag := part.strip())]
        places = [n for n in range(self.keep_tags, len(tags)) if draw("tag-dropout", variant, n) >= self.tag_dropout]
        if self.shuffle_tags:
            places.sort(key=lambda n: draw("tag-order", variant, n))
        return ", ".join([*tags[: self.keep_tags], *(tags[n] for n in places)])


def _phrase(words: str) -> re.Pattern[str]:
    """Finds the words where they stand by themselves, in any case."""
    return re.compile(rf"(?<!\w){re.escape(words)}(?!\w)", re.IGNORECASE)


def _joined(prefix: str, words: str, suffix: str) -> str:
    text = f"{prefix} {words}".strip()
    return f"{text}{suffix}" if suffix.startswith((",", ".", ";")) else f"{text} {suffix}".strip()


def _error(path: Path, what: str, remedy: str) -> DatasetError:
    return DatasetError(shown_name(path), [Problem(shown_name(path), what, remedy)])
