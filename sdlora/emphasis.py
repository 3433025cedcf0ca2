"""Words that count more or less: `(word)`, `((word))`, `[word]`, `(word:1.2)`, as in A1111. Loads no model library."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from sdlora.errors import GenerationError

__all__ = ["WeightedText", "escape_brackets", "parse_emphasis"]

_STEP = 1.1
_TOKEN = re.compile(r"\\[\\()\[\]]|[()\[\]]|[^\\()\[\]]+|\\")
_WEIGHT = re.compile(r"^(.*):\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*$", re.DOTALL)
_EDITING = re.compile(r"^[^:]*:[^:]*:\s*[\d.]+\s*$")


@dataclass(frozen=True)
class WeightedText:
    """A part of a prompt, its escapes resolved, and how much it counts; 1.0 is as it is."""

    text: str
    weight: float = 1.0


def parse_emphasis(prompt: str) -> tuple[WeightedText, ...]:
    """The prompt in parts of one weight, in order; neighbours of the same weight are one part.

    `(a)` counts 1.1 times as much, `[a]` 1 / 1.1 times, `(a:1.3)` 1.3 times; brackets inside brackets multiply. A
    bracket without its partner is an ordinary character, as is one after a backslash.

    Raises:
        GenerationError: the prompt asks to be changed while drawing, `[from:to:when]`.
    """
    return _joined(_weighted(_tree(prompt), 1.0))


def escape_brackets(text: str) -> str:
    """`text` so that `parse_emphasis` reads it as it is."""
    return re.sub(r"([\\()\[\]])", r"\\\1", text)


@dataclass(frozen=True)
class _Group:
    opening: str
    parts: list[str | _Group]


_PARTNERS = {")": "(", "]": "["}


def _tree(prompt: str) -> list[str | _Group]:
    """Texts (with their escapes) and groups; the brackets of a group are left out."""
    open_groups = [_Group("", [])]
    for token in _TOKEN.findall(prompt):
        if token in ("(", "["):
            open_groups.append(_Group(token, []))
        elif token in _PARTNERS and open_groups[-1].opening == _PARTNERS[token]:
            group = open_groups.pop()
            open_groups[-1].parts.append(group)
        else:
            open_groups[-1].parts.append(f"\\{token}" if token in _PARTNERS else token)
    while len(open_groups) > 1:
        group = open_groups.pop()
        open_groups[-1].parts.extend([f"\\{group.opening}", *group.parts])
    return open_groups[0].parts


def _weighted(parts: list[str | _Group], weight: float) -> Iterator[WeightedText]:
    for part in parts:
        if isinstance(part, str):
            yield WeightedText(re.sub(r"\\([\\()\[\]])", r"\1", part), weight)
        elif part.opening == "[":
            _refuse_editing(part)
            yield from _weighted(part.parts, weight / _STEP)
        else:
            inner, factor = _explicit(part.parts)
            yield from _weighted(inner, weight * factor)


def _explicit(parts: list[str | _Group]) -> tuple[list[str | _Group], float]:
    """The parts of `(...)` without the `:1.2` at their end, and that number or 1.1."""
    match = _WEIGHT.match(parts[-1]) if parts and isinstance(parts[-1], str) else None
    if match is None:
        return parts, _STEP
    factor = float(match[2])
    assert math.isfinite(factor)
    return [*parts[:-1], match[1]], factor


def _refuse_editing(group: _Group) -> None:
    text = "".join(part if isinstance(part, str) else "()" for part in group.parts)
    if _EDITING.match(text):
        raise GenerationError(
            f"[{text}] would change the prompt while drawing, which is not supported. "
            f"Write \\[{text}\\] if the brackets are meant as such."
        )


def _joined(parts: Iterator[WeightedText]) -> tuple[WeightedText, ...]:
    joined: list[WeightedText] = []
    for part in parts:
        if joined and joined[-1].weight == part.weight:
            part = WeightedText(joined.pop().text + part.text, part.weight)
        if part.text:
            joined.append(part)
    return tuple(joined)
