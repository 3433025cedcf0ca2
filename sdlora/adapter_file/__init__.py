"""Adapter files: read those of every dialect strictly, write those that every tool loads.

Key names, alpha and rank are dealt with here and nowhere else.
"""

from sdlora.adapter_file.fold import fold
from sdlora.adapter_file.metadata import AdapterMetadata, Family, carried_metadata, family_of
from sdlora.adapter_file.reader import file_dialects, read_adapter
from sdlora.adapter_file.resolve import adaptable_layers, describe_width, resolve_layers
from sdlora.adapter_file.types import PARTS, AdapterWeights, LoraPair, Part
from sdlora.adapter_file.writer import Dialect, rewrite_metadata, write_adapter

__all__ = [
    "PARTS",
    "AdapterMetadata",
    "AdapterWeights",
    "Dialect",
    "Family",
    "LoraPair",
    "Part",
    "adaptable_layers",
    "carried_metadata",
    "describe_width",
    "family_of",
    "file_dialects",
    "fold",
    "read_adapter",
    "resolve_layers",
    "rewrite_metadata",
    "write_adapter",
]
