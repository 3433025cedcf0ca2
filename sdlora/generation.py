"""Pictures from prompts: noise per picture, schedulers by their usual names, the recipe of every picture.

The adapters live in `Generator.stack`; this module only draws with whatever is active there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from sdlora import __version__
from sdlora.errors import GenerationError
from sdlora.families import load_pipeline, resolve_base
from sdlora.picture_file import AdapterRecord, Recipe
from sdlora.precision import choose_precision
from sdlora.prompts import cut_words
from sdlora.request import SCHEDULERS, GenerationRequest
from sdlora.stack import AdapterStack

__all__ = ["GeneratedPicture", "Generator", "initial_noise"]


@dataclass(frozen=True)
class GeneratedPicture:
    """A picture and how it was drawn."""

    image: Image.Image
    recipe: Recipe


def initial_noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Standard normal noise [1, channels, height, width] of one picture, drawn in fp32 on the CPU.

    So that neither the device nor the pictures beside it in a batch change what a seed means.
    """
    return torch.randn(1, channels, height, width, generator=torch.Generator("cpu").manual_seed(seed))


class Generator:
    """Draws with a base model and a stack of adapters.

    >>> generator = Generator.from_base("tiny")                                        # doctest: +SKIP
    >>> generator.stack.load("ink.safetensors")                                        # doctest: +SKIP
    >>> generator.stack.set_adapters(["ink"], [0.8])                                   # doctest: +SKIP
    >>> pictures = list(generator.draw(GenerationRequest(prompt="a fox", seed=7)))     # doctest: +SKIP

    Args:
        pipeline: a StableDiffusionPipeline or StableDiffusionXLPipeline; its modules stay the caller's.
        base: how the base model is called in recipes.
        warn: told in one sentence what the user should know, e.g. words that do not fit the text encoder.
    """

    def __init__(self, pipeline: Any, *, base: str = "", warn: Callable[[str], None] | None = None):
        self.pipeline, self.base, self._warn = pipeline, base, warn or (lambda message: None)
        self.stack = AdapterStack(pipeline)
        self._own_scheduler = pipeline.scheduler
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def from_base(
        cls, base: str, *, precision: str = "auto", device: str | None = None, warn: Callable[[str], None] | None = None
    ) -> Generator:
        """Load a base model: a diffusers folder, a Hub id or "tiny".

        `precision` "auto" is fp16 on CUDA and fp32 on a CPU, where accuracy is worth more than the time.

        Raises:
            ModelError: the base cannot be had or read.
        """
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if precision not in ("auto", "fp16", "bf16", "fp32"):
            raise GenerationError(f"No precision is called {precision!r}. Known: auto, fp16, bf16, fp32.")
        wanted = "fp32" if precision == "auto" and place.type == "cpu" else precision
        chosen = choose_precision(wanted, place)  # type: ignore[arg-type]
        pipeline = load_pipeline(resolve_base(base), weight_dtype=chosen.weight_dtype, device=place)
        return cls(pipeline, base=base, warn=warn)

    def draw(self, request: GenerationRequest) -> Iterator[GeneratedPicture]:
        """Yield `num_images` pictures, in order of their seeds.

        Raises:
            GenerationError: a value of the request is out of range, or a picture came out as NaN.
        """
        seeds = range(request.seed, request.seed + request.num_images)
        yield from self.draw_many([request.prompt] * len(seeds), seeds, request)

    def draw_many(
        self, prompts: Sequence[str], seeds: Sequence[int], request: GenerationRequest
    ) -> Iterator[GeneratedPicture]:
        """Yield one picture for each pair of prompt and seed, `request.batch_size` computed at once.

        `prompt`, `seed` and `num_images` of the request are not used.
        """
        request.check()
        request = request.with_defaults()
        for text in dict.fromkeys([*prompts, request.negative_prompt]):
            self._tell_cut_words(text)
        scheduler = self._scheduler(request.scheduler)
        with nullcontext() if self.stack.is_merged else self.stack.merged():
            for start in range(0, len(prompts), request.batch_size):
                part = slice(start, start + request.batch_size)
                yield from self._draw_batch(prompts[part], seeds[part], request, scheduler)

    def _draw_batch(
        self, prompts: Sequence[str], seeds: Sequence[int], request: GenerationRequest, scheduler: Any
    ) -> Iterator[GeneratedPicture]:
        pipeline = self.pipeline
        factor = pipeline.vae_scale_factor
        side = pipeline.unet.config.sample_size * factor
        height, width = request.height or side, request.width or side
        channels = pipeline.unet.config.in_channels
        noise = torch.cat([initial_noise(seed, channels, height // factor, width // factor) for seed in seeds])
        pipeline.scheduler = type(scheduler).from_config(scheduler.config)
        try:
            with torch.inference_mode():
                pixels = pipeline(
                    prompt=list(prompts),
                    negative_prompt=[request.negative_prompt] * len(prompts),
                    latents=noise.to(pipeline.unet.device, pipeline.unet.dtype),
                    num_inference_steps=request.num_inference_steps,
                    guidance_scale=request.guidance_scale,
                    height=height,
                    width=width,
                    # Steps with their own noise (Euler a) draw it here; one generator a picture keeps pictures apart.
                    generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                    output_type="pt",
                ).images
        finally:
            pipeline.scheduler = self._own_scheduler
        for prompt, seed, picture in zip(prompts, seeds, pixels.float().cpu(), strict=True):
            if not picture.isfinite().all():
                raise GenerationError(
                    f"The picture of seed {seed} came out as NaN: an adapter is too strong, or the VAE overflows in "
                    "fp16. Lower the weights or use --precision fp32."
                )
            yield GeneratedPicture(_to_image(picture), self._recipe(prompt, seed, request, height, width, scheduler))

    def _recipe(
        self, prompt: str, seed: int, request: GenerationRequest, height: int, width: int, scheduler: Any
    ) -> Recipe:
        assert request.num_inference_steps is not None and request.guidance_scale is not None
        return Recipe(
            prompt=prompt,
            negative_prompt=request.negative_prompt,
            seed=seed,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            height=height,
            width=width,
            scheduler=request.scheduler or type(scheduler).__name__,
            # Of a local folder or file only the name: a picture must not carry the paths of its maker's machine.
            base=Path(self.base).name if Path(self.base).exists() else self.base,
            precision=str(self.pipeline.unet.dtype).removeprefix("torch."),
            adapters=tuple(
                AdapterRecord(name, weight, self.stack.file_name(name), self.stack.tensor_hash(name))
                for name, weight in self.stack.weights.items()
            ),
            versions={"sdlora": __version__, **{name: version(name) for name in ("torch", "diffusers")}},
        )

    def _scheduler(self, name: str | None) -> Any:
        if name is None:
            return self._own_scheduler
        class_name, options = SCHEDULERS[name]
        cls = getattr(diffusers, class_name)
        config = dict(self._own_scheduler.config)
        known = inspect.signature(cls.__init__).parameters
        return cls.from_config({key: value for key, value in config.items() if key in known}, **options)

    def _tell_cut_words(self, text: str) -> None:
        cut = cut_words(text, self.pipeline.tokenizer)
        if cut:
            self._warn(f"The prompt is longer than the text encoder reads; these words have no effect: {cut!r}")


def _to_image(picture: Tensor) -> Image.Image:
    """A [3, H, W] tensor in [0, 1] as an RGB image."""
    array = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array, mode="RGB")
