"""Adapters named on the command line and in prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdlora.adapter_weight import PRESETS, AdapterWeight
from sdlora.errors import GenerationError
from sdlora.prompts import AdapterChoice, cut_words, find_adapter, parse_adapter_argument, split_adapter_tags


@pytest.mark.parametrize(
    ("text", "source", "weight"),
    [
        ("ink.safetensors", "ink.safetensors", None),
        ("ink.safetensors:0.8", "ink.safetensors", 0.8),
        ("a b/v1.5.safetensors:-.25", "a b/v1.5.safetensors", -0.25),
        (r"C:\art\ink.safetensors", r"C:\art\ink.safetensors", None),
        (r"C:\art\ink.safetensors:2", r"C:\art\ink.safetensors", 2.0),
        ("ink", "ink", None),
        ("ink:0.5:lbw=OUTALL", "ink", AdapterWeight(0.5, blocks=PRESETS["OUTALL"])),
        ("ink.safetensors:0@0,1@0.5", "ink.safetensors", AdapterWeight(curve=((0.0, 0.0), (0.5, 1.0)))),
        (r"C:\a.safetensors:b\ink", r"C:\a.safetensors:b\ink", None),
    ],
)
def test_a_lora_argument_is_a_path_and_perhaps_a_weight(text: str, source: str, weight: float) -> None:
    assert parse_adapter_argument(text) == AdapterChoice(source, weight)


@pytest.mark.parametrize("text", ["ink:loud", "ink.safetensors:nan", "ink.safetensors:inf", "ink:"])
def test_a_weight_that_is_no_finite_number_is_refused(text: str) -> None:
    with pytest.raises(GenerationError, match="weight"):
        parse_adapter_argument(text)


def test_tags_leave_the_prompt_and_become_adapters() -> None:
    tags = "<lora:ink:0.8>", "<lora:my style v1.5>", "<lora:blob:0.5:lbw=INALL:start=5>"
    prompt, choices = split_adapter_tags(f"a fox {tags[0]}, at night {tags[1]}{tags[2]}")
    assert prompt == "a fox, at night"
    blob = AdapterWeight(0.5, blocks=PRESETS["INALL"], start=5)
    assert choices == (AdapterChoice("ink", 0.8), AdapterChoice("my style v1.5", None), AdapterChoice("blob", blob))


def test_a_prompt_without_tags_is_unchanged() -> None:
    assert split_adapter_tags("a <3 fox, (red:1.2)") == ("a <3 fox, (red:1.2)", ())


def test_an_adapter_is_found_by_name_below_a_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "ink.safetensors").touch()
    assert find_adapter("ink", [tmp_path]).name == "ink.safetensors"
    with pytest.raises(GenerationError, match="sunset"):
        find_adapter("sunset", [tmp_path])


def test_two_adapters_of_one_name_are_not_guessed_between(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ink.safetensors").touch()
    with pytest.raises(GenerationError, match="2 files"):
        find_adapter("ink", [tmp_path])


def test_words_beyond_the_text_encoder_are_named(tiny_pipeline) -> None:
    # The tiny tokenizer has one token a letter: 75 letters fit between start and end.
    assert cut_words("a" * 70 + " owl box", tiny_pipeline.tokenizer) == "x"
    assert cut_words("fox", tiny_pipeline.tokenizer) == ""
