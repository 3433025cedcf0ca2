"""A stack as plain data, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.adapter_weight import AdapterWeight, as_weight
from sdlora.errors import AdapterError

__all__ = ["SavedAdapter", "read_state", "write_state"]


@dataclass(frozen=True)
class SavedAdapter:
    """One loaded adapter; weight None: it is off."""

    name: str
    path: Path
    tensor_hash: str
    weight: AdapterWeight | None


def write_state(adapters: Sequence[SavedAdapter], *, is_enabled: bool) -> dict[str, Any]:
    """Only strings, booleans, lists and dictionaries. An adapter that is off has no weight."""
    return {
        "enabled": is_enabled,
        "adapters": [
            {"name": saved.name, "path": str(saved.path.absolute()), "tensor_hash": saved.tensor_hash}
            | ({} if saved.weight is None else {"weight": str(saved.weight)})
            for saved in adapters
        ],
    }


def read_state(state: Mapping[str, Any]) -> tuple[list[SavedAdapter], bool]:
    """What `write_state` wrote.

    Raises:
        AdapterError: it is not of that form, or names an adapter twice.
    """
    try:
        adapters = [
            SavedAdapter(
                str(record["name"]),
                Path(record["path"]),
                str(record["tensor_hash"]),
                as_weight(record["weight"]) if "weight" in record else None,
            )
            for record in state["adapters"]
        ]
        is_enabled = bool(state["enabled"])
    except (KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"This is not the state of a stack ({type(error).__name__}: {error}).") from error
    if len({saved.name for saved in adapters}) < len(adapters):
        raise AdapterError("The state of the stack names an adapter twice.")
    return adapters, is_enabled
