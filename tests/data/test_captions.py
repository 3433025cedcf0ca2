"""Caption files: encodings, blank ones, and the trigger phrase."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.data.captions import compose_caption, decode_text, read_caption
from sdlora.errors import DatasetError

TEXT = "a grün fox 🦊, “ink”"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode("utf-8"),
        codecs.BOM_UTF8 + TEXT.encode("utf-8"),
        codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    ],
    ids=["utf-8", "utf-8 with mark", "utf-16 little-endian", "utf-16 big-endian"],
)
def test_every_accepted_encoding_gives_the_same_words_without_a_mark(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "fox.txt").write_bytes(data)
    assert read_caption(tmp_path / "fox.txt") == TEXT


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        ("a “fox”".encode("cp1252"), 2),
        (codecs.BOM_UTF8 + "é".encode("latin-1"), 3),
        ("fox".encode("utf-16-le"), 1),
        (codecs.BOM_UTF16_LE + "fox".encode("utf-16-le") + b"\x00\xd8", 8),
        (codecs.BOM_UTF16_BE + "a\0b".encode("utf-16-be"), 4),
        (codecs.BOM_UTF32_LE + "fox".encode("utf-32-le"), 2),
    ],
    ids=["cp1252 quotes", "latin-1 after a mark", "utf-16 without mark", "half a pair", "NUL", "utf-32"],
)
def test_any_other_encoding_is_an_error_with_the_byte_offset(data: bytes, offset: int, tmp_path: Path) -> None:
    (tmp_path / "fox.txt").write_bytes(data)
    with pytest.raises(DatasetError) as caught:
        read_caption(tmp_path / "fox.txt")
    (problem,) = caught.value.problems
    assert problem.where.endswith("fox.txt")
    assert f"at byte {offset}." in problem.what
    assert problem.remedy == "Save it as UTF-8."


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_text_or_an_offset_within_them(data: bytes) -> None:
    try:
        text = decode_text(data)
    except UnicodeDecodeError as error:
        assert 0 <= error.start < len(data)
    else:
        assert "\0" not in text
        assert not text.startswith("\ufeff") or text.encode() != data


@pytest.mark.parametrize("text", ["", "  \n\t ", "\ufeff"])
def test_a_file_without_words_is_an_empty_caption(text: str, tmp_path: Path) -> None:
    (tmp_path / "fox.txt").write_text(text, encoding="utf-8")
    assert read_caption(tmp_path / "fox.txt") == ""


def test_all_lines_of_a_caption_count(tmp_path: Path) -> None:
    (tmp_path / "fox.txt").write_bytes(b"a fox\r\nin the snow\n\n")
    assert read_caption(tmp_path / "fox.txt") == "a fox in the snow"


def test_a_huge_caption_file_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "fox.txt").write_bytes(b"a " * 40_000)
    with pytest.raises(DatasetError, match="larger than 64 KiB"):
        read_caption(tmp_path / "fox.txt")


def test_a_caption_that_is_not_there_is_a_dataset_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot be read"):
        read_caption(tmp_path / "fox.txt")


@pytest.mark.parametrize(
    ("caption", "trigger", "composed"),
    [
        ("fox", "blob emoji style", "fox, blob emoji style"),
        ("a fox.", "ink style", "a fox, ink style"),
        ("a fox, ", "  ink\nstyle ", "a fox, ink style"),
        (None, "ink style", "ink style"),
        ("", "ink style", "ink style"),
        ("fox", None, "fox"),
        ("fox", "  ", "fox"),
        ("", None, ""),
        ("a fox in INK style, red", "ink style", "a fox in INK style, red"),
        ("a pink stylet", "ink style", "a pink stylet, ink style"),
        ("a fox (x)", "(x)", "a fox (x)"),
    ],
)
def test_the_trigger_follows_the_caption_once(caption: str | None, trigger: str | None, composed: str) -> None:
    assert compose_caption(caption, trigger) == composed


def test_without_caption_and_trigger_there_is_nothing_to_train_with() -> None:
    with pytest.raises(ValueError, match="needs a trigger"):
        compose_caption(None, None)


@settings(max_examples=50, deadline=None)
@given(st.text("aB ,.;(\né", max_size=12), st.text("aB ,.;(\né", min_size=1, max_size=5))
def test_composing_twice_adds_nothing(caption: str, trigger: str) -> None:
    once = compose_caption(caption, trigger)
    assert compose_caption(once, trigger) == once
