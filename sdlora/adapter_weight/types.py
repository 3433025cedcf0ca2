"""AdapterWeight: a number where that is enough, and everything else a weight may depend on."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

from sdlora.adapter_weight.blocks import PRESETS, BlockFactor, factor_of
from sdlora.errors import AdapterError

__all__ = ["AdapterWeight", "Weight", "simplest", "written"]

_PATTERN = re.compile(r"[A-Za-z0-9_.*?]+")


@dataclass(frozen=True)
class AdapterWeight:
    """The strength of one adapter: a product of what holds everywhere, here, now, in this picture and branch.

    `str(weight)` is the compact syntax, which `parse_weight` reads back to an equal object. All numbers are finite and
    may be negative. Raises AdapterError for a value that means nothing.
    """

    base: float = 1.0
    """1 is as trained."""
    text: float | None = None
    """Instead of `base` in the text encoders. None: the same."""
    blocks: tuple[BlockFactor, ...] = ()
    """Patterns of block names or module paths with a factor each; the last that matches counts, unmatched is 0."""
    curve: tuple[tuple[float, float], ...] = ()
    """Points (share of the steps in 0..1, factor), straight lines between them, level before and after. U-Net only."""
    start: int = 0
    """The first step in which it acts, counted from 0. U-Net only, as the text is read before the first step."""
    stop: int | None = None
    """The first step in which it acts no more."""
    images: tuple[float, ...] = ()
    """One factor for each image of a batch."""
    cond: float = 1.0
    """Factor in the branch of classifier-free guidance that sees the prompt. U-Net only."""
    uncond: float = 1.0
    """Factor in the branch that sees the negative prompt. U-Net only."""

    def __post_init__(self) -> None:
        if self.text == self.base:
            object.__setattr__(self, "text", None)
        numbers = [self.base, *([] if self.text is None else [self.text]), *self.images, self.cond, self.uncond]
        numbers += [factor for _, factor in self.blocks] + [value for point in self.curve for value in point]
        if not all(math.isfinite(number) for number in numbers):
            raise AdapterError("A weight must be made of finite numbers.")
        foreign = next((pattern for pattern, _ in self.blocks if not _PATTERN.fullmatch(pattern)), None)
        if foreign is not None:
            raise AdapterError(f"{foreign!r} names no block. Write for example OUT05, IN* or up_blocks.1.*.")
        shares = [share for share, _ in self.curve]
        if any(not 0 <= share <= 1 for share in shares):
            raise AdapterError("The points of a curve lie at shares of the steps, from 0 to 1: 0@0,0.8@0.4.")
        if any(left >= right for left, right in pairwise(shares)):
            raise AdapterError("The points of a curve must stand in order, each after the one before: 0@0,0.8@0.4.")
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise AdapterError(f"start={self.start}, stop={self.stop}: the steps must be 0 or more, stop after start.")

    @property
    def varies(self) -> bool:
        """Whether it is not the same in all steps, images and branches; only then it cannot be merged."""
        unchanging = ((), 0, None, (), 1.0, 1.0)
        return (self.curve, self.start, self.stop, self.images, self.cond, self.uncond) != unchanging

    def of_layer(self, part: str, path: str) -> float:
        """What holds of it in a layer at all times."""
        strength = self.base if part == "unet" or self.text is None else self.text
        return strength * factor_of(self.blocks, part, path)

    def of_step(self, step: int, steps: int) -> float:
        """The factor in step `step` of `steps`, counted from 0."""
        if step < self.start or (self.stop is not None and step >= self.stop):
            return 0.0
        return self.of_share(step / (steps - 1) if steps > 1 else 0.0)

    def of_share(self, share: float) -> float:
        """The curve at a share of the steps, 0..1."""
        if not self.curve:
            return 1.0
        for (left, low), (right, high) in pairwise(self.curve):
            if share <= right:
                return low + (high - low) * max(0.0, share - left) / (right - left)
        return self.curve[-1][1]

    def of_row(self, image: int, *, is_cond: bool) -> float:
        """The factor for an image of the batch in one branch of the guidance."""
        return (self.images[image] if self.images else 1.0) * (self.cond if is_cond else self.uncond)

    def of_image(self, image: int) -> AdapterWeight:
        """The weight with which one image of the batch would be drawn alone."""
        if not self.images:
            return self
        factor = self.images[image]
        text = None if self.text is None else self.text * factor
        return replace(self, base=self.base * factor, text=text, images=())

    def __str__(self) -> str:
        first = number(self.base) if self.text is None else f"{number(self.text)}:{number(self.base)}"
        curve = ",".join(f"{number(factor)}@{number(share)}" for share, factor in self.curve)
        if curve and first == "1":
            first, curve = curve, ""
        options = {
            "lbw": _blocks_text(self.blocks) or None,
            "curve": curve or None,
            "start": str(self.start) if self.start else None,
            "stop": None if self.stop is None else str(self.stop),
            "images": ",".join(map(number, self.images)) or None,
            "cond": None if self.cond == 1 else number(self.cond),
            "uncond": None if self.uncond == 1 else number(self.uncond),
        }
        return ":".join([first, *(f"{key}={value}" for key, value in options.items() if value is not None)])


Weight: TypeAlias = float | AdapterWeight
"""A plain number stands for an AdapterWeight of nothing but that base."""


def simplest(weight: AdapterWeight) -> Weight:
    """The plain number if it is nothing more."""
    return weight.base if weight == AdapterWeight(weight.base) else weight


def written(weight: AdapterWeight) -> float | str:
    """The plain number if it is nothing more, else the compact syntax: what files hold."""
    plain = simplest(weight)
    return str(plain) if isinstance(plain, AdapterWeight) else plain


def number(value: float) -> str:
    """As short as it can be without losing a bit: 1, 0.8, 1e-07."""
    return repr(float(value)).removesuffix(".0")


def _blocks_text(blocks: tuple[BlockFactor, ...]) -> str:
    preset = next((name for name, patterns in PRESETS.items() if patterns == blocks), None)
    return preset or ",".join(f"{pattern}={number(factor)}" for pattern, factor in blocks)
