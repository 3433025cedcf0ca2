"""What differs from exposure to exposure: cut-outs, captions, and how much a picture and its parts count."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdlora.adapter_file import read_adapter
from sdlora.batches import micro_batches
from sdlora.data.captions import CaptionRules
from sdlora.data.dataset import scan_dataset
from sdlora.errors import ConfigError
from sdlora.events import Event, StepDone, from_json
from sdlora.families import components_from_pipeline
from sdlora.objective import diffusion_loss
from sdlora.prepare import TrainingSet, prepare_training_set
from sdlora.training import resume_run, train_adapter
from tests.data.files import drawing
from tests.tiny import tiny_sd1
from tests.training.helpers import make_config, make_trainer, make_training_set

LEFT = torch.zeros(1, 8, 8)
LEFT[:, :, :4] = 1


@pytest.fixture(scope="module")
def components() -> Any:
    return components_from_pipeline(tiny_sd1())


def draw_pictures(folder: Path, count: int, *, side: int = 96) -> Path:
    """Drawings with tags for captions, the left half of each transparent."""
    folder.mkdir(parents=True)
    for seed in range(count):
        image = drawing(seed, size_hw=(side, side)).convert("RGBA")
        image.paste((0, 0, 0, 0), (0, 0, side // 2, side))
        image.save(folder / f"{seed}.png")
        (folder / f"{seed}.txt").write_text(f"thing {seed}, red, small, old", encoding="utf-8")
    return folder


def latents(prepared: TrainingSet) -> list[Tensor]:
    return [view.latents.mean for example in prepared.examples for view in example.views]


def test_cut_outs_differ_and_depend_on_seed_and_picture_alone(tmp_path: Path, components: Any) -> None:
    dataset = scan_dataset(draw_pictures(tmp_path / "data", 2))

    def prepared(seed: int, examples: Any = dataset.examples) -> TrainingSet:
        return prepare_training_set(components, examples, crop_variants=3, flip=True, seed=seed)

    first, alone, other = prepared(0), prepared(0, dataset.examples[1:]), prepared(1)
    assert [len(example.views) for example in first.examples] == [3, 3]
    assert all(map(torch.equal, latents(first)[3:], latents(alone)))
    assert torch.equal(latents(first)[0], latents(other)[0])  # the whole picture
    assert not torch.equal(latents(first)[1], latents(other)[1])
    for example in first.examples:
        assert example.views[0].crop_top_left_yx == (0, 0)
        for view, mirror in zip(example.views, example.mirrored_views, strict=True):
            assert view.crop_top_left_yx[0] == mirror.crop_top_left_yx[0]
    small = [replace(example, size_hw=(64, 64)) for example in dataset.examples]
    for example in small:
        with Image.open(example.path) as image:
            image.resize((64, 64)).save(example.path)
    assert [len(example.views) for example in prepared(0, small).examples] == [1, 1]  # no room for others


def test_masks_are_mirrored_with_their_pictures_and_lightened(tmp_path: Path, components: Any) -> None:
    folder = draw_pictures(tmp_path / "data", 1, side=64)
    dataset = scan_dataset(folder, masks="alpha")
    (example,) = prepare_training_set(components, dataset.examples, flip=True, mask_outside=0.25).examples
    (view,), (mirror,) = example.views, example.mirrored_views
    assert view.loss_mask is not None and mirror.loss_mask is not None
    torch.testing.assert_close(view.loss_mask, 0.25 * LEFT + (1 - LEFT))
    torch.testing.assert_close(mirror.loss_mask, LEFT + 0.25 * (1 - LEFT))
    grey = np.zeros((64, 64), dtype=np.uint8)
    grey[:8, 8:24] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(grey).save(tmp_path / "masks" / "0.png")
    masked = scan_dataset(folder, masks=str(tmp_path / "masks"))
    (example,) = prepare_training_set(components, masked.examples).examples
    expected = torch.zeros(1, 8, 8)
    expected[0, 0, 1:3] = 1
    assert example.views[0].loss_mask is not None and torch.equal(example.views[0].loss_mask, expected)


def shown(training_set: TrainingSet, count: int, **options: Any) -> Any:
    family = components_from_pipeline(tiny_sd1()).family
    settings: dict[str, Any] = {"batch_size": count, "seed": 0, "num_train_timesteps": 1000, "noise_offset": 0.0}
    settings |= {"caption_dropout": 0.0, "device": torch.device("cpu"), **options}
    (batch,) = micro_batches(training_set, [(n, 0) for n in range(count)], family=family, **settings)
    return batch


def test_exposures_show_every_cut_out_and_caption_about_as_often(tmp_path: Path, components: Any) -> None:
    dataset = scan_dataset(draw_pictures(tmp_path / "data", 1))
    rules = CaptionRules("ink", shuffle_tags=True, keep_tags=1, variants=4)
    prepared = prepare_training_set(components, dataset.examples, captions=rules, crop_variants=3)
    (example,) = prepared.examples
    assert len(example.caption_rows) == 4
    assert all(prepared.texts[row].startswith("thing 0, ") for row in example.caption_rows)
    views = tuple(
        replace(view, latents=replace(view.latents, mean=torch.full((4, 8, 8), float(n)), std=torch.zeros(4, 8, 8)))
        for n, view in enumerate(example.views)
    )
    batch = shown(replace(prepared, examples=(replace(example, views=views),)), 600)
    counts = torch.bincount(batch.latents.flatten(1).mean(1).long(), minlength=3)
    assert (counts - 200).abs().max() < 3 * (600 * 2 / 9) ** 0.5
    rows = torch.tensor(sorted(set(example.caption_rows)))
    seen = (
        (batch.embeds.encoder_hidden_states[:, None] == prepared.captions.encoder_hidden_states[rows]).all(-1).all(-1)
    )
    assert seen.any(1).all() and seen.any(0).all()


def test_a_masked_loss_is_the_mean_over_all_places_and_blind_where_the_mask_is_0() -> None:
    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, 8, 8, generator=generator)
    mask[:, :, :, :4] = 0
    pred.requires_grad_()
    loss = diffusion_loss(pred, target, torch.tensor([1.0, 2.0]), mask=mask)
    expected = torch.stack([(mask[n] * (pred[n] - target[n]) ** 2).sum() / 256 for n in range(2)])
    torch.testing.assert_close(loss, expected * torch.tensor([1.0, 2.0]))
    loss.sum().backward()
    assert pred.grad is not None
    assert not pred.grad[..., :4].any() and pred.grad[..., 4:].all()


def test_the_trainer_counts_weights_and_masks(tmp_path: Path, components: Any) -> None:
    plain = make_training_set(components, sizes_hw=((64, 64),) * 2)
    trainer = make_trainer(tmp_path, components=components, training_set=plain)

    def losses(mask: Tensor | None = None, weight: float = 1.0) -> Tensor:
        first, second = plain.examples
        changed = replace(first, views=(replace(first.views[0], loss_mask=mask),), weight=weight)
        (batch,) = trainer._batches([(0, 0), (1, 1)], replace(plain, examples=(changed, second)))
        with torch.no_grad():
            return trainer._losses(batch, dropout_counters=(0, 0))

    whole, tripled = losses(), losses(weight=3.0)
    torch.testing.assert_close(tripled, whole * torch.tensor([3.0, 1.0]))
    left, right = losses(LEFT), losses(1 - LEFT)
    torch.testing.assert_close(left[0] + right[0], whole[0])
    assert left[0] < whole[0] and left[1] == whole[1]
    list(trainer.run())


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill cannot send SIGINT to itself there")
def test_a_stopped_run_with_all_of_it_ends_as_an_unbroken_one(tmp_path: Path, components: Any) -> None:
    data = draw_pictures(tmp_path / "data", 4)
    (data / "metadata.jsonl").write_text('{"file_name": "1.png", "weight": 2.5}', encoding="utf-8")

    def config(name: str) -> Any:
        return make_config(
            model={"precision": "fp32"},
            data={
                "path": data,
                "trigger": "ink",
                "caption_prefix": "a drawing of",
                "shuffle_tags": True,
                "tag_dropout": 0.2,
                "caption_variants": 3,
                "crop_variants": 2,
                "flip": True,
                "masks": "alpha",
                "mask_outside": 0.1,
            },
            train={"exposures": 4},
            validation={"count": 1, "timesteps": 1},
            output={"dir": tmp_path / name, "name": "ink"},
        )

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    said: list[str] = []
    whole = train_adapter(config("whole"), components=components, say=said.append)
    parts = train_adapter(config("parts"), components=components, observers=[stop])
    resume_run(parts.parent, components=components)
    assert read_adapter(parts).tensor_sha256 == read_adapter(whole).tensor_sha256
    logs = [
        [from_json(line) for line in (path.parent / "events.jsonl").read_text("utf-8").splitlines()]
        for path in (whole, parts)
    ]
    losses = [[event.loss for event in log if isinstance(event, StepDone)] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert sum(line.startswith("Held out are 1 of 4 pictures: ") for line in said) == 1


def test_what_is_held_out_is_said_once() -> None:
    with pytest.raises(ConfigError, match="path and count both say what is held out"):
        from sdlora.config import load_config

        load_config(None, ["data.path=x", "validation.path=y", "validation.count=2"])
