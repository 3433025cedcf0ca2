"""The text encoders' own LoRA: captions are encoded in the step, and what is saved is what was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora.adapter_file import PARTS, read_adapter
from sdlora.config import LoraSettings, TrainConfig
from sdlora.events import PreviewReady, StepDone
from sdlora.families import PromptEmbeds, components_from_pipeline
from sdlora.lora import plan_adapter
from sdlora.optimizers import build_optimizer
from sdlora.stack import AdapterStack
from sdlora.training import train_adapter
from tests.adapters.builders import difference, predict
from tests.training.helpers import TINY, CalledPreviews, make_config, make_trainer, make_training_set, write_pictures
from tests.training.test_adapted_layers import ONE_STEP, SLOW_REST, resumed_as_unbroken, tensor_bytes

TEXT: dict[str, Any] = {"rank": 2, "targets": ["mid_block.*.attn2.to_v"], "text_encoder": True}
PREFIXES = {"sd1": {b"lora_te_text"}, "sd2": {b"lora_te_text"}, "sdxl": {b"lora_te1_text", b"lora_te2_text"}}


def snapshot(pipeline: Any) -> dict[str, torch.Tensor]:
    parts = [getattr(pipeline, part, None) for part in ("unet", "text_encoder", "text_encoder_2")]
    return {
        f"{number}.{name}": tensor.clone()
        for number, part in enumerate(parts)
        if part is not None
        for name, tensor in part.state_dict().items()
    }


@pytest.mark.parametrize("name", TINY)
def test_text_encoders_learn_and_plain_diffusers_loads_what_they_learnt(tmp_path: Path, name: str) -> None:
    pipeline = TINY[name]()
    components, before, base = components_from_pipeline(pipeline), snapshot(pipeline), predict(pipeline)
    live: list[torch.Tensor] = []

    def look(step: int) -> list[Path]:
        live.append(predict(pipeline))
        return []

    prepared = make_training_set(components)
    rows = [components.family.encode_empty_prompt(components), prepared.captions.select([1, 2, 3, 4])]
    settings: dict[str, Any] = {
        "family": name,
        "training_set": replace(prepared, captions=PromptEmbeds.concat(rows)),
        "components": components,
        "data": {"path": "pictures", "trigger": "ink style", "caption_dropout": 0.5},
        "train": ONE_STEP,
    }
    without = [
        event.loss
        for event in make_trainer(tmp_path / "without", lora={**TEXT, "text_encoder": False}, **settings).run()
        if isinstance(event, StepDone)
    ]
    trainer = make_trainer(
        tmp_path, lora=TEXT, previews=CalledPreviews(look), optimizer={"text_encoder_learning_rate": 0.05}, **settings
    )
    losses = [event.loss for event in trainer.run() if isinstance(event, StepDone)]
    # Captions, dropped captions and the layer that is read are those of the prepared embeddings.
    assert losses == pytest.approx(without, rel=1e-5)
    after = snapshot(pipeline)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert not any(
        parameter.requires_grad for encoder in components.text_encoders for parameter in encoder.parameters()
    )
    path = tmp_path / "ink.safetensors"
    adapter = read_adapter(path)
    pairs = [*adapter.text_encoder.values(), *adapter.text_encoder_2.values()]
    # Two layers of six each; of SDXL's first encoder the last one is not read.
    assert len(pairs) == (18 if name == "sdxl" else 12)
    assert all(pair.up.abs().max() > 0 for pair in pairs)
    assert all(prefix in path.read_bytes() for prefix in PREFIXES[name])
    assert tensor_bytes(path) == trainer.adapter_plan.file_bytes
    theirs = TINY[name]()
    theirs.load_lora_weights(str(path))
    AdapterStack(pipeline).load(path)
    assert difference(live[0], base) > 0.02
    assert difference(predict(theirs), live[0]) < 0.02 * difference(live[0], base)
    assert difference(predict(pipeline), predict(theirs)) < 1e-4


@pytest.mark.parametrize("name", SLOW_REST)
def test_a_run_on_text_encoders_goes_on_exactly(tmp_path: Path, name: str) -> None:
    assert resumed_as_unbroken(tmp_path, family=name, lora={**TEXT, "dropout": 0.1})


@pytest.mark.slow
def test_a_dora_of_sdxl_and_both_its_encoders_goes_on_exactly(tmp_path: Path) -> None:
    """In four of its layers, so that the whole U-Net stays but its adapter is small."""
    settings = {"lora": {**TEXT, "dora": True, "dropout": 0.1, "targets": ["mid_block.attentions.0.*.0.attn?.to_[kv]"]}}
    assert resumed_as_unbroken(tmp_path, family="sdxl", **settings)
    adapter = read_adapter(tmp_path / "parts" / "ink.safetensors")
    assert adapter.is_dora and len(adapter.unet) == 4 and adapter.text_encoder and adapter.text_encoder_2
    lengths = [pair.dora_scale for part in PARTS for pair in adapter.part(part).values()]
    assert all(length is not None and length.min() > 0 for length in lengths)


def test_a_whole_run_keeps_the_encoders_and_draws_with_what_they_learnt(tmp_path: Path) -> None:
    pipeline = TINY["sd1"]()
    before, said, events = snapshot(pipeline), [], []
    config = make_config(
        data={"path": write_pictures(tmp_path / "data"), "trigger": "ink style"},
        output={"dir": tmp_path, "name": "ink"},
        lora=TEXT,
        preview={"prompts": ["a fox"], "num_inference_steps": 1},
        train=ONE_STEP,
    )
    components = components_from_pipeline(pipeline)
    path = train_adapter(config, components=components, observers=[events.append], say=said.append)
    assert len(read_adapter(path).text_encoder) == 12
    assert any("% of the U-Net's and the text encoders'." in sentence for sentence in said)
    assert [event.step for event in events if isinstance(event, PreviewReady)] == [1]
    assert any(f"Each adapter file: {tensor_bytes(path):,} bytes" in sentence for sentence in said)
    after = snapshot(pipeline)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_rows_of_blocks_reach_the_encoders() -> None:
    components = components_from_pipeline(TINY["sdxl"]())
    rows = [{"match": "text_encoder.*", "rank": 5}, {"match": "text_encoder_2.*", "rank": 0}]
    layers = plan_adapter(components, LoraSettings.model_validate({**TEXT, "blocks": rows})).layers
    assert set(layers) == {"unet", "text_encoder"}
    assert {layer.rank for layer in layers["text_encoder"].values()} == {5}
    assert {layer.rank for layer in layers["unet"].values()} == {2}


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({}, {"x.down": 1.0, "x.up": 1.0, "text": 0.1}),
        ({"text_encoder_learning_rate": 2e-4, "lora_plus_ratio": 4.0}, {"x.down": 1.0, "x.up": 4.0, "text": 8.0}),
        ({"name": "prodigy"}, {"x.down": 1.0, "x.up": 1.0, "text": 1.0}),
    ],
)
def test_the_encoders_learn_at_their_own_rate(optimizer: dict[str, Any], expected: dict[str, float]) -> None:
    named = {name: torch.nn.Parameter(torch.ones(2)) for name in ("x.down", "x.up", "text_encoder_2.text_model.x.up")}
    config: TrainConfig = make_config(optimizer=optimizer, train={"learning_rate": 1e-4})
    built = build_optimizer(named, config)
    scales = {id(parameter): group["lr_scale"] for group in built.param_groups for parameter in group["params"]}
    found = {name.split("_")[0]: scales[id(parameter)] for name, parameter in named.items()}
    assert found == pytest.approx(expected)
