"""What a run tells about itself in the header of its adapter: the settings and counts, never a place or a person."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from sdlora.adapter_file import AdapterMetadata
from sdlora.config import TrainConfig
from sdlora.length import LengthPlan

__all__ = ["run_metadata", "settings_digest", "tag_frequency"]


def run_metadata(
    config: TrainConfig,
    *,
    title: str,
    step: int,
    plan: LengthPlan,
    num_images: int,
    resolution: int,
    prediction_type: str,
    precision: str,
    base_fingerprint: str | None,
    captions: Iterable[str],
    training_alpha: float | None = None,
) -> AdapterMetadata:
    """The header of the adapter saved at `step`; of the captions only what `output.with_captions` allows.

    `resolution` is the side in pixels of the training's square; `precision` the number format that was chosen.
    """
    output, today = config.output, datetime.datetime.now(tz=datetime.UTC).date()
    return AdapterMetadata(
        title=title,
        base_model=config.model.base,
        prediction_type="v_prediction" if prediction_type == "v_prediction" else "epsilon",
        resolution=(resolution, resolution),
        trigger_phrase=config.data.trigger,
        author=output.author,
        license=output.license,
        recommended_weight=output.recommended_weight,
        date=today,
        base_fingerprint=base_fingerprint,
        training=_training(config, step, plan, num_images, precision, today),
        tag_frequency=tag_frequency(captions) if output.with_captions else {},
        training_alpha=training_alpha,
        own={
            **({"sdlora.base": "tiny"} if config.model.base == "tiny" else {}),
            "sdlora.steps": str(step),
            "sdlora.seed": str(config.train.seed),
            "sdlora.images": str(num_images),
            "sdlora.config_sha256": settings_digest(config),
        },
    )


def settings_digest(config: TrainConfig) -> str:
    """SHA-256 of the settings that make the adapter; places do not count, so that it is the same on every machine."""
    settings = config.model_dump(mode="json")
    del settings["output"], settings["data"]["path"], settings["validation"]["path"], settings["lora"]["init_from"]
    if Path(config.model.base).exists():
        del settings["model"]["base"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode("utf-8")).hexdigest()


def tag_frequency(captions: Iterable[str]) -> dict[str, int]:
    """How many captions hold each of the parts between commas, as kohya counts them; the most frequent first."""
    counts = Counter(tag for caption in captions for tag in {part.strip() for part in caption.split(",")} if tag)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _training(
    config: TrainConfig, step: int, plan: LengthPlan, num_images: int, precision: str, day: datetime.date
) -> dict[str, str]:
    """kohya's keys; a value that he would leave out is "None", as he writes it."""
    train, objective = config.train, config.objective
    midnight = datetime.datetime.combine(day, datetime.time(), tzinfo=datetime.UTC)
    values: dict[str, object] = {
        "ss_num_train_images": num_images,
        "ss_num_epochs": train.exposures,
        "ss_steps": step,
        "ss_max_train_steps": plan.steps,
        "ss_batch_size_per_device": train.batch_size,
        "ss_total_batch_size": train.batch_size * train.gradient_accumulation,
        "ss_gradient_accumulation_steps": train.gradient_accumulation,
        "ss_gradient_checkpointing": config.model.gradient_checkpointing,
        "ss_learning_rate": train.learning_rate,
        "ss_optimizer": config.optimizer.name,
        "ss_lr_scheduler": config.optimizer.schedule,
        "ss_lr_warmup_steps": plan.warmup_steps,
        "ss_max_grad_norm": train.max_grad_norm,
        "ss_seed": train.seed,
        "ss_mixed_precision": {"fp32": "no"}.get(precision, precision),
        "ss_network_dropout": config.lora.dropout or None,
        "ss_min_snr_gamma": train.snr_gamma if objective.weighting == "min-snr" and train.snr_gamma else None,
        "ss_noise_offset": train.noise_offset or None,
        "ss_multires_noise_discount": objective.multires_discount or None,
        "ss_caption_dropout_rate": config.data.caption_dropout,
        "ss_loss_type": {"mse": "l2"}.get(objective.loss, objective.loss),
        "ss_clip_skip": None,
        # The day; the hour is nobody's business.
        "ss_training_started_at": midnight.timestamp(),
    }
    return {key: str(value) for key, value in values.items()}
