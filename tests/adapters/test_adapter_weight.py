"""AdapterWeight and its compact syntax: what is printed reads back equal, and what means nothing is told."""

from __future__ import annotations

import pytest
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.adapter_file.keys import to_stability
from sdlora.adapter_weight import BLOCKS, PRESETS, AdapterWeight, as_weight, block_of, parse_weight, simplest
from sdlora.errors import AdapterError
from tests.tiny import tiny_sd1, tiny_sdxl

NUMBERS = st.floats(-1e6, 1e6)
SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=4, unique=True).map(sorted)
BLOCK_LISTS = st.one_of(
    st.sampled_from(sorted(PRESETS)).map(PRESETS.__getitem__),
    st.lists(st.tuples(st.from_regex(r"[A-Za-z0-9_.*?]{1,8}", fullmatch=True), NUMBERS), max_size=3).map(tuple),
)


@st.composite
def weights(draw) -> AdapterWeight:
    shares = draw(st.one_of(st.just([]), SHARES))
    start = draw(st.integers(0, 30))
    return AdapterWeight(
        base=draw(NUMBERS),
        text=draw(st.none() | NUMBERS),
        blocks=draw(BLOCK_LISTS),
        curve=tuple((share, draw(NUMBERS)) for share in shares),
        start=start,
        stop=draw(st.none() | st.integers(start + 1, 60)),
        images=tuple(draw(st.lists(NUMBERS, max_size=3))),
        cond=draw(NUMBERS),
        uncond=draw(NUMBERS),
    )


@settings(max_examples=60, deadline=None)
@given(weights())
def test_what_is_printed_reads_back_to_an_equal_object(weight: AdapterWeight) -> None:
    assert parse_weight(str(weight)) == weight
    assert as_weight(simplest(weight)) == weight


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("0.8", AdapterWeight(0.8)),
        ("-.25", AdapterWeight(-0.25)),
        ("0@0,0.8@0.4", AdapterWeight(curve=((0.0, 0.0), (0.4, 0.8)))),
        ("0.5:curve=0@0,1@1", AdapterWeight(0.5, curve=((0.0, 0.0), (1.0, 1.0)))),
        ("0.8:lbw=OUTALL:start=5:stop=20", AdapterWeight(0.8, blocks=(("BASE", 1), ("OUT*", 1)), start=5, stop=20)),
        ("0.8:OUTALL", AdapterWeight(0.8, blocks=(("BASE", 1), ("OUT*", 1)))),
        ("1:step=5-20", AdapterWeight(start=5, stop=20)),
        ("0.5:0.8", AdapterWeight(0.8, text=0.5)),
        # A1111: a number given for the text encoders counts for the U-Net too, unless that has its own.
        ("te=0.5", AdapterWeight(0.5)),
        ("0.8:te=0.5", AdapterWeight(0.5)),
        ("0.8:unet=0.5", AdapterWeight(0.5, text=0.8)),
        ("1:blocks=IN*=0.5,up_blocks.1.*=2", AdapterWeight(blocks=(("IN*", 0.5), ("up_blocks.1.*", 2.0)))),
        ("1:images=0,0.5,1:cond=1:uncond=-1", AdapterWeight(images=(0.0, 0.5, 1.0), uncond=-1.0)),
        ("1:lbw=" + ",".join("1" * 17), AdapterWeight(blocks=tuple((block, 1.0) for block in BLOCKS[17]))),
    ],
)
def test_each_dialect_parses_to_the_same_kind_of_object(text: str, weight: AdapterWeight) -> None:
    assert parse_weight(text) == weight


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loud", "'loud' is not a number"),
        ("", "'' is not a number"),
        ("nan", "finite"),
        ("1:images=1,inf", "finite"),
        ("0.8@0.4,0@0", "in order"),
        ("0@0,1@0", "in order"),
        ("1@5", "shares of the steps"),
        ("1:curve=0.5", "no curve"),
        ("1:start=5:stop=5", "stop after start"),
        ("1:start=-1", "whole number"),
        ("1:start=0.4", "whole number"),
        ("1:step=5", "two numbers"),
        ("1:lbw=OUTSIDE", "No preset .* 'OUTSIDE'"),
        ("1:lbw=1,0,1", "12, 17, 20 or 26 numbers, not 3"),
        ("1:lbw=IN 04=1", "names no block"),
        ("1:dyn=8", "no field called 'dyn'"),
        ("1:te=1:te=2", "twice"),
        ("1:2:3", "at most two numbers"),
    ],
)
def test_what_means_nothing_is_refused_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        parse_weight(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [True, float("inf"), None, {"unet": 1.0}])
def test_only_finite_numbers_are_weights(value: object) -> None:
    with pytest.raises(AdapterError, match="finite"):
        as_weight(value)


def stability_block(path: str) -> str:
    """The block's name from Stability's own module names, which the adapter file tables know independently."""
    side, _, index = to_stability(path).split("_")[:3]
    return {"input": "IN", "middle": "M", "output": "OUT"}[side] + ("00" if side == "middle" else f"{int(index):02d}")


@pytest.mark.parametrize("build", [tiny_sd1, tiny_sdxl])
def test_every_layer_of_the_unet_is_in_the_block_that_stability_numbers_so(build) -> None:
    unet: UNet2DConditionModel = build().unet
    seen = set()
    for path, module in unet.named_modules():
        if path.startswith(("down_blocks", "mid_block", "up_blocks")) and getattr(module, "weight", None) is not None:
            if "norm" in path.split(".")[-1]:
                continue
            assert block_of("unet", path) == stability_block(path), path
            seen.add(block_of("unet", path))
    expected = BLOCKS[26 if len(unet.config.block_out_channels) == 4 else 20]
    assert seen == set(expected) - {"BASE", "IN00"}
    assert block_of("unet", "conv_in") == "IN00"
    assert block_of("unet", "time_embedding.linear_1") == block_of("text_encoder", "text_model.x") == "BASE"


def test_the_lists_of_attention_blocks_are_those_with_attention() -> None:
    for build, count in ((tiny_sd1, 17), (tiny_sdxl, 12)):
        paths = [path for path, _ in build().unet.named_modules() if path.endswith("attn2.to_k")]
        assert {"BASE", *(block_of("unet", path) for path in paths)} == set(BLOCKS[count])


def test_the_last_matching_pattern_counts_and_what_none_matches_is_off() -> None:
    weight = AdapterWeight(
        2.0, text=3.0, blocks=(("OUT*", 0.5), ("up_blocks.1.*attn2*", 0.25), ("text_encoder_2.*", 1))
    )
    assert weight.of_layer("unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k") == 1.0
    assert weight.of_layer("unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k") == 0.5
    assert weight.of_layer("unet", "mid_block.attentions.0.proj_in") == 0.0
    assert weight.of_layer("text_encoder", "text_model.encoder.layers.0.mlp.fc1") == 0.0
    assert weight.of_layer("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1") == 3.0


def test_presets_are_those_of_the_lists_that_lora_block_weight_brings() -> None:
    """Its own lists of 17, written out: BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 ... OUT11."""
    lists = {
        "INS": "11110000000000000",
        "IND": "10001110000000000",
        "INALL": "11111110000000000",
        "MIDD": "10001111111100000",
        "OUTD": "10000000111100000",
        "OUTS": "10000000000011111",
        "OUTALL": "10000000111111111",
    }
    places = {"BASE": ("text_encoder", "text_model.x"), "M00": ("unet", "mid_block.attentions.0.x")}
    for number in range(12):
        level, layer = divmod(number - 1, 3)
        places[f"IN{number:02d}"] = ("unet", f"down_blocks.{level}.attentions.{layer}.x")
        level, layer = divmod(number, 3)
        places[f"OUT{number:02d}"] = ("unet", f"up_blocks.{level}.attentions.{layer}.x")
    for name, digits in lists.items():
        weight = AdapterWeight(blocks=PRESETS[name])
        assert [weight.of_layer(*places[block]) for block in BLOCKS[17]] == [float(digit) for digit in digits], name


def test_a_curve_is_straight_between_its_points_and_level_outside() -> None:
    weight = parse_weight("0.2@0.2,1@0.6")
    assert [weight.of_share(share) for share in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([0.2, 0.2, 0.6, 1.0, 1.0])
    assert [weight.of_step(step, 6) for step in range(6)] == pytest.approx([0.2, 0.2, 0.6, 1.0, 1.0, 1.0])
    assert weight.of_step(0, 1) == pytest.approx(0.2)


def test_start_and_stop_count_steps_from_0() -> None:
    weight = parse_weight("1:start=2:stop=4")
    assert [weight.of_step(step, 6) for step in range(6)] == [0, 0, 1, 1, 0, 0]


def test_the_weight_of_one_image_is_what_it_would_be_drawn_with_alone() -> None:
    weight = parse_weight("0.5:0.8:images=0.5,2:start=3")
    assert weight.of_image(1) == parse_weight("1:1.6:start=3")
    assert AdapterWeight(0.3).of_image(5) == AdapterWeight(0.3)
