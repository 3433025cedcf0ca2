"""Everything that stays the same through a run, computed once: latents of the images, embeddings of the captions.

Kept in memory on the CPU; afterwards neither VAE nor text encoders are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sdlora.cache import DiskCache
from sdlora.data.buckets import CropPlan, bucket_step, make_buckets, plan_crop
from sdlora.data.content import content_hash, require_content
from sdlora.data.dataset import ImageCaption, compose_caption
from sdlora.data.pixels import load_pixels
from sdlora.embeddings import EMPTY_PROMPT_ROW, embed_captions
from sdlora.errors import ConfigError, Problem
from sdlora.families.base import Components, PromptEmbeds
from sdlora.latents import LatentDistribution, LatentEncoder

__all__ = ["EMPTY_PROMPT_ROW", "LatentDistribution", "PreparedExample", "TrainingSet", "View", "prepare_training_set"]


@dataclass(frozen=True, eq=False)
class View:
    """One way to see an image: what was cut out of it, perhaps mirrored, and encoded."""

    latents: LatentDistribution
    crop_top_left_yx: tuple[int, int] = (0, 0)
    """In pixels of the resized picture, mirrored where the view is."""


@dataclass(frozen=True, eq=False)
class PreparedExample:
    """One image of the dataset, ready for any number of exposures."""

    name: str
    """The file's name, for messages."""
    views: tuple[View, ...]
    """An exposure shows one of them; all have the same size."""
    mirrored_views: tuple[View, ...]
    """Empty where mirroring is off; the VAE does not commute with it, so that these must be encoded too."""
    caption_rows: tuple[int, ...]
    """Rows of `TrainingSet.captions`; an exposure reads one of them."""
    original_hw: tuple[int, int]
    target_hw: tuple[int, int]
    repeats: int = 1

    @property
    def latent_shape(self) -> torch.Size:
        """Of one exposure: [4, H/8, W/8]."""
        return self.views[0].latents.mean.shape


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
    cache: DiskCache | None = None,
) -> TrainingSet:
    """Crops, encodes and embeds all examples; `resolution` None is the base's own.

    What the cache holds is not computed again; the result is the same with and without, bit for bit.

    Raises:
        ConfigError: the base cannot work at this resolution.
        DatasetError: an image cannot be read any more.
        NonFiniteError: the VAE or the text encoder answers with NaN or Inf; names the image or the caption.
    """
    assert components.vae is not None
    resolution = resolution or components.default_resolution
    buckets = _buckets(components, resolution)
    texts = [compose_caption(example.caption, trigger) for example in examples]
    rows, captions = embed_captions(components, texts, cache)
    encoder = LatentEncoder(components.vae, cache)
    prepared = []
    for example, text in zip(examples, texts, strict=True):
        plan = plan_crop(example.size_hw, buckets)
        prepared.append(
            PreparedExample(
                name=example.path.name,
                views=(_view(encoder, example, plan, background=background, mirrored=False),),
                mirrored_views=(_view(encoder, example, plan, background=background, mirrored=True),) if flip else (),
                caption_rows=(rows[text],),
                original_hw=example.size_hw,
                target_hw=plan.bucket_hw,
                repeats=example.repeats,
            )
        )
    if encoder.overflowed:
        # Previews would overflow too.
        components.vae.to(torch.float32)
    return TrainingSet(tuple(prepared), captions, tuple(rows), resolution)


def _buckets(components: Components, resolution: int) -> tuple[tuple[int, int], ...]:
    step = components.size_step
    if resolution % step:
        near = max(step, round(resolution / step) * step)
        what = f"this base needs a multiple of {step} (got {resolution})."
        raise ConfigError("the settings", [Problem("data.resolution", what, f"Take {near}.")])
    return make_buckets(resolution, step=bucket_step(resolution, step))


def _view(
    encoder: LatentEncoder,
    example: ImageCaption,
    plan: CropPlan,
    *,
    background: tuple[int, int, int],
    mirrored: bool,
) -> View:
    content = content_hash(example.path)

    def load() -> NDArray[np.float32]:
        pixels = load_pixels(example, plan, background=background)
        # Else the latents of another picture would be kept under the name of this one.
        require_content(example.path, content)
        return pixels[:, :, ::-1] if mirrored else pixels

    origin = (content, *astuple(plan), background, mirrored)
    (top, left), rest = plan.crop_top_left_yx, plan.resized_hw[1] - plan.bucket_hw[1]
    return View(
        latents=encoder.encode(origin, load, example.path.name),
        crop_top_left_yx=(top, rest - left if mirrored else left),
    )
