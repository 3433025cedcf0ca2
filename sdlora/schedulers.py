"""The schedulers (samplers) by the names people use: "DPM++ 2M Karras", `dpm++2m-karras`. Loads no model library."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdlora.errors import GenerationError

__all__ = ["SCHEDULERS", "SchedulerChoice", "find_scheduler", "scheduler_label"]


@dataclass(frozen=True)
class SchedulerChoice:
    """A class of diffusers and what is set on top of the base's own noise schedule."""

    label: str
    """Its name in A1111."""
    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    eta: float = 0.0
    """How much of each step's noise is new, where the class has that choice."""
    num_inference_steps: int | None = None
    """Steps that suit it, where the usual 20 to 50 do not."""
    guidance_scale: float | None = None
    """Guidance that suits it, where the usual one does not."""
    max_steps: int = 1000


def _few_steps(label: str, class_name: str, eta: float = 0.0) -> SchedulerChoice:
    # Distilled on 50 of the 1000 timesteps (arXiv 2310.04378, sec. 4.3), with the guidance inside the weights.
    return SchedulerChoice(label, class_name, eta=eta, num_inference_steps=4, guidance_scale=1.0, max_steps=50)


_KARRAS = {"use_karras_sigmas": True}
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_TRAILING = {"timestep_spacing": "trailing"}

SCHEDULERS: Mapping[str, SchedulerChoice] = {
    "ddim": SchedulerChoice("DDIM", "DDIMScheduler"),
    "ddim-trailing": SchedulerChoice("DDIM Trailing", "DDIMScheduler", _TRAILING),
    "ddpm": SchedulerChoice("DDPM", "DDPMScheduler"),
    "pndm": SchedulerChoice("PLMS", "PNDMScheduler", {"skip_prk_steps": True}),
    "lms": SchedulerChoice("LMS", "LMSDiscreteScheduler", {"use_karras_sigmas": False}),
    "lms-karras": SchedulerChoice("LMS Karras", "LMSDiscreteScheduler", _KARRAS),
    "heun": SchedulerChoice("Heun", "HeunDiscreteScheduler"),
    "euler": SchedulerChoice("Euler", "EulerDiscreteScheduler"),
    "euler-trailing": SchedulerChoice("Euler SGM Uniform", "EulerDiscreteScheduler", _TRAILING),
    "euler-a": SchedulerChoice("Euler a", "EulerAncestralDiscreteScheduler"),
    "dpm2": SchedulerChoice("DPM2", "KDPM2DiscreteScheduler"),
    "dpm2-a": SchedulerChoice("DPM2 a", "KDPM2AncestralDiscreteScheduler"),
    "dpm++2m": SchedulerChoice("DPM++ 2M", "DPMSolverMultistepScheduler", {"use_karras_sigmas": False}),
    "dpm++2m-karras": SchedulerChoice("DPM++ 2M Karras", "DPMSolverMultistepScheduler", _KARRAS),
    "dpm++2m-sde": SchedulerChoice("DPM++ 2M SDE", "DPMSolverMultistepScheduler", _SDE),
    "dpm++2m-sde-karras": SchedulerChoice("DPM++ 2M SDE Karras", "DPMSolverMultistepScheduler", _SDE | _KARRAS),
    "dpm++sde": SchedulerChoice("DPM++ SDE", "DPMSolverSDEScheduler"),
    "dpm++sde-karras": SchedulerChoice("DPM++ SDE Karras", "DPMSolverSDEScheduler", _KARRAS),
    "unipc": SchedulerChoice("UniPC", "UniPCMultistepScheduler"),
    "deis": SchedulerChoice("DEIS", "DEISMultistepScheduler"),
    "lcm": _few_steps("LCM", "LCMScheduler"),
    # The eta of the paper's few-step results (TCD, arXiv 2402.19159, sec. 5.1).
    "tcd": _few_steps("TCD", "TCDScheduler", eta=0.3),
}
"""Name on the command line -> the scheduler. Spaces, case and hyphens do not matter; A1111's labels are names too."""

_ALIASES = {"plms": "pndm", "eulerancestral": "euler-a", "eulersgmuniform": "euler-trailing", "dpmsolver++": "dpm++2m"}


def find_scheduler(name: str) -> str:
    """The key in `SCHEDULERS` that a user's spelling means.

    Raises:
        GenerationError: none; the message names the nearest.
    """
    key = _NAMES.get(_plain(name))
    if key is not None:
        return key
    near = difflib.get_close_matches(_plain(name), _NAMES, n=1, cutoff=0.5)
    hint = f" Did you mean {_NAMES[near[0]]!r}?" if near else ""
    raise GenerationError(f"No scheduler is called {name!r}.{hint} Known: {', '.join(SCHEDULERS)}.")


def scheduler_label(name: str) -> str:
    """What A1111 calls a key of `SCHEDULERS` or a class of diffusers; an unknown class keeps its own name."""
    if name in SCHEDULERS:
        return SCHEDULERS[name].label
    of_class = (choice.label for choice in SCHEDULERS.values() if choice.class_name == name)
    return next(of_class, name)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower())


_NAMES = _ALIASES | {_plain(name): key for key, choice in SCHEDULERS.items() for name in (choice.label, key)}
