"""Small recipes of each kind, as their trainers write them, and what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from sdlora import cli
from sdlora.config import load_config
from sdlora.errors import ConfigError
from sdlora.recipes import Translated, read_recipe_file, translate

KOHYA = """
[model]
pretrained_model_name_or_path = "stabilityai/stable-diffusion-xl-base-1.0"
[training]
network_module = "networks.lora"
network_dim = 16
network_alpha = 8
unet_lr = 5e-4
text_encoder_lr = 1e-4
train_batch_size = 2
max_train_epochs = 10
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.1"]
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 0.05
min_snr_gamma = 5.0
multires_noise_iterations = 6
multires_noise_discount = 0.3
mixed_precision = "fp16"
save_precision = "float"
resolution = "1024,1024"
seed = 42
clip_skip = 2
cache_latents = true
[[datasets]]
[[datasets.subsets]]
image_dir = "C:/Users/me/pictures"
num_repeats = 8
flip_aug = true
shuffle_caption = true
"""

ONETRAINER = {
    "training_method": "LORA",
    "model_type": "STABLE_DIFFUSION_15",
    "base_model_name": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "lora_rank": 16,
    "lora_alpha": 1.0,
    "learning_rate": 3e-4,
    "learning_rate_scheduler": "CONSTANT",
    "learning_rate_warmup_steps": 200,
    "epochs": 100,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "resolution": "512",
    "train_dtype": "BFLOAT_16",
    "loss_weight_fn": "DEBIASED_ESTIMATION",
    "offset_noise_weight": 0.05,
    "layer_filter_preset": "attn-only",
    "ema": "GPU",
    "ema_decay": 0.99,
    "optimizer": {"optimizer": "CAME", "weight_decay": 0.02},
    "text_encoder": {"train": True, "learning_rate": 1e-4},
    "masked_training": True,
    "lora_decompose": True,
    "concepts": [{"path": "/home/me/art", "image": {"enable_random_flip": True}, "balancing": 2.0}],
}

HEADER = {
    "ss_network_dim": "32",
    "ss_network_alpha": "16.0",
    "ss_learning_rate": "0.0001",
    "ss_unet_lr": "0.0001",
    "ss_text_encoder_lr": "None",
    "ss_optimizer": "prodigyopt.prodigy.Prodigy(weight_decay=0.01,decouple=True)",
    "ss_lr_scheduler": "cosine",
    "ss_max_train_steps": "1000",
    "ss_batch_size_per_device": "4",
    "ss_gradient_accumulation_steps": "1",
    "ss_num_train_images": "200",
    "ss_dataset_dirs": json.dumps({"10_ink": {"n_repeats": 10, "img_count": 20}}),
    "ss_resolution": "(768, 512)",
    "ss_noise_offset": "None",
    "ss_min_snr_gamma": "5.0",
    "ss_network_module": "networks.lora",
    "ss_seed": "7",
    "ss_training_comment": "me at home",
}


def written(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / {"kohya": "a.toml", "onetrainer": "b.json", "header": "c.safetensors"}[kind]
    if kind == "kohya":
        path.write_text(KOHYA, encoding="utf-8")
    elif kind == "onetrainer":
        path.write_text(json.dumps(ONETRAINER), encoding="utf-8")
    else:
        save_file({"lora_unet_x.alpha": torch.zeros(())}, path, metadata=HEADER)
    return path


def read(tmp_path: Path, kind: str, **options: Any) -> Translated:
    return translate(read_recipe_file(written(tmp_path, kind)), **options)


def test_a_kohya_configuration(tmp_path: Path) -> None:
    made = read(tmp_path, "kohya")
    config = made.config
    assert config.model.base == "stabilityai/stable-diffusion-xl-base-1.0"
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (16, None, "attention+ff")
    # alpha / rank = 8 / 16 halves it.
    assert config.train.learning_rate == pytest.approx(2.5e-4)
    assert (config.optimizer.name, config.train.weight_decay) == ("adamw8bit", 0.1)
    assert (config.optimizer.schedule, config.optimizer.restarts, config.train.warmup_fraction) == (
        "cosine-restarts",
        3,
        0.05,
    )
    assert config.train.exposures == 80  # 10 epochs x 8 repeats
    assert (config.data.resolution, config.data.flip, config.data.caption_dropout) == (1024, True, 0.0)
    assert (config.train.snr_gamma, config.objective.multires_discount) == (5.0, 0.3)
    assert (config.model.precision, config.train.seed, config.train.batch_size) == ("fp16", 42, 2)
    assert config.output.dtype == "fp32"
    assert set(made.without) >= {"clip_skip", "shuffle_caption"}
    assert "cache_latents" not in made.without
    assert config.lora.text_encoder and config.optimizer.text_encoder_learning_rate == pytest.approx(5e-5)


def test_a_onetrainer_configuration(tmp_path: Path) -> None:
    made = read(tmp_path, "onetrainer")
    config = made.config
    assert config.train.learning_rate == pytest.approx(3e-4 / 16, rel=1e-2)
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (16, None, "attention")
    assert config.train.exposures == 200  # 100 epochs x balancing 2
    assert (config.objective.weighting, config.train.noise_offset) == ("debiased", 0.05)
    assert (config.optimizer.schedule, config.optimizer.ema_decay) == ("constant", 0.99)
    assert (config.data.resolution, config.data.flip, config.model.precision) == (512, True, "bf16")
    assert {"optimizer", "masked_training"} <= set(made.without)
    assert any("200 steps" in note for note in made.notes)
    assert config.lora.text_encoder and config.optimizer.text_encoder_learning_rate == pytest.approx(6.25e-6, rel=1e-2)
    assert config.train.weight_decay == 0.02 and config.lora.dora


def test_the_header_of_a_file(tmp_path: Path) -> None:
    made = read(tmp_path, "header")
    config = made.config
    # Prodigy finds its own rate, so that the scale is kept instead.
    assert (config.optimizer.name, config.train.learning_rate, config.lora.alpha) == ("prodigy", 0.0001, 16.0)
    assert config.train.exposures == 200  # 1000 steps x 4 / 20 pictures
    assert config.data.resolution == 624  # the square of 768 x 512, in eights
    assert (config.optimizer.schedule, config.train.seed, config.lora.rank) == ("cosine", 7, 32)
    assert "me at home" not in made.to_toml()


@pytest.mark.parametrize("kind", ["kohya", "onetrainer", "header"])
def test_what_is_printed_is_a_configuration_of_ours_without_foreign_paths(tmp_path: Path, kind: str) -> None:
    result = CliRunner().invoke(cli.app, ["runs", "recipe", str(written(tmp_path, kind)), "--data", "my pictures"])
    assert result.exit_code == 0, result.output
    path = tmp_path / "ours.toml"
    path.write_text(result.output, encoding="utf-8")
    config = load_config(path)
    assert config == read(tmp_path, kind, data="my pictures").config
    assert config.data.path == Path("my pictures")
    assert "C:/" not in result.output and "/home" not in result.output
    if kind != "header":
        assert "# Learning rate: " in result.output


def test_a_length_in_steps_needs_the_number_of_pictures(tmp_path: Path) -> None:
    path = tmp_path / "steps.toml"
    path.write_text("network_dim = 8\nnetwork_alpha = 8\nlearning_rate = 1e-4\nmax_train_steps = 1600\n")
    without = translate(read_recipe_file(path))
    assert "train.exposures" not in without.settings
    assert any("--images" in note for note in without.notes)
    assert translate(read_recipe_file(path), images=40).config.train.exposures == 40
    assert without.config.train.learning_rate == 1e-4
    # kohya's schedule is constant unless told.
    assert without.config.optimizer.schedule == "constant"


def test_convolutions_are_trained_where_the_recipe_does(tmp_path: Path) -> None:
    path = tmp_path / "locon.toml"
    path.write_text(
        'network_module = "lycoris.kohya"\nnetwork_dim = 8\nnetwork_alpha = 8\nlearning_rate = 1e-4\n'
        'network_args = ["algo=locon", "conv_dim=4"]\nnetwork_train_unet_only = true\n'
    )
    made = translate(read_recipe_file(path))
    assert made.config.lora.targets == "attention+ff+conv" and not made.config.lora.text_encoder
    assert "network_args: conv_dim" in made.without


def test_what_is_out_of_range_is_told_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "wild.toml"
    path.write_text('network_dim = 4096\nlearning_rate = 1e-4\nnetwork_dropout = 1.5\noptimizer_type = "CAME"\n')
    made = translate(read_recipe_file(path))
    assert {"lora.rank", "lora.dropout", "optimizer"} <= set(made.without)
    assert made.config.lora.rank == 16


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "x", "no recipe"),
        ("a.toml", "x =", "not what its name says"),
        ("a.toml", 'title = "x"', "no setting of kohya's"),
        ("a.json", "[]", "not a configuration of OneTrainer"),
        ("a.json", '{"training_method": "EMBEDDING"}', "EMBEDDING"),
        ("a.safetensors", "short", "not what its name says"),
        ("missing.toml", None, "cannot be read"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_recipe_file(tmp_path / name)


def test_a_file_without_training_in_its_header_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="nothing of its training"):
        read_recipe_file(tmp_path / "plain.safetensors")
