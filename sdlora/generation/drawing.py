"""One batch of pictures through the pipelines of diffusers: from noise or over a picture, and once more enlarged.

The caller's pipeline is not called itself: a shallow copy of it is, with a scheduler of its own, so that nothing it
holds changes. All randomness of a picture comes from one CPU generator seeded with its seed; first the noise it begins
with is drawn from it, in fp32, then that of the steps.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdlora.errors import GenerationError
from sdlora.families import detect_family
from sdlora.generation.decoding import decode_in_fp32, to_image
from sdlora.generation.schedules import give_noise_per_picture, make_scheduler
from sdlora.generation.start_image import enlarged_latents, enlarged_side
from sdlora.request import GenerationRequest
from sdlora.schedulers import SCHEDULERS

__all__ = ["Batch", "StepDrawn", "draw_batch", "initial_noise"]


@dataclass(frozen=True, eq=False)
class StepDrawn:
    """After every step: which pictures, how far they are, and their latents [B, C, h, w] at about unit variance."""

    seeds: tuple[int, ...]
    step: int
    num_steps: int
    latents: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """What is drawn at once: `conditions` are the pipeline's arguments of the prompts, `size` is (height, width)."""

    seeds: Sequence[int]
    conditions: Mapping[str, Any]
    size: tuple[int, int]
    start: Image.Image | None


def initial_noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Standard normal noise [1, channels, height, width] of one picture, drawn in fp32 on the CPU.

    So that neither the device nor the pictures beside it in a batch change what a seed means.
    """
    return _noise(_generator(seed), channels, height, width)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _noise(generator: torch.Generator, channels: int, height: int, width: int) -> Tensor:
    return torch.randn(1, channels, height, width, generator=generator)


def draw_batch(
    pipeline: Any,
    batch: Batch,
    request: GenerationRequest,
    *,
    on_step: Callable[[StepDrawn], None],
    warn: Callable[[str], None],
    on_view: Callable[[Any], None],
) -> list[Image.Image]:
    """The pictures of a request whose defaults are filled in; `on_view` is told which pipeline is about to draw.

    Raises:
        GenerationError: a picture came out as NaN, and not for want of the VAE's precision.
    """
    generators = [_generator(seed) for seed in batch.seeds]
    painter = _Painter(pipeline, batch, request, generators, on_step, warn, on_view)
    if batch.start is None:
        first = painter.from_noise(*batch.size)
    else:
        assert request.strength is not None
        first = painter.over([batch.start] * len(batch.seeds), request.strength, request.num_inference_steps)
    if request.hires_scale is None:
        return painter.pictures(first)
    assert request.hires_strength is not None
    height, width = (enlarged_side(side, request.hires_scale) for side in batch.size)
    larger: Any
    if request.hires_upscaler == "latent":
        factor = pipeline.vae_scale_factor
        larger = enlarged_latents(first.latents, height // factor, width // factor)
    else:
        larger = [image.resize((width, height), Image.Resampling.LANCZOS) for image in painter.pictures(first)]
    steps = request.hires_steps or request.num_inference_steps
    return painter.pictures(painter.over(larger, request.hires_strength, steps))


@dataclass(frozen=True, eq=False)
class _Drawn:
    """The latents [B, C, h, w] of the last step, and the pipeline's pixels [B, 3, H, W] in [0, 1]."""

    latents: Tensor
    pixels: Tensor


class _Painter:
    """Calls the pipelines and looks at what comes out."""

    def __init__(
        self,
        pipeline: Any,
        batch: Batch,
        request: GenerationRequest,
        generators: list[torch.Generator],
        on_step: Callable[[StepDrawn], None],
        warn: Callable[[str], None],
        on_view: Callable[[Any], None],
    ):
        self._pipeline, self._batch, self._request, self._generators = pipeline, batch, request, generators
        self._on_step, self._warn, self._on_view = on_step, warn, on_view

    def from_noise(self, height: int, width: int) -> _Drawn:
        """Pictures of that size in pixels, from each one's own noise."""
        unet, factor = self._pipeline.unet, self._pipeline.vae_scale_factor
        shape = (unet.config.in_channels, height // factor, width // factor)
        noise = torch.cat([_noise(generator, *shape) for generator in self._generators])
        view = _view(self._pipeline)
        return self._call(
            view,
            shape,
            self._request.num_inference_steps,
            latents=noise.to(view._execution_device, unet.dtype),
            height=height,
            width=width,
        )

    def over(self, start: Any, strength: float, num_inference_steps: int | None) -> _Drawn:
        """Pictures drawn over others of the same size: a list of images, or latents [B, C, h, w]."""
        view = _image_to_image(self._pipeline)
        if isinstance(start, Tensor):
            shape = tuple(start.shape[1:])
        else:
            width, height = (side // self._pipeline.vae_scale_factor for side in start[0].size)
            shape = (self._pipeline.unet.config.in_channels, height, width)
        return self._call(view, shape, num_inference_steps, image=start, strength=strength)

    def pictures(self, drawn: _Drawn) -> list[Image.Image]:
        """The pixels as images; those that the VAE spoilt are decoded once more in fp32."""
        rows = zip(self._batch.seeds, drawn.pixels, drawn.latents, strict=True)
        return [to_image(self._sound(seed, pixels.float(), latents)) for seed, pixels, latents in rows]

    def _call(self, view: Any, shape: tuple[int, ...], num_inference_steps: int | None, **arguments: Any) -> _Drawn:
        request, seeds = self._request, self._batch.seeds
        scheduler = make_scheduler(self._pipeline.scheduler, request.scheduler)
        give_noise_per_picture(scheduler, seeds, shape, self._pipeline.unet.dtype)
        view.scheduler = scheduler
        self._on_view(view)
        last: dict[str, Tensor] = {}

        def after_step(view: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            last.update(tensors)
            order, count = scheduler.order, view.num_timesteps
            progress = (step // order + 1, -(-count // order))
            self._on_step(StepDrawn(tuple(seeds), *progress, _unit_variance(scheduler, tensors["latents"])))
            return {}

        with torch.inference_mode():
            pixels = view(
                **self._batch.conditions,
                **arguments,
                num_inference_steps=num_inference_steps,
                guidance_scale=request.guidance_scale,
                eta=0.0 if request.scheduler is None else SCHEDULERS[request.scheduler].eta,
                generator=self._generators,
                callback_on_step_end=after_step,
                output_type="pt",
            ).images
        return _Drawn(last["latents"], pixels)

    def _sound(self, seed: int, pixels: Tensor, latents: Tensor) -> Tensor:
        """[3, H, W] without NaN. A picture that is all black is decoded again too: what fp16 spoils may look so."""
        vae, checker = self._pipeline.vae, getattr(self._pipeline, "safety_checker", None)
        broken = not pixels.isfinite().all()
        if not broken and (pixels.max() > 0 or checker is not None):
            return pixels
        if not latents.isfinite().all():
            raise GenerationError(
                f"The picture of seed {seed} came out as NaN: the U-Net overflowed. An adapter is too strong, or the "
                "base needs more than fp16: lower the weights, or use --precision fp32."
            )
        if vae.dtype != torch.float32:
            pixels = decode_in_fp32(self._pipeline, latents[None])[0].to(pixels.device)
            if pixels.isfinite().all() and pixels.max() > 0:
                name = str(vae.dtype).removeprefix("torch.")
                self._warn(
                    f"The VAE overflowed in {name} on the picture of seed {seed}; it was decoded in fp32 instead."
                )
                return pixels
        if not pixels.isfinite().all():
            raise GenerationError(
                f"The picture of seed {seed} came out as NaN: the VAE gives NaN even in fp32. Is the base damaged?"
            )
        self._warn(f"The picture of seed {seed} is all black.")
        return pixels


def _view(pipeline: Any) -> Any:
    """A pipeline of the same parts whose own settings can be changed."""
    view = copy.copy(pipeline)
    view.set_progress_bar_config(disable=True)
    return view


def _image_to_image(pipeline: Any) -> Any:
    """The pipeline that draws over pictures, of the same parts."""
    cls = detect_family(pipeline.unet.config).image_to_image_class
    known = inspect.signature(cls.__init__).parameters
    parts = {name: part for name, part in pipeline.components.items() if name in known}
    options = {name: value for name, value in pipeline.config.items() if name in known and name not in parts}
    if "add_watermarker" in known:
        options["add_watermarker"] = False
    # Its constructor would change the configuration of the scheduler it gets.
    view = cls(**{**parts, "scheduler": None}, **options)
    for name in ("watermark", "_all_hooks", "_offload_device", "_offload_gpu_id"):
        if hasattr(pipeline, name):
            setattr(view, name, getattr(pipeline, name))
    view.set_progress_bar_config(disable=True)
    return view


def _unit_variance(scheduler: Any, latents: Tensor) -> Tensor:
    """Schedulers that count in sigmas have latents of variance 1 + sigma^2."""
    if scheduler.init_noise_sigma <= 1:
        return latents
    sigma: Tensor = scheduler.sigmas[min(scheduler.step_index, len(scheduler.sigmas) - 1)].to(latents.device)
    return latents / (sigma**2 + 1) ** 0.5
