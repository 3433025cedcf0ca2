"""The names that sites know a file by, against their formulas."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from sdlora.adapter_file import LoraPair, read_adapter, rewrite_metadata
from sdlora.adapter_tools import file_hashes
from tests.adapters.builders import write

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"


def test_the_hashes_of_a_file_above_one_mib_are_those_of_the_formulas(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {LAYER: LoraPair(torch.randn(8, 40_000), torch.randn(8, 8), 8.0)})
    content, hashes = path.read_bytes(), file_hashes(path)
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert hashes.sha256 == hashlib.sha256(content).hexdigest()
    # A1111's old hash, which Civitai calls AutoV1: 64 KiB from 1 MiB on.
    assert hashes.auto_v1 == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8] != "e3b0c442"
    assert hashes.auto_v2 == hashlib.sha256(content).hexdigest()[:10]
    # A1111 shows these 12 digits of a LoRA, and Civitai calls them AutoV3.
    assert hashes.auto_v3 == hashlib.sha256(tensors).hexdigest()[:12]
    assert read_adapter(path).metadata["sshs_model_hash"] == hashlib.sha256(tensors).hexdigest()


def test_an_edit_of_the_header_changes_auto_v2_and_not_auto_v3(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {LAYER: LoraPair(torch.randn(2, 8), torch.randn(8, 2), 2.0)})
    other = rewrite_metadata(path, tmp_path / "b.safetensors", {"modelspec.author": "Ann"})
    before, after = file_hashes(path), file_hashes(other)
    assert before.auto_v3 == after.auto_v3
    assert before.auto_v2 != after.auto_v2
