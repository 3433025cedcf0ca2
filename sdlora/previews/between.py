"""Previews drawn between two steps, on the models that are trained, with what is trained set aside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sdlora.adapter_file import PARTS
from sdlora.config import PreviewConfig
from sdlora.errors import SdloraError
from sdlora.families import Components, pipeline_of
from sdlora.generation import Generator
from sdlora.previews.drawing import draw_previews, failure, preview_task
from sdlora.prior import base_restored
from sdlora.run_dir import RunDir
from sdlora.unet_modes import uncompiled

__all__ = ["PreviewsBetween", "shared_generator"]


def shared_generator(components: Components, *, base: str) -> Generator:
    """Draws with these models as they are in memory; made before a LoRA is put into them.

    A VAE or text encoder of another number format than the U-Net's is copied in that, which is how `generate` loads it.
    `base` is what the base is called in the pictures' recipes.
    """
    dtype = components.unet.dtype
    same = replace(
        components,
        vae=_in(components.vae, dtype),
        text_encoders=tuple(_in(encoder, dtype) for encoder in components.text_encoders),
    )
    return Generator(pipeline_of(same), base=base)


class PreviewsBetween:
    """Draws when it is asked, by a `shared_generator`; the loop waits for it. See `Previews`.

    What cannot be drawn is told by `say`, and the run goes on without it.
    """

    def __init__(
        self,
        *,
        generator: Generator,
        settings: PreviewConfig,
        resolution: int,
        run_dir: RunDir,
        say: Callable[[str], None],
    ):
        self._generator, self._settings, self._resolution = generator, settings, resolution
        self._run_dir, self._say = run_dir, say
        self._ready: list[tuple[int, Path]] = []

    def request(self, step: int, adapter: Path) -> None:
        """Draws at once."""
        task = preview_task(self._run_dir, self._settings, step, adapter)
        models = [getattr(self._generator.pipeline, part, None) for part in PARTS]
        with ExitStack() as stack:
            stack.enter_context(uncompiled(self._generator.pipeline.unet))
            for model in models:
                if model is not None:
                    stack.enter_context(base_restored(model))
            try:
                self._ready.extend(draw_previews(self._generator, task, self._settings, self._resolution))
            except (SdloraError, MemoryError, RuntimeError) as error:
                self._say(f"No preview of step {step}: {failure(error)}")

    def ready(self) -> list[tuple[int, Path]]:
        """See `Previews`."""
        ready, self._ready = self._ready, []
        return ready

    def finish(self, is_stopped: Callable[[], bool]) -> Iterator[tuple[int, Path]]:
        """See `Previews`; there is nothing to wait for."""
        yield from self.ready()

    def close(self) -> None:
        """See `Previews`."""


def _in(module: Any, dtype: torch.dtype) -> Any:
    """The module itself if it is of that format, else a copy that is."""
    if module is None or module.dtype == dtype:
        return module
    # Not diffusers' own `to`, which warns of layers to be kept in fp32 that are none here.
    return torch.nn.Module.to(copy.deepcopy(module), dtype=dtype)
