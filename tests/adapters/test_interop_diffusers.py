"""Our files in plain diffusers: `load_lora_weights` and nothing else must draw what the stack draws."""

from __future__ import annotations

import pytest
import torch

from sdlora.adapter_file import write_adapter
from sdlora.stack import AdapterStack
from tests.tiny import tiny_sd1, tiny_sd2, tiny_sdxl

from .builders import METADATA, TEXT, difference, draw, random_pairs

# fp32 on both sides, the same stored numbers, another order of additions; each test asserts a far larger effect.
SAME = 1e-4


def both_ways(build, path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(base, ours, plain diffusers), each on its own pipeline."""
    ours, theirs = build(), build()
    base = draw(ours)
    AdapterStack(ours).load(path)
    theirs.load_lora_weights(str(path))
    return base, draw(ours), draw(theirs)


@pytest.mark.parametrize(("dtype", "alpha"), [(torch.float16, 1.0), (torch.bfloat16, 4.0), (torch.float32, 7.0)])
def test_an_sd1_file_draws_the_same_in_diffusers(tmp_path, dtype, alpha) -> None:
    pairs = random_pairs(tiny_sd1().unet, rank=4, alpha=alpha)
    path = write_adapter(tmp_path / "ink.safetensors", pairs, family="sd1", metadata=METADATA, dtype=dtype)
    base, ours, theirs = both_ways(tiny_sd1, path)
    assert difference(ours, theirs) < SAME
    assert difference(ours, base) > 0.02


def test_an_sd1_file_with_text_encoder_and_feed_forward_draws_the_same_in_diffusers(tmp_path) -> None:
    pipeline = tiny_sd1()
    unet = random_pairs(
        pipeline.unet, targets=("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ff.net.0.proj", "ff.net.2")
    )
    text = random_pairs(pipeline.text_encoder, targets=TEXT)
    path = tmp_path / "ink.safetensors"
    write_adapter(path, unet, family="sd1", metadata=METADATA, text_encoder=text)
    base, ours, theirs = both_ways(tiny_sd1, path)
    assert difference(ours, theirs) < SAME
    assert difference(ours, base) > 0.05


def test_an_sd2_file_draws_the_same_in_diffusers(tmp_path) -> None:
    pairs = random_pairs(tiny_sd2().unet, targets=("attn2.to_k", "attn2.to_v", "proj_in"))
    path = write_adapter(tmp_path / "ink.safetensors", pairs, family="sd2", metadata=METADATA)
    base, ours, theirs = both_ways(tiny_sd2, path)
    assert difference(ours, theirs) < SAME
    assert difference(ours, base) > 0.02


def test_an_sdxl_file_with_both_text_encoders_draws_the_same_in_diffusers(tmp_path) -> None:
    pipeline = tiny_sdxl()
    targets = ("attn1.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "proj_in")
    unet = random_pairs(pipeline.unet, targets=targets, strength=0.2)
    text, text_2 = (random_pairs(model, targets=TEXT) for model in (pipeline.text_encoder, pipeline.text_encoder_2))
    path = tmp_path / "xl.safetensors"
    write_adapter(path, unet, family="sdxl", metadata=METADATA, text_encoder=text, text_encoder_2=text_2)
    base, ours, theirs = both_ways(tiny_sdxl, path)
    assert difference(ours, theirs) < SAME
    assert difference(ours, base) > 0.05
