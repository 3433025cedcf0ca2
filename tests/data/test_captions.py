"""Caption files: encodings, blank ones, and the trigger phrase."""

from __future__ import annotations

import codecs
import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.data.captions import CaptionRules, compose_caption, decode_text, read_caption
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


@pytest.mark.parametrize(
    ("caption", "rules", "words"),
    [
        ("fox", CaptionRules("ink", prefix="a big", suffix=", white ground"), "a big fox, ink, white ground"),
        ("fox", CaptionRules(None, prefix="a", suffix="on paper"), "a fox on paper"),
        ("fox", CaptionRules("ink", prefix="Ink of a"), "Ink of a fox"),
        (None, CaptionRules("ink", prefix="a", suffix="."), "a ink."),
        ("", CaptionRules(None, suffix="paper"), "paper"),
        ("fox", CaptionRules("ink"), "fox, ink"),
    ],
)
def test_prefix_and_suffix_stand_around_caption_and_trigger(
    caption: str | None, rules: CaptionRules, words: str
) -> None:
    assert rules.compose(caption) == words


@pytest.mark.parametrize(
    ("caption", "words"),
    [("fox, ink style", "fox"), ("an Ink Style fox", "an fox"), ("a, ink style, b", "a, b"), (None, "")],
)
def test_a_caption_without_its_trigger(caption: str | None, words: str) -> None:
    assert CaptionRules("ink style").compose_without_trigger(caption) == words
    prefixed = CaptionRules("ink style", prefix="ink style of", suffix=", large")
    assert prefixed.compose_without_trigger(caption) == f"of {words}".strip() + ", large"


def pseudo_random(purpose: str, variant: int, tag: int) -> float:
    return int.from_bytes(hashlib.sha256(f"{purpose} {variant} {tag}".encode()).digest()[:4], "big") / 2**32


TAGS = st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(TAGS, st.integers(0, 9), st.booleans(), st.sampled_from((0.0, 0.5, 1.0)))
def test_varied_captions_keep_their_first_tags_and_lose_or_move_only_others(
    tags: list[str], keep: int, shuffle: bool, dropout: float
) -> None:
    rules = CaptionRules("TRIGGER", shuffle_tags=shuffle, keep_tags=keep, tag_dropout=dropout, variants=5)
    variants = rules.variations(", ".join(tags), pseudo_random)
    assert len(variants) == (5 if shuffle or dropout else 1)
    for variant in variants:
        found = variant.split(", ")
        assert found.pop() == "TRIGGER"
        assert found[: min(keep, len(tags))] == tags[:keep]
        left = list(tags)
        for tag in found:
            left.remove(tag)
        assert dropout or not left
        assert shuffle or found == [tag for tag in tags if tag in found][: len(found)] or len(set(tags)) < len(tags)
        if dropout == 1.0:
            assert found == tags[:keep]


def test_tags_come_in_every_order_and_drop_as_often_as_asked() -> None:
    shuffled = CaptionRules(shuffle_tags=True, variants=200).variations("a, b, c", pseudo_random)
    assert set(shuffled) == {"a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a"}
    dropped = CaptionRules(tag_dropout=0.25, variants=400).variations("a, b", pseudo_random)
    lost = sum("a" not in text for text in dropped)
    assert abs(lost - 100) < 3 * (400 * 0.25 * 0.75) ** 0.5
    steady = CaptionRules("ink", tag_dropout=0.5, variants=9).steady()
    assert steady.variations("a, b", pseudo_random) == ("a, b, ink",)
