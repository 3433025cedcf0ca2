"""What an adapter file holds, independent of the dialect it was written in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

__all__ = ["PARTS", "AdapterWeights", "LoraPair", "Part"]

Part = Literal["unet", "text_encoder", "text_encoder_2"]
PARTS: tuple[Part, ...] = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True, eq=False)
class LoraPair:
    """The low-rank change of one layer: delta = alpha / rank * up @ down (LoRA, arXiv 2106.09685, section 4.1)."""

    down: Tensor
    """[rank, in] of a Linear, [rank, in, k, k] of a convolution."""
    up: Tensor
    """[out, rank] of a Linear, [out, rank, 1, 1] of a convolution."""
    alpha: float
    dora_scale: Tensor | None = None
    """DoRA's lengths, [out, 1] by row or [1, in] by column; the change then depends on the base (`dora.py`)."""

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        """alpha / rank: fixed by the file; the user's strength is the adapter weight."""
        return self.alpha / self.rank


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """All pairs of one adapter, by diffusers module path, such as "mid_block.attentions.0.proj_in".

    Text encoder paths are those of CLIPTextModel as files name them ("text_model.encoder.layers.0.self_attn.q_proj").
    """

    unet: Mapping[str, LoraPair]
    text_encoder: Mapping[str, LoraPair] = field(default_factory=dict)
    text_encoder_2: Mapping[str, LoraPair] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    path: Path = Path()
    tensor_sha256: str = ""
    """Hex digest of the tensor bytes; kohya's `sshs_model_hash` and Civitai's AutoV3 when cut to 12 digits."""

    foreign: tuple[str, ...] = ()
    """Tensors of the file that are no part of a LoRA and were left out; empty unless reading was told to do so."""

    def part(self, part: Part) -> Mapping[str, LoraPair]:
        return {"unet": self.unet, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}[part]

    def pairs(self) -> Iterator[tuple[Part, str, LoraPair]]:
        """Every (part, module path, pair)."""
        for part in PARTS:
            for path, pair in self.part(part).items():
                yield part, path, pair

    @property
    def is_dora(self) -> bool:
        """Whether a layer has lengths of its own, so that its change cannot be told without the base."""
        return any(pair.dora_scale is not None for _, _, pair in self.pairs())

    @property
    def cross_attention_dim(self) -> int | None:
        """The width of the text embeddings it was made for; None if it does not touch attn2's keys or values."""
        for path, pair in self.unet.items():
            if path.endswith(("attn2.to_k", "attn2.to_v")):
                return int(pair.down.shape[1])
        return None
