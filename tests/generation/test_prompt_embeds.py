"""Weights and length of prompts, against what diffusers encodes and against written formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdlora.emphasis import WeightedText, escape_brackets, parse_emphasis
from sdlora.errors import GenerationError
from sdlora.generation.prompt_embeds import PromptEncoder
from tests.tiny import tiny_sdxl


@pytest.fixture(scope="module")
def sdxl():
    return tiny_sdxl()


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a fox", [("a fox", 1.0)]),
        ("a (red) fox", [("a ", 1.0), ("red", 1.1), (" fox", 1.0)]),
        ("((red)) fox", [("red", 1.21), (" fox", 1.0)]),
        ("[red] fox", [("red", 1 / 1.1), (" fox", 1.0)]),
        ("(red:1.3) fox", [("red", 1.3), (" fox", 1.0)]),
        ("(a (red:2) fox:0.5)", [("a ", 0.5), ("red", 1.0), (" fox", 0.5)]),
        (r"a \(red\) fox", [("a (red) fox", 1.0)]),
        (r"\[x\] \\ y", [("[x] \\ y", 1.0)]),
        ("a fox :)", [("a fox :)", 1.0)]),
        ("a (red fox", [("a (red fox", 1.0)]),
        ("(word:abc)", [("word:abc", 1.1)]),
        ("([fox])", [("fox", 1.0)]),
        ("(fox:.5)", [("fox", 0.5)]),
        ("()", []),
    ],
)
def test_brackets_weigh_words(prompt: str, parts: list[tuple[str, float]]) -> None:
    found = parse_emphasis(prompt)
    assert [part.text for part in found] == [text for text, _ in parts]
    assert [part.weight for part in found] == pytest.approx([weight for _, weight in parts])


@given(st.text(alphabet="ab()[]\\:1. "))
def test_escaped_text_is_read_as_it_is(text: str) -> None:
    assert parse_emphasis(escape_brackets(text)) == ((WeightedText(text),) if text else ())


@given(st.text(alphabet="ab()[]\\ "))
def test_no_word_is_lost_whatever_the_brackets(text: str) -> None:
    letters = [letter for letter in "".join(part.text for part in parse_emphasis(text)) if letter in "ab"]
    assert letters == [letter for letter in text if letter in "ab"]


def test_a_prompt_that_changes_while_drawing_is_refused() -> None:
    with pytest.raises(GenerationError, match="not supported"):
        parse_emphasis("a [fox:owl:0.5]")


@pytest.mark.parametrize("negative", ["", "grey"])
def test_a_short_prompt_without_weights_is_encoded_as_diffusers_does(tiny_pipeline, sdxl, negative: str) -> None:
    for pipeline in (tiny_pipeline, sdxl):
        ours = PromptEncoder(pipeline).arguments(["a red fox", "an owl"], negative, guided=True)
        with torch.no_grad():
            theirs = pipeline.encode_prompt(
                prompt=["a red fox", "an owl"],
                device="cpu",
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                negative_prompt=[negative] * 2 if negative else None,
            )
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        assert set(ours) == set(names[: len(theirs)])
        assert all(torch.equal(ours[name], theirs[index]) for index, name in enumerate(names[: len(theirs)]))


def test_a_weight_moves_a_word_away_from_the_empty_prompt(tiny_pipeline, sdxl) -> None:
    for pipeline in (tiny_pipeline, sdxl):
        encoder = PromptEncoder(pipeline)
        weighted = encoder.arguments(["a (b:1.5) c", "a b c"], "(d:0.5)", guided=True)
        plain = encoder.arguments(["a b c", "a b c"], "d", guided=True)
        empty = encoder.arguments([" ", " "], " ", guided=True)["prompt_embeds"]
        # The tiny tokenizer has one token a character: start, a, b, c.
        expected = plain["prompt_embeds"].clone()
        expected[0, 2] = empty[0, 2] + 1.5 * (expected[0, 2] - empty[0, 2])
        assert torch.allclose(weighted["prompt_embeds"], expected, atol=1e-6)
        assert torch.equal(weighted["prompt_embeds"][1], plain["prompt_embeds"][1])
        negative = plain["negative_prompt_embeds"].clone()
        negative[:, 1] = empty[:, 1] + 0.5 * (negative[:, 1] - empty[:, 1])
        assert torch.allclose(weighted["negative_prompt_embeds"], negative, atol=1e-6)


def test_a_long_prompt_is_read_to_its_end_in_chunks_of_75_tokens(tiny_pipeline, sdxl) -> None:
    first, second = "a" * 75, "b" * 10
    for pipeline in (tiny_pipeline, sdxl):
        encoder = PromptEncoder(pipeline)
        assert encoder.num_chunks(first) == 1 and encoder.num_chunks(f"{first} {second}") == 2
        both = encoder.arguments([f"{first} {second}"], "c", guided=True)
        parts = [encoder.arguments([text], "c", guided=True) for text in (first, second)]
        assert torch.allclose(both["prompt_embeds"], torch.cat([p["prompt_embeds"] for p in parts], 1), atol=1e-6)
        empty = encoder.arguments([" "], "c", guided=False)["prompt_embeds"]
        negative = torch.cat([parts[0]["negative_prompt_embeds"], empty], 1)
        assert torch.allclose(both["negative_prompt_embeds"], negative, atol=1e-6)
        if "pooled_prompt_embeds" in both:
            assert torch.allclose(both["pooled_prompt_embeds"], parts[0]["pooled_prompt_embeds"], atol=1e-6)


def test_a_phrase_is_not_cut_where_a_comma_is_near(tiny_pipeline) -> None:
    encoder = PromptEncoder(tiny_pipeline)
    start, rest = "a" * 69 + ",", "b" * 10
    both = encoder.arguments([f"{start} {rest}"], "", guided=False)["prompt_embeds"]
    parts = [encoder.arguments([text], "", guided=False)["prompt_embeds"] for text in (start, rest)]
    assert torch.allclose(both, torch.cat(parts, 1), atol=1e-6)


def test_plain_text_is_cut_and_its_brackets_stay(tiny_pipeline) -> None:
    encoder = PromptEncoder(tiny_pipeline, weighted=False)
    assert encoder.num_chunks("a" * 200) == 1
    plain = encoder.arguments(["(a)"], "", guided=False)["prompt_embeds"]
    escaped = PromptEncoder(tiny_pipeline).arguments([r"\(a\)"], "", guided=False)["prompt_embeds"]
    assert torch.equal(plain, escaped)


def test_clip_skip_reads_an_earlier_layer(tiny_pipeline, sdxl) -> None:
    encoder = tiny_pipeline.text_encoder
    ids = tiny_pipeline.tokenizer(["a fox"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = encoder.final_layer_norm(encoder(ids, output_hidden_states=True).hidden_states[-2])
        ours = PromptEncoder(tiny_pipeline, clip_skip=2).arguments(["a fox"], "", guided=True)
        negative = PromptEncoder(tiny_pipeline, clip_skip=2).arguments([""], "", guided=False)
    assert torch.equal(ours["prompt_embeds"], expected)
    assert torch.equal(ours["negative_prompt_embeds"], negative["prompt_embeds"])
    default = PromptEncoder(sdxl).arguments(["a fox"], "", guided=False)
    second = PromptEncoder(sdxl, clip_skip=2).arguments(["a fox"], "", guided=False)
    assert torch.equal(default["prompt_embeds"], second["prompt_embeds"])
    with pytest.raises(GenerationError, match="has 2 layers"):
        PromptEncoder(sdxl, clip_skip=3)
