"""What can be done with adapter files without a model: look into, merge, resize, compare, find, describe, install."""

from sdlora.adapter_tools.arithmetic import Resized, difference, energy_rank, merge_adapters, resize_adapter
from sdlora.adapter_tools.card import CardPicture, is_hub_id, model_card
from sdlora.adapter_tools.checkpoints import CheckpointLayers, OpenedCheckpoint, bake_checkpoint, open_layers
from sdlora.adapter_tools.extract import extract_pairs
from sdlora.adapter_tools.hashes import FileHashes, file_hashes
from sdlora.adapter_tools.install import TOOLS, new_file, put_file, tool_folder
from sdlora.adapter_tools.library import LibraryEntry, find_by_tensor_hash, list_library, tensor_hash
from sdlora.adapter_tools.report import AdapterReport, BlockNorm, ToolVerdict, inspect_adapter
from sdlora.adapter_tools.sidecar import sidecar_fields, thumbnail_jpeg, write_sidecars

__all__ = [
    "TOOLS",
    "AdapterReport",
    "BlockNorm",
    "CardPicture",
    "CheckpointLayers",
    "FileHashes",
    "LibraryEntry",
    "OpenedCheckpoint",
    "Resized",
    "ToolVerdict",
    "bake_checkpoint",
    "difference",
    "energy_rank",
    "extract_pairs",
    "file_hashes",
    "find_by_tensor_hash",
    "inspect_adapter",
    "is_hub_id",
    "list_library",
    "merge_adapters",
    "model_card",
    "new_file",
    "open_layers",
    "put_file",
    "resize_adapter",
    "sidecar_fields",
    "tensor_hash",
    "thumbnail_jpeg",
    "tool_folder",
    "write_sidecars",
]
