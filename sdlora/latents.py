"""Pictures as the VAE sees them. Of a latent the distribution is kept, so that every exposure can draw its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from sdlora.cache import DiskCache, cache_key
from sdlora.errors import NonFiniteError
from sdlora.families import weights_fingerprint

__all__ = ["LatentDistribution", "LatentEncoder"]

_VERSION = 1
"""Counted up when the way from a file to its latents changes: decoding, resizing, cropping, encoding."""


@dataclass(frozen=True, eq=False)
class LatentDistribution:
    """The VAE's answer for one image: a normal distribution per value, times the VAE's scaling factor."""

    mean: Tensor
    """fp32 [4, H/8, W/8]."""
    std: Tensor
    """The same shape."""

    def sample(self, generator: torch.Generator) -> Tensor:
        """One draw, [4, H/8, W/8]."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator)

    def is_finite(self) -> bool:
        """Whether no number is NaN or infinite."""
        return bool(self.mean.isfinite().all() and self.std.isfinite().all())


class LatentEncoder:
    """A VAE with a cache. What a picture's latents are depends on nothing but the picture and the VAE."""

    def __init__(self, vae: AutoencoderKL, cache: DiskCache | None):
        self._vae, self._cache, self._dtype = vae, cache, vae.dtype
        # Kinds of devices round differently.
        self._identity = (_VERSION, weights_fingerprint(vae), vae.device.type) if cache is not None else ()
        self.overflowed = False
        """Whether a picture was too much for a half-precision VAE."""

    def encode(self, origin: object, load: Callable[[], NDArray[np.float32]], name: str) -> LatentDistribution:
        """The latents of pixels [3, H, W] in [-1, 1], which `load` gives; `origin`, as text, stands for all that they
        depend on.

        Raises:
            NonFiniteError: the VAE answers with NaN or Inf; says `name`.
        """
        key = cache_key(*self._identity, origin)
        found = self._cache.read("latents", key) if self._cache is not None else None
        if found is not None:
            tensors = safetensors.torch.load(found)
            self.overflowed |= bool(tensors["overflowed"])
            return self._scaled(LatentDistribution(mean=tensors["mean"], std=tensors["std"]))
        posterior, overflowed = self._compute(load(), name)
        self.overflowed |= overflowed
        if self._cache is not None:
            tensors = {"mean": posterior.mean, "std": posterior.std, "overflowed": torch.tensor(overflowed)}
            self._cache.write("latents", key, safetensors.torch.save(tensors))
        return self._scaled(posterior)

    def _compute(self, pixels: NDArray[np.float32], name: str) -> tuple[LatentDistribution, bool]:
        batch = torch.from_numpy(np.ascontiguousarray(pixels))[None]
        posterior = _posterior(self._vae, batch)
        overflowed = not posterior.is_finite() and self._dtype != torch.float32
        if overflowed:
            # SDXL's VAE overflows in fp16. The next picture is tried in fp16 again: its latents must not depend on
            # whether this one was encoded now or found in the cache.
            self._vae.to(torch.float32)
            posterior = _posterior(self._vae, batch)
            self._vae.to(self._dtype)
        if not posterior.is_finite():
            raise NonFiniteError(f"The VAE answers with NaN or Inf for {name}. Is the base model damaged?")
        return posterior, overflowed

    def _scaled(self, posterior: LatentDistribution) -> LatentDistribution:
        factor = self._vae.config.scaling_factor
        return LatentDistribution(mean=posterior.mean * factor, std=posterior.std * factor)


def _posterior(vae: AutoencoderKL, batch: Tensor) -> LatentDistribution:
    """Not scaled, fp32 on the CPU."""
    with torch.no_grad():
        distribution = vae.encode(batch.to(vae.device, vae.dtype)).latent_dist
    return LatentDistribution(
        mean=distribution.mean[0].to("cpu", torch.float32).contiguous(),
        std=distribution.std[0].to("cpu", torch.float32).contiguous(),
    )
