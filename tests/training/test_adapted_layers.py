"""Runs with other layers, ranks and strengths: what they save is what was trained, in every family."""

from __future__ import annotations

import math
import os
import signal
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora.adapter_file import LoraPair, read_adapter, write_adapter
from sdlora.adapter_file.safety import read_header
from sdlora.checkpoint import read_latest_checkpoint
from sdlora.errors import AdapterFileError, AdapterMismatchError, CheckpointError, ConfigError
from sdlora.events import Event, StepDone
from sdlora.families import components_from_pipeline
from sdlora.lora import active_ranks, lora_pairs
from sdlora.optimizers import build_optimizer
from sdlora.stack import AdapterStack
from sdlora.training import resume_run, train_adapter
from tests.adapters.builders import METADATA, difference, hand_merged, kohya_tensors, predict, random_pairs, save
from tests.training.helpers import TINY, CalledPreviews, make_config, make_trainer, write_pictures

SLOW_REST = ["sd1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd2", "sdxl"))]
ONE_STEP: dict[str, Any] = {"exposures": 1, "batch_size": 4, "learning_rate": 0.05, "warmup_fraction": 0.0}
CONVOLUTIONS: dict[str, Any] = {
    "rank": 2,
    "targets": "attention+ff+conv",
    "blocks": [{"match": "*.transformer_blocks.*", "rank": 0}, {"match": "mid_block.*", "rank": 3, "alpha": 1.0}],
}
KEYS = {
    "sd1": "lora_unet_down_blocks_0_resnets_0_conv1",
    "sd2": "lora_unet_down_blocks_0_resnets_0_conv1",
    "sdxl": "lora_unet_input_blocks_1_0_in_layers_2",
}


def tensor_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return max(info.end for info in read_header(file, path).tensors.values())


def resumed_as_unbroken(tmp_path: Path, stop: int = 1, **settings: Any) -> bool:
    """Whether a run of four images, two a step, stopped after step `stop`, ends as one that never stopped."""
    settings = {**settings, "train": {"exposures": 1, "batch_size": 2, **settings.get("train", {})}}
    list(make_trainer(tmp_path / "whole", **settings).run())
    first = make_trainer(tmp_path / "parts", **settings)
    for event in first.run():
        if isinstance(event, StepDone) and event.step == stop:
            first.request_stop()
    checkpoint = read_latest_checkpoint(tmp_path / "parts" / "state", say=print)
    assert checkpoint.step == stop < first.plan.steps
    list(make_trainer(tmp_path / "parts", checkpoint=checkpoint, **settings).run())
    hashes = {read_adapter(tmp_path / name / "ink.safetensors").tensor_sha256 for name in ("whole", "parts")}
    return len(hashes) == 1


@pytest.mark.parametrize("name", SLOW_REST)
def test_convolutions_are_trained_saved_and_loaded_by_plain_diffusers(tmp_path: Path, name: str) -> None:
    pipeline = TINY[name]()
    base = predict(pipeline)
    live: list[torch.Tensor] = []

    def look(step: int) -> list[Path]:
        live.append(predict(pipeline))
        return []

    components = components_from_pipeline(pipeline)
    trainer = make_trainer(
        tmp_path, family=name, components=components, previews=CalledPreviews(look), lora=CONVOLUTIONS, train=ONE_STEP
    )
    list(trainer.run())
    path = tmp_path / "ink.safetensors"
    adapter = read_adapter(path)
    assert adapter.unet["down_blocks.0.resnets.0.conv1"].down.shape == (2, 32, 3, 3)
    assert adapter.unet["mid_block.resnets.0.conv1"].rank == 3
    assert f"{KEYS[name]}.lora_down.weight".encode() in path.read_bytes()
    assert tensor_bytes(path) == trainer.adapter_plan.file_bytes
    theirs = TINY[name]()
    theirs.load_lora_weights(str(path))
    AdapterStack(pipeline).load(path)
    # The file's factors are fp16.
    assert difference(predict(theirs), live[0]) < 0.02 * difference(live[0], base)
    assert difference(predict(pipeline), predict(theirs)) < 1e-4
    assert difference(live[0], base) > 0.05


def test_the_file_has_the_format_that_was_asked_for(tmp_path: Path) -> None:
    """The same run three times: fp32 has every bit, the others what rounding leaves of them."""
    read = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        trainer = make_trainer(tmp_path / name, output={"dtype": name}, train=ONE_STEP)
        list(trainer.run())
        path = tmp_path / name / "ink.safetensors"
        read[name] = read_adapter(path).unet
        assert {tensor.dtype for pair in read[name].values() for tensor in (pair.down, pair.up)} == {dtype}
        assert tensor_bytes(path) == trainer.adapter_plan.file_bytes_in(name)
    for layer, whole in read["fp32"].items():
        assert whole.up.abs().max() > 0 and not torch.equal(whole.down, whole.down.half().float())
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            assert torch.equal(read[name][layer].down, whole.down.to(dtype))
            assert torch.equal(read[name][layer].up, whole.up.to(dtype))


def test_rslora_is_folded_into_the_file(tmp_path: Path) -> None:
    settings = [{"rank": 4, "alpha": 3.0, "rslora": True}, {"rank": 4, "alpha": 6.0}]
    for number, lora in enumerate(settings):
        list(make_trainer(tmp_path / str(number), lora=lora, train=ONE_STEP).run())
    adapters = [read_adapter(tmp_path / str(number) / "ink.safetensors") for number in range(2)]
    assert adapters[0].tensor_sha256 == adapters[1].tensor_sha256
    assert all(pair.alpha == pair.rank for pair in adapters[0].unet.values())
    assert adapters[0].metadata["sdlora.training_alpha"] == "6.0"


@pytest.mark.parametrize("name", SLOW_REST)
def test_a_run_on_convolutions_of_several_ranks_goes_on_exactly(tmp_path: Path, name: str) -> None:
    assert resumed_as_unbroken(tmp_path, family=name, lora={**CONVOLUTIONS, "rslora": True, "dropout": 0.1})


# A LoRA that goes on from a file.


def mixed_pairs() -> dict[str, LoraPair]:
    """Of two ranks and strengths, on linear layers and a convolution."""
    unet = TINY["sd1"]().unet
    return {
        **random_pairs(unet, rank=3, alpha=1.0, targets=("attn2.to_k",)),
        **random_pairs(unet, rank=5, alpha=5.0, targets=("resnets.0.conv1",), seed=1),
    }


def test_a_file_goes_on_from_where_it_ended(tmp_path: Path) -> None:
    pairs = mixed_pairs()
    first = save(tmp_path / "first.safetensors", kohya_tensors(pairs))
    components = components_from_pipeline(TINY["sd1"]())
    train = {**ONE_STEP, "learning_rate": 1e-3}
    trainer = make_trainer(tmp_path, components=components, lora={"init_from": first}, train=train)
    start = lora_pairs(components.unet)
    assert start.keys() == pairs.keys()
    for path, pair in pairs.items():
        assert (start[path].rank, start[path].alpha) == (pair.rank, pair.alpha)
        # Powers of two are moved from one factor to the other; that rounds nothing.
        assert torch.equal(
            start[path].up.flatten(1) @ start[path].down.flatten(1), pair.up.flatten(1) @ pair.down.flatten(1)
        )
        kaiming = 1 / (3 * pair.down[0].numel()) ** 0.5
        assert kaiming / 1.5 < start[path].down.square().mean().sqrt() < kaiming * 1.5
    list(trainer.run())
    after = read_adapter(tmp_path / "ink.safetensors").unet
    for path, pair in pairs.items():
        change = pair.scale * pair.up.flatten(1) @ pair.down.flatten(1)
        moved = after[path].scale * after[path].up.float().flatten(1) @ after[path].down.float().flatten(1) - change
        # One step away: not where it began, not somewhere else.
        assert 1e-3 < moved.norm() / change.norm() < 0.5


def test_a_file_for_another_base_or_with_other_parts_is_refused(tmp_path: Path) -> None:
    first = save(tmp_path / "first.safetensors", kohya_tensors(mixed_pairs()))
    with pytest.raises(AdapterMismatchError, match=r"first\.safetensors: made for"):
        make_trainer(tmp_path, family="sdxl", lora={"init_from": first})
    with pytest.raises(ConfigError, match=r"first\.safetensors does not adapt the text encoders\. Set it to false"):
        make_trainer(tmp_path, lora={"init_from": first, "text_encoder": True})
    with pytest.raises(ValueError, match="cannot have blocks or rslora"):
        make_config(lora={"init_from": first, "rslora": True})


@pytest.mark.parametrize("name", SLOW_REST)
def test_a_run_that_began_with_a_file_goes_on_exactly(tmp_path: Path, name: str) -> None:
    pairs = random_pairs(TINY[name]().unet, rank=3, targets=("attn2.to_k", "conv1"))
    first = write_adapter(tmp_path / "first.safetensors", pairs, family=name, metadata=METADATA)
    assert resumed_as_unbroken(tmp_path, family=name, lora={"init_from": first})


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill cannot send SIGINT to itself there")
def test_a_run_goes_on_only_with_the_file_it_began_with(tmp_path: Path) -> None:
    first = save(tmp_path / "first.safetensors", kohya_tensors(mixed_pairs()))
    said: list[str] = []

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    config = make_config(
        data={"path": write_pictures(tmp_path / "data"), "trigger": "ink style"},
        output={"dir": tmp_path, "name": "ink"},
        lora={"init_from": first},
    )
    components = components_from_pipeline(TINY["sd1"]())
    root = train_adapter(config, components=components, observers=[stop], say=said.append).parent
    assert "Going on from first.safetensors: its layers are kept, with their ranks (3, 5)." in said
    first.rename(tmp_path / "moved.safetensors")
    save(first, kohya_tensors(random_pairs(components.unet, rank=3)))
    with pytest.raises(CheckpointError, match="not the adapter that this run was begun with"):
        resume_run(root, components=components)
    moved = [f"lora.init_from={tmp_path / 'moved.safetensors'}"]
    assert read_adapter(resume_run(root, overrides=moved, components=components)).metadata["sdlora.steps"] == "3"


# T-LoRA.


@pytest.mark.parametrize(("rank", "min_rank"), [(16, 8), (7, 1), (4, 9)])
def test_the_active_ranks_are_those_of_the_paper(rank: int, min_rank: int) -> None:
    """arXiv 2507.05964: r(t) = floor((r - r_min) (T - t) / T) + r_min."""
    timesteps = torch.arange(1000)
    least = min(rank, min_rank)
    expected = [least + math.floor(Fraction((rank - least) * (1000 - t), 1000)) for t in range(1000)]
    assert active_ranks(timesteps, rank, min_rank, 1000).tolist() == expected
    assert expected[0] == rank and expected[-1] == least


@torch.no_grad()
def test_in_training_each_example_has_its_own_ranks_and_in_drawing_all(tmp_path: Path) -> None:
    components = components_from_pipeline(TINY["sd1"]())
    lora = {"rank": 4, "alpha": 2.0, "timestep_min_rank": 1, "targets": ["attn2.to_k", "conv1"]}
    trainer = make_trainer(tmp_path, components=components, lora=lora)
    pairs = random_pairs(TINY["sd1"]().unet, targets=("attn2.to_k", "conv1"))
    for path, pair in pairs.items():
        trainer._named[f"{path}.down"].copy_(pair.down)
        trainer._named[f"{path}.up"].copy_(pair.up)
    timesteps = torch.tensor([0, 400, 999])
    sample, text = torch.randn(3, 4, 8, 8), torch.randn(3, 77, 32)
    assert trainer._rank_mask is not None
    trainer._rank_mask.timesteps = timesteps
    trainer._adapter.train()
    masked = components.unet(sample, timesteps, text).sample
    trainer._adapter.train(False)
    full = components.unet(sample, timesteps, text).sample
    for row, ranks in enumerate([4, 2, 1]):
        cut = {path: LoraPair(pair.down[:ranks], pair.up[:, :ranks], 0.5 * ranks) for path, pair in pairs.items()}
        truth = hand_merged(TINY["sd1"](), ("unet", cut, 1.0)).unet
        expected = truth(sample[row : row + 1], timesteps[row : row + 1], text[row : row + 1]).sample[0]
        assert difference(masked[row], expected) < 1e-4
        assert (difference(masked[row], full[row]) > 0.02) == (ranks < 4)


@pytest.mark.parametrize("name", SLOW_REST)
def test_a_run_with_few_ranks_in_noise_goes_on_exactly(tmp_path: Path, name: str) -> None:
    lora = {"rank": 4, "timestep_min_rank": 2}
    assert resumed_as_unbroken(tmp_path, family=name, lora=lora, model={"gradient_checkpointing": name == "sd1"})


# DoRA.


@pytest.mark.parametrize("name", SLOW_REST)
def test_dora_learns_lengths_and_its_file_draws_what_was_trained(tmp_path: Path, name: str) -> None:
    pipeline = TINY[name]()
    base = predict(pipeline)
    live: list[torch.Tensor] = []

    def look(step: int) -> list[Path]:
        live.append(predict(pipeline))
        return []

    components = components_from_pipeline(pipeline)
    lora = {"rank": 2, "alpha": 1.0, "dora": True, "targets": ["attn2.to_k", "conv1"]}
    trainer = make_trainer(
        tmp_path, family=name, components=components, previews=CalledPreviews(look), lora=lora, train=ONE_STEP
    )
    before = predict(pipeline)
    assert difference(before, base) < 1e-4
    list(trainer.run())
    path = tmp_path / "ink.safetensors"
    assert tensor_bytes(path) == trainer.adapter_plan.file_bytes
    # The paper's equation 5, with lengths of rows as in peft: m (W + s B A) / |W + s B A|.
    truth, moved = TINY[name](), 0
    with torch.no_grad():
        for module, pair in read_adapter(path).unet.items():
            layer = truth.unet.get_submodule(module)
            turned = layer.weight.flatten(1) + pair.scale * pair.up.float().flatten(1) @ pair.down.float().flatten(1)
            lengths = turned.norm(dim=1, keepdim=True)
            moved += int(not torch.allclose(pair.dora_scale, layer.weight.flatten(1).norm(dim=1, keepdim=True)))
            layer.weight.copy_((pair.dora_scale * turned / lengths).view_as(layer.weight))
    assert moved == trainer.adapter_plan.num_layers
    assert difference(live[0], base) > 0.02
    assert difference(predict(truth), live[0]) < 0.02 * difference(live[0], base)
    AdapterStack(pipeline).load(path)
    assert difference(predict(pipeline), predict(truth)) < 1e-4


@pytest.mark.parametrize("name", SLOW_REST)
def test_a_dora_run_goes_on_exactly(tmp_path: Path, name: str) -> None:
    assert resumed_as_unbroken(tmp_path, family=name, lora={"rank": 2, "dora": True, "dropout": 0.1})


def test_lengths_do_not_decay_and_dora_refuses_what_it_cannot_have(tmp_path: Path) -> None:
    named = {name: torch.nn.Parameter(torch.ones(2)) for name in ("a.down", "a.up", "a.lengths")}
    groups = build_optimizer(named, make_config()).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(2, 0.01), (1, 0.0)]
    first = save(tmp_path / "first.safetensors", kohya_tensors(mixed_pairs()))
    with pytest.raises(ConfigError, match=r"first\.safetensors is no DoRA\. Set it to false"):
        make_trainer(tmp_path, lora={"init_from": first, "dora": True})
    lengths = {path: torch.ones(1, pair.down.shape[1]) for path, pair in mixed_pairs().items()}
    pairs = {path: replace(pair, dora_scale=lengths[path]) for path, pair in mixed_pairs().items()}
    columns = write_adapter(tmp_path / "columns.safetensors", pairs, family="sd1", metadata=METADATA)
    with pytest.raises(AdapterFileError, match=r"columns\.safetensors.*has no lengths by row"):
        make_trainer(tmp_path, lora={"init_from": columns, "dora": True})
    with pytest.raises(ValueError, match="cannot have a timestep_min_rank"):
        make_config(lora={"dora": True, "timestep_min_rank": 2})
