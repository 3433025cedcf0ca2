"""A PNG that says how it was drawn: A1111's `parameters` text, and an exact recipe as JSON under `sdlora`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdlora.errors import GenerationError

__all__ = ["AdapterRecord", "Recipe", "read_recipe", "save_picture"]


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter of the stack: its name, weight, file name (no folder) and sha256 of its tensor bytes."""

    name: str
    weight: float
    file: str
    tensor_hash: str


@dataclass(frozen=True)
class Recipe:
    """Everything needed to draw the picture again."""

    prompt: str
    negative_prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    scheduler: str
    base: str
    precision: str
    adapters: tuple[AdapterRecord, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def parameters(self) -> str:
        """The text A1111 and Civitai read."""
        lines = [self.prompt + "".join(f" <lora:{a.name}:{a.weight:g}>" for a in self.adapters)]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        settings = [
            f"Steps: {self.num_inference_steps}",
            f"Sampler: {self.scheduler}",
            f"CFG scale: {self.guidance_scale:g}",
            f"Seed: {self.seed}",
            f"Size: {self.width}x{self.height}",
            f"Model: {self.base.replace(',', ' ').replace(':', ' ')}",
        ]
        if self.adapters:
            hashes = ", ".join(f"{a.name.translate({44: 32, 58: 32})}: {a.tensor_hash[:12]}" for a in self.adapters)
            settings.append(f'Lora hashes: "{hashes}"')
        sdlora = self.versions.get("sdlora", "")
        settings.append(f"Version: sdlora {sdlora}".rstrip())
        return "\n".join([*lines, ", ".join(settings)])


def save_picture(image: Image.Image, path: Path, recipe: Recipe) -> Path:
    """Write `image` as a PNG with its recipe; the file appears whole or not at all.

    Raises:
        GenerationError: the file cannot be written.
    """
    info = PngInfo()
    info.add_itxt("parameters", recipe.parameters())
    info.add_itxt("sdlora", json.dumps(asdict(recipe), ensure_ascii=False))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(temporary, format="PNG", pnginfo=info)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise GenerationError(f"{path}: cannot be written ({error.strerror or error}).") from error
    return path


def read_recipe(path: Path) -> Recipe:
    """The recipe in a picture drawn by sdlora.

    Raises:
        GenerationError: not a PNG of ours, or its recipe is unreadable.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text: Any = image.info.get("sdlora")
        if text is None:
            raise GenerationError(f"{path}: holds no sdlora recipe.")
        data = json.loads(text)
        adapters = tuple(AdapterRecord(**record) for record in data.pop("adapters"))
        return Recipe(**data, adapters=adapters)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise GenerationError(f"{path}: its recipe cannot be read ({error}).") from error
