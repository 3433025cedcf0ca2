"""Where the parts meet: from options to files. The only modules that know everybody are this one and `demo`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from sdlora import embedded
from sdlora.adapter_file import read_adapter
from sdlora.config import DEFAULT_BASE, TrainConfig
from sdlora.data.dataset import ImageDataset
from sdlora.events import RunFinished
from sdlora.generation import GenerationRequest, Generator
from sdlora.picture_file import save_picture
from sdlora.progress import terminal_progress
from sdlora.training import train_adapter

__all__ = ["GenerateOptions", "generate_files", "train_with_progress"]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """`sdlora generate` in one value; None means: what suits the base model."""

    prompt: str
    adapters: tuple[tuple[Path, float], ...]
    base: str | None
    num_images: int
    seed: int
    num_inference_steps: int | None
    guidance_scale: float | None
    negative_prompt: str
    height: int | None
    width: int | None
    scheduler: str | None
    precision: str
    batch_size: int
    out_dir: Path

    def request(self, base: str) -> GenerationRequest:
        """The request for the generator, with the base's own number of steps and guidance where none is given."""
        steps, guidance = (embedded.NUM_INFERENCE_STEPS, embedded.GUIDANCE_SCALE) if base == "tiny" else (30, 7.5)
        return GenerationRequest(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            num_images=self.num_images,
            seed=self.seed,
            num_inference_steps=steps if self.num_inference_steps is None else self.num_inference_steps,
            guidance_scale=guidance if self.guidance_scale is None else self.guidance_scale,
            height=self.height,
            width=self.width,
            scheduler=self.scheduler,
            batch_size=self.batch_size,
        )


def generate_files(options: GenerateOptions, *, warn: Callable[[str], None]) -> Iterator[Path]:
    """Draw the pictures and yield each file's path as it is written. Nothing existing is overwritten.

    Raises:
        GenerationError: an option is out of range.
        ModelError: the base cannot be had.
        AdapterError: an adapter cannot be used.
    """
    base = options.base or _base_of_adapters(options.adapters) or DEFAULT_BASE
    request = options.request(base)
    request.check()
    generator = Generator.from_base(base, precision=options.precision, warn=warn)
    names = [generator.stack.load(path) for path, _ in options.adapters]
    generator.stack.set_adapters(names, [weight for _, weight in options.adapters])
    index = _next_index(options.out_dir)
    for offset, picture in enumerate(generator.draw(request)):
        path = options.out_dir / f"{index + offset:05d}-seed{picture.recipe.seed}.png"
        yield save_picture(picture.image, path, picture.recipe)


def _base_of_adapters(adapters: tuple[tuple[Path, float], ...]) -> str | None:
    """ "tiny" if every adapter says that it was trained on the embedded base."""
    bases = {read_adapter(path).metadata.get("sdlora.base") for path, _ in adapters}
    return "tiny" if bases == {"tiny"} else None


def _next_index(folder: Path) -> int:
    numbers = [int(match[1]) for path in folder.glob("*.png") if (match := re.match(r"(\d{5})-", path.name))]
    return max(numbers, default=0) + 1


def train_with_progress(
    config: TrainConfig, dataset: ImageDataset, *, say: Callable[[str], None], stream: TextIO
) -> Path:
    """Train as `config` says, with a progress bar on `stream`; returns the adapter's path.

    Raises:
        ModelError: the base cannot be had or used here.
        TrainingError: training cannot start or go on.
    """
    ends: list[RunFinished] = []
    with terminal_progress(stream) as progress:
        path = train_adapter(
            config,
            dataset=dataset,
            observers=[progress, lambda event: ends.append(event) if isinstance(event, RunFinished) else None],
            say=say,
        )
    if ends and ends[0].stopped_early:
        say(f"Stopped after step {ends[0].step}; what was learnt until then is saved.")
    say(f'{path} ({path.stat().st_size / 1024:.0f} kB). Draw with it: sdlora generate "..." --lora {path}')
    return path
