"""What to draw, as one checked value. Loads no model library, so that an impossible request is refused at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sdlora.errors import GenerationError

__all__ = ["SCHEDULERS", "GenerationRequest"]

SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": False}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Name on the command line -> diffusers class and what is set on top of the base's own schedule."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What to draw. `num_images` pictures with the seeds `seed`, `seed + 1`, ...; sizes in pixels.

    None means what suits the base model: 30 steps and a guidance of 7.5 for Stable Diffusion, its size, its scheduler.
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
    batch_size: int = 1

    def check(self) -> None:
        """Raises:
        GenerationError: a value is out of range.
        """
        steps, guidance = self.num_inference_steps, self.guidance_scale
        counts = {"number of steps": steps, "number of images": self.num_images, "batch size": self.batch_size}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise GenerationError(f"The {name} must be at least 1, not {value}.")
        if steps is not None and steps > 1000:
            raise GenerationError(f"{steps} steps: the noise schedule has 1000. Use 20 to 50.")
        if guidance is not None and (not math.isfinite(guidance) or guidance < 0):
            raise GenerationError(f"The guidance must be 0 or more, not {guidance}. 7.5 is usual.")
        if not 0 <= self.seed < 2**63:
            raise GenerationError(f"The seed must be 0 or more, not {self.seed}.")
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None and (side < 8 or side % 8):
                raise GenerationError(
                    f"The {name} must be a multiple of 8, not {side}. Use {max(8, round(side / 8) * 8)}."
                )
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise GenerationError(f"No scheduler is called {self.scheduler!r}. Known: {', '.join(SCHEDULERS)}.")

    def with_defaults(self, num_inference_steps: int = 30, guidance_scale: float = 7.5) -> GenerationRequest:
        """The same with these numbers where none is given."""
        return replace(
            self,
            num_inference_steps=self.num_inference_steps or num_inference_steps,
            guidance_scale=guidance_scale if self.guidance_scale is None else self.guidance_scale,
        )
