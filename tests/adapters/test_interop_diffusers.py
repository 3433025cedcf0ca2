"""Our files in plain diffusers: `load_lora_weights` and nothing else must draw what the stack draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sdlora.adapter_file import read_adapter, write_adapter
from sdlora.stack import AdapterStack
from tests.tiny import tiny_sd1, tiny_sd2, tiny_sdxl

from .builders import METADATA, TEXT, difference, draw, kohya_tensors, predict, random_pairs, save

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


def test_ranks_that_differ_from_layer_to_layer_draw_the_same_in_diffusers(tmp_path) -> None:
    """With an alpha for each rank, diffusers would scale attention layers by the most frequent alpha."""
    unet = tiny_sd1().unet
    pairs = random_pairs(unet, rank=4) | {
        path: pair for path, pair in random_pairs(unet, rank=2, seed=1).items() if path.startswith("up_blocks.")
    }
    stored = write_adapter(tmp_path / "ink.safetensors", pairs, family="sd1", metadata=METADATA)
    read = read_adapter(stored).unet
    assert {(pair.rank, pair.alpha) for pair in read.values()} == {(4, 2.0), (2, 2.0)}
    base, ours, theirs = both_ways(tiny_sd1, stored)
    assert difference(ours, theirs) < SAME
    assert difference(ours, base) > 0.02
    each_its_own = {path: replace(pair, up=pair.up * pair.scale, alpha=pair.rank) for path, pair in read.items()}
    pipeline = tiny_sd1()
    pipeline.load_lora_weights(save(tmp_path / "own.safetensors", kohya_tensors(each_its_own)))
    assert difference(draw(pipeline), theirs) > 0.02


@torch.no_grad()
def test_dora_has_no_file_that_plain_diffusers_draws_right(tmp_path) -> None:
    """What is said of DoRA (arXiv 2402.09353) before a run: W' = m (W + BA) / |W + BA| is no change of low rank, and
    the names that files have for m, `dora_scale`, are dropped on loading; the rest is drawn as plain LoRA."""
    pairs = random_pairs(tiny_sd1().unet, rank=4, alpha=4.0)
    tensors, truth = kohya_tensors(pairs), tiny_sd1()
    for path, pair in pairs.items():
        layer = truth.unet.get_submodule(path)
        before, moved = layer.weight.clone(), layer.weight + pair.up @ pair.down
        magnitude = torch.linspace(0.5, 1.5, len(moved))[:, None] * moved.norm(dim=1, keepdim=True)
        layer.weight.copy_(magnitude * moved / moved.norm(dim=1, keepdim=True))
        tensors[f"lora_unet_{path.replace('.', '_')}.dora_scale"] = magnitude
        assert torch.linalg.matrix_rank(layer.weight - before) > 7 * pair.rank
    theirs, plain = tiny_sd1(), tiny_sd1()
    theirs.load_lora_weights(save(tmp_path / "dora.safetensors", tensors))
    plain.load_lora_weights(save(tmp_path / "plain.safetensors", kohya_tensors(pairs)))
    assert difference(predict(theirs), predict(plain)) < 1e-5
    assert difference(predict(theirs), predict(truth)) > 0.02
