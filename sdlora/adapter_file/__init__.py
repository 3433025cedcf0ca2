"""Adapter files: read those of every dialect strictly, write those that every tool loads.

Key names, alpha and rank are dealt with here and nowhere else.
"""

from sdlora.adapter_file.dora import without_dora
from sdlora.adapter_file.fold import fold, is_finite
from sdlora.adapter_file.keys import unet_path_of_original
from sdlora.adapter_file.metadata import TRAINING_KEYS, AdapterMetadata, Family, carried_metadata, family_of
from sdlora.adapter_file.reader import Outline, outline_adapter, read_adapter
from sdlora.adapter_file.resolve import adaptable_layers, describe_width, resolve_layers, walk_modules
from sdlora.adapter_file.types import PARTS, AdapterWeights, LoraPair, Part
from sdlora.adapter_file.writer import Dialect, replace_metadata, rewrite_metadata, write_adapter

__all__ = [
    "PARTS",
    "TRAINING_KEYS",
    "AdapterMetadata",
    "AdapterWeights",
    "Dialect",
    "Family",
    "LoraPair",
    "Outline",
    "Part",
    "adaptable_layers",
    "carried_metadata",
    "describe_width",
    "family_of",
    "fold",
    "is_finite",
    "outline_adapter",
    "read_adapter",
    "replace_metadata",
    "resolve_layers",
    "rewrite_metadata",
    "unet_path_of_original",
    "walk_modules",
    "without_dora",
    "write_adapter",
]
