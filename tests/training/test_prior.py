"""Prior preservation: the base's own answers are kept, by no more than the forward pass without the adapter."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sdlora.adapter_file import read_adapter
from sdlora.data.captions import CaptionRules
from sdlora.data.dataset import scan_dataset
from sdlora.errors import CheckpointError, ConfigError, DatasetError
from sdlora.events import Event, StepDone
from sdlora.families import components_from_pipeline
from sdlora.prepare import TrainingSet, prepare_training_set
from sdlora.prior import base_alone
from sdlora.trainer import Trainer
from sdlora.training import resume_run, train_adapter
from tests.tiny import tiny_sd1
from tests.training.helpers import make_config, make_trainer, make_training_set, write_pictures


@pytest.fixture(scope="module")
def components() -> Any:
    return components_from_pipeline(tiny_sd1())


def kept(components: Any) -> TrainingSet:
    """Two images; the base's answer to the second's caption is to be kept."""
    plain = make_training_set(components, sizes_hw=((64, 64),) * 2)
    return replace(plain, examples=tuple(replace(example, prior_rows=(2,)) for example in plain.examples))


def test_without_its_adapter_the_unet_is_the_base_to_the_last_bit(tmp_path: Path, components: Any) -> None:
    trainer = make_trainer(tmp_path, components=components, lora={"rank": 4, "dropout": 0.5})
    noise, words = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)

    def answer(unet: Any) -> Tensor:
        with torch.no_grad():
            return unet(noise, torch.tensor([500]), words).sample

    with torch.no_grad():
        for parameter in trainer._parameters:
            parameter.add_(0.1)
    components.unet.eval()
    adapted, random = answer(components.unet), torch.get_rng_state()
    with base_alone(components.unet):
        assert torch.equal(answer(components.unet), answer(tiny_sd1().unet))
    assert torch.equal(answer(components.unet), adapted) and not torch.equal(adapted, answer(tiny_sd1().unet))
    assert all(parameter.requires_grad for parameter in trainer._parameters)
    assert torch.equal(torch.get_rng_state(), random)
    list(trainer.run())


def test_the_base_reads_prompts_with_the_encoder_it_had(tmp_path: Path) -> None:
    components = components_from_pipeline(tiny_sd1())
    settings: dict[str, Any] = {"components": components, "training_set": kept(components), "prior": {"weight": 1.0}}
    trainer = make_trainer(tmp_path, lora={"rank": 4, "text_encoder": True}, **settings)
    with torch.no_grad():
        for name, parameter in trainer._named.items():
            if name.startswith("text_encoder"):
                parameter.add_(0.1)
    (batch,) = trainer._batches([(0, 0), (1, 1)])
    assert batch.prior is not None and batch.prior.texts == ("picture 1",) * 2
    # Only the encoder has moved: what the base answers is known from before, and the adapter's answer is another.
    with torch.no_grad():
        expected = trainer._answer(batch.prior, batch.prior.embeds, batch.prior.added_cond_kwargs)
    assert torch.equal(trainer._predict_as_base(batch.prior), expected)
    assert (trainer._drift(batch.prior, dropout_counters=(0, 0)) > 0).all()
    list(trainer.run())


def drifts(folder: Path, components: Any, weight: float) -> tuple[list[float], list[float]]:
    """How far the answers have moved after each step of a run, and the losses."""
    trainer = make_trainer(
        folder,
        components=components,
        training_set=kept(components),
        prior={"weight": weight},
        train={"exposures": 5, "learning_rate": 5e-3},
    )
    moved, losses = [], []

    def measured(trainer: Trainer) -> float:
        (batch,) = trainer._batches([(0, 0), (1, 1)])
        assert batch.prior is not None and torch.equal(batch.prior.latents, batch.latents)
        return float(trainer._drift(batch.prior, dropout_counters=(-1, 0)).sum().detach())

    moved.append(measured(trainer))
    for event in trainer.run():
        if isinstance(event, StepDone):
            moved.append(measured(trainer))
            losses.append(event.loss)
    return moved, losses


@pytest.mark.slow
def test_the_base_answers_drift_less_where_they_are_kept(tmp_path: Path, components: Any) -> None:
    free, free_losses = drifts(tmp_path / "free", components, 0.0)
    held, held_losses = drifts(tmp_path / "held", components, 10.0)
    assert free[0] == held[0] == 0
    assert all(drift > 0 for drift in free[2:])
    assert held[-1] < 0.5 * free[-1]
    # The pictures' own loss is what is told; it is the same until the first update.
    assert free_losses[0] == held_losses[0] and free_losses[-1] != held_losses[-1]
    plain = make_trainer(
        tmp_path / "plain",
        components=components,
        training_set=make_training_set(components, sizes_hw=((64, 64),) * 2),
        train={"exposures": 5, "learning_rate": 5e-3},
    )
    # Looking at the base on the way changes nothing.
    assert [event.loss for event in plain.run() if isinstance(event, StepDone)] == free_losses


def run_config(tmp_path: Path, name: str, prior: dict[str, Any]) -> Any:
    if not (tmp_path / "data").exists():
        write_pictures(tmp_path / "data", count=4)
        write_pictures(tmp_path / "others", count=3)
        for path in (tmp_path / "others").glob("*.png"):
            with Image.open(path) as image:
                image.rotate(90).resize((64, 128)).save(path)
    return make_config(
        model={"precision": "fp32"},
        data={"path": tmp_path / "data", "trigger": "ink style"},
        output={"dir": tmp_path / name, "name": "ink"},
        prior={"weight": 0.5, **prior},
        lora={"rank": 4, "dropout": 0.1},
    )


def stop_after_one(event: Event) -> None:
    if isinstance(event, StepDone) and event.step == 1:
        os.kill(os.getpid(), signal.SIGINT)


def trained(config: Any, components: Any, **options: Any) -> Path:
    return train_adapter(config, components=components, **options)


needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="os.kill cannot send SIGINT to itself there")


@needs_signals
def test_stopped_runs_that_keep_the_base_end_as_unbroken_ones(tmp_path: Path, components: Any) -> None:
    ends = set()
    for number, prior in enumerate(({"prompts": ("a fox", "a house")}, {"path": tmp_path / "others"})):
        whole = trained(run_config(tmp_path, f"whole{number}", prior), components)
        parts = trained(run_config(tmp_path, f"parts{number}", prior), components, observers=[stop_after_one])
        resume_run(parts.parent, components=components)
        assert read_adapter(parts).tensor_sha256 == read_adapter(whole).tensor_sha256
        ends.add(read_adapter(whole).tensor_sha256)
    assert len(ends) == 2


def test_answers_are_kept_to_plain_prompts_or_to_the_captions_without_trigger(tmp_path: Path, components: Any) -> None:
    (tmp_path / "data").mkdir()
    for name, words in (("a", "an ink style fox"), ("b", "a house")):
        Image.new("RGB", (64, 64)).save(tmp_path / "data" / f"{name}.png")
        (tmp_path / "data" / f"{name}.txt").write_text(words)
    examples, rules = scan_dataset(tmp_path / "data").examples, CaptionRules("ink style")

    def texts(prompts: tuple[str, ...] | None) -> list[list[str]]:
        prepared = prepare_training_set(components, examples, captions=rules, prior_prompts=prompts)
        return [[prepared.texts[row] for row in example.prior_rows] for example in prepared.examples]

    assert texts(None) == [[], []]
    assert texts(()) == [["an fox"], ["a house"]]
    assert texts(("a fox", "a tree")) == [["a fox", "a tree"]] * 2


@needs_signals
def test_a_changed_picture_that_is_learnt_besides_is_told(tmp_path: Path, components: Any) -> None:
    config = run_config(tmp_path, "ink", {"path": tmp_path / "others"})
    root = trained(config, components, observers=[stop_after_one]).parent
    (tmp_path / "others" / "1.txt").write_text("something else")
    with pytest.raises(CheckpointError, match=r"prior\.path: 1\.png: caption 'thing 1' -> 'something else'"):
        resume_run(root, components=components)


def test_what_is_kept_must_not_be_what_is_learnt(tmp_path: Path, components: Any) -> None:
    config = run_config(tmp_path, "ink", {})
    aimless = config.model_copy(update={"data": config.data.model_copy(update={"trigger": None})})
    with pytest.raises(ConfigError, match=r"prior\.weight: without a trigger"):
        trained(aimless, components)
    with pytest.raises(DatasetError, match=r"prior\.path: these are the pictures that are trained on"):
        trained(run_config(tmp_path, "ink", {"path": tmp_path / "data"}), components)
