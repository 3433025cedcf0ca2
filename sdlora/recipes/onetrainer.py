"""OneTrainer: the JSON that its window saves and loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdlora.recipes.translate import Foreign

__all__ = ["from_onetrainer"]

_DIRECT = {
    "batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "seed": "train.seed",
}
_NUMBERS = {
    "clip_grad_norm": "train.max_grad_norm",
    "offset_noise_weight": "train.noise_offset",
    "perturbation_noise_weight": "objective.input_perturbation",
    "dropout_probability": "lora.dropout",
}
_WEIGHTINGS = {"MIN_SNR_GAMMA": "min-snr", "DEBIASED_ESTIMATION": "debiased", "P2": "p2", "CONSTANT": "none"}
_PRECISIONS = {"FLOAT_32": "fp32", "FLOAT_16": "fp16", "BFLOAT_16": "bf16"}
_TARGETS = {"attn-only": "attention", "attn-mlp": "attention+ff", "full": "attention+ff"}


def from_onetrainer(values: Mapping[str, Any]) -> Foreign:
    """The settings of a saved configuration; what it does not say is left to our defaults."""
    foreign = Foreign("a OneTrainer configuration")
    settings = foreign.settings
    settings |= {ours: values[theirs] for theirs, ours in _DIRECT.items() if isinstance(values.get(theirs), int)}
    settings |= {ours: float(values[theirs]) for theirs, ours in _NUMBERS.items() if values.get(theirs) is not None}
    if isinstance(values.get("base_model_name"), str) and values["base_model_name"]:
        settings["model.base"] = values["base_model_name"]
    foreign.rank = int(values.get("lora_rank", 16))
    foreign.alpha = float(values.get("lora_alpha", 1.0))
    unet, text = _part(values, "unet"), _part(values, "text_encoder")
    foreign.learning_rate = _first_number(unet.get("learning_rate"), values.get("learning_rate"))
    if text.get("train", False):
        foreign.text_encoder_rate = _first_number(text.get("learning_rate"), values.get("learning_rate"))
    optimizer = _part(values, "optimizer")
    foreign.optimizer = str(optimizer.get("optimizer") or "ADAMW")
    if optimizer.get("weight_decay") is not None:
        settings["train.weight_decay"] = float(optimizer["weight_decay"])
    foreign.schedule = str(values.get("learning_rate_scheduler") or "CONSTANT")
    foreign.warmup_steps = _first_number(values.get("learning_rate_warmup_steps")) or 0.0
    foreign.epochs = _first_number(values.get("epochs"))
    _rest(values, foreign)
    _concepts(values, foreign)
    return foreign


def _rest(values: Mapping[str, Any], foreign: Foreign) -> None:
    settings = foreign.settings
    side = str(values.get("resolution", ""))
    if side.isdecimal():
        settings["data.resolution"] = int(side)
    elif side:
        foreign.without["resolution"] = f"{side}; ours is one number, with shapes around it"
    if values.get("train_dtype") in _PRECISIONS:
        settings["model.precision"] = _PRECISIONS[values["train_dtype"]]
    if values.get("gradient_checkpointing") in ("ON", "CPU_OFFLOADED", True):
        settings["model.gradient_checkpointing"] = True
    weighting = _WEIGHTINGS.get(str(values.get("loss_weight_fn", "CONSTANT")))
    if weighting is None:
        foreign.without["loss_weight_fn"] = str(values["loss_weight_fn"])
    else:
        settings["objective.weighting"] = weighting
    if weighting == "min-snr":
        settings["train.snr_gamma"] = float(values.get("loss_weight_strength", 5.0))
    low, high = values.get("min_noising_strength", 0.0), values.get("max_noising_strength", 1.0)
    if (low, high) != (0.0, 1.0):
        settings["objective.timestep_range"] = (float(low), float(high))
    preset = str(values.get("layer_filter_preset", "full"))
    settings["lora.targets"] = _TARGETS.get(preset, "attention+ff")
    if preset not in _TARGETS:
        foreign.without["layer_filter"] = f"{values.get('layer_filter') or preset}; see lora.targets for patterns"
    if values.get("ema", "OFF") != "OFF":
        settings["optimizer.ema_decay"] = float(values.get("ema_decay", 0.999))
    if values.get("mae_strength"):
        foreign.without["mae_strength"] = f"{values['mae_strength']:g}; see objective.loss"
    if values.get("peft_type", "LORA") != "LORA":
        foreign.without["peft_type"] = f"{values['peft_type']}; a plain LoRA stands in"
    if values.get("lora_decompose"):
        settings["lora.dora"] = True
    if values.get("masked_training"):
        foreign.without["masked_training"] = "masks are settings of the data"


def _concepts(values: Mapping[str, Any], foreign: Foreign) -> None:
    concepts = [one for one in values.get("concepts") or [] if isinstance(one, dict)]
    if not concepts:
        return
    image, text = _part(concepts[0], "image"), _part(concepts[0], "text")
    foreign.settings["data.flip"] = bool(image.get("enable_random_flip", False))
    dropout = _first_number(text.get("caption_dropout_probability"))
    foreign.settings["data.caption_dropout"] = dropout or 0.0
    if concepts[0].get("balancing_strategy", "REPEATS") == "REPEATS":
        foreign.repeats = float(concepts[0].get("balancing", 1.0))
    if text.get("enable_tag_shuffling"):
        foreign.without["enable_tag_shuffling"] = "the order of tags is a setting of the data"
    if len(concepts) > 1:
        foreign.without["concepts"] = f"{len(concepts)}; the first one counts here"


def _part(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = values.get(name)
    return part if isinstance(part, Mapping) else {}


def _first_number(*values: Any) -> float | None:
    return next((float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)), None)
