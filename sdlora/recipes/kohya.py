"""kohya sd-scripts: settings as in its TOML files, and the `ss_*` texts in the header of a LoRA."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sdlora.recipes.translate import Foreign

__all__ = ["from_kohya", "from_metadata"]

_DIRECT = {
    "train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "noise_offset": "train.noise_offset",
    "network_dropout": "lora.dropout",
    "seed": "train.seed",
    "max_grad_norm": "train.max_grad_norm",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "scale_weight_norms": "optimizer.max_norm",
    "ip_noise_gamma": "objective.input_perturbation",
    "caption_dropout_rate": "data.caption_dropout",
    "flip_aug": "data.flip",
    "lr_scheduler_num_cycles": "optimizer.restarts",
    "save_every_n_steps": "train.save_every",
    "huber_c": "objective.huber_delta",
    "output_name": "output.name",
}
_LATER = (
    *("unet_lr", "learning_rate", "text_encoder_lr", "network_dim", "network_alpha", "optimizer_type", "lr_scheduler"),
    *("lr_warmup_steps", "max_train_epochs", "max_train_steps", "resolution", "mixed_precision", "min_snr_gamma"),
    *("debiased_estimation_loss", "loss_type", "multires_noise_iterations", "multires_noise_discount", "num_repeats"),
    *("pretrained_model_name_or_path", "network_module", "network_args", "network_train_unet_only", "xformers"),
    *("network_train_text_encoder_only", "optimizer_args", "min_timestep", "max_timestep", "sdpa"),
    "save_precision",
)
_OURS = (
    *("cache_latents", "cache_latents_to_disk", "enable_bucket", "save_model_as", "persistent"),
    *("max_data_loader_n_workers", "persistent_data_loader_workers", "logging_dir", "log_with", "train_data_dir"),
    *("output_dir", "caption_extension", "bucket_no_upscale", "min_bucket_reso", "max_bucket_reso", "max_token_length"),
    *("bucket_reso_steps", "lowram", "no_half_vae", "prior_loss_weight", "save_every_n_epochs", "v2", "image_dir"),
    *("cache_text_encoder_outputs", "class_tokens", "v_parameterization", "batch_size", "config_file", "is_reg"),
)
"""Done always, found out by itself, or said elsewhere: nothing is lost by leaving them out."""


def from_kohya(values: Mapping[str, Any]) -> Foreign:
    """The settings of a training or dataset TOML; sections do not matter, as they do not to kohya."""
    flat = _flat(values)
    return _read(flat, Foreign("a kohya sd-scripts configuration", repeats=float(flat.get("num_repeats", 1))))


def from_metadata(metadata: Mapping[str, str]) -> Foreign:
    """The `ss_*` texts that kohya's trainer (and others) leave in a file."""
    said = {key[3:]: value for key, value in metadata.items() if key.startswith("ss_") and value not in ("None", "")}
    renamed = {
        "batch_size_per_device": "train_batch_size",
        "num_epochs": "max_train_epochs",
        "optimizer": "optimizer_type",
        "flip": "flip_aug",
    }
    wanted = (*_DIRECT, *_LATER, *renamed)
    values = {renamed.get(key, key): _value(text) for key, text in said.items() if key in wanted}
    values.pop("output_name", None)
    foreign = Foreign("what the header of a LoRA file says of its training")
    per_epoch = _value(said.get("num_train_images", ""))
    folders = _value(said.get("dataset_dirs", ""))
    if isinstance(folders, dict) and all(isinstance(one, dict) for one in folders.values()):
        foreign.images = sum(int(one.get("img_count", 0)) for one in folders.values()) or None
    if isinstance(per_epoch, int) and foreign.images:
        foreign.repeats = per_epoch / foreign.images
    elif isinstance(per_epoch, int):
        foreign.images = per_epoch
    # Options were folded into the name: "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)".
    if isinstance(values.get("optimizer_type"), str):
        name, _, options = values["optimizer_type"].partition("(")
        values["optimizer_type"], values["optimizer_args"] = name, options.rstrip(")")
    return _read(values, foreign)


def _read(values: Mapping[str, Any], foreign: Foreign) -> Foreign:
    settings = foreign.settings
    settings |= {ours: values[theirs] for theirs, ours in _DIRECT.items() if values.get(theirs) is not None}
    # What kohya does where a recipe is silent, and we do not.
    settings.setdefault("data.caption_dropout", 0.0)
    _make_floats(settings)
    foreign.rank = int(values.get("network_dim") or 4)
    foreign.alpha = float(values.get("network_alpha") or 1)
    foreign.learning_rate = _number(values.get("unet_lr") or values.get("learning_rate"))
    foreign.optimizer = str(values.get("optimizer_type") or "AdamW")
    foreign.schedule = str(values.get("lr_scheduler") or "constant")
    foreign.warmup_steps = float(values.get("lr_warmup_steps") or 0)
    foreign.epochs, foreign.steps = _number(values.get("max_train_epochs")), values.get("max_train_steps")
    base = values.get("pretrained_model_name_or_path")
    if isinstance(base, str):
        settings["model.base"] = base
    if (side := _side(values.get("resolution"))) is not None:
        settings["data.resolution"] = side
    precision = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}.get(str(values.get("mixed_precision")))
    if precision:
        settings["model.precision"] = precision
    saved = {"float": "fp32", "fp32": "fp32", "bf16": "bf16"}.get(str(values.get("save_precision")))
    if saved:
        settings["output.dtype"] = saved
    if values.get("xformers") is True:
        settings["model.attention"] = "xformers"
    _objective(values, settings)
    _targets(values, foreign)
    if values.get("network_train_unet_only") is not True:
        foreign.text_encoder_rate = _number(values.get("text_encoder_lr"))
    decay = re.search(r"weight_decay\s*=\s*([\d.e-]+)", str(values.get("optimizer_args", "")))
    if decay:
        settings["train.weight_decay"] = float(decay[1])
    for name, value in values.items():
        if name not in _DIRECT and name not in _LATER and name not in _OURS and value not in (None, False, "", 0):
            foreign.without[name] = f"{str(value)[:60]}"
    return foreign


def _objective(values: Mapping[str, Any], settings: dict[str, Any]) -> None:
    gamma = _number(values.get("min_snr_gamma")) or 0.0
    settings["train.snr_gamma"] = gamma
    if values.get("debiased_estimation_loss") is True:
        settings["objective.weighting"] = "debiased"
    if values.get("loss_type") in ("huber", "smooth_l1"):
        settings["objective.loss"] = values["loss_type"]
    if values.get("multires_noise_iterations"):
        settings["objective.multires_discount"] = float(values.get("multires_noise_discount") or 0.3)
    low, high = _number(values.get("min_timestep")) or 0.0, _number(values.get("max_timestep")) or 1000.0
    if (low, high) != (0.0, 1000.0):
        settings["objective.timestep_range"] = (low / 1000, high / 1000)


def _targets(values: Mapping[str, Any], foreign: Foreign) -> None:
    arguments = str(values.get("network_args") or "")
    module = str(values.get("network_module") or "networks.lora")
    algorithm = re.search(r"algo['\"]?\s*[:=]\s*['\"]?(\w+)", arguments)
    preset = re.search(r"preset['\"]?\s*[:=]\s*['\"]?([\w-]+)", arguments)
    foreign.settings["lora.targets"] = "attention" if preset and preset[1] == "attn-only" else "attention+ff"
    if module != "networks.lora" and algorithm and algorithm[1] not in ("lora", "locon"):
        foreign.without["network_args: algo"] = f"{algorithm[1]}; a plain LoRA stands in"
    if not preset:
        foreign.notes.append(
            "Layers: kohya's LoRA also covers the two projections around each transformer, which our presets leave out."
        )
    if re.search(r"conv_dim", arguments):
        foreign.settings["lora.targets"] = "attention+ff+conv"
        foreign.without["network_args: conv_dim"] = "the convolutions get lora.rank; lora.blocks can give them another"
    ratio = re.search(r"loraplus_(?:unet_)?lr_ratio['\"]?\s*[:=]\s*['\"]?([\d.]+)", arguments)
    if ratio:
        foreign.settings["optimizer.lora_plus_ratio"] = float(ratio[1])


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """All settings on one level; of several datasets or subsets the first."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {inner: found for inner, found in _flat(value).items() if inner not in flat}
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            flat |= {inner: found for inner, found in _flat(value[0]).items() if inner not in flat}
        else:
            flat[name] = value
    if "batch_size" in flat:
        flat.setdefault("train_batch_size", flat["batch_size"])
    return flat


def _value(text: str) -> Any:
    words = {"True": True, "False": False}
    if text in words:
        return words[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def _number(value: Any) -> float | None:
    if isinstance(value, list) and value:
        value = value[0]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _make_floats(settings: dict[str, Any]) -> None:
    """Numbers that are whole by chance, where ours are not."""
    for place in ("train.noise_offset", "lora.dropout", "train.max_grad_norm", "optimizer.max_norm"):
        if isinstance(settings.get(place), int):
            settings[place] = float(settings[place])


def _side(value: Any) -> int | None:
    """One side of "512,512", "(512, 512)", [512, 512] or 512."""
    numbers = [int(number) for number in re.findall(r"\d+", str(value))]
    if not numbers:
        return None
    side = int((numbers[0] * numbers[-1]) ** 0.5)
    return side // 8 * 8
