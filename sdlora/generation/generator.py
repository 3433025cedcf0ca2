"""The generator: a base model, a stack of adapters, and requests that become pictures.

The adapters live in `Generator.stack`; this module only draws with whatever is active there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from sdlora import __version__, embedded
from sdlora.adapter_weight import written
from sdlora.errors import GenerationError
from sdlora.families import load_pipeline, resolve_base
from sdlora.generation.decoding import LatentColours
from sdlora.generation.drawing import Batch, StepDrawn, draw_batch
from sdlora.generation.memory import Thrift, apply_thrift, check_thrift, offloaded
from sdlora.generation.prompt_embeds import PromptEncoder
from sdlora.generation.schedules import check_steps, make_scheduler
from sdlora.generation.start_image import StartImage
from sdlora.picture_file import AdapterRecord, Recipe
from sdlora.precision import choose_precision
from sdlora.prompts import cut_words
from sdlora.request import GenerationRequest
from sdlora.stack import AdapterStack

__all__ = ["GeneratedPicture", "Generator"]

_SUITED = {"tiny": (embedded.NUM_INFERENCE_STEPS, embedded.GUIDANCE_SCALE)}
"""Steps and guidance of a base, where they are not those of Stable Diffusion."""


@dataclass(frozen=True)
class GeneratedPicture:
    """A picture and how it was drawn."""

    image: Image.Image
    recipe: Recipe


class Generator:
    """Draws with a base model and a stack of adapters.

    >>> generator = Generator.from_base("tiny")                                        # doctest: +SKIP
    >>> generator.stack.load("ink.safetensors")                                        # doctest: +SKIP
    >>> generator.stack.set_adapters(["ink"], [0.8])                                   # doctest: +SKIP
    >>> pictures = list(generator.draw(GenerationRequest(prompt="a fox", seed=7)))     # doctest: +SKIP

    A pipeline of the caller's stays as it is: its scheduler, its settings and its modules; the adapters go with
    `generator.stack.unload()`, or at the end of a `with` block.

    Args:
        pipeline: a StableDiffusionPipeline or StableDiffusionXLPipeline.
        base: how the base model is called in recipes.
        warn: told in one sentence what the user should know, e.g. words that do not fit the text encoder.
        on_step: told after every step; what it raises ends the drawing.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        base: str = "",
        warn: Callable[[str], None] | None = None,
        on_step: Callable[[StepDrawn], None] | None = None,
    ):
        self.pipeline, self.base = pipeline, base
        self.warn: Callable[[str], None] = warn or (lambda message: None)
        self.on_step: Callable[[StepDrawn], None] = on_step or (lambda step: None)
        self.stack = AdapterStack(pipeline)
        self._thrift, self._device = Thrift(), pipeline.device

    @classmethod
    def from_base(
        cls,
        base: str,
        *,
        precision: str = "auto",
        device: str | None = None,
        thrift: Thrift | None = None,
        warn: Callable[[str], None] | None = None,
        on_step: Callable[[StepDrawn], None] | None = None,
    ) -> Generator:
        """Load a base model: a diffusers folder, a checkpoint file, a Hub id or "tiny".

        `precision` "auto" is fp16 on CUDA and fp32 on a CPU, where accuracy is worth more than the time.

        Raises:
            ModelError: the base cannot be had or read.
            GenerationError: the precision is unknown, or this machine cannot do what `thrift` asks.
        """
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        thrift = thrift or Thrift()
        if precision not in ("auto", "fp16", "bf16", "fp32"):
            raise GenerationError(f"No precision is called {precision!r}. Known: auto, fp16, bf16, fp32.")
        check_thrift(thrift, place)
        wanted = "fp32" if precision == "auto" and place.type == "cpu" else precision
        chosen = choose_precision(wanted, place)  # type: ignore[arg-type]
        kept_on = torch.device("cpu") if thrift.offload else place
        pipeline = load_pipeline(resolve_base(base), weight_dtype=chosen.weight_dtype, device=kept_on)
        apply_thrift(pipeline, thrift)
        generator = cls(pipeline, base=base, warn=warn, on_step=on_step)
        generator._thrift, generator._device = thrift, place
        return generator

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stack.unload()

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
        request = request.with_defaults(*_SUITED.get(self.base, ()))
        # Once more: a strength that suits the usual number of steps may leave none of this base's.
        request.check()
        self._check_steps(request)
        weighted = request.prompt_syntax == "weighted"
        encoder = PromptEncoder(self.pipeline, weighted=weighted, clip_skip=request.clip_skip)
        if not weighted:
            for text in dict.fromkeys([*prompts, request.negative_prompt]):
                self._tell_cut_words(text)
        start = self._start_image(request)
        with self.stack.applied():
            yield from self._draw_all(prompts, seeds, request, encoder, start)

    def _draw_all(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        request: GenerationRequest,
        encoder: PromptEncoder,
        start: StartImage | None,
    ) -> Iterator[GeneratedPicture]:
        with offloaded(self.pipeline, self._thrift.offload, self._device):
            for part_prompts, part_seeds in _batches(encoder, prompts, seeds, request):
                yield from self._draw_batch(part_prompts, part_seeds, request, encoder, start)

    def approximate(self, latents: Tensor) -> list[Image.Image]:
        """What latents [B, C, h, w] of a `StepDrawn` look like, roughly, at w x h pixels."""
        return self._colours(latents)

    @cached_property
    def _colours(self) -> LatentColours:
        return LatentColours.of(self.pipeline)

    def _draw_batch(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        request: GenerationRequest,
        encoder: PromptEncoder,
        start: StartImage | None,
    ) -> Iterator[GeneratedPicture]:
        assert request.guidance_scale is not None
        guided = request.guidance_scale > 1 and self.pipeline.unet.config.time_cond_proj_dim is None
        conditions = encoder.arguments(prompts, request.negative_prompt, guided=guided)
        size = self._size(request, start)
        batch = Batch(seeds, conditions, size, None if start is None else start.image)
        images = draw_batch(
            self.pipeline, batch, request, on_step=self.on_step, warn=self.warn, on_view=self.stack.follow
        )
        for row, (prompt, seed, image) in enumerate(zip(prompts, seeds, images, strict=True)):
            yield GeneratedPicture(image, self._recipe(prompt, seed, request, size, start, row))

    def _size(self, request: GenerationRequest, start: StartImage | None) -> tuple[int, int]:
        if start is not None:
            return start.image.height, start.image.width
        side = self._side
        return request.height or side, request.width or side

    @property
    def _side(self) -> int:
        """Side in pixels of what the base draws by itself."""
        side: int = self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor
        return side

    def _start_image(self, request: GenerationRequest) -> StartImage | None:
        if request.init_image is None:
            return None
        return StartImage.read(request.init_image, height=request.height, width=request.width, area=self._side**2)

    def _recipe(
        self,
        prompt: str,
        seed: int,
        request: GenerationRequest,
        size: tuple[int, int],
        start: StartImage | None,
        row: int,
    ) -> Recipe:
        """Of the picture in that row of its batch."""
        assert request.num_inference_steps is not None and request.guidance_scale is not None
        return Recipe(
            prompt=prompt,
            negative_prompt=request.negative_prompt,
            seed=seed,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            height=size[0],
            width=size[1],
            scheduler=request.scheduler or type(self.pipeline.scheduler).__name__,
            # Of a local folder or file only the name: a picture must not carry the paths of its maker's machine.
            base=Path(self.base).name if Path(self.base).exists() else self.base,
            precision=str(self.pipeline.unet.dtype).removeprefix("torch."),
            clip_skip=request.clip_skip,
            prompt_syntax=request.prompt_syntax,
            init_image=start.file if start else "",
            init_hash=start.pixel_hash if start else "",
            strength=request.strength,
            hires_scale=request.hires_scale,
            hires_strength=request.hires_strength,
            hires_steps=request.hires_steps,
            hires_upscaler=request.hires_upscaler if request.hires_scale else "",
            vae_tiling=self.pipeline.vae.use_tiling,
            adapters=tuple(
                AdapterRecord(
                    name, written(weight.of_image(row)), self.stack.file_name(name), self.stack.tensor_hash(name)
                )
                for name, weight in self.stack.active.items()
            ),
            method=self.stack.method,
            versions={"sdlora": __version__, **{name: version(name) for name in ("torch", "diffusers")}},
        )

    def _check_steps(self, request: GenerationRequest) -> None:
        """Before anything is drawn: whether the scheduler is there and can make these numbers of steps."""
        scheduler = make_scheduler(self.pipeline.scheduler, request.scheduler)
        for steps in {request.num_inference_steps, request.hires_steps} - {None}:
            assert steps is not None
            check_steps(scheduler, request.scheduler, steps)

    def _tell_cut_words(self, text: str) -> None:
        cut = cut_words(text, self.pipeline.tokenizer)
        if cut:
            self.warn(f"The prompt is longer than the text encoder reads; these words have no effect: {cut!r}")


def _batches(
    encoder: PromptEncoder, prompts: Sequence[str], seeds: Sequence[int], request: GenerationRequest
) -> Iterator[tuple[list[str], list[int]]]:
    """Neighbours in parts of at most the batch size. Only prompts of the same length in chunks share one: padding a
    prompt to its neighbours' length would change its picture."""
    pairs = zip(prompts, seeds, strict=True)
    for _, group in groupby(pairs, lambda pair: encoder.num_chunks(pair[0])):
        rest = list(group)
        while rest:
            part, rest = rest[: request.batch_size], rest[request.batch_size :]
            yield [prompt for prompt, _ in part], [seed for _, seed in part]
