"""The header of a written adapter: what A1111, Forge, kohya, SwarmUI and model managers look for, and our own keys.

Nothing private is written: no captions, tags, folder names, paths, user or host; the words of the captions only where
they are given on purpose (`tag_frequency`). All values are strings.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from sdlora.adapter_file.types import LoraPair

__all__ = ["TRAINING_KEYS", "AdapterMetadata", "Family", "build_metadata", "carried_metadata", "family_of"]

Family = Literal["sd1", "sd2", "sdxl"]

_FAMILY_WORDS: tuple[tuple[str, Family], ...] = (
    ("sdxl", "sdxl"),
    ("sd_v2", "sd2"),
    ("sd2", "sd2"),
    ("sd_v1", "sd1"),
    ("sd1", "sd1"),
)
_STABILITY = "https://github.com/Stability-AI/generative-models"

_TRAINING = (
    "ss_num_train_images ss_num_epochs ss_epoch ss_steps ss_max_train_steps ss_batch_size_per_device "
    "ss_total_batch_size ss_gradient_accumulation_steps ss_gradient_checkpointing ss_learning_rate ss_unet_lr "
    "ss_text_encoder_lr ss_optimizer ss_lr_scheduler ss_lr_warmup_steps ss_max_grad_norm ss_seed ss_mixed_precision "
    "ss_network_dropout ss_min_snr_gamma ss_noise_offset ss_multires_noise_discount ss_caption_dropout_rate "
    "ss_loss_type ss_clip_skip ss_training_started_at"
)
TRAINING_KEYS = frozenset(_TRAINING.split())
"""kohya's numbers and plain words about a training; none of them has room for a name."""
_PLAIN_VALUE = re.compile(r"[A-Za-z0-9_.+\-]{1,40}")
_JPEG_URI = "data:image/jpeg;base64,"


@dataclass(frozen=True)
class AdapterMetadata:
    """What the trainer knows about an adapter and others may read."""

    title: str
    """Shown by model managers; also A1111's alias, so it should differ from file to file."""
    base_model: str
    """Hub id or public name of the base model. A path on this machine is not passed on."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    resolution: tuple[int, int] | None = None
    """(height, width) of training, in pixels."""
    trigger_phrase: str | None = None
    author: str | None = None
    description: str | None = None
    license: str | None = None
    tags: tuple[str, ...] = ()
    usage_hint: str | None = None
    date: datetime.date | None = None
    """A day; the hour is nobody's business."""
    recommended_weight: float | None = None
    """The strength to begin with in a prompt, where 1 is that of the training."""
    base_fingerprint: str | None = None
    """Tells the base from its fine-tunings: `families.weights_fingerprint`, 64 hex digits."""
    training: Mapping[str, str] = field(default_factory=dict)
    """How it was trained, in kohya's words; keys of `TRAINING_KEYS`."""
    tag_frequency: Mapping[str, int] = field(default_factory=dict)
    """How often the captions say what; for A1111's cloud of tags. Private: only given when the user asks."""
    thumbnail: bytes | None = None
    """A small JPEG that model managers show."""
    training_alpha: float | None = None
    """alpha during training, for going on; the stored alpha is always the rank."""
    own: Mapping[str, str] = field(default_factory=dict)
    """Further keys, all in our own namespace: "sdlora.steps" and the like."""

    def __post_init__(self) -> None:
        foreign = [key for key in self.own if not re.fullmatch(r"sdlora\.[a-z0-9_.]+", key)]
        if foreign:
            raise ValueError(f"Own metadata keys begin with 'sdlora.' and are lower case, unlike {foreign[0]!r}.")
        unknown = self.training.keys() - TRAINING_KEYS
        if unknown:
            raise ValueError(f"{min(unknown)!r} is no key about a training.")


class _Described(Protocol):
    """What an adapter and its outline have in common."""

    @property
    def cross_attention_dim(self) -> int | None: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...


def family_of(weights: _Described) -> Family | None:
    """The family that an adapter was made for, by the width of its text embeddings, else by what its header says."""
    by_width: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
    if (weights.cross_attention_dim or 0) in by_width:
        return by_width[weights.cross_attention_dim or 0]
    said = weights.metadata.get("sdlora.family") or weights.metadata.get("ss_base_model_version", "")
    return next((family for start, family in _FAMILY_WORDS if said.startswith(start)), None)


def carried_metadata(metadata: Mapping[str, str], *, title: str) -> AdapterMetadata:
    """What of a file's header stays true in a file made from it: base, resolution, trigger, author, licence, training.

    Texts of foreign files count as far as they have the known form; their captions are left behind.
    """
    own = {
        key: value
        for key, value in metadata.items()
        if re.fullmatch(r"sdlora\.(base|seed|steps|images|config_sha256)", key)
    }
    size = re.fullmatch(r"(\d{2,5})x(\d{2,5})", metadata.get("modelspec.resolution", ""))
    is_v = metadata.get("modelspec.prediction_type") == "v" or metadata.get("ss_base_model_version", "").endswith("_v")
    return AdapterMetadata(
        title=title,
        base_model=metadata.get("sdlora.base_model") or metadata.get("ss_sd_model_name") or "unknown",
        prediction_type="v_prediction" if is_v else "epsilon",
        resolution=(int(size[2]), int(size[1])) if size else None,
        trigger_phrase=metadata.get("modelspec.trigger_phrase"),
        author=metadata.get("modelspec.author"),
        description=metadata.get("modelspec.description"),
        license=metadata.get("modelspec.license"),
        tags=tuple(tag.strip() for tag in metadata.get("modelspec.tags", "").split(",") if tag.strip()),
        usage_hint=metadata.get("modelspec.usage_hint"),
        date=_day(metadata.get("modelspec.date", "")),
        recommended_weight=_weight(metadata),
        base_fingerprint=metadata.get("sdlora.base_fingerprint"),
        training={k: v for k, v in metadata.items() if k in TRAINING_KEYS and _PLAIN_VALUE.fullmatch(v)},
        thumbnail=_thumbnail(metadata.get("modelspec.thumbnail", "")),
        own=own,
    )


def _day(text: str) -> datetime.date | None:
    """The day of an ISO date; other tools add the time."""
    try:
        return datetime.date.fromisoformat(text[:10])
    except ValueError:
        return None


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d{1,6}(\.\d{1,20})?", text) else None


def _weight(metadata: Mapping[str, str]) -> float | None:
    return _number(metadata.get("sdlora.recommended_weight") or metadata.get("modelspec.lora_default_weight", ""))


def _thumbnail(uri: str) -> bytes | None:
    try:
        return base64.b64decode(uri.removeprefix(_JPEG_URI), validate=True) if uri.startswith(_JPEG_URI) else None
    except binascii.Error:
        return None


def build_metadata(
    metadata: AdapterMetadata, *, family: Family, pairs: Mapping[str, LoraPair], version: str
) -> dict[str, str]:
    """The header's texts, without the hashes; `pairs` are those that will be stored, by any unique name.

    Keys: kohya's `ss_*`, ModelSpec 1.0.1 (`modelspec.*`), `sdlora.*`.
    """
    base = _public_name(metadata.base_model)
    dims = {pair.rank for pair in pairs.values()}
    # kohya's word for ranks that differ from layer to layer.
    dim = str(dims.pop()) if len(dims) == 1 else "Dynamic"
    is_v = metadata.prediction_type == "v_prediction"
    result = {
        # kohya's own module knows no DoRA.
        "ss_network_module": "lycoris.kohya" if _is_dora(pairs) else "networks.lora",
        "ss_network_dim": dim,
        "ss_network_alpha": dim,
        "ss_network_args": json.dumps(_network_args(pairs)),
        "ss_base_model_version": _base_model_version(family, is_v),
        "ss_v2": str(family == "sd2"),
        "ss_output_name": metadata.title,
        "ss_sd_model_name": base,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": _architecture(family, is_v),
        "modelspec.implementation": _STABILITY if family == "sdxl" else "diffusers",
        "modelspec.title": metadata.title,
        "modelspec.prediction_type": "v" if is_v else "epsilon",
        "sdlora.version": version,
        "sdlora.family": family,
        "sdlora.base_model": base,
        "sdlora.rank": dim,
    }
    if metadata.resolution is not None:
        height, width = metadata.resolution
        result["ss_resolution"] = f"({width}, {height})"
        result["modelspec.resolution"] = f"{width}x{height}"
    if metadata.training_alpha is not None:
        result["sdlora.training_alpha"] = repr(metadata.training_alpha)
    if metadata.recommended_weight is not None:
        weight = f"{metadata.recommended_weight:g}"
        # SwarmUI's key, and ours.
        result |= {"modelspec.lora_default_weight": weight, "sdlora.recommended_weight": weight}
    if metadata.thumbnail is not None:
        cover = base64.b64encode(metadata.thumbnail).decode("ascii")
        result |= {"modelspec.thumbnail": f"{_JPEG_URI}{cover}", "ssmd_cover_images": json.dumps([cover])}
    if metadata.tag_frequency:
        # kohya writes the folder's name where "captions" stands.
        result["ss_tag_frequency"] = json.dumps({"captions": dict(metadata.tag_frequency)})
    optional = {
        "modelspec.trigger_phrase": metadata.trigger_phrase,
        "modelspec.author": metadata.author,
        "modelspec.description": metadata.description,
        "modelspec.license": metadata.license,
        "modelspec.tags": ", ".join(metadata.tags),
        "modelspec.usage_hint": metadata.usage_hint,
        "modelspec.date": metadata.date.isoformat() if metadata.date else None,
        "sdlora.base_fingerprint": metadata.base_fingerprint,
    }
    result |= {key: value for key, value in optional.items() if value}
    return result | dict(metadata.training) | dict(metadata.own)


def _public_name(base_model: str) -> str:
    """A Hub id or a plain name as it is; anything that looks like a place on a disk without the place."""
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?", base_model) is not None
    return base_model if is_hub_id else "local model"


def _network_args(pairs: Mapping[str, LoraPair]) -> dict[str, str]:
    """kohya's arguments for 3x3 convolutions, whose rank it keeps apart, and LyCORIS' for DoRA."""
    dims = {pair.rank for pair in pairs.values() if pair.down.ndim == 4 and pair.down.shape[2] > 1}
    conv = {"conv_dim": str(max(dims)), "conv_alpha": str(max(dims))} if dims else {}
    return conv | ({"algo": "locon", "dora_wd": "True"} if _is_dora(pairs) else {})


def _is_dora(pairs: Mapping[str, LoraPair]) -> bool:
    return any(pair.dora_scale is not None for pair in pairs.values())


def _base_model_version(family: Family, is_v: bool) -> str:
    if family == "sdxl":
        return "sdxl_base_v1-0"
    return ("sd_v2" if family == "sd2" else "sd_v1") + ("_v" if is_v else "")


def _architecture(family: Family, is_v: bool) -> str:
    if family == "sd2":
        return "stable-diffusion-v2-768-v/lora" if is_v else "stable-diffusion-v2-512/lora"
    return "stable-diffusion-xl-v1-base/lora" if family == "sdxl" else "stable-diffusion-v1/lora"
