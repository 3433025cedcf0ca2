"""A stack as plain data, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.adapter_weight import AdapterWeight, as_weight
from sdlora.errors import AdapterError

__all__ = ["SavedAdapter", "SavedStack", "read_state", "write_state"]


@dataclass(frozen=True)
class SavedAdapter:
    """One loaded adapter; weight None: it is off."""

    name: str
    path: Path
    tensor_hash: str
    weight: AdapterWeight | None


@dataclass(frozen=True)
class SavedStack:
    """All of a stack, `weights` in the order in which they were set."""

    adapters: tuple[SavedAdapter, ...]
    weights: Mapping[str, AdapterWeight]
    is_enabled: bool
    method: str


def write_state(
    adapters: Sequence[SavedAdapter], *, order: Sequence[str], is_enabled: bool, method: str
) -> dict[str, Any]:
    """Only strings, booleans, lists and dictionaries. An adapter that is off has no weight."""
    return {
        "enabled": is_enabled,
        "method": method,
        "order": list(order),
        "adapters": [
            {"name": saved.name, "path": str(saved.path.absolute()), "tensor_hash": saved.tensor_hash}
            | ({} if saved.weight is None else {"weight": str(saved.weight)})
            for saved in adapters
        ],
    }


def read_state(state: Mapping[str, Any]) -> SavedStack:
    """What `write_state` wrote.

    Raises:
        AdapterError: it is not of that form, or names an adapter twice.
    """
    try:
        adapters = tuple(
            SavedAdapter(
                str(record["name"]),
                Path(record["path"]),
                str(record["tensor_hash"]),
                as_weight(record["weight"]) if "weight" in record else None,
            )
            for record in state["adapters"]
        )
        weights = {saved.name: saved.weight for saved in adapters if saved.weight is not None}
        ordered = {str(name): weights[name] for name in state["order"]}
        saved = SavedStack(adapters, ordered, bool(state["enabled"]), str(state["method"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"This is not the state of a stack ({type(error).__name__}: {error}).") from error
    if len({adapter.name for adapter in adapters}) < len(adapters) or weights.keys() != ordered.keys():
        raise AdapterError("The state of the stack names an adapter twice, or not in its order.")
    return saved
