"""Everything that stays the same through a run, computed once: latents of the images, embeddings of the captions.

Kept in memory on the CPU; afterwards neither VAE nor text encoders are needed. Of a latent the distribution is kept,
not a sample, so that every exposure can draw its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdlora.data.buckets import make_buckets, plan_crop
from sdlora.data.dataset import ImageCaption, compose_caption
from sdlora.data.pixels import load_pixels
from sdlora.errors import ConfigError, NonFiniteError, Problem
from sdlora.families.base import Components, PromptEmbeds
from sdlora.prompts import cut_words

__all__ = ["EMPTY_PROMPT_ROW", "LatentDistribution", "PreparedExample", "TrainingSet", "prepare_training_set"]

logger = logging.getLogger(__name__)

EMPTY_PROMPT_ROW = 0
_CAPTIONS_AT_ONCE = 16
_BUCKET_STEP = 64


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


@dataclass(frozen=True, eq=False)
class PreparedExample:
    """One image of the dataset, ready for any number of exposures."""

    name: str
    """The file's name, for messages."""
    latents: LatentDistribution
    mirrored_latents: LatentDistribution | None
    """None where mirroring is off; the VAE does not commute with it, so that it must be encoded too."""
    caption_row: int
    """Row of `TrainingSet.captions`."""
    original_hw: tuple[int, int]
    crop_top_left_yx: tuple[int, int]
    """Also taken for the mirrored image: crops are centred, to a pixel."""
    target_hw: tuple[int, int]
    repeats: int = 1


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """All images and captions of a run, on the CPU. Row 0 of `captions` is the empty prompt."""

    examples: tuple[PreparedExample, ...]
    captions: PromptEmbeds
    texts: tuple[str, ...]
    """What each row of `captions` says."""
    resolution: int

    @property
    def entries(self) -> tuple[int, ...]:
        """Example indices, each as often as it is repeated in an epoch."""
        return tuple(index for index, example in enumerate(self.examples) for _ in range(example.repeats))


def prepare_training_set(
    components: Components,
    examples: Sequence[ImageCaption],
    *,
    resolution: int | None = None,
    trigger: str | None = None,
    background: tuple[int, int, int] = (255, 255, 255),
    flip: bool = False,
) -> TrainingSet:
    """Crops, encodes and embeds all examples; `resolution` None is the base's own.

    Raises:
        ConfigError: the base cannot work at this resolution.
        DatasetError: an image cannot be read any more.
        NonFiniteError: the VAE or the text encoder answers with NaN or Inf; names the image or the caption.
    """
    resolution = resolution or components.default_resolution
    buckets = _buckets(components, resolution)
    texts = [compose_caption(example.caption, trigger) for example in examples]
    rows, captions = _embed_captions(components, texts)
    prepared = []
    for example, text in zip(examples, texts, strict=True):
        plan = plan_crop(example.size_hw, buckets)
        pixels = load_pixels(example, plan, background=background)
        prepared.append(
            PreparedExample(
                name=example.path.name,
                latents=_encode(components, pixels, example.path.name),
                mirrored_latents=_encode(components, pixels[:, :, ::-1], example.path.name) if flip else None,
                caption_row=rows[text],
                original_hw=example.size_hw,
                crop_top_left_yx=plan.crop_top_left_yx,
                target_hw=plan.bucket_hw,
                repeats=example.repeats,
            )
        )
    return TrainingSet(tuple(prepared), captions, tuple(rows), resolution)


def _buckets(components: Components, resolution: int) -> tuple[tuple[int, int], ...]:
    step = components.size_step
    if resolution % step:
        near = max(step, round(resolution / step) * step)
        what = f"this base needs a multiple of {step} (got {resolution})."
        raise ConfigError("the settings", [Problem("data.resolution", what, f"Take {near}.")])
    # Finer steps than 64 only make more buckets with fewer images each, once pictures are large.
    return make_buckets(resolution, step=step if resolution < 8 * _BUCKET_STEP else max(step, _BUCKET_STEP))


def _embed_captions(components: Components, texts: Sequence[str]) -> tuple[dict[str, int], PromptEmbeds]:
    """Row of each caption, and the rows, fp32 on the CPU: the empty prompt, then each different caption once."""
    unique = [text for text in dict.fromkeys(texts) if text]
    chunks = [unique[start : start + _CAPTIONS_AT_ONCE] for start in range(0, len(unique), _CAPTIONS_AT_ONCE)]
    parts = [components.family.encode_empty_prompt(components)]
    parts += [components.family.encode_prompts(components, chunk) for chunk in chunks]
    captions = PromptEmbeds.concat([part.to("cpu", torch.float32) for part in parts])
    for row, text in enumerate(["", *unique]):
        if not captions.select([row]).is_finite():
            raise NonFiniteError(f"The text encoder answers with NaN or Inf for the caption {text!r}.")
        lost = cut_words(text, components.tokenizers[0])
        if lost:
            logger.warning("A caption is too long for the model; it does not see %r of %r.", lost, text)
    return {"": EMPTY_PROMPT_ROW} | {text: row for row, text in enumerate(unique, 1)}, captions


def _encode(components: Components, pixels: NDArray[np.float32], name: str) -> LatentDistribution:
    vae = components.vae
    assert vae is not None
    batch = torch.from_numpy(np.ascontiguousarray(pixels))[None]
    posterior = _posterior(vae, batch)
    if not _is_finite(posterior) and vae.dtype != torch.float32:
        # SDXL's VAE overflows in fp16.
        vae.to(torch.float32)
        posterior = _posterior(vae, batch)
    if not _is_finite(posterior):
        raise NonFiniteError(f"The VAE answers with NaN or Inf for {name}. Is the base model damaged?")
    scale = vae.config.scaling_factor
    return LatentDistribution(mean=posterior.mean * scale, std=posterior.std * scale)


def _posterior(vae: torch.nn.Module, batch: Tensor) -> LatentDistribution:
    """Not yet scaled, fp32 on the CPU."""
    weight = next(vae.parameters())
    with torch.no_grad():
        distribution = vae.encode(batch.to(weight.device, weight.dtype)).latent_dist  # type: ignore[operator]
    return LatentDistribution(
        mean=distribution.mean[0].to("cpu", torch.float32), std=distribution.std[0].to("cpu", torch.float32)
    )


def _is_finite(latents: LatentDistribution) -> bool:
    return bool(latents.mean.isfinite().all() and latents.std.isfinite().all())
