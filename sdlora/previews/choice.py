"""Which way the previews of a run are drawn, and those that it was stopped before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from sdlora.config import TrainConfig
from sdlora.families import Components
from sdlora.generation import Generator
from sdlora.preview_requests import Previews
from sdlora.previews.beside import PreviewsBeside
from sdlora.previews.between import PreviewsBetween, shared_generator
from sdlora.previews.drawing import draw_previews, preview_task
from sdlora.previews.place import place_beside
from sdlora.run_dir import RunDir

__all__ = ["draw_missing", "previews_of"]


def previews_of(
    config: TrainConfig, components: Components, resolution: int, *, given: bool
) -> Callable[[RunDir, Callable[[str], None]], Previews] | None:
    """What makes them for a run's folder, with what is told in words; None where none are wanted.

    Called before a LoRA is put into the models. `given`: a program passed them in, so that no other process knows them.
    """
    settings = config.preview
    if not settings.prompts:
        return None
    if settings.where == "between" or (settings.where == "auto" and given):
        generator = shared_generator(components, base=components.source if given else config.model.base)
        return lambda run_dir, say: PreviewsBetween(
            generator=generator, settings=settings, resolution=resolution, run_dir=run_dir, say=say
        )
    models = (components.unet, components.vae, *components.text_encoders)
    parameters = sum(weight.numel() for model in models if model is not None for weight in model.parameters())
    place = partial(place_beside, components.unet.device, parameters=parameters, resolution=resolution)
    return lambda run_dir, say: PreviewsBeside(
        base=config.model.base, settings=settings, resolution=resolution, run_dir=run_dir, place=place, say=say
    )


def draw_missing(run_dir: RunDir, config: TrainConfig, components: Components | None) -> Iterator[tuple[int, Path]]:
    """Draws the previews of all saves that lack some, in this process; yields step and file of each picture.

    Raises:
        ModelError: the base cannot be had.
        AdapterError, GenerationError: as `draw_previews`.
    """
    settings = config.preview
    if components is None:
        generator = Generator.from_base(config.model.base)
    else:
        generator = shared_generator(components, base=components.source)
    for step in run_dir.undrawn_steps(len(settings.prompts)):
        task = preview_task(run_dir, settings, step, run_dir.checkpoint_adapter_path(step))
        yield from draw_previews(generator, task, settings, config.data.resolution)
