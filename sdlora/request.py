"""What to draw, as one checked value. Loads no model library, so that an impossible request is refused at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image

from sdlora.errors import GenerationError
from sdlora.schedulers import SCHEDULERS, find_scheduler

__all__ = ["GenerationRequest"]

_DEFAULT_STRENGTH = 0.6
_DEFAULT_HIRES_STRENGTH = 0.5
_MAX_SIDE = 16384


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What to draw. `num_images` pictures with the seeds `seed`, `seed + 1`, ...; sizes in pixels.

    None means what suits the base model and the scheduler: 30 steps and a guidance of 7.5 for Stable Diffusion, the
    base's size, scheduler and layer of the text encoder.
    """

    prompt: str
    negative_prompt: str = ""
    num_images: int = 1
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    scheduler: str | None = None
    """A name from `sdlora.schedulers.SCHEDULERS`, in any spelling."""
    batch_size: int = 1
    clip_skip: int | None = None
    """Which hidden state of the text encoder is read, counted from the end; 1 is the last."""
    prompt_syntax: Literal["weighted", "plain"] = "weighted"
    """Whether brackets in prompts are weights, and long prompts are read to their end; "plain" takes a text as it is
    and cuts it at 77 tokens."""
    init_image: Path | Image.Image | None = None
    """A picture to draw over. Without `height` and `width`: at its own size, or smaller if it is larger than what the
    base draws."""
    strength: float | None = None
    """How much of the steps is drawn over the picture, above 0 to 1. Default 0.6."""
    hires_scale: float | None = None
    """Draw, enlarge by this factor, and draw over it."""
    hires_strength: float | None = None
    """As `strength`, for the enlarged picture. Default 0.5."""
    hires_steps: int | None = None
    """Default: as many as for the first picture."""
    hires_upscaler: Literal["latent", "lanczos"] = "latent"
    """What is enlarged: the latents (bilinear), or the pixels (Lanczos)."""

    def check(self) -> None:
        """Raises:
        GenerationError: a value is out of range.
        """
        self._check_counts()
        self._check_sizes()
        guidance = self.guidance_scale
        if guidance is not None and (not math.isfinite(guidance) or guidance < 0):
            raise GenerationError(f"The guidance must be 0 or more, not {guidance}. 7.5 is usual.")
        if not 0 <= self.seed < 2**63:
            raise GenerationError(f"The seed must be 0 or more, not {self.seed}.")
        if self.prompt_syntax not in ("weighted", "plain"):
            raise GenerationError(f"No prompt syntax is called {self.prompt_syntax!r}. Known: weighted, plain.")
        self._check_redrawing()

    def with_defaults(self, num_inference_steps: int = 30, guidance_scale: float = 7.5) -> GenerationRequest:
        """The same with numbers where none are given (the scheduler's own before these), and the scheduler's key."""
        key = None if self.scheduler is None else find_scheduler(self.scheduler)
        suited = None if key is None else SCHEDULERS[key]
        steps, guidance = self.num_inference_steps, self.guidance_scale
        if suited is not None:
            steps, guidance = (
                steps or suited.num_inference_steps,
                suited.guidance_scale if guidance is None else guidance,
            )
        return replace(
            self,
            scheduler=key,
            num_inference_steps=steps or num_inference_steps,
            guidance_scale=guidance_scale if guidance is None else guidance,
            strength=_DEFAULT_STRENGTH if self.init_image is not None and self.strength is None else self.strength,
            hires_strength=_DEFAULT_HIRES_STRENGTH
            if self.hires_scale is not None and self.hires_strength is None
            else self.hires_strength,
        )

    def _check_counts(self) -> None:
        counts = {
            "number of steps": self.num_inference_steps,
            "number of steps for the enlarged picture": self.hires_steps,
            "number of images": self.num_images,
            "batch size": self.batch_size,
            "clip skip": self.clip_skip,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise GenerationError(f"The {name} must be at least 1, not {value}.")
        most, whose = 1000, "the noise schedule has"
        if self.scheduler is not None:
            choice = SCHEDULERS[find_scheduler(self.scheduler)]
            most, whose = (
                choice.max_steps,
                "the noise schedule has" if choice.max_steps == 1000 else f"{choice.label} has",
            )
        for steps in (self.num_inference_steps, self.hires_steps):
            if steps is not None and steps > most:
                usual = "20 to 50" if most == 1000 else "4 to 8"
                raise GenerationError(f"{steps} steps: {whose} {most}. Use {usual}.")

    def _check_sizes(self) -> None:
        for name, side in (("height", self.height), ("width", self.width)):
            if side is None:
                continue
            if side < 8 or side % 8:
                raise GenerationError(
                    f"The {name} must be a multiple of 8, not {side}. Use {max(8, round(side / 8) * 8)}."
                )
            if side > _MAX_SIDE:
                raise GenerationError(f"The {name} must be at most {_MAX_SIDE}, not {side}.")

    def _check_redrawing(self) -> None:
        if self.strength is not None and self.init_image is None:
            raise GenerationError("A strength says how much of a picture is redrawn: give the picture with --init.")
        if self.hires_scale is None and (self.hires_strength is not None or self.hires_steps is not None):
            raise GenerationError("Settings of the enlarged picture need a factor: --hires 2.")
        if self.hires_scale is not None and not 1 < self.hires_scale <= 8:
            raise GenerationError(f"The factor of enlarging must be above 1 and at most 8, not {self.hires_scale}.")
        if self.hires_upscaler not in ("latent", "lanczos"):
            raise GenerationError(f"Nothing enlarges by {self.hires_upscaler!r}. Known: latent, lanczos.")
        filled = self.with_defaults()
        for strength, steps in (
            (filled.strength, filled.num_inference_steps),
            (filled.hires_strength, filled.hires_steps or filled.num_inference_steps),
        ):
            if strength is None:
                continue
            if not 0 < strength <= 1:
                raise GenerationError(f"The strength must be above 0 and at most 1, not {strength}. 0.6 is usual.")
            assert steps is not None
            if int(steps * strength) < 1:
                raise GenerationError(
                    f"A strength of {strength:g} leaves none of {steps} steps. Use more strength or more steps."
                )
