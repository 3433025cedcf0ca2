"""Latents and embeddings computed once, and the batches made of them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.batches import Batch, micro_batches
from sdlora.config import ObjectiveConfig
from sdlora.data.captions import CaptionRules
from sdlora.data.dataset import scan_dataset
from sdlora.errors import ConfigError, NonFiniteError
from sdlora.families import components_from_pipeline
from sdlora.prepare import EMPTY_PROMPT_ROW, LatentDistribution, TrainingSet, View, prepare_training_set
from tests.tiny import tiny_sd1, tiny_sdxl
from tests.training.helpers import make_training_set, write_pictures


def gradient_picture(path: Path) -> np.ndarray[Any, Any]:
    """A 64 x 64 picture that is brighter to the right; its pixels in [-1, 1], [3, 64, 64]."""
    rows = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    pixels = np.stack([rows, rows // 2, 255 - rows])
    Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
    return pixels.astype(np.float32) / 127.5 - 1


def test_latents_are_the_vaes_distribution_times_its_factor(tmp_path: Path) -> None:
    pipeline = tiny_sd1()
    pixels = torch.from_numpy(gradient_picture(tmp_path / "a.png"))[None]
    dataset = scan_dataset(tmp_path, trigger="ink style")
    prepared = prepare_training_set(
        components_from_pipeline(pipeline), dataset.examples, captions=CaptionRules("ink style"), flip=True
    )
    (example,) = prepared.examples
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent_dist
        mirrored = pipeline.vae.encode(pixels.flip(-1)).latent_dist
    factor = pipeline.vae.config.scaling_factor
    (view,), (mirror_image,) = example.views, example.mirrored_views
    torch.testing.assert_close(view.latents.mean, expected.mean[0] * factor)
    torch.testing.assert_close(view.latents.std, expected.std[0] * factor)
    torch.testing.assert_close(mirror_image.latents.mean, mirrored.mean[0] * factor)


def test_each_caption_is_embedded_once_and_the_empty_prompt_comes_first(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "data", count=3)
    (folder / "2.txt").write_text("thing 0", encoding="utf-8")
    components = components_from_pipeline(tiny_sd1())
    prepared = prepare_training_set(components, scan_dataset(folder).examples, captions=CaptionRules("ink style"))
    assert [example.caption_rows for example in prepared.examples] == [(1,), (2,), (1,)]
    reference = components.family.encode_prompts(components, ["", "thing 0, ink style", "thing 1, ink style"])
    torch.testing.assert_close(prepared.captions.encoder_hidden_states, reference.encoder_hidden_states)


def test_an_overlong_caption_is_told_with_the_words_that_are_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_pictures(tmp_path / "data", count=1)
    (folder / "0.txt").write_text("x" * 90, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        prepare_training_set(components_from_pipeline(tiny_sd1()), scan_dataset(folder).examples)
    assert "too long" in caplog.text and "'" + "x" * 15 + "'" in caplog.text


def test_an_image_that_the_vae_cannot_encode_is_named(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "data", count=2)
    pipeline = tiny_sd1()
    with torch.no_grad():
        pipeline.vae.quant_conv.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"0\.png"):
        prepare_training_set(components_from_pipeline(pipeline), scan_dataset(folder).examples)


def test_a_half_precision_vae_that_overflows_is_tried_again_in_fp32(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "data", count=1)
    pipeline = tiny_sd1()
    with torch.no_grad():
        pipeline.vae.encoder.conv_in.weight.mul_(1e4)
        pipeline.vae.encoder.conv_in.bias.fill_(1e5)
    pipeline.vae.to(torch.float16)
    with torch.no_grad():
        # What fp16 cannot hold, fp32 can: the weight is finite, its product with the pixels is not.
        pipeline.vae.encoder.conv_in.bias.fill_(6e4)
    prepared = prepare_training_set(components_from_pipeline(pipeline), scan_dataset(folder).examples)
    assert prepared.examples[0].views[0].latents.mean.isfinite().all()
    assert pipeline.vae.dtype == torch.float32


def test_a_resolution_that_the_base_cannot_halve_is_refused(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "data", count=1)
    with pytest.raises(ConfigError, match=r"data\.resolution: this base needs a multiple of 64 \(got 72\)\. Take 64"):
        prepare_training_set(components_from_pipeline(tiny_sd1()), scan_dataset(folder).examples, resolution=72)


def batches(training_set: TrainingSet, exposures: list[tuple[int, int]], **options: Any) -> list[Batch]:
    settings: dict[str, Any] = {
        "family": components_from_pipeline(tiny_sd1()).family,
        "batch_size": 4,
        "seed": 0,
        "num_train_timesteps": 1000,
        "caption_dropout": 0.0,
        "noise_offset": 0.0,
        "device": torch.device("cpu"),
        **options,
    }
    return list(micro_batches(training_set, exposures, **settings))


def test_what_an_exposure_sees_does_not_depend_on_its_companions() -> None:
    training_set = make_training_set(components_from_pipeline(tiny_sd1()))
    options = {
        "noise_offset": 0.1,
        "objective": ObjectiveConfig(
            multires_discount=0.3, input_perturbation=0.1, timestep_range=(0.1, 0.9), timestep_bias="noisy"
        ),
    }
    (together,) = batches(training_set, [(8, 0), (9, 1), (10, 2)], **options)
    (alone,) = batches(training_set, [(9, 1)], **options)
    for name in ("latents", "noise", "input_noise", "timesteps"):
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name)), name
    assert torch.equal(together.embeds.encoder_hidden_states[1:2], alone.embeds.encoder_hidden_states)
    assert not torch.equal(together.noise[0], together.noise[1])


def test_a_batch_has_one_size_and_no_more_than_it_may() -> None:
    components = components_from_pipeline(tiny_sd1())
    training_set = make_training_set(components, sizes_hw=[(64, 64), (64, 128), (64, 64), (64, 64)])
    parts = batches(training_set, [(0, 0), (1, 1), (2, 2), (3, 3)], batch_size=2)
    assert [part.names for part in parts] == [("0.png", "2.png"), ("3.png",), ("1.png",)]
    assert [tuple(part.latents.shape) for part in parts] == [(2, 4, 8, 8), (1, 4, 8, 8), (1, 4, 8, 16)]


def test_captions_are_dropped_as_often_as_asked() -> None:
    training_set = make_training_set(components_from_pipeline(tiny_sd1()))
    empty = training_set.captions.encoder_hidden_states[EMPTY_PROMPT_ROW]

    def dropped(share: float) -> int:
        (batch,) = batches(training_set, [(n, n % 4) for n in range(400)], batch_size=400, caption_dropout=share)
        return int((batch.embeds.encoder_hidden_states == empty).flatten(1).all(1).sum())

    assert (dropped(0.0), dropped(1.0)) == (0, 400)
    assert abs(dropped(0.1) - 40) < 18  # three standard deviations


def test_half_of_the_exposures_are_mirrored_where_that_is_wanted() -> None:
    training_set = make_training_set(components_from_pipeline(tiny_sd1()))
    examples = tuple(
        replace(
            example,
            views=(View(LatentDistribution(torch.zeros(4, 8, 8), torch.zeros(4, 8, 8))),),
            mirrored_views=(View(LatentDistribution(torch.ones(4, 8, 8), torch.zeros(4, 8, 8))),),
        )
        for example in training_set.examples
    )
    (batch,) = batches(replace(training_set, examples=examples), [(n, 0) for n in range(400)], batch_size=400)
    mirrored = batch.latents.flatten(1).mean(1)
    assert set(mirrored.tolist()) == {0.0, 1.0}
    assert abs(mirrored.sum().item() - 200) < 31  # three standard deviations


def test_latents_are_drawn_anew_from_their_distribution() -> None:
    training_set = make_training_set(components_from_pipeline(tiny_sd1()))
    (batch,) = batches(training_set, [(n, 0) for n in range(64)], batch_size=64)
    deviation = batch.latents - training_set.examples[0].views[0].latents.mean
    assert deviation.std().item() == pytest.approx(0.05, rel=0.05)
    assert not torch.equal(batch.latents[0], batch.latents[1])


def test_sdxl_batches_carry_their_sizes() -> None:
    components = components_from_pipeline(tiny_sdxl())
    training_set = make_training_set(components, sizes_hw=[(64, 128)])
    (batch,) = batches(training_set, [(0, 0)], family=components.family)
    assert batch.added_cond_kwargs is not None
    assert batch.added_cond_kwargs["time_ids"].tolist() == [[64, 128, 0, 0, 64, 128]]
    assert batch.added_cond_kwargs["text_embeds"].shape == (1, 32)


def test_a_perturbed_input_leaves_the_target_alone() -> None:
    training_set = make_training_set(components_from_pipeline(tiny_sd1()))
    (plain,) = batches(training_set, [(0, 0), (1, 1)])
    (perturbed,) = batches(training_set, [(0, 0), (1, 1)], objective=ObjectiveConfig(input_perturbation=0.1))
    assert plain.input_noise is plain.noise
    assert torch.equal(perturbed.noise, plain.noise)
    assert (perturbed.input_noise - plain.noise).std().item() == pytest.approx(0.1, rel=0.1)
