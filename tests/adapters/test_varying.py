"""Weights that vary, against weights merged by hand for each step, image and branch.

Tolerance: as in test_stack.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from sdlora.adapter_file import LoraPair
from sdlora.adapter_weight import parse_weight
from sdlora.errors import AdapterError
from sdlora.stack import AdapterStack

from .builders import TEXT, difference, hand_merged, random_pairs, write
from .test_stack import count_calls

SAME = 1e-5
EFFECT = 0.02
FAMILIES = ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)]


@pytest.fixture
def pipeline(request):
    return request.getfixturevalue(request.param)


def inputs(pipeline, rows: int) -> dict[str, object]:
    """Arguments of the U-Net for a batch; every row another."""
    generator = torch.Generator().manual_seed(3)
    width = pipeline.unet.config.cross_attention_dim
    values: dict[str, object] = {
        "sample": torch.randn(rows, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(rows, 77, width, generator=generator),
    }
    if width == 64:
        pooled = torch.randn(rows, 32, generator=generator)
        values["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.full((rows, 6), 64.0)}
    return values


def row(values: dict[str, object], index: int) -> dict[str, object]:
    def cut(value: object) -> object:
        return {k: cut(v) for k, v in value.items()} if isinstance(value, dict) else value[index : index + 1]

    return {name: cut(value) for name, value in values.items()}


@torch.no_grad()
def unet(pipeline, values: dict[str, object], timestep: object = 500) -> torch.Tensor:
    return pipeline.unet(timestep=timestep, **values).sample


def make(pipeline, tmp_path, *adapters: dict[str, LoraPair], family: str = "sd1") -> AdapterStack:
    stack = AdapterStack(pipeline)
    for number, pairs in enumerate(adapters):
        stack.load(write(tmp_path / f"a{number}.safetensors", pairs, family=family))
    return stack


def two(pipeline) -> list[dict[str, LoraPair]]:
    ink = random_pairs(pipeline.unet, seed=1, rank=4, alpha=2.0)
    return [ink, random_pairs(pipeline.unet, seed=2, rank=3, alpha=6.0, targets=("attn1.to_q", "attn2.to_k"))]


def by_hand(pipeline, adapters: Sequence[dict[str, LoraPair]], weights: Sequence[float]):
    return hand_merged(pipeline, *(("unet", pairs, weight) for pairs, weight in zip(adapters, weights, strict=True)))


@pytest.mark.parametrize("pipeline", FAMILIES, indirect=True)
def test_a_curve_and_a_window_of_steps_equal_hand_merged_weights_at_every_step(pipeline, tmp_path) -> None:
    adapters, values = two(pipeline), inputs(pipeline, 1)
    pipeline.scheduler.set_timesteps(5)
    times = list(pipeline.scheduler.timesteps)
    # Shares of the five steps: 0, 0.25, 0.5, 0.75, 1.
    expected = [(0.0, -0.5), (0.4, -0.5), (0.8, -0.5), (0.8, 0.0), (0.8, 0.0)]
    truth = [unet(by_hand(pipeline, adapters, pair), values, time) for pair, time in zip(expected, times, strict=True)]
    stack = make(pipeline, tmp_path, *adapters, family="sdxl" if pipeline.unet.config.addition_embed_type else "sd1")
    stack.set_adapters(["a0", "a1"], ["0@0,0.8@0.5", "-0.5:stop=3"])
    drawn = [unet(pipeline, values, time) for time in times]
    assert max(map(difference, drawn, truth)) < SAME
    assert difference(truth[0], truth[2]) > EFFECT


@pytest.mark.parametrize("pipeline", FAMILIES, indirect=True)
def test_each_image_and_branch_of_one_batch_equals_hand_merged_weights(pipeline, tmp_path) -> None:
    adapters, values = two(pipeline), inputs(pipeline, 6)
    # Rows: the unconditional branch of three images, then the conditional one.
    first, second = [0.0, 0.5, -1.0], [1.0, 0.2, 0.6]
    rows = [(0.8 * w * -0.5, v) for w, v in zip(first, second, strict=True)]
    rows += [(0.8 * w, v * 2.0) for w, v in zip(first, second, strict=True)]
    truth = [unet(by_hand(pipeline, adapters, weights), row(values, index)) for index, weights in enumerate(rows)]
    stack = make(pipeline, tmp_path, *adapters, family="sdxl" if pipeline.unet.config.addition_embed_type else "sd1")
    stack.set_adapters(["a0", "a1"], ["0.8:images=0,0.5,-1:uncond=-0.5", "1:images=1,0.2,0.6:cond=2"])
    pipeline._guidance_scale = 7.5
    assert difference(unet(pipeline, values), torch.cat(truth)) < SAME


def test_branches_alone_follow_the_pipelines_guidance(sd1, tmp_path) -> None:
    adapters, values = two(sd1)[:1], inputs(sd1, 4)
    base = [unet(sd1, row(values, index)) for index in range(4)]
    styled = [unet(by_hand(sd1, adapters, [1.0]), row(values, index)) for index in range(4)]
    stack = make(sd1, tmp_path, *adapters)
    stack.set_weight("a0", "1:uncond=0")
    sd1._guidance_scale = 7.5
    assert difference(unet(sd1, values), torch.cat([*base[:2], *styled[2:]])) < SAME
    sd1._guidance_scale = 1.0
    assert difference(unet(sd1, values), torch.cat(styled)) < SAME


@pytest.mark.parametrize("pipeline", FAMILIES, indirect=True)
def test_a_batch_of_pictures_with_weights_of_their_own_equals_each_drawn_alone(pipeline, tmp_path) -> None:
    """The whole way, text encoders and guidance included."""
    is_xl = pipeline.unet.config.addition_embed_type is not None
    text = random_pairs(pipeline.text_encoder, targets=TEXT)
    path = write(
        tmp_path / "ink.safetensors",
        random_pairs(pipeline.unet, seed=1),
        family="sdxl" if is_xl else "sd1",
        text_encoder=text,
    )
    stack = AdapterStack(pipeline)
    stack.load(path)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompts: list[str], noise: torch.Tensor) -> torch.Tensor:
        size = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.0}
        return pipeline(prompts, latents=noise, output_type="latent", **size).images

    together = parse_weight("0.9:0.6:images=0,1,-0.5:curve=0.5@0,1@1:uncond=0.3")
    stack.set_weight("ink", together)
    batch = draw(["a fox"] * 3, latents)
    alone = []
    for image in range(3):
        stack.set_weight("ink", together.of_image(image))
        alone.append(draw(["a fox"], latents[image : image + 1]))
    assert difference(batch, torch.cat(alone)) < SAME
    assert difference(batch[0], batch[1]) > EFFECT


def test_blocks_equal_hand_merged_weights_of_those_blocks_and_are_merged(sd1, tmp_path) -> None:
    pairs, values = random_pairs(sd1.unet, targets=None, strength=0.1), inputs(sd1, 1)

    def strength(path: str) -> float:
        return 0.5 if path.startswith("up_blocks.1") else 1.0 if path.startswith("up_blocks") else 0.0

    parts = [({path: pair}, 0.8 * strength(path)) for path, pair in pairs.items()]
    truth = unet(hand_merged(sd1, *(("unet", part, weight) for part, weight in parts)), values)
    stack = make(sd1, tmp_path, pairs)
    stack.set_weight("a0", "0.8:lbw=OUT*=1,up_blocks.1.*=0.5")
    assert difference(unet(sd1, values), truth) < SAME
    with stack.applied() as mode:
        assert mode == "merged"
        assert difference(unet(sd1, values), truth) < SAME


def test_the_text_encoders_have_a_weight_of_their_own(sd1, tmp_path) -> None:
    pairs, text = random_pairs(sd1.unet), random_pairs(sd1.text_encoder, targets=TEXT)
    ids = torch.arange(77)[None]
    with torch.no_grad():
        truth = hand_merged(sd1, ("text_encoder", text, 0.25)).text_encoder(ids).last_hidden_state
        stack = AdapterStack(sd1)
        stack.load(write(tmp_path / "ink.safetensors", pairs, text_encoder=text))
        stack.set_weight("ink", "0.25:0.8")
        assert difference(sd1.text_encoder(ids).last_hidden_state, truth) < SAME


def test_applied_takes_the_cheapest_way_that_is_exact_and_says_which(sd1, tmp_path) -> None:
    stack = make(sd1, tmp_path, *two(sd1))
    for weight, expected in (
        ("0.5", "merged"),
        ("0.5:lbw=OUTALL", "merged"),
        ("0@0,1@1", "live"),
        ("1:cond=0", "live"),
    ):
        with stack.applied({"a0": weight}) as mode:
            assert mode == stack.mode == expected
        assert stack.weights == {"a0": 1.0, "a1": 1.0}
    stack.disable()
    with stack.applied() as mode:
        assert mode == "base"


def test_what_varies_costs_the_same_for_one_adapter_and_for_four(sd1, tmp_path) -> None:
    values = inputs(sd1, 1)
    many = [random_pairs(sd1.unet, seed=seed) for seed in range(4)]
    stack = make(sd1, tmp_path, *many)
    weights = ["0@0,1@1", "0.5:start=1", "0.3", "1:cond=2"]
    stack.set_adapters(["a0"], weights[:1])
    one = count_calls(lambda: unet(sd1, values))
    stack.set_adapters(["a0", "a1", "a2", "a3"], weights)
    # Once a forward pass each adapter's factor is put in its place; in the layers nothing is added.
    assert count_calls(lambda: unet(sd1, values)) - one < 50


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_varying_weights_work_in_half_precision(sd1, tmp_path, dtype) -> None:
    adapters, values = two(sd1), inputs(sd1, 2)
    truth = torch.cat([unet(by_hand(sd1, adapters, [w, 0.5]), row(values, i)) for i, w in enumerate((0.0, 1.0))])
    base_error = difference(unet(sd1.to(dtype), {k: v.to(dtype) for k, v in values.items()}), truth)
    stack = make(sd1, tmp_path, *adapters)
    stack.set_adapters(["a0", "a1"], ["1:images=0,1", 0.5])
    drawn = unet(sd1, {k: v.to(dtype) for k, v in values.items()})
    assert drawn.dtype == dtype
    assert difference(drawn, truth) < base_error / 3


def test_batches_that_do_not_fit_the_weights_are_refused(sd1, tmp_path) -> None:
    stack = make(sd1, tmp_path, *two(sd1))
    stack.set_weight("a0", "1:images=0,1")
    with pytest.raises(AdapterError, match="Weights for 2 images of a batch are given, but the batch has 3"):
        unet(sd1, inputs(sd1, 3))
    # One image with guidance has two rows as well, and they are not two images.
    sd1._guidance_scale = 7.5
    with pytest.raises(AdapterError, match="Weights for 2 images of a batch are given, but the batch has 1"):
        unet(sd1, inputs(sd1, 2))
    with pytest.raises(AdapterError, match="One adapter has weights for 2 images of a batch, another for 3"):
        stack.set_weight("a1", "1:images=0,1,2")
    with pytest.raises(AdapterError, match=r"cannot be merged; use applied"), stack.merged():
        pytest.fail("entered")


def test_one_text_for_images_of_different_text_weights_is_refused(sd1, tmp_path) -> None:
    stack = AdapterStack(sd1)
    text = random_pairs(sd1.text_encoder, targets=TEXT)
    stack.load(write(tmp_path / "ink.safetensors", random_pairs(sd1.unet), text_encoder=text))
    stack.set_weight("ink", "1:images=0,1")
    with pytest.raises(AdapterError, match="one prompt for each image"):
        sd1("a fox", num_images_per_prompt=2, num_inference_steps=1, output_type="latent")
