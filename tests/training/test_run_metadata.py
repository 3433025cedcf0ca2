"""What a run writes into its adapter's header, read back as other tools read it."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from sdlora.adapter_file import TRAINING_KEYS, AdapterMetadata, carried_metadata, read_adapter
from sdlora.run_metadata import settings_digest, tag_frequency
from tests.training.helpers import make_config, make_trainer


def header_of_run(folder: Path, **sections) -> dict[str, str]:
    trainer = make_trainer(folder, **sections)
    for _ in trainer.run():
        pass
    return dict(read_adapter(folder / "ink.safetensors").metadata)


def test_the_training_is_told_in_kohyas_words_and_the_day_without_the_hour(tmp_path: Path) -> None:
    header = header_of_run(
        tmp_path,
        train={"learning_rate": 2e-3, "seed": 5, "noise_offset": 0.05},
        output={"author": "Ann", "license": "cc-by-4.0", "recommended_weight": 0.8},
    )
    expected = {
        "ss_num_train_images": "4",
        "ss_num_epochs": "2",
        "ss_steps": "4",
        "ss_max_train_steps": "4",
        "ss_total_batch_size": "2",
        "ss_learning_rate": "0.002",
        "ss_optimizer": "adamw",
        "ss_lr_scheduler": "cosine",
        "ss_seed": "5",
        "ss_mixed_precision": "no",
        "ss_min_snr_gamma": "5.0",
        "ss_noise_offset": "0.05",
        "ss_clip_skip": "None",
        "modelspec.author": "Ann",
        "modelspec.license": "cc-by-4.0",
        "modelspec.lora_default_weight": "0.8",
        "sdlora.recommended_weight": "0.8",
        "modelspec.resolution": "64x64",
    }
    assert expected.items() <= header.items()
    started = datetime.datetime.fromtimestamp(float(header["ss_training_started_at"]), tz=datetime.UTC)
    assert (started.hour, started.minute, started.second) == (0, 0, 0)
    assert started.date().isoformat() == header["modelspec.date"]


def test_captions_are_only_written_when_asked_for(tmp_path: Path) -> None:
    assert "ss_tag_frequency" not in header_of_run(tmp_path / "a")
    header = header_of_run(tmp_path / "b", output={"with_captions": True})
    assert json.loads(header["ss_tag_frequency"]) == {"captions": {f"picture {n}": 1 for n in range(4)}}


def test_tags_are_the_parts_between_commas_counted_once_a_caption() -> None:
    counts = tag_frequency(["ink style, a fox, a fox", "ink style, a cat", ""])
    assert list(counts.items()) == [("ink style", 2), ("a cat", 1), ("a fox", 1)]


def test_the_digest_of_the_settings_does_not_know_places(tmp_path: Path) -> None:
    here = make_config(data={"path": tmp_path}, output={"dir": tmp_path}, model={"base": str(tmp_path)})
    there = make_config(data={"path": "elsewhere"}, model={"base": str(Path.cwd())})
    assert settings_digest(here) == settings_digest(there)
    assert settings_digest(here) != settings_digest(make_config(data={"path": tmp_path}, lora={"rank": 5}))


def test_a_file_made_of_another_keeps_what_stays_true_and_no_captions(tmp_path: Path) -> None:
    header = header_of_run(tmp_path, output={"with_captions": True, "recommended_weight": 0.5})
    header |= {"ss_optimizer": "C:/Users/ann/adam.py", "ss_dataset_dirs": "{}", "modelspec.thumbnail": "data:text,x"}
    carried = carried_metadata(header, title="new")
    assert carried.training.keys() == (TRAINING_KEYS & header.keys()) - {"ss_optimizer"}
    assert (carried.recommended_weight, carried.trigger_phrase) == (0.5, "ink style")
    assert carried.tag_frequency == {} and carried.thumbnail is None
    assert carried.date is not None and carried.date.isoformat() == header["modelspec.date"]


def test_a_key_that_is_not_about_training_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="ss_dataset_dirs"):
        AdapterMetadata(title="ink", base_model="base", training={"ss_dataset_dirs": "{}"})
