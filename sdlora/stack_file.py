"""stack.toml: a stack to keep, send and draw with again. Adapters are known by the hash of their tensors."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.adapter_weight import AdapterWeight, as_weight, written
from sdlora.errors import AdapterError
from sdlora.run_dir import write_text_atomic

__all__ = ["StackEntry", "StackFile", "read_stack_file", "write_stack_file"]

_FORMAT = 1


@dataclass(frozen=True)
class StackEntry:
    """One adapter: its name in the stack, its file's name without a folder, the SHA-256 of its tensors, its weight."""

    name: str
    file: str
    tensor_hash: str
    weight: AdapterWeight


@dataclass(frozen=True)
class StackFile:
    """What a stack file says."""

    adapters: tuple[StackEntry, ...]
    base: str | None = None
    """Hub id or name of the base model; None where it is not known."""
    method: str = "sum"
    """How the adapters are put together, as `AdapterStack.set_method` takes it."""


def write_stack_file(path: Path, stack: StackFile) -> Path:
    """Write a stack file; a reader finds the old one or the new one.

    Raises:
        AdapterError: the folder is missing, or the disk does not take the file.
    """
    lines = [
        '# A stack of adapters for sdlora. Draw with it: sdlora generate "..." --stack FILE',
        f"format = {_FORMAT}",
        *([] if stack.base is None else [f"base = {_quoted(stack.base)}"]),
        f"method = {_quoted(stack.method)}",
    ]
    for entry in stack.adapters:
        weight = written(entry.weight)
        lines += [
            "",
            "[[adapter]]",
            f"name = {_quoted(entry.name)}",
            f"file = {_quoted(entry.file)}",
            f"tensor_hash = {_quoted(entry.tensor_hash)}",
            f"weight = {_quoted(weight) if isinstance(weight, str) else weight}",
        ]
    try:
        write_text_atomic(path, "\n".join([*lines, ""]))
    except OSError as error:
        raise AdapterError(f"{path}: cannot be written ({error.strerror or error}).") from error
    return path


def read_stack_file(path: Path) -> StackFile:
    """Read a stack file.

    Raises:
        AdapterError: no such file, no TOML, or not of this form.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} is no stack file: {error}.") from error
    if data.get("format") != _FORMAT:
        raise AdapterError(f"{path} is no stack file of format {_FORMAT}. `sdlora stack save` writes one.")
    try:
        adapters = tuple(_entry(record) for record in data["adapter"])
        base, method = data.get("base"), data.get("method", "sum")
    except (KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{path}: an adapter needs name, file, tensor_hash and weight ({error}).") from error
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error
    if not adapters or not isinstance(base, str | None) or not isinstance(method, str):
        raise AdapterError(f"{path}: it needs at least one [[adapter]]; base and method are texts.")
    return StackFile(adapters, base, method)


def _entry(record: dict[str, Any]) -> StackEntry:
    name, file, digest = (record[key] for key in ("name", "file", "tensor_hash"))
    if not all(isinstance(text, str) and text for text in (name, file, digest)):
        raise AdapterError("name, file and tensor_hash of an adapter are texts.")
    if Path(file).name != file:
        raise AdapterError(f"file = {file!r} must be a file's name without its folder.")
    return StackEntry(name, file, digest, as_weight(record["weight"]))


def _quoted(text: str) -> str:
    """A TOML basic string; its escapes are JSON's, and DEL has one too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
