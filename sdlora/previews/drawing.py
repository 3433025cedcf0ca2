"""The one way that previews are drawn: what `generate` draws with the saved file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdlora.adapter_file import read_adapter
from sdlora.calibration import recommended_weight
from sdlora.config import PreviewConfig
from sdlora.errors import SdloraError
from sdlora.generation import Generator
from sdlora.out_of_memory import is_out_of_memory
from sdlora.picture_file import save_picture
from sdlora.request import GenerationRequest
from sdlora.run_dir import RunDir

__all__ = ["PreviewTask", "draw_previews", "failure", "preview_request", "preview_task"]


@dataclass(frozen=True)
class PreviewTask:
    """The previews of one save: the adapter's file, and each prompt with the file of its picture."""

    step: int
    adapter: Path
    pictures: tuple[tuple[str, Path], ...]


def preview_task(run_dir: RunDir, settings: PreviewConfig, step: int, adapter: Path) -> PreviewTask:
    """That of a save of the run in `run_dir`, without the pictures that are there."""
    drawn = run_dir.drawn_previews(step)
    wanted = [(prompt, run_dir.preview_path(step, n)) for n, prompt in enumerate(settings.prompts) if n not in drawn]
    return PreviewTask(step, adapter, tuple(wanted))


def preview_request(settings: PreviewConfig, resolution: int | None) -> GenerationRequest:
    """What is asked of the generator, for squares of `resolution` pixels a side; None is the base's own size.

    Brackets are no weights, as in the captions that are trained on.
    """
    return GenerationRequest(
        prompt="",
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        height=resolution,
        width=resolution,
        prompt_syntax="plain",
    )


def draw_previews(
    generator: Generator, task: PreviewTask, settings: PreviewConfig, resolution: int | None
) -> Iterator[tuple[int, Path]]:
    """Draws every picture with the file, at the weight that it recommends; yields step and file as each is written.

    Raises:
        AdapterError: the file cannot be used.
        GenerationError: a picture cannot be drawn or written.
    """
    name = generator.stack.load(task.adapter)
    try:
        generator.stack.set_adapters([name], recommended_weight(read_adapter(task.adapter).metadata))
        prompts = [prompt for prompt, _ in task.pictures]
        drawn = generator.draw_many(prompts, [settings.seed] * len(prompts), preview_request(settings, resolution))
        for picture, (_, path) in zip(drawn, task.pictures, strict=True):
            save_picture(picture.image, path, picture.recipe)
            yield task.step, path
    finally:
        generator.stack.unload(name)


def failure(error: BaseException) -> str:
    """Why a run goes on without previews, in one sentence. What is no reason but a fault is raised again."""
    if is_out_of_memory(error):
        return "the memory does not suffice for drawing."
    if not isinstance(error, SdloraError):
        raise error
    return " ".join(str(error).split())
