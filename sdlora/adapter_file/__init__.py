"""Adapter files: read those of every dialect strictly, write those that every tool loads.

Key names, alpha and rank are dealt with here and nowhere else.
"""

from sdlora.adapter_file.fold import fold
from sdlora.adapter_file.metadata import AdapterMetadata, Family
from sdlora.adapter_file.reader import read_adapter
from sdlora.adapter_file.resolve import adaptable_layers, describe_width, resolve_layers
from sdlora.adapter_file.types import PARTS, AdapterWeights, LoraPair, Part
from sdlora.adapter_file.writer import write_adapter

__all__ = [
    "PARTS",
    "AdapterMetadata",
    "AdapterWeights",
    "Family",
    "LoraPair",
    "Part",
    "adaptable_layers",
    "describe_width",
    "fold",
    "read_adapter",
    "resolve_layers",
    "write_adapter",
]
