"""Where the LoRA goes, how it starts, and that it leaves no trace."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from sdlora.config import LoraSettings
from sdlora.errors import ConfigError, NothingToTrainError
from sdlora.families import Components, components_from_pipeline
from sdlora.lora import (
    PRESETS,
    AdapterPlan,
    LiveAdapter,
    base_models,
    lora_pairs,
    plan_adapter,
    target_modules,
    target_patterns,
    trainable_parameters,
)
from sdlora.precision import Precision
from tests.tiny import CROSS_ATTENTION_DIM, tiny_sd1, tiny_sd2, tiny_sdxl
from tests.training.helpers import make_trainer, make_training_set

TINY = {"sd1": tiny_sd1, "sd2": tiny_sd2, "sdxl": tiny_sdxl}
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
MIDDLE = "mid_block.attentions.0.transformer_blocks.0"


def base(name: str = "sd1") -> Components:
    return components_from_pipeline(TINY[name]())


def plan(components: Components, **settings: Any) -> AdapterPlan:
    return plan_adapter(components, LoraSettings.model_validate({"rank": 4, **settings}))


def attach(components: Components, *, seed: int = 0, **settings: Any) -> LiveAdapter:
    return LiveAdapter(base_models(components), plan(components, **settings), seed=seed)


@pytest.mark.parametrize("preset", ENDINGS)
@pytest.mark.parametrize(("name", "num_blocks"), [("sd1", 16), ("sdxl", 70)])
def test_a_preset_reaches_every_transformer_block(preset: str, name: str, num_blocks: int) -> None:
    """SD 1.x has 16 transformer blocks and SDXL 70, as the published models."""
    modules = target_modules(TINY[name]().unet, PRESETS[preset])
    assert len(modules) == num_blocks * len(ENDINGS[preset])
    assert all(any(module.endswith(ending) for ending in ENDINGS[preset]) for module in modules)


@pytest.mark.parametrize(("name", "num_resnets", "num_samplers"), [("sd1", 22, 6), ("sd2", 22, 6), ("sdxl", 17, 4)])
def test_the_convolutional_preset_adds_every_convolution_but_the_first_and_last(
    name: str, num_resnets: int, num_samplers: int
) -> None:
    """SD 1.x has 8 + 2 + 12 resnets and 3 + 3 samplers, SDXL 6 + 2 + 9 and 2 + 2, as the published models."""
    unet = TINY[name]().unet
    added = set(target_modules(unet, PRESETS["attention+ff+conv"])) - set(target_modules(unet, PRESETS["attention+ff"]))
    convolutions = {path for path, module in unet.named_modules() if isinstance(module, torch.nn.Conv2d)}
    projections = {path for path, _ in unet.named_modules() if path.endswith((".proj_in", ".proj_out"))}
    assert added == (convolutions - {"conv_in", "conv_out"}) | projections
    assert sum(".conv1" in path for path in added) == num_resnets
    assert sum("samplers" in path for path in added) == num_samplers


@pytest.mark.parametrize(
    ("name", "preset", "blocks", "layers"),
    [
        ("sd1", "style-blocks", {f"up_blocks.{n}" for n in (1, 2, 3)}, 9 * 8),
        ("sd2", "style-blocks", {f"up_blocks.{n}" for n in (1, 2, 3)}, 9 * 8),
        ("sdxl", "style-blocks", {"up_blocks.0.attentions.0", "up_blocks.0.attentions.1"}, 20 * 8),
        ("sdxl", "b-lora-style", {"up_blocks.0.attentions.1"}, 10 * 8),
        ("sdxl", "b-lora-content", {"up_blocks.0.attentions.0"}, 10 * 8),
    ],
)
def test_the_presets_of_blocks_are_the_familys_own(name: str, preset: str, blocks: set[str], layers: int) -> None:
    components = base(name)
    modules = target_modules(components.unet, target_patterns(preset, components.family))
    assert len(modules) == layers
    assert {block for block in blocks for module in modules if module.startswith(f"{block}.")} == blocks
    assert all(any(module.startswith(f"{block}.") for block in blocks) for module in modules)


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_a_preset_of_another_family_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"no blocks called 'b-lora-style'\. Take one of cross-attention, .*style-blo"
    ):
        plan(base(name), targets="b-lora-style")


def test_exactly_the_targets_are_trainable() -> None:
    components = base()
    live = attach(components)
    modules = target_modules(tiny_sd1().unet, PRESETS["cross-attention"])
    trainable = {name for name, parameter in components.unet.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{module}.lora_{half}.lora.weight" for module in modules for half in "AB"}
    assert set(live.named) == {f"{module}.{half}" for module in modules for half in ("down", "up")}
    count = sum(parameter.numel() for parameter in trainable_parameters(components.unet))
    layers = dict(tiny_sd1().unet.named_modules())
    assert count == sum(4 * (layers[name].in_features + layers[name].out_features) for name in modules)


def test_own_patterns_match_whole_paths_or_their_ends() -> None:
    unet = tiny_sd1().unet
    assert target_modules(unet, ["mid_block.*.attn2.to_k"]) == (f"{MIDDLE}.attn2.to_k",)
    assert target_modules(unet, ["attn2.to_k"]) == target_modules(unet, ["*.attn2.to_k"])
    assert target_modules(unet, ["conv_in"]) == ("conv_in",)


@pytest.mark.parametrize("patterns", [["*.attn3.*", "*.attn2.to_q"], ["mid_block"], []])
def test_a_pattern_that_matches_no_layer_is_named(patterns: list[str]) -> None:
    with pytest.raises(NothingToTrainError) as caught:
        target_modules(tiny_sd1().unet, patterns)
    assert set(caught.value.targets) == set(patterns) - {"*.attn2.to_q"}


def test_the_last_row_that_matches_gives_a_layer_its_rank_and_alpha() -> None:
    rows = [
        {"match": "up_blocks.*", "rank": 8, "alpha": 2.0},
        {"match": "attn2.to_v", "rank": 3},
        {"match": "down_blocks.0.*", "rank": 0},
    ]
    components = base()
    planned = plan(components, alpha=1.0, blocks=rows).layers["unet"]
    attach(components, alpha=1.0, blocks=rows)
    pairs = lora_pairs(components.unet)
    expected = {
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (4, 1.0),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (3, 0.75),  # alpha / rank is that of the others
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (8, 2.0),
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v": (3, 0.75),
    }
    for path, (rank, alpha) in expected.items():
        assert (planned[path].rank, planned[path].alpha) == (rank, alpha)
        pair = pairs[path]
        assert (pair.rank, pair.alpha, tuple(pair.up.shape)) == (rank, alpha, (64, rank))
    assert len(pairs) == len(planned) == 64 - 8
    assert not any(path.startswith("down_blocks.0.") for path in pairs)


def test_a_row_that_matches_no_layer_is_told_and_so_is_leaving_out_everything() -> None:
    with pytest.raises(ConfigError, match=r"lora\.blocks: '\*\.attn1\.\*' matches none of the layers"):
        plan(base(), blocks=[{"match": "*.attn1.*", "rank": 2}, {"match": "mid_block.*", "rank": 2}])
    with pytest.raises(NothingToTrainError):
        plan(base(), blocks=[{"match": "*", "rank": 0}])


@pytest.mark.parametrize("rank", [4, 9])
def test_rslora_scales_as_in_peft(rank: int) -> None:
    components = base()
    live = attach(components, rank=rank, alpha=3.0, rslora=True, targets=["conv_in"])
    theirs = torch.nn.Sequential(torch.nn.Linear(3, 5))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=3, use_rslora=True, target_modules=["0"]), theirs, "x")
    assert live.scales["conv_in"] == pytest.approx(theirs[0].scaling["x"])
    pair = live.pairs()["unet"]["conv_in"]
    assert pair.scale == live.scales["conv_in"]


@torch.no_grad()
def test_a_new_lora_changes_nothing() -> None:
    components, inputs = base(), (torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.ones(1, 77, 32))
    before = components.unet(*inputs).sample
    attach(components, targets="attention+ff+conv")
    assert torch.equal(components.unet(*inputs).sample, before)


def test_the_start_is_kaiming_uniform_and_depends_on_the_seed_alone() -> None:
    def start(seed: int, global_seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(global_seed)
        pairs = attach(base(), seed=seed, rank=8, targets="attention+ff+conv").pairs()["unet"]
        return {path: pair.down for path, pair in pairs.items()}

    first, again, other = start(0, 1), start(0, 2), start(1, 1)
    assert all(torch.equal(first[path], again[path]) for path in first)
    assert not any(torch.equal(first[path], other[path]) for path in first)
    for path, down in first.items():
        bound = 1 / math.sqrt(down[0].numel())
        assert down.abs().max() <= bound, path
        # Standard deviation of a uniform distribution on +-bound; 8 x 32 values or more.
        assert down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)


def test_attaching_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    attach(base())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_lora_is_fp32_whatever_the_base_is(dtype: torch.dtype) -> None:
    components = base()
    torch.nn.Module.to(components.unet, dtype)
    attach(components)
    unet = components.unet
    assert {parameter.dtype for parameter in trainable_parameters(unet)} == {torch.float32}
    assert {parameter.dtype for parameter in unet.parameters() if not parameter.requires_grad} == {dtype}


def test_pairs_have_the_shapes_and_the_alpha_of_the_layers() -> None:
    pair = attach(base(), alpha=2.0).pairs()["unet"][f"{MIDDLE}.attn2.to_k"]
    assert pair.down.shape == (4, CROSS_ATTENTION_DIM["sd1"])
    assert pair.up.shape == (64, 4)
    assert (pair.alpha, pair.scale) == (2.0, 0.5)


def test_pairs_are_copies() -> None:
    components = base()
    pairs = attach(components).pairs()["unet"]
    with torch.no_grad():
        trainable_parameters(components.unet)[0].fill_(7.0)
    assert not any((pair.down == 7.0).all() for pair in pairs.values())


def test_detaching_gives_the_base_back() -> None:
    components, untouched = base(), tiny_sd1().unet
    unet = components.unet
    attach(components, targets="attention+ff+conv").detach()
    assert {name: type(module) for name, module in unet.named_modules()} == {
        name: type(module) for name, module in untouched.named_modules()
    }
    state, expected = unet.state_dict(), untouched.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    attach(components, rank=2)


def test_a_second_lora_is_refused() -> None:
    components = base()
    planned = plan(components)
    LiveAdapter(base_models(components), planned)
    with pytest.raises(ValueError, match="already"):
        LiveAdapter(base_models(components), planned)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_without_peft_s_cast_of_its_input_the_adapter_is_the_same_to_the_bit(tmp_path: Path, name: Any) -> None:
    weights = []
    prepared = make_training_set(components_from_pipeline(tiny_sd1()))
    for casts in (False, True):
        precision = Precision(name, "cpu")
        components = components_from_pipeline(tiny_sd1(), weight_dtype=precision.weight_dtype)
        trainer = make_trainer(
            tmp_path / f"{casts}",
            components=components,
            training_set=prepared,
            precision=precision,
            lora={"rank": 2, "targets": "attention+ff+conv"},
        )
        layers = [module for module in components.unet.modules() if isinstance(module, LoraLayer)]
        assert layers and not any(layer.cast_input_dtype_enabled for layer in layers)
        for layer in layers:
            layer.cast_input_dtype_enabled = casts
        list(trainer.run())
        weights.append({key: weight.clone() for key, weight in trainer._named.items()})
    assert all(weight.abs().max() > 0 for weight in weights[0].values())
    assert all(torch.equal(weight, weights[1][key]) for key, weight in weights[0].items())


@pytest.mark.parametrize("settings", [{"dropout": 0.1}, {"dora": True}])
def test_what_computes_with_the_input_itself_keeps_the_cast(settings: dict[str, Any]) -> None:
    components = components_from_pipeline(tiny_sd1())
    plan = plan_adapter(components, LoraSettings.model_validate({"rank": 2, **settings}))
    live = LiveAdapter({"unet": components.unet}, plan, dropout=settings.get("dropout", 0.0))
    layers = [module for module in components.unet.modules() if isinstance(module, LoraLayer)]
    assert layers and all(layer.cast_input_dtype_enabled for layer in layers)
    live.detach()
