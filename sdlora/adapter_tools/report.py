"""What an adapter file is, how strong it is where, and what each tool will make of it."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdlora.adapter_file import PARTS, AdapterWeights, LoraPair, Outline, Part, family_of, outline_adapter, read_adapter
from sdlora.adapter_tools.arithmetic import core_svd, energy_rank
from sdlora.adapter_tools.hashes import FileHashes, file_hashes

__all__ = ["AdapterReport", "BlockNorm", "ToolVerdict", "inspect_adapter"]

_BLOCK = re.compile(r"(down_blocks|up_blocks)\.\d+|mid_block|text_model\.encoder\.layers\.\d+")
_INVOKE_WIDTHS = (768, 1024, 2048)
_ATTENTION = re.compile(r"attn[12]\.")
_DIFFUSERS_NAME = re.compile(r"(unet|text_encoder|text_encoder_2)\.")
_KIND = re.compile(r"(attn1|attn2|ff|proj_in|proj_out|self_attn|mlp|resnets|conv|time_emb)")


@dataclass(frozen=True)
class BlockNorm:
    """How strongly a block is changed."""

    block: str
    layers: int
    norm: float
    """Frobenius norm of all its changes together, alpha / rank included."""
    rank_used: float
    """Mean over its layers: share of the rank that holds 99 % of the change's energy."""


@dataclass(frozen=True)
class ToolVerdict:
    """What a tool does with the file; why, if not "yes"."""

    tool: str
    loads: str
    """ "yes", "wrong strength", "wrong picture", "nothing" or "refuses"."""
    why: str = ""


@dataclass(frozen=True)
class AdapterReport:
    """Everything `sdlora lora inspect` tells of one file."""

    path: Path
    family: str | None
    """"sd1", "sd2", "sdxl", or None where nothing tells."""
    dialects: tuple[str, ...]
    methods: tuple[str, ...]
    """ "LoRA", "LoHa", "LoKr", "full difference", "DoRA"; ranks and norms are those of the pairs made of them, without
    the lengths of DoRA."""
    dtype: str
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    parts: Mapping[str, int]
    """Layers by part."""
    targets: Mapping[str, int]
    """Layers by kind: attn1, attn2, ff, ..."""
    size_bytes: int
    hashes: FileHashes
    blocks: tuple[BlockNorm, ...]
    trigger: str | None
    metadata: Mapping[str, str]
    tools: tuple[ToolVerdict, ...]


def inspect_adapter(path: Path) -> AdapterReport:
    """Read a file strictly and describe it.

    Raises:
        AdapterFileError: it is no sound LoRA file; the message says why.
    """
    weights, outline = read_adapter(path), outline_adapter(path)
    pairs = [pair for _, _, pair in weights.pairs()]
    return AdapterReport(
        path=path,
        family=family_of(weights),
        dialects=outline.dialects,
        methods=outline.methods,
        dtype=", ".join(sorted({str(pair.down.dtype).removeprefix("torch.") for pair in pairs})),
        ranks=tuple(sorted({pair.rank for pair in pairs})),
        alphas=tuple(sorted({pair.alpha for pair in pairs})),
        parts=dict(Counter(str(part) for part, _, _ in weights.pairs())),
        targets=dict(sorted(Counter(_kind(path) for _, path, _ in weights.pairs()).items())),
        size_bytes=path.stat().st_size,
        hashes=file_hashes(path),
        blocks=_blocks(weights),
        trigger=weights.metadata.get("modelspec.trigger_phrase"),
        metadata=weights.metadata,
        tools=_verdicts(weights, outline),
    )


def _kind(path: str) -> str:
    match = _KIND.search(path)
    return match[1] if match else path.rsplit(".", 1)[-1]


def _blocks(weights: AdapterWeights) -> tuple[BlockNorm, ...]:
    spectra = defaultdict(list)
    for part, path, pair in weights.pairs():
        match = _BLOCK.match(path)
        spectra[f"{part}.{match[0] if match else path.split('.', 1)[0]}"].append(core_svd(pair)[1])
    return tuple(
        BlockNorm(
            block=block,
            layers=len(values),
            norm=float(sum(float(v.square().sum()) for v in values) ** 0.5),
            rank_used=sum(energy_rank(v, 0.99) / len(v) for v in values) / len(values),
        )
        for block, values in sorted(spectra.items())
    )


def _verdicts(weights: AdapterWeights, outline: Outline) -> tuple[ToolVerdict, ...]:
    """By the loading experiments that docs/INTEROP.md tells."""
    pairs = [pair for _, _, pair in weights.pairs()]
    is_kohya = outline.dialects == ("kohya",)
    is_plain = set(outline.methods) == {"LoRA"}
    by_row = any(pair.dora_scale is not None and pair.dora_scale.shape[1] == 1 for pair in pairs)
    reasons = {
        "diffusers": _diffusers(weights, outline),
        "ComfyUI": ("yes", "") if is_kohya else ("nothing", "it knows kohya's key names only; the rest is skipped"),
        "A1111 / Forge": ("yes", "") if is_kohya else ("nothing", "the keys are skipped without a word"),
        "kohya sd-scripts": _kohya(is_kohya, is_plain),
        "InvokeAI": _invoke(weights, is_kohya, by_row),
    }
    if is_kohya and by_row:
        reasons["ComfyUI"] = ("wrong picture", "it divides the lengths of DoRA's rows by the base's, not by the sum's")
        reasons["A1111 / Forge"] = (
            "wrong picture",
            "the one takes the lengths of rows for columns, the other as ComfyUI",
        )
    return tuple(ToolVerdict(tool, loads, why) for tool, (loads, why) in reasons.items())


def _diffusers(weights: AdapterWeights, outline: Outline) -> tuple[str, str]:
    """What `load_lora_weights` makes of it; a test asks diffusers itself about a file of each kind."""
    others = sorted(set(outline.methods) - {"LoRA", "DoRA"})
    if others:
        return "refuses", f"it has no {' or '.join(others)}"
    if outline.dialects == ("kohya",):
        return _diffusers_on_kohya(weights, outline)
    if not all(_DIFFUSERS_NAME.match(name) for name in outline.names):
        return "nothing", "it looks for names that begin with unet. or text_encoder."
    if "diffusers" in outline.dialects and any(_is_untyped(outline, part) for part in PARTS[1:]):
        return "refuses", "it does not recognise text encoder layers without lora_linear_layer in their names"
    if not _names_targets(weights):
        return "refuses", "its lora_adapter_metadata names no target_modules"
    if "lora_adapter_metadata" not in weights.metadata and any(pair.scale != 1 for _, _, pair in weights.pairs()):
        return "wrong strength", "it looks for alpha in the header alone"
    return "yes", ""


def _names_targets(weights: AdapterWeights) -> bool:
    """Whether PEFT's configuration, if there is one, says of each part which modules it is for."""
    # Reading has seen to it that this is a JSON object.
    config = json.loads(weights.metadata.get("lora_adapter_metadata", "null"))
    return config is None or all(config.get(f"{part}.target_modules") for part in PARTS if weights.part(part))


def _diffusers_on_kohya(weights: AdapterWeights, outline: Outline) -> tuple[str, str]:
    if "lora_adapter_metadata" in weights.metadata:
        return "refuses", "alpha tensors and lora_adapter_metadata exclude each other there"
    for part in PARTS[1:]:
        # It tells the kind of a text encoder's layers by these names.
        if weights.part(part) and not any(path.endswith(("out_proj", "fc1", "fc2")) for path in weights.part(part)):
            return "refuses", "it does not recognise a text encoder of which only q, k or v are changed"
    if "DoRA" in outline.methods:
        return "wrong picture", "it leaves the lengths of DoRA out"
    if any(".lora_mid." in name for name in outline.names):
        return "refuses", "it has no LoCon with a middle convolution"
    if any(_loses_alpha(part, weights.part(part)) for part in PARTS):
        return "wrong strength", "alphas that differ from layer to layer are lost on attention and text encoders"
    return "yes", ""


def _loses_alpha(part: Part, pairs: Mapping[str, LoraPair]) -> bool:
    """Whether an attention layer, or any of a text encoder, has another alpha than most: diffusers gives it theirs."""
    counts = Counter(pair.alpha for pair in pairs.values())
    usual = max(counts, key=counts.__getitem__, default=None)
    return any(pair.alpha != usual for path, pair in pairs.items() if part != "unet" or _ATTENTION.search(path))


def _is_untyped(outline: Outline, part: Part) -> bool:
    names = [name for name in outline.names if name.startswith(f"{part}.")]
    return bool(names) and not any("lora_linear_layer" in name or "to_out_lora" in name for name in names)


def _kohya(is_kohya: bool, is_plain: bool) -> tuple[str, str]:
    if not is_kohya:
        return "nothing", "it looks for lora_down names only"
    return ("yes", "") if is_plain else ("wrong picture", "networks.lora knows plain LoRA only; LyCORIS does it")


def _invoke(weights: AdapterWeights, is_kohya: bool, by_row: bool) -> tuple[str, str]:
    if not is_kohya:
        return "refuses", "it recognises single files by kohya's key names"
    # It knows SDXL without them, by blocks of more than two transformers.
    is_deep = any(re.search(r"transformer_blocks\.[2-9]\.", path) for path in weights.unet)
    if weights.cross_attention_dim is None and not is_deep:
        return "refuses", "it tells the base model by attn2's keys or values, which this file does not change"
    if weights.cross_attention_dim not in (*_INVOKE_WIDTHS, None) and not is_deep:
        return "refuses", f"it knows no base model of cross-attention width {weights.cross_attention_dim}"
    return ("wrong picture", "it takes the lengths of DoRA's rows for columns") if by_row else ("yes", "")
