"""Ways to put adapters together, each against its formula on weights merged by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sdlora.adapter_file import LoraPair
from sdlora.errors import AdapterError
from sdlora.stack import AdapterStack
from tests.adapters.builders import TEXT, difference, hand_merged, random_pairs, write
from tests.adapters.test_varying import EFFECT, SAME, by_hand, inputs, make, row, unet

Pairs = dict[str, LoraPair]


def attention(pipeline, seed: int, **options: object) -> Pairs:
    return random_pairs(pipeline.unet, seed=seed, targets=("attn2.to_k", "attn1.to_q"), **options)


def test_orthogonal_takes_from_each_adapter_what_lies_in_the_output_space_of_those_before(sd1, tmp_path) -> None:
    first, second, third = (attention(sd1, seed, rank=3) for seed in range(3))
    # The third repeats a direction of the second, so that a basis of the two is not one of independent columns.
    third = {p: dataclasses.replace(pair, up=second[p].up.roll(1, dims=1)) for p, pair in third.items()}
    values = inputs(sd1, 1)

    def projected(pair: LoraPair, *before: LoraPair) -> LoraPair:
        columns = torch.cat([other.up for other in before], dim=1).double()
        up = pair.up.double()
        return dataclasses.replace(pair, up=(up - columns @ torch.linalg.lstsq(columns, up).solution).float())

    second_left = {path: projected(pair, first[path]) for path, pair in second.items()}
    truth = unet(by_hand(sd1, [first, second_left], [0.7, 1.2]), values)
    plain = unet(by_hand(sd1, [first, second], [0.7, 1.2]), values)
    stack = make(sd1, tmp_path, first, second, third)
    stack.set_adapters(["a0", "a1", "a2"], [0.7, 1.2, 5])
    stack.set_method("orthogonal")
    assert difference(unet(sd1, values), truth) < SAME  # nothing of the third is left
    with stack.applied() as mode:
        assert mode == "merged"
        assert difference(unet(sd1, values), truth) < SAME
    assert difference(plain, truth) > 500 * SAME
    stack.set_method("sum")
    stack.set_adapters(["a0", "a1"], [0.7, 1.2])
    assert difference(unet(sd1, values), plain) < SAME


def test_switch_has_one_adapter_in_a_step_in_turn(sd1, tmp_path) -> None:
    adapters, values = [attention(sd1, seed) for seed in range(2)], inputs(sd1, 1)
    sd1.scheduler.set_timesteps(6)
    sd1.scheduler.timesteps = torch.tensor([505.0, 504, 503, 502, 501, 500])
    merged = [by_hand(sd1, [pairs], [weight]) for pairs, weight in zip(adapters, (0.9, 0.6), strict=True)]
    truth = [[unet(pipeline, values, time) for pipeline in merged] for time in (505, 503)]
    stack = make(sd1, tmp_path, *adapters)
    stack.set_adapters(["a0", "a1"], [0.9, 0.6])
    stack.set_method("switch")
    with stack.applied() as mode:
        assert mode == "live"
        assert difference(unet(sd1, values, 505), truth[0][0]) < SAME
        assert difference(unet(sd1, values, 503), truth[1][0]) < SAME
    stack.set_method("switch:2")
    assert difference(unet(sd1, values, 503), truth[1][1]) < SAME
    assert difference(truth[1][0], truth[1][1]) > EFFECT
    stack.set_adapters(["a1", "a0"], [0.6, 0.9])
    assert difference(unet(sd1, values, 505), truth[0][1]) < SAME


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_composite_is_the_mean_of_what_each_adapter_predicts(request, tmp_path, family) -> None:
    pipeline = request.getfixturevalue(family)
    adapters, values = [attention(pipeline, seed) for seed in range(2)], inputs(pipeline, 2)
    alone = [unet(by_hand(pipeline, [pairs], [w]), values) for pairs, w in zip(adapters, (0.9, -0.5), strict=True)]
    stack = make(pipeline, tmp_path, *adapters, family=family)
    stack.set_adapters(["a0", "a1"], [0.9, -0.5])
    stack.set_method("composite")
    assert difference(unet(pipeline, values), (alone[0] + alone[1]) / 2) < SAME
    with torch.no_grad():
        as_tuple = pipeline.unet(timestep=500, return_dict=False, **values)[0]
    assert difference(as_tuple, (alone[0] + alone[1]) / 2) < SAME
    stack.set_weight("a0", "1:images=0,0.9")
    mixed = torch.cat([unet(pipeline_off(stack, pipeline), row(values, 0)), alone[0][1:]])
    assert difference(unet(pipeline, values), (mixed + alone[1]) / 2) < SAME


def pipeline_off(stack: AdapterStack, pipeline):
    """A copy of the base, without the stack's hooks."""
    stack.disable()
    base = hand_merged(pipeline)
    stack.enable()
    return base


def test_k_lora_takes_content_or_style_in_each_layer_by_its_largest_entries(sd1, tmp_path) -> None:
    content, style = attention(sd1, 1, rank=4), attention(sd1, 2, rank=2, alpha=1.0)
    # Layers of every ratio, so that both are chosen at every step.
    for number, pair in enumerate(style.values()):
        pair.up.mul_(0.2 + 0.1 * number)
    weights, values = (0.9, 0.6), inputs(sd1, 1)

    def changes(pairs: Pairs, weight: float) -> dict[str, torch.Tensor]:
        return {p: (weight * pair.alpha / len(pair.down) * pair.up @ pair.down).abs() for p, pair in pairs.items()}

    both = [changes(content, weights[0]), changes(style, weights[1])]
    gamma = sum(c.sum() for c in both[0].values()) / sum(c.sum() for c in both[1].values())
    sd1.scheduler.set_timesteps(5)
    times, taken = sd1.scheduler.timesteps, []
    stack = make(sd1, tmp_path, content, style)
    truth = []
    base = pipeline_off(stack, sd1)
    for step in (0, 2, 4):
        scale = 1.5 * step / 4 + 0.5
        parts = []
        for path in content:
            largest = [torch.sort(c[path].flatten(), descending=True).values[: 4 * 2].sum() for c in both]
            is_content = largest[0] / gamma > largest[1] * scale
            taken.append((step, bool(is_content)))
            pairs, weight = (content, weights[0]) if is_content else (style, weights[1])
            parts.append(("unet", {path: pairs[path]}, weight))
        truth.append(unet(hand_merged(base, *parts), values, times[step]))
    assert {(step, chosen) for step in (0, 2, 4) for chosen in (True, False)} == set(taken)
    stack.set_adapters(["a0", "a1"], list(weights))
    stack.set_method("k-lora")
    for step, expected in zip((0, 2, 4), truth, strict=True):
        assert difference(unet(sd1, values, times[step]), expected) < SAME


def test_a_method_that_cannot_be_used_is_refused_and_changes_nothing(sd1, tmp_path) -> None:
    stack = make(sd1, tmp_path, *(attention(sd1, seed) for seed in range(3)))
    for text in ("average", "switch:0", "switch:x", "sum:2", ""):
        with pytest.raises(AdapterError, match="No method is called"):
            stack.set_method(text)
    with pytest.raises(AdapterError, match="exactly two adapters together, first content, then style; 3 are on"):
        stack.set_method("k-lora")
    assert stack.method == "sum" and stack.mode == "live"
    stack.set_method("switch")
    with pytest.raises(AdapterError, match="cannot be merged"), stack.merged():
        pytest.fail("entered")
    state = stack.state()
    stack.set_method("sum")
    stack.restore(state)
    assert stack.method == "switch"


def test_text_encoders_get_the_sum_where_steps_are_what_differs(sd1, tmp_path) -> None:
    stack, ids = AdapterStack(sd1), torch.arange(77)[None]
    texts = [random_pairs(sd1.text_encoder, seed=seed, targets=TEXT) for seed in range(2)]
    with torch.no_grad():
        truth = hand_merged(sd1, *(("text_encoder", text, 1.0) for text in texts)).text_encoder(ids).last_hidden_state
        for seed, text in enumerate(texts):
            stack.load(write(tmp_path / f"{seed}.safetensors", attention(sd1, seed), text_encoder=text))
        stack.set_method("switch")
        assert difference(sd1.text_encoder(ids).last_hidden_state, truth) < SAME
