"""May a run go on as asked? What changed since it was started, and what each change means. Loads no model library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sdlora.config import TrainConfig
from sdlora.data.content import content_hash
from sdlora.data.dataset import ImageCaption, ImageDataset
from sdlora.errors import CheckpointError

__all__ = [
    "CHANGE_CLASSES",
    "Change",
    "config_changes",
    "dataset_changes",
    "dataset_record",
    "own_pictures",
    "require_allowed",
]

_PRIOR_PREFIX = "prior.path: "
"""Before the names of pictures in the folder `prior.path`."""

Meaning = Literal["free", "safe", "changes the run", "impossible"]

CHANGE_CLASSES: dict[str, Meaning] = {
    "model.base": "free",
    "model.precision": "changes the run",
    "model.attention": "safe",
    "data.path": "free",
    "data.trigger": "changes the run",
    "data.resolution": "changes the run",
    "data.background": "changes the run",
    "data.caption_dropout": "changes the run",
    "data.flip": "changes the run",
    "data.caption_prefix": "changes the run",
    "data.caption_suffix": "changes the run",
    "data.shuffle_tags": "changes the run",
    "data.keep_tags": "changes the run",
    "data.tag_dropout": "changes the run",
    "data.caption_variants": "changes the run",
    "data.crop_variants": "changes the run",
    "data.masks": "free",
    "data.mask_outside": "changes the run",
    "data.cache": "free",
    "data.cache_dir": "free",
    "lora.rank": "impossible",
    "lora.alpha": "changes the run",
    "lora.dropout": "changes the run",
    "lora.targets": "impossible",
    "lora.blocks": "impossible",
    "lora.text_encoder": "impossible",
    "lora.init_from": "free",
    "lora.timestep_min_rank": "changes the run",
    "lora.dora": "impossible",
    "lora.rslora": "changes the run",
    "train.exposures": "changes the run",
    "train.batch_size": "safe",
    "train.gradient_accumulation": "safe",
    "train.learning_rate": "changes the run",
    "train.warmup_fraction": "changes the run",
    "train.weight_decay": "changes the run",
    "train.snr_gamma": "changes the run",
    "train.noise_offset": "changes the run",
    "train.max_grad_norm": "changes the run",
    "train.seed": "changes the run",
    "model.gradient_checkpointing": "safe",
    "model.channels_last": "safe",
    "model.compile": "safe",
    "objective.loss": "changes the run",
    "objective.huber_delta": "changes the run",
    "objective.weighting": "changes the run",
    "objective.multires_discount": "changes the run",
    "objective.input_perturbation": "changes the run",
    "objective.timestep_range": "changes the run",
    "objective.timestep_bias": "changes the run",
    "optimizer.name": "impossible",
    "optimizer.schedule": "changes the run",
    "optimizer.restarts": "changes the run",
    "optimizer.text_encoder_learning_rate": "changes the run",
    "optimizer.lora_plus_ratio": "changes the run",
    "optimizer.ema_decay": "impossible",
    "optimizer.max_norm": "changes the run",
    "train.save_every": "free",
    "train.log_every": "free",
    "validation.path": "impossible",
    "validation.share": "impossible",
    "validation.count": "impossible",
    "validation.timesteps": "impossible",
    "validation.stop": "changes the run",
    "validation.stop_after": "changes the run",
    "validation.keep_best": "free",
    "validation.tolerance": "changes the run",
    "prior.weight": "changes the run",
    "prior.prompts": "changes the run",
    "prior.path": "free",
    "preview.prompts": "free",
    "preview.where": "free",
    "preview.num_inference_steps": "free",
    "preview.guidance_scale": "free",
    "preview.seed": "free",
    "output.dir": "free",
    "output.name": "impossible",
    "output.tracker": "free",
    "output.author": "free",
    "output.license": "free",
    "output.recommended_weight": "free",
    "output.with_captions": "free",
    "output.dtype": "free",
}
"""What a changed setting does to a run that goes on. `free`: the adapter stays the same (what base, pictures and a
first adapter hold is compared by itself, wherever they lie). `safe`: the same but for rounding. `changes the run`:
another adapter than without the stop. `impossible`: the saved state does not fit it. A run keeps the pictures a step
that it was begun with, whatever batch size they are computed in now. A test sees to it that every setting is here."""


@dataclass(frozen=True)
class Change:
    """One difference, in words, and what it means."""

    what: str
    meaning: Meaning

    def __str__(self) -> str:
        return f"{self.what} ({self.meaning})"


def config_changes(old: TrainConfig, new: TrainConfig) -> list[Change]:
    """Every setting that differs."""
    before, after = (_flat(config.model_dump(mode="json")) for config in (old, new))
    return [
        Change(f"{name}: {json.dumps(before[name])} -> {json.dumps(after[name])}", CHANGE_CLASSES[name])
        for name in before
        if before[name] != after[name]
    ]


def dataset_record(dataset: ImageDataset, prior: ImageDataset | None = None) -> dict[str, dict[str, Any]]:
    """By file name: SHA-256 of the picture's bytes, its caption, how often and how much it counts, its mask's hash. The
    pictures of a `prior` stand under names of their own."""
    record = {example.path.relative_to(dataset.root).as_posix(): _entry(example) for example in dataset.examples}
    if prior is not None:
        names = {example.path.relative_to(prior.root).as_posix(): example for example in prior.examples}
        record |= {f"{_PRIOR_PREFIX}{name}": _entry(example) for name, example in names.items()}
    return record


def own_pictures(record: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The entries of the pictures that the adapter is made of."""
    return {name: entry for name, entry in record.items() if not name.startswith(_PRIOR_PREFIX)}


def _entry(example: ImageCaption) -> dict[str, Any]:
    return {
        "sha256": content_hash(example.path),
        "caption": example.caption,
        "repeats": example.repeats,
        "weight": example.weight,
        "mask": content_hash(example.mask) if example.mask is not None else None,
    }


def dataset_changes(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> list[Change]:
    """Every picture that came, went or changed."""
    changes = [f"{name} is gone" for name in old if name not in new]
    changes += [f"{name} is new" for name in new if name not in old]
    for name in old:
        if name not in new:
            continue
        if old[name]["sha256"] != new[name]["sha256"]:
            changes.append(f"{name}: the picture changed")
        if old[name].get("mask") != new[name]["mask"]:
            changes.append(f"{name}: its mask changed")
        for key in ("caption", "repeats", "weight"):
            # Runs from before there were weights had none.
            before = old[name].get(key, 1.0) if key == "weight" else old[name][key]
            if before != new[name][key]:
                changes.append(f"{name}: {key} {before!r} -> {new[name][key]!r}")
    return [Change(what, "changes the run") for what in changes]


def require_allowed(root: Path, changes: Sequence[Change], *, allow_change: bool) -> None:
    """Lets a run go on unless a change forbids it.

    Raises:
        CheckpointError: lists the changes that are impossible, or that need `allow_change`.
    """
    for meaning, way_out in (
        ("impossible", "The saved state does not fit. Undo them, or start a new run with `sdlora train`."),
        ("changes the run", "Undo them, or add --allow-change to go on with another run than the one begun."),
    ):
        matching = [change for change in changes if change.meaning == meaning]
        if matching and not (allow_change and meaning == "changes the run"):
            lines = "\n".join(f"  {change.what}" for change in matching)
            raise CheckpointError(f"Since {root} was started, this changed:\n{lines}\n{way_out}")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, inner in values.items() for name, value in inner.items()}
