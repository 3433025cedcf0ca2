"""Choices in prompts: always the same ones for the same seed, and every mistake named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdlora.errors import GenerationError
from sdlora.wildcards import expand_prompt, read_prompts


def expand(prompt: str, folder: Path = Path("nowhere"), *, seed: int = 0, number: int = 0) -> str:
    return expand_prompt(prompt, seed=seed, number=number, folder=folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "animal.txt").write_text("fox\n\n# not this\nowl\n", encoding="utf-8")
    (tmp_path / "scene.txt").write_text("a {red|blue} __animal__\n", encoding="utf-8-sig")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "tree.txt").write_text("oak", encoding="utf-8")
    return tmp_path


def test_every_choice_is_met_and_the_rest_stays(folder: Path) -> None:
    drawn = {expand("{ink|chalk} of a __animal__, 2:1", folder, number=n) for n in range(100)}
    assert drawn == {f"{a} of a {b}, 2:1" for a in ("ink", "chalk") for b in ("fox", "owl")}


def test_the_same_seed_and_number_choose_the_same_and_others_do_not() -> None:
    prompt = "{a|b|c|d|e|f|g|h} {a|b|c|d|e|f|g|h}"
    assert expand(prompt, seed=3, number=1) == expand(prompt, seed=3, number=1)
    assert len({expand(prompt, seed=seed) for seed in range(10)}) > 3
    assert len({expand(prompt, number=number) for number in range(10)}) > 3


def test_choices_nest_and_files_may_hold_choices_and_lie_in_folders(folder: Path) -> None:
    assert {expand("{a|{b|c}}", number=n) for n in range(50)} == {"a", "b", "c"}
    assert expand("__deep/tree__", folder) == "oak"
    drawn = {expand("__scene__", folder, number=n) for n in range(60)}
    assert drawn == {f"a {c} {a}" for c in ("red", "blue") for a in ("fox", "owl")}


def test_one_part_may_be_empty() -> None:
    assert {expand("a {red |}fox", number=n) for n in range(30)} == {"a redfox", "a fox"}


@given(st.text(alphabet=st.characters(exclude_characters="{}_")))
def test_a_prompt_without_choices_stays_as_it_is(prompt: str) -> None:
    assert expand(prompt) == prompt


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a {red|blue fox", "a brace is open"),
        ("a red} fox", "a brace is open"),
        ("a __bird__", r"there is no .*bird\.txt"),
        ("__empty__", "has no lines"),
        ("__latin__", "not UTF-8"),
        ("__loop__", "never end"),
    ],
)
def test_mistakes_are_named(folder: Path, prompt: str, message: str) -> None:
    (folder / "empty.txt").write_text("\n# nothing\n")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "loop.txt").write_text("__loop__ __loop__")
    with pytest.raises(GenerationError, match=message):
        expand(prompt, folder)


def test_a_prompt_file_has_a_prompt_a_line() -> None:
    assert read_prompts("\ufeffa fox\n\n# a note\n  an owl \n") == ["a fox", "an owl"]
    with pytest.raises(GenerationError, match="no prompt"):
        read_prompts("# only a note")
