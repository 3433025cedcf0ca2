"""Everything that stays the same through a run, computed once: latents of the images, embeddings of the captions.

Kept in memory on the CPU; afterwards neither VAE nor text encoders are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdlora.cache import DiskCache
from sdlora.data.buckets import CropPlan, bucket_step, make_buckets, plan_closer_crop, plan_crop
from sdlora.data.captions import CaptionRules
from sdlora.data.content import content_hash, require_content
from sdlora.data.dataset import ImageCaption
from sdlora.data.masks import load_mask, pool_mask
from sdlora.data.pixels import load_pixels
from sdlora.embeddings import EMPTY_PROMPT_ROW, embed_captions
from sdlora.errors import ConfigError, Problem
from sdlora.families.base import Components, PromptEmbeds
from sdlora.latents import LatentDistribution, LatentEncoder
from sdlora.randomness import counter_uniform

__all__ = ["EMPTY_PROMPT_ROW", "LatentDistribution", "PreparedExample", "TrainingSet", "View", "prepare_training_set"]

_PLAIN_CAPTIONS = CaptionRules()


@dataclass(frozen=True, eq=False)
class View:
    """One way to see an image: what was cut out of it, perhaps mirrored, and encoded."""

    latents: LatentDistribution
    crop_top_left_yx: tuple[int, int] = (0, 0)
    """In pixels of the resized picture, mirrored where the view is."""
    loss_mask: Tensor | None = None
    """fp32 [1, H/8, W/8] in 0..1, how much each place counts; None: all the same."""


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
    weight: float = 1.0
    """The loss is multiplied by it."""
    prior_rows: tuple[int, ...] = ()
    """Rows of `TrainingSet.captions` to which the base's answers are kept; empty where they may change."""

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
    captions: CaptionRules = _PLAIN_CAPTIONS,
    background: tuple[int, int, int] = (255, 255, 255),
    flip: bool = False,
    crop_variants: int = 1,
    mask_outside: float = 0.0,
    prior_prompts: Sequence[str] | None = None,
    seed: int = 0,
    cache: DiskCache | None = None,
) -> TrainingSet:
    """Crops, encodes and embeds all examples; `resolution` None is the base's own.

    Of each picture so many `crop_variants` are made, each also mirrored with `flip`. `mask_outside` is how much black
    in a mask counts. `prior_prompts` are those to which the base's answers are kept; if empty, the captions without
    trigger. `seed` decides on crops and varied captions, together with what picture or caption hold. What the
    cache holds is not computed again; the result is the same with and without, bit for bit.

    Raises:
        ConfigError: the base cannot work at this resolution.
        DatasetError: an image cannot be read any more.
        NonFiniteError: the VAE or the text encoder answers with NaN or Inf; names the image or the caption.
    """
    assert components.vae is not None
    resolution = resolution or components.default_resolution
    buckets = _buckets(components, resolution)
    texts = [captions.variations(example.caption, partial(_draw, seed, example.caption)) for example in examples]
    priors = [_prior_texts(captions, example.caption, prior_prompts) for example in examples]
    rows, embeds = embed_captions(components, [text for several in (*texts, *priors) for text in several], cache)
    encoder = LatentEncoder(components.vae, cache)
    prepared = []
    for example, variants, prior in zip(examples, texts, priors, strict=True):
        content = content_hash(example.path)
        plans = _crop_plans(example, content, buckets, crop_variants, seed)
        source = _Source(example, content, background, mask_outside)
        prepared.append(
            PreparedExample(
                name=example.path.name,
                views=tuple(source.view(encoder, plan, mirrored=False) for plan in plans),
                mirrored_views=tuple(source.view(encoder, plan, mirrored=True) for plan in plans) if flip else (),
                caption_rows=tuple(rows[text] for text in variants),
                original_hw=example.size_hw,
                target_hw=plans[0].bucket_hw,
                repeats=example.repeats,
                weight=example.weight,
                prior_rows=tuple(rows[text] for text in prior),
            )
        )
    if encoder.overflowed:
        # Previews would overflow too.
        components.vae.to(torch.float32)
    return TrainingSet(tuple(prepared), embeds, tuple(rows), resolution)


def _buckets(components: Components, resolution: int) -> tuple[tuple[int, int], ...]:
    step = components.size_step
    if resolution % step:
        near = max(step, round(resolution / step) * step)
        what = f"this base needs a multiple of {step} (got {resolution})."
        raise ConfigError("the settings", [Problem("data.resolution", what, f"Take {near}.")])
    return make_buckets(resolution, step=bucket_step(resolution, step))


def _prior_texts(rules: CaptionRules, caption: str | None, prompts: Sequence[str] | None) -> tuple[str, ...]:
    if prompts is None:
        return ()
    return tuple(prompts) or (rules.compose_without_trigger(caption),)


def _draw(seed: int, caption: str | None, purpose: str, variant: int, tag: int) -> float:
    return counter_uniform(seed, purpose, caption or "", variant, tag)


def _crop_plans(
    example: ImageCaption, content: str, buckets: Sequence[tuple[int, int]], count: int, seed: int
) -> tuple[CropPlan, ...]:
    """The whole picture, then closer cut-outs; fewer than `count` where the picture has no room for as many."""
    whole = plan_crop(example.size_hw, buckets)
    closer = [
        plan_closer_crop(
            whole,
            example.size_hw,
            zoom=counter_uniform(seed, "crop-zoom", content, number),
            down=counter_uniform(seed, "crop-down", content, number),
            across=counter_uniform(seed, "crop-across", content, number),
        )
        for number in range(1, count)
    ]
    return tuple(dict.fromkeys([whole, *closer]))


@dataclass(frozen=True)
class _Source:
    """A picture that views are made of."""

    example: ImageCaption
    content: str
    """SHA-256 of its bytes."""
    background: tuple[int, int, int]
    mask_outside: float

    def view(self, encoder: LatentEncoder, plan: CropPlan, *, mirrored: bool) -> View:
        origin = (self.content, *astuple(plan), self.background, mirrored)
        latents = encoder.encode(origin, lambda: self._pixels(plan, mirrored), self.example.path.name)
        (top, left), rest = plan.crop_top_left_yx, plan.resized_hw[1] - plan.bucket_hw[1]
        height, width = latents.mean.shape[1:]
        return View(
            latents=latents,
            crop_top_left_yx=(top, rest - left if mirrored else left),
            loss_mask=self._loss_mask(plan, (height, width), mirrored),
        )

    def _pixels(self, plan: CropPlan, mirrored: bool) -> NDArray[np.float32]:
        pixels = load_pixels(self.example, plan, background=self.background)
        # Else the latents of another picture would be kept under the name of this one.
        require_content(self.example.path, self.content)
        return pixels[:, :, ::-1] if mirrored else pixels

    def _loss_mask(self, plan: CropPlan, grid_hw: tuple[int, int], mirrored: bool) -> Tensor | None:
        example = self.example
        if example.mask is None:
            return None
        mask = pool_mask(load_mask(example.path, example.mask, example.size_hw, plan), grid_hw)
        shown = torch.from_numpy(np.ascontiguousarray(mask[:, ::-1] if mirrored else mask))[None]
        return self.mask_outside + (1 - self.mask_outside) * shown
