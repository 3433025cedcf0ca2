"""InvokeAI's own reader on our files, without InvokeAI's dependencies.

    python tools/interop/invokeai_reader.py WHEEL_FOLDER      (the unpacked wheel, `pip download --no-deps invokeai`)

Prints, as JSON, which base its detection names for a file of each family, which trigger phrases it finds in our
sidecar, and for each part of each family the largest difference between the weights that its patcher writes into a
small model and those merged by hand, as a share of the largest change. Its code is imported from the folder and
nothing of it is kept; packages that it imports and this does not need are empty modules here.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import tempfile
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import diffusers  # noqa: F401  (looks for packages that are stood in for below)
import torch
from safetensors.torch import load_file

from sdlora.adapter_file import AdapterMetadata, LoraPair
from sdlora.adapter_tools import sidecar_fields, write_sidecars
from tests.adapters.builders import METADATA, TEXT, hand_merged, random_pairs, simple_pairs, write
from tests.tiny import tiny_sd1, tiny_sd2, tiny_sdxl

FAMILIES = {"sd1": (tiny_sd1, 768), "sd2": (tiny_sd2, 1024), "sdxl": (tiny_sdxl, 2048)}
UNET = ("attn1.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "proj_in")
CONV = ("resnets.0.conv1", "conv_shortcut", "downsamplers.0.conv")
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}


def stand_in(name: str, **attributes: Any) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module


def prepare(root: Path) -> None:
    """Every package of the wheel without its own start-up, and empty modules for what is not installed."""
    sys.path.insert(0, str(root))
    for start in (root / "invokeai").rglob("__init__.py"):
        stand_in(".".join(start.parent.relative_to(root).parts), __path__=[str(start.parent)])

    class Logger:
        @staticmethod
        def get_logger(*_: object, **__: object) -> logging.Logger:
            return logging.getLogger("invokeai")

    stand_in("invokeai.backend.util.logging", warning=logging.warning, InvokeAILogger=Logger)
    util: Any = sys.modules["invokeai.backend.util"]
    util.logging, util.InvokeAILogger = sys.modules["invokeai.backend.util.logging"], Logger
    for name in ("picklescan", "picklescan.scanner", "onnxruntime", "blake3", "deprecated"):
        stand_in(name, __getattr__=lambda _: MagicMock())
    scanning: Any = sys.modules["picklescan"]
    scanning.scanner = sys.modules["picklescan.scanner"]
    stand_in("deprecated", deprecated=lambda *_, **__: lambda function: function)
    # The module of its cache imports much for one lock.
    cache = "invokeai.backend.model_manager.load.model_cache.model_cache"
    stand_in(cache, MODEL_LOAD_LOCK=MagicMock())
    stand_in("invokeai.app.services.config.config_default", get_config=MagicMock())
    stand_in("invokeai.backend.quantization.gguf.loaders", gguf_sd_loader=MagicMock())
    stand_in("invokeai.backend.quantization.gguf.ggml_tensor", GGMLTensor=type("GGMLTensor", (), {}))
    stand_in("invokeai.backend.model_manager.configs.factory", AnyModelConfig=object)


def detected_width(family: str, folder: Path) -> int:
    util = importlib.import_module("invokeai.backend.model_manager.util.model_util")
    path = write(folder / f"{family}-width.safetensors", simple_pairs(width=FAMILIES[family][1]), family=family)
    return util.lora_token_vector_length(load_file(path))


def gap(family: str, part: str, targets: tuple[str, ...], folder: Path, *, dora: bool = False) -> float:
    """Largest difference of a weight, as a share of the adapter's largest change of one."""
    patcher = importlib.import_module("invokeai.backend.patches.layer_patcher").LayerPatcher
    convert = importlib.import_module("invokeai.backend.patches.lora_conversions.sd_lora_conversion_utils")
    names = importlib.import_module("invokeai.backend.patches.lora_conversions.sdxl_lora_conversion_utils")
    pipeline = FAMILIES[family][0]()
    model = getattr(pipeline, part)
    pairs = random_pairs(model, targets=targets, alpha=2.0)
    merged = getattr(hand_merged(pipeline, (part, pairs, 0.7)), part)
    if dora:
        pairs, merged = by_column(model, pairs)
    anchor = random_pairs(pipeline.unet, targets=("attn2.to_k",)) if part != "unet" else pairs
    parts = {} if part == "unet" else {part: pairs}
    state = load_file(write(folder / f"{family}-{part}.safetensors", anchor, family=family, **parts))
    if family == "sdxl":
        state = names.convert_sdxl_keys_to_diffusers_format(state)
    prefix = "lora_te1_" if family == "sdxl" and part == "text_encoder" else PREFIXES[part]
    # It asks transformers 4 for its text encoders, whose layers lie one module deeper than those of transformers 5.
    holder = model
    if part != "unet" and not hasattr(model, "text_model"):
        holder = torch.nn.Module()
        holder.text_model = model
    raw = convert.lora_model_from_sd_state_dict(state)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight = 1.0 if dora else 0.7
    with patcher.apply_smart_model_patches(
        model=holder, patches=[(raw, weight)], prefix=prefix, dtype=torch.float32, force_direct_patching=True
    ):
        patched = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = merged.state_dict()
    change = max(float((expected[name] - before[name]).abs().max()) for name in before)
    return max(float((patched[name] - expected[name]).abs().max()) for name in before) / change


def by_column(model: torch.nn.Module, pairs: dict[str, LoraPair]) -> tuple[dict[str, LoraPair], torch.nn.Module]:
    """The pairs as DoRA with lengths by column, and the model with them merged by the formula of the paper."""
    import copy
    import dataclasses

    merged, made = copy.deepcopy(model), {}
    for path, pair in pairs.items():
        weight = merged.get_submodule(path).weight
        lengths = weight.detach().norm(dim=0, keepdim=True) * 1.2
        made[path] = dataclasses.replace(pair, dora_scale=lengths)
        turned = weight.detach() + pair.scale * pair.up @ pair.down
        weight.data = lengths * turned / turned.norm(dim=0, keepdim=True)
    return made, merged


def triggers(folder: Path) -> list[str]:
    reader = importlib.import_module("invokeai.backend.model_manager.util.lora_metadata_extractor")
    metadata = AdapterMetadata(title="ink", base_model="some/base", trigger_phrase="ink style, brush")
    adapter = write(folder / "ink.safetensors", simple_pairs(width=768), metadata=metadata)
    write_sidecars(adapter, sidecar_fields(metadata, "sd1"))
    _, phrases = reader._extract_json_metadata("ink", folder)
    return sorted(phrases)


def main(root: Path) -> None:
    prepare(root)
    assert METADATA.title
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        gaps = {}
        for family in FAMILIES:
            gaps[f"{family} unet"] = gap(family, "unet", UNET, folder)
            gaps[f"{family} conv"] = gap(family, "unet", (*CONV, "attn2.to_k"), folder)
            gaps[f"{family} text_encoder"] = gap(family, "text_encoder", TEXT, folder)
        gaps["sdxl text_encoder_2"] = gap("sdxl", "text_encoder_2", TEXT, folder)
        gaps["sd1 DoRA by column"] = gap("sd1", "unet", ("attn2.to_k", "attn2.to_q"), folder, dora=True)
        widths = {family: detected_width(family, folder) for family in FAMILIES}
        print(json.dumps({"widths": widths, "triggers": triggers(folder), "gaps": gaps}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
