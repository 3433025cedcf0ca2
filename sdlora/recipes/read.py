"""Which kind of recipe a file is, and its reader."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from sdlora.errors import ConfigError, Problem
from sdlora.recipes.kohya import from_kohya, from_metadata
from sdlora.recipes.onetrainer import from_onetrainer
from sdlora.recipes.translate import Foreign

__all__ = ["read_recipe_file"]

_LARGEST_HEADER = 100 * 2**20


def read_recipe_file(path: Path) -> Foreign:
    """A kohya TOML, a OneTrainer JSON, or the header of a LoRA, told apart by the file's ending.

    Raises:
        ConfigError: it cannot be read, or holds no recipe.
    """
    readers = {".toml": _toml, ".json": _json, ".safetensors": _header}
    if path.suffix.lower() not in readers:
        raise _refused(path, "is no recipe.", "Give a kohya .toml, a OneTrainer .json or a LoRA's .safetensors.")
    try:
        return readers[path.suffix.lower()](path)
    except OSError as error:
        raise _refused(path, f"cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise _refused(path, f"is not what its name says: {error}.") from error


def _toml(path: Path) -> Foreign:
    values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    if not any(isinstance(value, dict | list) or "_" in name for name, value in values.items()):
        raise _refused(path, "holds no setting of kohya's.")
    return from_kohya(values)


def _json(path: Path) -> Foreign:
    values = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(values, dict) or not {"training_method", "lora_rank", "optimizer"} & values.keys():
        raise _refused(path, "is not a configuration of OneTrainer.")
    method = values.get("training_method", "LORA")
    if method != "LORA":
        raise _refused(path, f"is a recipe for {method}, not for a LoRA.")
    return from_onetrainer(values)


def _header(path: Path) -> Foreign:
    metadata = _metadata(path)
    if "ss_network_dim" not in metadata or not {"ss_learning_rate", "ss_unet_lr"} & metadata.keys():
        raise _refused(path, "says nothing of its training in its header.", "Ask its maker for the settings.")
    return from_metadata(metadata)


def _metadata(path: Path) -> dict[str, str]:
    """The texts in a safetensors header: a length of 8 bytes, then JSON."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= _LARGEST_HEADER:
            raise ValueError("it has no header")
        header: Any = json.loads(file.read(size))
    return dict(header.get("__metadata__") or {})


def _refused(path: Path, what: str, remedy: str = "") -> ConfigError:
    return ConfigError("the recipe", [Problem(str(path), what, remedy)])
