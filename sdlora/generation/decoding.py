"""Latents to pixels when the usual way failed, and a look at pictures that are not done yet."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

__all__ = ["LatentColours", "decode_in_fp32", "to_image"]

_PATCHES, _PATCH = 16, 2
"""Patches a side of the picture of random colours, and the side of one in latent pixels."""


def to_image(picture: Tensor) -> Image.Image:
    """A [3, H, W] tensor in [0, 1] as an RGB image."""
    array = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array, mode="RGB")


@torch.inference_mode()
def decode_in_fp32(pipeline: Any, latents: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [0, 1]. The VAE computes in fp32 and has its own format back afterwards, bit for bit."""
    vae, dtype = pipeline.vae, pipeline.vae.dtype
    # Not diffusers' own `to`, which warns of layers to be kept in fp32 that are none here.
    torch.nn.Module.to(vae, dtype=torch.float32)
    try:
        pixels = vae.decode(_unscaled(vae, latents.float()), return_dict=False)[0]
    finally:
        torch.nn.Module.to(vae, dtype=dtype)
    if getattr(pipeline, "safety_checker", None) is not None:
        pixels, _ = pipeline.run_safety_checker(pixels, pixels.device, pipeline.unet.dtype)
    shown: Tensor = pipeline.image_processor.postprocess(pixels.float(), output_type="pt")
    pipeline.maybe_free_model_hooks()
    return shown


class LatentColours:
    """What latents look like, roughly and in no time: one pixel each, its colour a linear function of its channels.

    The function is fitted to the VAE at hand, by the latents of patches of random colours.
    """

    def __init__(self, matrix: Tensor):
        self._matrix = matrix  # [channels + 1, 3], fp32

    @classmethod
    @torch.inference_mode()
    def of(cls, pipeline: Any) -> LatentColours:
        """Fitted by one encoding of a picture of 256 x 256 pixels."""
        vae = pipeline.vae
        colours = torch.rand(1, 3, _PATCHES, _PATCHES, generator=torch.Generator().manual_seed(0))
        side = _PATCHES * _PATCH * pipeline.vae_scale_factor
        pixels = torch.nn.functional.interpolate(colours, size=(side, side), mode="nearest") * 2 - 1
        mean = vae.encode(pixels.to(pipeline._execution_device, vae.dtype)).latent_dist.mean
        shown = torch.nn.functional.interpolate(colours, scale_factor=_PATCH, mode="nearest")
        return cls(torch.linalg.lstsq(_with_one(_scaled(vae, mean.float()).cpu()), shown[0].flatten(1).T).solution)

    def __call__(self, latents: Tensor) -> list[Image.Image]:
        """Latents [B, C, h, w] (scaled as in the pipeline) as pictures of w x h pixels."""
        height, width = latents.shape[-2:]
        shown = [_with_one(row[None]) @ self._matrix for row in latents.float().cpu()]
        return [to_image(colours.T.reshape(3, height, width)) for colours in shown]


def _with_one(latents: Tensor) -> Tensor:
    """[1, C, h, w] as rows of channels and a one, [h * w, C + 1]."""
    rows = latents[0].flatten(1).T
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)


def _unscaled(vae: Any, latents: Tensor) -> Tensor:
    """As the VAE's decoder takes them."""
    mean, std = _statistics(vae, latents)
    unscaled: Tensor = latents * std / vae.config.scaling_factor + mean
    return unscaled


def _scaled(vae: Any, latents: Tensor) -> Tensor:
    """As the U-Net takes them."""
    mean, std = _statistics(vae, latents)
    scaled: Tensor = (latents - mean) * vae.config.scaling_factor / std
    return scaled


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return 0.0, 1.0
    return latents.new_tensor(mean).view(1, -1, 1, 1), latents.new_tensor(std).view(1, -1, 1, 1)
