"""What can be done with adapter files without a model: look into, merge, resize, compare, rewrite, find."""

from sdlora.adapter_tools.arithmetic import Resized, difference, energy_rank, merge_adapters, resize_adapter
from sdlora.adapter_tools.extract import extract_pairs
from sdlora.adapter_tools.hashes import FileHashes, file_hashes
from sdlora.adapter_tools.library import find_by_tensor_hash, tensor_hash
from sdlora.adapter_tools.report import AdapterReport, BlockNorm, ToolVerdict, inspect_adapter

__all__ = [
    "AdapterReport",
    "BlockNorm",
    "FileHashes",
    "Resized",
    "ToolVerdict",
    "difference",
    "energy_rank",
    "extract_pairs",
    "file_hashes",
    "find_by_tensor_hash",
    "inspect_adapter",
    "merge_adapters",
    "resize_adapter",
    "tensor_hash",
]
