"""The blocks of a Stable Diffusion model by the names that lora-block-weight for A1111 made usual.

BASE is the text encoders and whatever belongs to no block; IN00 to IN11, M00 and OUT00 to OUT11 are the input, middle
and output blocks of Stability's own code. SD 1.x and 2.x have all of them, SDXL has IN00 to IN08 and OUT00 to OUT08.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from sdlora.errors import AdapterError

__all__ = ["BLOCKS", "PRESETS", "BlockFactor", "block_of", "factor_of", "from_numbers"]

BlockFactor = tuple[str, float]
"""A pattern and the factor of what it matches: ("OUT*", 1.0), ("up_blocks.1.*attn2*", 0.5)."""


def _blocks(prefix: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{prefix}{number:02d}" for number in numbers)


def _between(first: str, last: str) -> tuple[str, ...]:
    return _ALL[_ALL.index(first) : _ALL.index(last) + 1]


_ALL = ("BASE", *_blocks("IN", *range(12)), "M00", *_blocks("OUT", *range(12)))

BLOCKS: Mapping[int, tuple[str, ...]] = {
    12: ("BASE", *_blocks("IN", 4, 5, 7, 8), "M00", *_blocks("OUT", *range(6))),
    17: ("BASE", *_blocks("IN", 1, 2, 4, 5, 7, 8), "M00", *_blocks("OUT", *range(3, 12))),
    20: ("BASE", *_blocks("IN", *range(9)), "M00", *_blocks("OUT", *range(9))),
    26: _ALL,
}
"""Which block each number of a list stands for, by the list's length: the blocks with attention of SDXL (12) and of
SD 1.x (17), then all blocks of SDXL (20) and of SD 1.x (26)."""

PRESETS: Mapping[str, tuple[BlockFactor, ...]] = {
    "NONE": (("*", 0.0),),
    "ALL": (("*", 1.0),),
    "INS": tuple((block, 1.0) for block in ("BASE", *_between("IN00", "IN04"))),
    "IND": tuple((block, 1.0) for block in ("BASE", *_between("IN05", "IN11"))),
    "INALL": (("BASE", 1.0), ("IN*", 1.0)),
    "MIDD": tuple((block, 1.0) for block in ("BASE", *_between("IN05", "OUT06"))),
    "OUTD": tuple((block, 1.0) for block in ("BASE", *_between("OUT00", "OUT06"))),
    "OUTS": tuple((block, 1.0) for block in ("BASE", *_between("OUT07", "OUT11"))),
    "OUTALL": (("BASE", 1.0), ("OUT*", 1.0)),
    "ALL0.5": (("*", 0.5),),
}
"""The presets that come with lora-block-weight."""

_PATH = re.compile(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.")
_LAYERS_PER_BLOCK = 2


def block_of(part: str, path: str) -> str:
    """The block of a module: "unet" and a diffusers path, or a text encoder and any path."""
    if part != "unet":
        return "BASE"
    if path.startswith("mid_block."):
        return "M00"
    if path.startswith("conv_in"):
        return "IN00"
    match = _PATH.match(path)
    if match is None:
        return "BASE"
    # A level has its resnets, and after them on the way down the downsampler; the upsampler belongs to the last resnet.
    layer = min(int(match[4]), _LAYERS_PER_BLOCK)
    if match[3] in ("downsamplers", "upsamplers"):
        layer = _LAYERS_PER_BLOCK
    index = int(match[2]) * (_LAYERS_PER_BLOCK + 1) + layer
    return f"IN{index + 1:02d}" if match[1] == "down" else f"OUT{index:02d}"


def factor_of(blocks: Sequence[BlockFactor], part: str, path: str) -> float:
    """The factor of the last pattern that matches the block's name or the module's path; 0 if none does.

    Without any pattern everything has the factor 1. Paths of text encoders begin with the encoder's name.
    """
    if not blocks:
        return 1.0
    names = (block_of(part, path), path if part == "unet" else f"{part}.{path}")
    matching = [factor for pattern, factor in blocks if any(fnmatchcase(name, pattern) for name in names)]
    return matching[-1] if matching else 0.0


def from_numbers(numbers: Sequence[float]) -> tuple[BlockFactor, ...]:
    """A list of lora-block-weight as patterns.

    Raises:
        AdapterError: no model has so many blocks.
    """
    if len(numbers) not in BLOCKS:
        raise AdapterError(f"A list of block weights has 12, 17, 20 or 26 numbers, not {len(numbers)}.")
    return tuple(zip(BLOCKS[len(numbers)], map(float, numbers), strict=True))
