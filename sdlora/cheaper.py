"""What to change, in order, when a run does not fit the memory: first what leaves the adapter alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sdlora.config import TrainConfig

__all__ = ["Cheaper", "cheaper_settings"]

_SMALLER_TARGETS = {"attention+ff": "attention", "attention": "cross-attention"}


@dataclass(frozen=True)
class Cheaper:
    """Settings, each as `section.name=value`, and what they cost."""

    settings: tuple[str, ...]
    cost: str

    def __str__(self) -> str:
        return f"{' '.join(f'--set {setting}' for setting in self.settings)}  ({self.cost})"


def cheaper_settings(config: TrainConfig, *, precision: str, resolution: int, step: int = 64) -> Iterator[Cheaper]:
    """The next cheaper settings, the least costly first; each line alone, most of them can be combined.

    `precision` is the one that is computed in ("fp16", "bf16", "fp32"), `resolution` the side in pixels that is trained
    at, `step` what it must be a multiple of.
    """
    train = config.train
    if train.batch_size > 1:
        size = train.batch_size // 2
        while train.batch_size % size:
            size -= 1
        accumulation = train.gradient_accumulation * train.batch_size // size
        settings = (f"train.batch_size={size}", f"train.gradient_accumulation={accumulation}")
        yield Cheaper(settings, "the same adapter; a little slower")
    if not config.model.gradient_checkpointing:
        yield Cheaper(("model.gradient_checkpointing=true",), "the same adapter; about 1.7 times the time")
    if config.preview.prompts:
        kept = "VAE and text encoder leave" if config.preview.where == "between" else "no other process shares"
        yield Cheaper(("preview.prompts=none",), f"no previews: {kept} the memory")
    if precision == "fp32":
        yield Cheaper(("model.precision=bf16",), "half the memory; other roundings")
    if isinstance(config.lora.targets, str) and config.lora.targets in _SMALLER_TARGETS:
        yield Cheaper((f"lora.targets={_SMALLER_TARGETS[config.lora.targets]}",), "another adapter, with fewer layers")
    smaller = resolution * 3 // 4 // step * step
    if smaller >= step:
        yield Cheaper((f"data.resolution={smaller}",), "less detail")
