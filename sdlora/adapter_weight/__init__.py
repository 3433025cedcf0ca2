"""How strongly an adapter acts: where in the model, when in the drawing, in which picture. Loads no model library."""

from sdlora.adapter_weight.blocks import BLOCKS, PRESETS, block_of
from sdlora.adapter_weight.syntax import as_weight, parse_weight
from sdlora.adapter_weight.types import AdapterWeight, Weight, simplest, written

__all__ = [
    "BLOCKS",
    "PRESETS",
    "AdapterWeight",
    "Weight",
    "as_weight",
    "block_of",
    "parse_weight",
    "simplest",
    "written",
]
