"""sdlora: train style LoRAs for Stable Diffusion, stack them, draw with them, share them.

    from sdlora import GenerationRequest, Generator

The names below are imported when they are first used; `import sdlora` alone loads no model library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdlora.adapter_file import read_adapter
    from sdlora.config import TrainConfig, load_config
    from sdlora.errors import SdloraError
    from sdlora.generation import GeneratedPicture, Generator, Thrift
    from sdlora.picture_file import Recipe, read_recipe, save_picture
    from sdlora.request import GenerationRequest
    from sdlora.stack import AdapterStack
    from sdlora.training import resume_run, train_adapter

__version__ = "0.1.0"

__all__ = [
    "AdapterStack",
    "GeneratedPicture",
    "GenerationRequest",
    "Generator",
    "Recipe",
    "SdloraError",
    "Thrift",
    "TrainConfig",
    "load_config",
    "read_adapter",
    "read_recipe",
    "resume_run",
    "save_picture",
    "train_adapter",
]

_HOMES = {
    "adapter_file": ("read_adapter",),
    "config": ("TrainConfig", "load_config"),
    "errors": ("SdloraError",),
    "generation": ("GeneratedPicture", "Generator", "Thrift"),
    "picture_file": ("Recipe", "read_recipe", "save_picture"),
    "request": ("GenerationRequest",),
    "stack": ("AdapterStack",),
    "training": ("resume_run", "train_adapter"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'sdlora' has no attribute {name!r}")
    value = getattr(import_module(f"sdlora.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
