"""Where the LoRA goes, how it starts, and that it leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch

from sdlora.errors import NothingToTrainError
from sdlora.lora import (
    PRESETS,
    attach_lora,
    detach_lora,
    lora_pairs,
    target_modules,
    trainable_parameters,
    trainable_share,
)
from tests.tiny import CROSS_ATTENTION_DIM, tiny_sd1, tiny_sdxl

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ENDINGS = {
    "cross-attention": [f".attn2.{part}" for part in ATTENTION],
    "attention": [f".{attention}.{part}" for attention in ("attn1", "attn2") for part in ATTENTION],
    "attention+ff": [
        *(f".{attention}.{part}" for attention in ("attn1", "attn2") for part in ATTENTION),
        ".ff.net.0.proj",
        ".ff.net.2",
    ],
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("name", "num_blocks"), [("sd1", 16), ("sdxl", 70)])
def test_a_preset_reaches_every_transformer_block(preset: str, name: str, num_blocks: int) -> None:
    """SD 1.x has 16 transformer blocks and SDXL 70, as the published models."""
    unet = {"sd1": tiny_sd1, "sdxl": tiny_sdxl}[name]().unet
    modules = target_modules(unet, preset)
    assert len(modules) == num_blocks * len(ENDINGS[preset])
    assert all(any(module.endswith(ending) for ending in ENDINGS[preset]) for module in modules)


def test_exactly_the_targets_are_trainable() -> None:
    unet = tiny_sd1().unet
    modules = attach_lora(unet, adapter_name="ink", rank=4)
    trainable = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{module}.lora_{half}.ink.weight" for module in modules for half in "AB"}
    count, share = trainable_share(unet)
    layers = dict(tiny_sd1().unet.named_modules())
    assert count == sum(4 * (layers[name].in_features + layers[name].out_features) for name in modules)
    assert share == pytest.approx(count / sum(parameter.numel() for parameter in tiny_sd1().unet.parameters()))


def test_own_patterns_match_whole_paths_or_their_ends() -> None:
    unet = tiny_sd1().unet
    assert target_modules(unet, ["mid_block.*.attn2.to_k"]) == (
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    )
    assert target_modules(unet, ["attn2.to_k"]) == target_modules(unet, ["*.attn2.to_k"])
    assert target_modules(unet, ["conv_in"]) == ("conv_in",)


@pytest.mark.parametrize("patterns", [["*.attn3.*", "*.attn2.to_q"], ["mid_block"], []])
def test_a_pattern_that_matches_no_layer_is_named(patterns: list[str]) -> None:
    with pytest.raises(NothingToTrainError) as caught:
        attach_lora(tiny_sd1().unet, adapter_name="ink", rank=4, targets=patterns)
    assert set(caught.value.targets) == set(patterns) - {"*.attn2.to_q"}


@torch.no_grad()
def test_a_new_lora_changes_nothing() -> None:
    unet, inputs = tiny_sd1().unet, (torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.ones(1, 77, 32))
    before = unet(*inputs).sample
    attach_lora(unet, adapter_name="ink", rank=4)
    assert torch.equal(unet(*inputs).sample, before)


def test_the_start_is_kaiming_uniform_and_depends_on_the_seed_alone() -> None:
    def start(seed: int, global_seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(global_seed)
        unet = tiny_sd1().unet
        attach_lora(unet, adapter_name="ink", rank=8, seed=seed)
        return {path: pair.down for path, pair in lora_pairs(unet, "ink").items()}

    first, again, other = start(0, 1), start(0, 2), start(1, 1)
    assert all(torch.equal(first[path], again[path]) for path in first)
    assert not any(torch.equal(first[path], other[path]) for path in first)
    for path, down in first.items():
        bound = 1 / math.sqrt(down.shape[1])
        assert down.abs().max() <= bound, path
        # Standard deviation of a uniform distribution on +-bound; 8 x 32 values or more.
        assert down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)


def test_attaching_leaves_the_global_generator_alone() -> None:
    unet = tiny_sd1().unet
    before = torch.get_rng_state()
    attach_lora(unet, adapter_name="ink", rank=4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_lora_is_fp32_whatever_the_base_is(dtype: torch.dtype) -> None:
    unet = torch.nn.Module.to(tiny_sd1().unet, dtype)
    attach_lora(unet, adapter_name="ink", rank=4)
    assert {parameter.dtype for parameter in trainable_parameters(unet)} == {torch.float32}
    assert {parameter.dtype for parameter in unet.parameters() if not parameter.requires_grad} == {dtype}


def test_pairs_have_the_shapes_and_the_alpha_of_the_layers() -> None:
    unet = tiny_sd1().unet
    attach_lora(unet, adapter_name="ink", rank=4, alpha=2.0)
    pair = lora_pairs(unet, "ink")["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"]
    assert pair.down.shape == (4, CROSS_ATTENTION_DIM["sd1"])
    assert pair.up.shape == (64, 4)
    assert (pair.alpha, pair.scale) == (2.0, 0.5)


def test_pairs_are_copies() -> None:
    unet = tiny_sd1().unet
    attach_lora(unet, adapter_name="ink", rank=4)
    pairs = lora_pairs(unet, "ink")
    with torch.no_grad():
        trainable_parameters(unet)[0].fill_(7.0)
    assert not any((pair.down == 7.0).all() for pair in pairs.values())


def test_detaching_gives_the_base_back() -> None:
    unet, untouched = tiny_sd1().unet, tiny_sd1().unet
    attach_lora(unet, adapter_name="ink", rank=4)
    detach_lora(unet)
    assert {name: type(module) for name, module in unet.named_modules()} == {
        name: type(module) for name, module in untouched.named_modules()
    }
    state, expected = unet.state_dict(), untouched.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    attach_lora(unet, adapter_name="ink", rank=2)


def test_a_second_lora_is_refused() -> None:
    unet = tiny_sd1().unet
    attach_lora(unet, adapter_name="ink", rank=4)
    with pytest.raises(ValueError, match="already"):
        attach_lora(unet, adapter_name="pen", rank=4)
