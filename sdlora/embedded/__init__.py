"""The embedded base: a small Stable Diffusion that ships with the package, so that everything works offline.

It is an ordinary diffusers folder: `StableDiffusionPipeline.from_pretrained(sdlora.embedded.path())` loads it.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["GUIDANCE_SCALE", "NUM_INFERENCE_STEPS", "STYLES", "TO_STOP", "TRAINING", "model_card", "path", "subjects"]

STYLES = ("noto", "flat", "gradient", "twemoji", "emojione", "monotone")
"""The styles it was trained on; a caption reads "<subject>, <style> style"."""

GUIDANCE_SCALE = 3.0
"""The classifier-free guidance at which it draws best."""

NUM_INFERENCE_STEPS = 20
"""Enough DDIM steps: more change nothing that can be seen."""

TRAINING = ("train.exposures=40", "train.batch_size=8", "train.learning_rate=6e-3", "train.snr_gamma=0.0")
"""Settings of a LoRA run on it, where Stable Diffusion's own do not suit: its narrow layers take a larger step, and its
colours are decided at the noisiest timesteps, to which Min-SNR gives hardly any weight (docs/LOG.md)."""

TO_STOP = (
    "optimizer.name=adamw-schedulefree",
    "train.learning_rate=1.5e-2",
    "validation.stop=rise",
)
"""What to set besides, with held-out pictures, so that a run ends itself as soon as the style is there."""


def path() -> Path:
    """The diffusers folder of the embedded base."""
    return Path(__file__).parent / "base"


def model_card() -> str:
    """What it was made of and what it can do, in Markdown."""
    return (path() / "README.md").read_text(encoding="utf-8")


def subjects() -> tuple[str, ...]:
    """The subjects it knows, by the names used in captions."""
    return tuple((path() / "subjects.txt").read_text(encoding="utf-8").split("\n"))
