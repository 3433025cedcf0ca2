"""From what a foreign recipe says to a configuration of ours, with what has no counterpart told.

What moves a picture is alpha / rank times up @ down. The first step of an Adam-like optimizer moves `up` by the
learning rate whatever the scale, so that a recipe with alpha below rank is slower by alpha / rank at the same learning
rate. We write alpha = rank and multiply the learning rate by alpha / rank: the picture moves as far in the first steps.
(Both trainers start `down` Kaiming-uniform, as we do, so that nothing else has to be converted.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from sdlora.config import TrainConfig, to_toml

__all__ = ["Foreign", "Translated", "translate"]

_OPTIMIZERS = {
    "adamw": "adamw",
    "adam": "adamw",
    "adamw8bit": "adamw8bit",
    "adam8bit": "adamw8bit",
    "pagedadamw8bit": "adamw8bit",
    "adafactor": "adafactor",
    "lion": "lion",
    "lion8bit": "lion",
    "prodigy": "prodigy",
    "schedulefreeadamw": "adamw-schedulefree",
    "adamwschedulefree": "adamw-schedulefree",
}
_OWN_RATE = ("prodigy", "dadapt")
_SCHEDULES = {
    "constant": "constant",
    "constantwithwarmup": "constant",
    "cosine": "cosine",
    "cosinewithrestarts": "cosine-restarts",
    "cosinewithhardrestarts": "cosine-restarts",
    "linear": "linear",
}


@dataclass
class Foreign:
    """What was read: `settings` by our own names, the rest by what it means; None where the recipe does not say."""

    source: str
    """What kind of recipe it is, in words."""
    settings: dict[str, Any] = field(default_factory=dict)
    rank: int | None = None
    alpha: float | None = None
    learning_rate: float | None = None
    text_encoder_rate: float | None = None
    optimizer: str | None = None
    schedule: str | None = None
    warmup_steps: float | None = None
    """Below 1: a share."""
    epochs: float | None = None
    """How often the training set is gone through, repeats included."""
    repeats: float = 1.0
    steps: int | None = None
    images: int | None = None
    """Different pictures."""
    without: dict[str, str] = field(default_factory=dict)
    """Foreign setting -> why it has no counterpart."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Translated:
    """Our configuration, and what a person should know about it."""

    config: TrainConfig
    settings: Mapping[str, Any]
    """What the recipe decided, as `section.name`; everything else is our default."""
    notes: tuple[str, ...]
    without: Mapping[str, str]

    def to_toml(self) -> str:
        """A configuration file with the notes as comments, and only what the recipe decided."""
        lines = [f"# {note}" for note in self.notes]
        lines += [f"# No counterpart: {name} ({why})" for name, why in self.without.items()]
        section = ""
        for line in to_toml(self.config).splitlines():
            if line.startswith("["):
                section = line.strip("[]")
                heading = line
            elif line and f"{section}.{line.split(' = ')[0]}" in self.settings:
                if heading:
                    lines += ["", heading]
                    heading = ""
                lines.append(line)
        return "\n".join(lines) + "\n"


def translate(foreign: Foreign, *, images: int | None = None, data: str = "PICTURES") -> Translated:
    """The configuration that trains like the recipe; `images` is the number of different pictures, `data` the folder
    that stands for the recipe's own (None of a recipe's paths is passed on)."""
    settings: dict[str, Any] = {"data.path": data, **foreign.settings}
    notes = [f"From {foreign.source}."]
    without = dict(foreign.without)
    rate = _adapter(foreign, settings, notes)
    _optimizer(foreign, settings, without, rate, notes)
    _length(foreign, settings, notes, images)
    _schedule(foreign, settings, without, notes)
    if foreign.text_encoder_rate:
        settings["lora.text_encoder"] = True
        scale = 1.0 if not foreign.learning_rate or rate is None else rate / foreign.learning_rate
        settings["optimizer.text_encoder_learning_rate"] = float(f"{foreign.text_encoder_rate * scale:.3g}")
        notes.append("Text encoder: trained as in the recipe; for a style it is rarely better (lora.text_encoder).")
    notes += foreign.notes
    config = _validated(settings, without)
    return Translated(config, settings, tuple(notes), without)


def _adapter(foreign: Foreign, settings: dict[str, Any], notes: list[str]) -> float | None:
    """Sets the rank; returns the converted learning rate."""
    rate = foreign.learning_rate
    if foreign.rank is None:
        return rate
    settings["lora.rank"] = foreign.rank
    alpha = float(foreign.rank) if foreign.alpha is None else foreign.alpha
    own = _plain(foreign.optimizer or "").startswith(_OWN_RATE)
    if alpha == foreign.rank or rate is None or own:
        if alpha != foreign.rank:
            settings["lora.alpha"] = alpha
        return rate
    converted = rate * alpha / foreign.rank
    notes.append(
        f"Learning rate: {rate:g} at alpha {alpha:g} of rank {foreign.rank} moves a picture as far as "
        f"{rate:g} x {alpha:g} / {foreign.rank} = {converted:.3g} at alpha = rank, which is ours."
    )
    return float(f"{converted:.3g}")


def _optimizer(
    foreign: Foreign, settings: dict[str, Any], without: dict[str, str], rate: float | None, notes: list[str]
) -> None:
    known = _plain(foreign.optimizer or "")
    names = _allowed("optimizer", "name")
    name = _OPTIMIZERS.get(known)
    if name in names:
        settings["optimizer.name"] = name
    elif known.startswith("dadapt"):
        settings["optimizer.name"], rate = "prodigy", 1.0
        notes.append(f"Optimizer: {foreign.optimizer} is replaced by prodigy, which also finds its own rate.")
    elif known:
        without["optimizer"] = f"{foreign.optimizer}; AdamW stands in"
    if settings.get("optimizer.name") == "adamw" and not known.startswith("adamw"):
        notes.append(f"Optimizer: {foreign.optimizer} is replaced by AdamW.")
    if rate is not None:
        settings["train.learning_rate"] = rate


def _length(foreign: Foreign, settings: dict[str, Any], notes: list[str], images: int | None) -> None:
    images = images or foreign.images
    per_step = settings.get("train.batch_size", 1) * settings.get("train.gradient_accumulation", 1)
    if foreign.steps and images:
        settings["train.exposures"] = max(1, round(foreign.steps * per_step / images))
        notes.append(
            f"Length: {foreign.steps} steps x {per_step} pictures a step / {images} images = "
            f"{settings['train.exposures']} exposures."
        )
    elif foreign.epochs:
        settings["train.exposures"] = max(1, round(foreign.epochs * foreign.repeats))
        notes.append(f"Length: {foreign.epochs:g} epochs x {foreign.repeats:g} repeats a picture.")
    elif foreign.steps:
        notes.append(
            f"Length: {foreign.steps} steps of {per_step}. How many exposures that is depends on the number of "
            "pictures: give it with --images, or set train.exposures."
        )


def _schedule(foreign: Foreign, settings: dict[str, Any], without: dict[str, str], notes: list[str]) -> None:
    if foreign.schedule is not None:
        name = _SCHEDULES.get(_plain(foreign.schedule))
        if name is None:
            without["schedule"] = f"{foreign.schedule}; ours are {', '.join(sorted(set(_SCHEDULES.values())))}"
        else:
            settings["optimizer.schedule"] = name
    warmup = foreign.warmup_steps
    if warmup is None:
        return
    if warmup < 1:
        settings["train.warmup_fraction"] = float(warmup)
    elif foreign.steps:
        settings["train.warmup_fraction"] = round(min(1.0, warmup / foreign.steps), 4)
    else:
        notes.append(f"Warm-up: {warmup:g} steps; ours is a share of the run (train.warmup_fraction).")


def _validated(settings: dict[str, Any], without: dict[str, str]) -> TrainConfig:
    """The settings as a configuration; one that is out of range goes to `without`."""
    while True:
        values: dict[str, dict[str, Any]] = {}
        for place, value in settings.items():
            section, name = place.split(".")
            values.setdefault(section, {})[name] = value
        try:
            return TrainConfig.model_validate(values)
        except ValidationError as error:
            refused = {".".join(map(str, details["loc"][:2])) for details in error.errors()}
            named = [place for place in settings if place in refused] or list(settings)[-1:]
            for place in named:
                without[place] = f"{settings.pop(place)!r} is out of our range"


def _allowed(section: str, name: str) -> tuple[str, ...]:
    model: Any = TrainConfig.model_fields[section].annotation
    return tuple(model.model_fields[name].annotation.__args__)


def _plain(name: str) -> str:
    """Without the module, case and separators: "bitsandbytes.optim.AdamW8bit" -> "adamw8bit"."""
    return name.rsplit(".", 1)[-1].lower().replace("_", "").replace("-", "")
