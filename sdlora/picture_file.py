"""A PNG that says how it was drawn: A1111's `parameters` text, and an exact recipe as JSON under `sdlora`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdlora.adapter_weight import as_weight
from sdlora.errors import GenerationError
from sdlora.request import GenerationRequest
from sdlora.schedulers import SCHEDULERS, scheduler_label

__all__ = ["AdapterRecord", "Recipe", "read_recipe", "save_picture"]

_UPSCALERS = {"latent": "Latent", "lanczos": "Lanczos"}


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter of the stack: its name, weight, file name (no folder) and sha256 of its tensor bytes."""

    name: str
    weight: float | str
    """A number, or the compact syntax of `adapter_weight` where the weight is more than one."""
    file: str
    tensor_hash: str


@dataclass(frozen=True)
class Recipe:
    """Everything needed to draw the picture again. Fields with a default are missing from older pictures."""

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
    clip_skip: int | None = None
    prompt_syntax: str = "plain"
    """Older pictures were drawn from plain texts."""
    init_image: str = ""
    """File name of the picture that was drawn over, without its folder."""
    init_hash: str = ""
    """SHA-256 of that picture's size and RGB pixels."""
    strength: float | None = None
    hires_scale: float | None = None
    hires_strength: float | None = None
    hires_steps: int | None = None
    hires_upscaler: str = ""
    vae_tiling: bool = False
    adapters: tuple[AdapterRecord, ...] = ()
    method: str = "sum"
    """How the adapters were put together, as `AdapterStack.set_method` takes it."""
    versions: Mapping[str, str] = field(default_factory=dict)

    def request(self, init_image: Path | None = None) -> GenerationRequest:
        """What was asked for; the picture that was drawn over has to be found by its hash."""
        return GenerationRequest(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            seed=self.seed,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            height=self.height,
            width=self.width,
            scheduler=self.scheduler if self.scheduler in SCHEDULERS else None,
            clip_skip=self.clip_skip,
            prompt_syntax="weighted" if self.prompt_syntax == "weighted" else "plain",
            init_image=init_image,
            strength=self.strength,
            hires_scale=self.hires_scale,
            hires_strength=self.hires_strength,
            hires_steps=self.hires_steps,
            hires_upscaler="lanczos" if self.hires_upscaler == "lanczos" else "latent",
        )

    def parameters(self) -> str:
        """The text A1111 and Civitai read."""
        lines = [self.prompt + "".join(f" <lora:{a.name}:{as_weight(a.weight)}>" for a in self.adapters)]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        return "\n".join([*lines, ", ".join(self._settings())])

    def _settings(self) -> list[str]:
        settings: dict[str, object] = {
            "Steps": self.num_inference_steps,
            "Sampler": scheduler_label(self.scheduler),
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": _without_separators(self.base),
            "Clip skip": self.clip_skip,
            "Denoising strength": self.strength if self.hires_strength is None else self.hires_strength,
            "Hires upscale": self.hires_scale,
            "Hires steps": self.hires_steps,
            "Hires upscaler": _UPSCALERS.get(self.hires_upscaler),
        }
        if self.adapters:
            hashes = ", ".join(f"{_without_separators(a.name)}: {a.tensor_hash[:12]}" for a in self.adapters)
            settings["Lora hashes"] = f'"{hashes}"'
        settings["Version"] = f"sdlora {self.versions.get('sdlora', '')}".rstrip()
        return [
            f"{name}: {value:g}" if isinstance(value, float) else f"{name}: {value}"
            for name, value in settings.items()
            if value is not None
        ]


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


def _without_separators(text: str) -> str:
    """A value of A1111's list has neither commas nor colons."""
    return text.translate({ord(","): " ", ord(":"): " "})
