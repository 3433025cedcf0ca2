"""Thrift changes how, not what: tiles, slices, offloading, compiling; a VAE that overflows is helped and told of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sdlora.errors import GenerationError
from sdlora.generation import Generator, Thrift
from sdlora.generation.memory import apply_thrift, check_thrift, offloaded
from sdlora.request import GenerationRequest
from tests.adapters.builders import random_pairs, write
from tests.tiny import tiny_sd1

REQUEST = GenerationRequest(prompt="a fox", num_inference_steps=2, guidance_scale=3.0)


@pytest.fixture
def pipeline():
    return tiny_sd1()


def pixels(picture: object) -> np.ndarray:
    return np.asarray(picture.image).astype(int)


def test_slices_draw_the_same_and_tiles_nearly(pipeline) -> None:
    request = dataclasses.replace(REQUEST, num_images=2, batch_size=2)
    plain = list(Generator(pipeline).draw(request))
    apply_thrift(pipeline, Thrift(vae_slicing=True))
    sliced = list(Generator(pipeline).draw(request))
    assert all(np.abs(pixels(a) - pixels(b)).max() <= 1 for a, b in zip(plain, sliced, strict=True))
    apply_thrift(pipeline, Thrift(vae_tiling=True))
    pipeline.vae.tile_latent_min_size, pipeline.vae.tile_sample_min_size = 4, 32
    tiled = list(Generator(pipeline).draw(request))
    assert tiled[0].recipe.vae_tiling and not plain[0].recipe.vae_tiling
    assert 0 < np.abs(pixels(tiled[0]) - pixels(plain[0])).mean() < 40


def test_offloading_draws_the_same_with_a_stack_and_leaves_no_hook(pipeline, tmp_path) -> None:
    # The CPU stands for the GPU: every model still goes through the hooks of accelerate.
    generator = Generator(pipeline)
    generator.stack.load(write(tmp_path / "ink.safetensors", random_pairs(pipeline.unet)))
    before = generator.stack.base_checksum()
    plain = next(generator.draw(REQUEST))
    generator._thrift = Thrift(offload="model")
    drawn = next(generator.draw(REQUEST))
    assert np.array_equal(pixels(plain), pixels(drawn))
    assert generator.stack.base_checksum() == before
    modules = [*pipeline.unet.modules(), *pipeline.vae.modules(), *pipeline.text_encoder.modules()]
    assert not any(hasattr(module, "_hf_hook") for module in modules)
    with offloaded(pipeline, "model", torch.device("cpu")):
        assert hasattr(pipeline.unet, "_hf_hook")


@pytest.mark.parametrize(
    ("thrift", "device"),
    [
        (Thrift(offload="model"), "cpu"),
        (Thrift(offload="everything"), "cuda"),
        (Thrift(offload="model", compile=True), "cuda"),
        (Thrift(attention="xformers"), "cpu"),
        (Thrift(attention="magic"), "cpu"),
    ],
    ids=str,
)
def test_what_the_machine_cannot_do_is_one_sentence(thrift: Thrift, device: str) -> None:
    with pytest.raises(GenerationError) as caught:
        check_thrift(thrift, torch.device(device))
    assert "\n" not in str(caught.value)


@pytest.fixture
def overflowing(pipeline) -> Iterator[object]:
    """A VAE whose first activations are too large for fp16, and harmless in fp32: a norm follows."""
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight.mul_(1e5)
    return pipeline


def test_a_vae_that_overflows_in_fp16_is_asked_again_in_fp32(overflowing) -> None:
    expected = next(Generator(overflowing).draw(REQUEST))
    overflowing.vae.to(torch.float16)
    halves = {name: tensor.clone() for name, tensor in overflowing.vae.state_dict().items()}
    # The pipelines hand latents of the U-Net's format to the VAE.
    overflowing.vae.register_forward_pre_hook(lambda module, inputs: inputs)
    decode = overflowing.vae.decode
    overflowing.vae.decode = lambda latents, **options: decode(latents.to(overflowing.vae.dtype), **options)
    told: list[str] = []
    drawn = next(Generator(overflowing, warn=told.append).draw(REQUEST))
    assert len(told) == 1 and "overflowed in float16" in told[0]
    assert np.abs(pixels(drawn) - pixels(expected)).max() <= 2
    assert overflowing.vae.dtype == torch.float16
    assert all(torch.equal(halves[name], tensor) for name, tensor in overflowing.vae.state_dict().items())


def test_nan_of_the_unet_is_told_from_nan_of_the_vae(pipeline) -> None:
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(GenerationError, match="the U-Net overflowed"):
        next(Generator(pipeline).draw(REQUEST))


def test_a_black_picture_is_told(pipeline) -> None:
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.zero_()
        pipeline.vae.decoder.conv_out.bias.fill_(-2.0)
    told: list[str] = []
    assert pixels(next(Generator(pipeline, warn=told.append).draw(REQUEST))).max() == 0
    assert told == ["The picture of seed 0 is all black."]


@pytest.mark.slow
def test_other_weights_compile_nothing_anew(pipeline, tmp_path) -> None:
    from torch._dynamo.utils import counters

    generator = Generator(pipeline)
    for seed, name in enumerate(("ink", "blob")):
        generator.stack.load(write(tmp_path / f"{name}.safetensors", random_pairs(pipeline.unet, seed=seed)))
    expected = next(generator.draw(REQUEST))
    torch._dynamo.reset()
    counters.clear()
    # The kernels are the same for every backend's counting; eager ones need no compiler.
    pipeline.unet.compile(backend="eager")
    compiled = next(generator.draw(REQUEST))
    first = counters["stats"]["unique_graphs"]
    assert first > 0 and np.abs(pixels(compiled) - pixels(expected)).max() <= 1
    for weights in ([0.3, 0.5], [1.0, 0.0], [-0.5, 2.0]):
        generator.stack.set_adapters(["ink", "blob"], weights)
        next(generator.draw(REQUEST))
    assert counters["stats"]["unique_graphs"] == first


@pytest.mark.cuda
@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloading_on_a_gpu_draws_what_the_gpu_draws(offload, tmp_path) -> None:
    plain = next(Generator.from_base("tiny", device="cuda").draw(REQUEST))
    generator = Generator.from_base("tiny", device="cuda", thrift=Thrift(offload=offload))
    drawn = next(generator.draw(REQUEST))
    assert np.abs(pixels(plain) - pixels(drawn)).max() <= 2
    assert generator.pipeline.unet.device.type == "cpu"
