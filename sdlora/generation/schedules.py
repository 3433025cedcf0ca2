"""Schedulers by name, made from the base's own noise schedule, with the noise of every picture its own."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from sdlora.errors import GenerationError
from sdlora.schedulers import SCHEDULERS

__all__ = ["check_steps", "give_noise_per_picture", "make_scheduler"]

# What the Euler scheduler of diffusers calls zero: a signal-to-noise ratio of 0 would be an infinite sigma.
_ZERO_ALPHA_CUMPROD = 2.0**-24


def make_scheduler(own: Any, name: str | None) -> Any:
    """A new scheduler: a key of `SCHEDULERS`, or for None one like the pipeline's `own`.

    The base's betas, prediction type, timestep spacing and zero terminal SNR (arXiv 2305.08891) are kept; a class that
    does not know the last gets betas that say it.

    Raises:
        GenerationError: the scheduler needs a package that is not installed.
    """
    if name is None:
        return type(own).from_config(own.config)
    choice = SCHEDULERS[name]
    cls = getattr(diffusers, choice.class_name)
    known = inspect.signature(cls.__init__).parameters
    config = {key: value for key, value in own.config.items() if key in known}
    if own.config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        config["trained_betas"] = _nearly_zero_snr_betas(own.alphas_cumprod)
    try:
        return cls.from_config(config, **choice.options)
    except ImportError as error:
        raise GenerationError(
            f"{choice.label} needs packages that are not installed. Install them with: pip install 'sdlora[samplers]'"
        ) from error


def check_steps(scheduler: Any, name: str | None, num_inference_steps: int) -> None:
    """Raises:
    GenerationError: the scheduler cannot make that number of steps.
    """
    label = type(scheduler).__name__ if name is None else SCHEDULERS[name].label
    try:
        type(scheduler).from_config(scheduler.config).set_timesteps(num_inference_steps)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise GenerationError(f"{label} cannot make {num_inference_steps} steps: {reason}") from error


def give_noise_per_picture(scheduler: Any, seeds: Sequence[int], shape: Sequence[int], dtype: torch.dtype) -> None:
    """Where a scheduler draws the noise of its steps by itself, let it be one Brownian path a picture, on the CPU.

    The other schedulers take the generators that the pipeline passes on. `shape` is [C, h, w] of one picture's latents.
    """
    if type(scheduler).__name__ != "DPMSolverSDEScheduler":
        return
    set_timesteps = scheduler.set_timesteps

    def set_timesteps_and_noise(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        scheduler.noise_sampler = _BrownianNoise(scheduler.sigmas, seeds, shape, scheduler.timesteps.device, dtype)

    scheduler.set_timesteps = set_timesteps_and_noise


class _BrownianNoise:
    """Standard normal noise [B, C, h, w] between two sigmas; row n depends on seed n and the sigmas alone."""

    def __init__(
        self, sigmas: Tensor, seeds: Sequence[int], shape: Sequence[int], device: torch.device, dtype: torch.dtype
    ):
        self._sigmas, self._seeds, self._shape = sigmas[sigmas > 0], list(seeds), shape
        self._device, self._dtype = device, dtype
        self._sampler: Any = None

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

        if self._sampler is None:
            # Not earlier: a single step asks for no noise, and has no span of sigmas either.
            low, high = self._sigmas.min().item(), self._sigmas.max().item()
            self._sampler = BrownianTreeNoiseSampler(
                torch.empty(len(self._seeds), *self._shape), low, high, self._seeds
            )
        with warnings.catch_warnings():
            # It warns where a sigma and the span's end differ by the rounding of fp32.
            warnings.simplefilter("ignore", UserWarning)
            noise: Tensor = self._sampler(sigma, sigma_next)
        return noise.to(self._device, self._dtype)


def _nearly_zero_snr_betas(alphas_cumprod: Tensor) -> list[float]:
    """Betas [T] whose product ends at almost zero, where `alphas_cumprod` [T] ends at zero."""
    product = alphas_cumprod.double().clone()
    product[-1] = _ZERO_ALPHA_CUMPROD
    alphas = torch.cat([product[:1], product[1:] / product[:-1]])
    betas: list[float] = (1 - alphas).tolist()
    return betas
