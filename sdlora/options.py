"""From the command line's own options to settings of a training run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["as_overrides"]


def as_overrides(config: Path | None, given: Mapping[str, object], settings: Sequence[str]) -> list[str]:
    """Options (setting -> value, None if not given) and `--set` as overrides of a file, the last one wins; without a
    file the embedded base gets what suits it."""
    from sdlora import embedded

    from_options = [f"{key}={_toml_value(value)}" for key, value in given.items() if value is not None]
    suited = embedded.TRAINING if given.get("model.base") == "tiny" and config is None else ()
    return [*suited, *from_options, *settings]


def _toml_value(value: object) -> str:
    """A command-line value as the right-hand side of `--set`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False)
