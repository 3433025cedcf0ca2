"""The compact syntax of a weight: what stands behind `FILE:` on the command line and in `<lora:NAME:...>`.

    0.8                                     a number
    0@0,0.8@0.4                             a curve over the steps: 0 at the start, 0.8 from 40 % on
    0.5:0.8                                 one for the text encoders, one for the U-Net
    0.8:lbw=OUTALL:start=5:stop=20          A1111's dialect, with that of its lora-block-weight extension
    0.8:images=0,0.5,1:cond=1:uncond=-0.5   for each image of a batch, for each branch of the guidance
    0.8:lbw=IN*=0.5,up_blocks.1.*attn2*=1   blocks by pattern

Named fields come in any order. `te=` and `unet=` may stand for the two numbers, `step=5-20` for start and stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

from sdlora.adapter_weight.blocks import PRESETS, BlockFactor, from_numbers
from sdlora.adapter_weight.types import AdapterWeight
from sdlora.errors import AdapterError

__all__ = ["as_weight", "parse_weight"]

_NAMES = ("te", "unet", "lbw", "curve", "start", "stop", "step", "images", "cond", "uncond")
_SAME_AS = {"blocks": "lbw"}


def parse_weight(text: str) -> AdapterWeight:
    """The weight that `text` says.

    Raises:
        AdapterError: it is not in the syntax, or means nothing.
    """
    fields = [field.strip() for field in text.split(":")]
    places = [field for field in fields if not _is_named(field)]
    named = _named([field for field in fields if _is_named(field)])
    # The oldest form of lora-block-weight names the preset without a word before it.
    if len(places) > 1 and places[-1] in PRESETS and "lbw" not in named:
        named["lbw"] = places.pop()
    if len(places) > 2:
        raise AdapterError(
            f"{text!r}: at most two numbers may stand before the named fields, as in 0.8:0.5:lbw=OUTALL."
        )
    if places and "@" in places[0]:
        named.setdefault("curve", places[0])
        places[0] = "1"
    start, stop = _steps(named)
    base, text_weight = _strengths(places, named)
    return AdapterWeight(
        base=base,
        text=text_weight,
        blocks=_blocks(named["lbw"]) if "lbw" in named else (),
        curve=_curve(named["curve"]) if "curve" in named else (),
        start=start,
        stop=stop,
        images=tuple(_numbers(named["images"].split(","))) if "images" in named else (),
        cond=_number(named.get("cond", "1")),
        uncond=_number(named.get("uncond", "1")),
    )


def as_weight(value: object) -> AdapterWeight:
    """An object as it is, a plain number, or the compact syntax.

    Raises:
        AdapterError: it is none of them, or not finite.
    """
    if isinstance(value, AdapterWeight):
        return value
    if isinstance(value, str):
        return parse_weight(value)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise AdapterError(f"A weight must be a finite number, not {value!r}.")
    return AdapterWeight(float(value))


def _is_named(field: str) -> bool:
    return "=" in field


def _named(fields: Sequence[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for field in fields:
        key, _, value = field.partition("=")
        key = _SAME_AS.get(key.strip().lower(), key.strip().lower())
        if key not in _NAMES:
            raise AdapterError(f"A weight has no field called {key!r}. Known: {', '.join(_NAMES)}.")
        if key in named:
            raise AdapterError(f"The field {key!r} stands there twice.")
        named[key] = value.strip()
    return named


def _strengths(places: Sequence[str], named: dict[str, str]) -> tuple[float, float]:
    """(base, text) by A1111's rule: what is not given for the U-Net is as for the text encoders."""
    text = _number(named.get("te", places[0] if places else "1"))
    unet = named.get("unet", places[1] if len(places) > 1 else None)
    return text if unet is None else _number(unet), text


def _steps(named: dict[str, str]) -> tuple[int, int | None]:
    """start and stop; `step=5-20` says both."""
    begin, dash, end = named.get("step", "").partition("-")
    if "step" in named and (not dash or "start" in named or "stop" in named):
        raise AdapterError("step= takes two numbers, step=5-20, and stands instead of start= and stop=.")
    start, stop = named.get("start", begin), named.get("stop", end)
    return _step(start) if start else 0, _step(stop) if stop else None


def _step(text: str) -> int:
    if not text.isdecimal():
        raise AdapterError(f"The step {text!r} is not a whole number of 0 or more.")
    return int(text)


def _blocks(text: str) -> tuple[BlockFactor, ...]:
    """A preset's name, a list of numbers, or pattern=number with commas between."""
    if text in PRESETS:
        return PRESETS[text]
    parts = [part.strip() for part in text.split(",")]
    if "=" in text:
        pairs = [part.partition("=") for part in parts]
        return tuple((pattern.strip(), _number(value)) for pattern, _, value in pairs)
    if len(parts) == 1:
        raise AdapterError(f"No preset of blocks is called {text!r}. Known: {', '.join(PRESETS)}.")
    return from_numbers(_numbers(parts))


def _curve(text: str) -> tuple[tuple[float, float], ...]:
    points = [point.partition("@") for point in text.split(",")]
    if any(not at for _, at, _ in points):
        raise AdapterError(f"{text!r} is no curve. Write weight@share with commas between: 0@0,0.8@0.4.")
    return tuple((_number(share), _number(factor)) for factor, _, share in points)


def _numbers(texts: Sequence[str]) -> list[float]:
    return [_number(text) for text in texts]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise AdapterError(f"the weight {text!r} is not a number. Write for example 0.8.") from None
