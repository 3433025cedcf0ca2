"""What `sdlora lora ...` does with adapters and base models: take out, put in, compare with diffusers."""

from __future__ import annotations

import math
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sdlora.adapter_file import PARTS, Family, LoraPair, Part, carried_metadata, read_adapter, write_adapter
from sdlora.adapter_file.keys import text_module_path
from sdlora.adapter_tools import bake_checkpoint, extract_pairs, new_file, open_layers
from sdlora.errors import AdapterError
from sdlora.families import load_components, load_pipeline, local_base, resolve_base
from sdlora.families.single_file import open_checkpoint
from sdlora.lora import PRESETS, target_modules, target_patterns
from sdlora.stack import AdapterStack

__all__ = ["bake", "extract", "verify"]

_PART_TITLES: Mapping[Part, str] = {
    "unet": "U-Net",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
}
# Whatever a stranger's file makes diffusers raise.
_DIFFUSERS_ERRORS = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, NotImplementedError, OSError)

Say = Callable[[str], None]


@dataclass(frozen=True)
class _TwoModels:
    """The layers in question of a fine-tuned model and of its base."""

    family: Family
    prediction_type: str
    weights: Mapping[Part, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]
    """(tuned, base) by part."""


def extract(
    tuned: str,
    base: str,
    target: Path,
    *,
    rank: int,
    targets: str | Sequence[str],
    say: Say,
    energy: float | None = None,
    text_encoders: bool = True,
    dtype: torch.dtype = torch.float16,
    overwrite: bool = False,
) -> Path:
    """An adapter of what a fine-tuned model has that its base has not; of two files one layer at a time.

    `targets` are the U-Net's. Of the text encoders the attention and feed-forward layers are taken where they differ.
    A layer keeps at most `rank` singular values, and no more than hold `energy` (0..1] of its change.

    Raises:
        ModelError: a model cannot be had.
        ConfigError: the targets are for another family.
        AdapterError: they are of different families, equal in these layers, or the target is there.
    """
    new_file(target, overwrite=overwrite)
    models = _of_files(tuned, base, targets) or _of_models(tuned, base, targets)
    errors: dict[str, float] = {}
    pairs: dict[Part, dict[str, LoraPair]] = {part: {} for part in PARTS}
    for part, (changed, origin) in models.weights.items():
        if part == "unet" or text_encoders:
            tell = _teller(errors, part)
            pairs[part] = extract_pairs(changed, origin, rank=rank, energy=energy, tell=tell)
    if not errors:
        raise AdapterError("The two models are equal in these layers: there is nothing to extract.")
    worst = max(errors, key=errors.__getitem__)
    counts = ", ".join(f"{_PART_TITLES[part]}: {len(found)}" for part, found in pairs.items() if found)
    say(f"{counts} layers; lost of a layer's change: {errors[worst]:.1%} at most ({worst}).")
    header = {
        "sdlora.base_model": base,
        **({"sdlora.base": "tiny"} if base == "tiny" else {}),
        **({"modelspec.prediction_type": "v"} if models.prediction_type == "v_prediction" else {}),
    }
    return write_adapter(
        target,
        pairs["unet"],
        family=models.family,
        metadata=carried_metadata(header, title=target.stem),
        text_encoder=pairs["text_encoder"],
        text_encoder_2=pairs["text_encoder_2"],
        dtype=dtype,
    )


def _teller(errors: dict[str, float], part: Part) -> Callable[[str, float], None]:
    return lambda path, error: errors.__setitem__(f"{part}.{path}", error)


def _of_files(tuned: str, base: str, targets: str | Sequence[str]) -> _TwoModels | None:
    """Two checkpoint files, whose layers are read when they are asked for; None if one of them is no file, or if only
    the models know the targets."""
    if not (Path(tuned).is_file() and Path(base).is_file()) or (isinstance(targets, str) and targets not in PRESETS):
        return None
    changed, origin = (open_layers(Path(name)) for name in (tuned, base))
    _require_one_family(tuned, changed.family, base, origin.family)
    patterns = PRESETS[targets] if isinstance(targets, str) else targets
    unet = [p for p in origin.layers["unet"] if any(fnmatchcase(p, f"*{pattern.lstrip('*')}") for pattern in patterns)]
    weights: dict[Part, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]] = {
        "unet": (changed.layers["unet"].only(unet), origin.layers["unet"].only(unet))
    }
    for part in PARTS[1:]:
        if part in origin.layers and part in changed.layers:
            weights[part] = (changed.layers[part], origin.layers[part])
    # Only an SD 2.x without a mark has to be opened for it.
    prediction = origin.prediction_type or open_checkpoint(Path(base)).prediction_type()
    return _TwoModels(origin.family, prediction, weights)


def _of_models(tuned: str, base: str, targets: str | Sequence[str]) -> _TwoModels:
    changed, origin = (
        load_components(resolve_base(name), weight_dtype=torch.float32, device=torch.device("cpu"))
        for name in (tuned, base)
    )
    _require_one_family(tuned, changed.family.name, base, origin.family.name)
    paths = set(target_modules(origin.unet, target_patterns(targets, origin.family)))
    weights: dict[Part, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]] = {
        "unet": (_weights_of(changed.unet, paths), _weights_of(origin.unet, paths))
    }
    encoders = zip(PARTS[1:], changed.text_encoders, origin.text_encoders, strict=False)
    for part, ours, theirs in encoders:
        weights[part] = (_text_weights(ours), _text_weights(theirs))
    return _TwoModels(origin.family.name, origin.prediction_type, weights)


def _weights_of(model: nn.Module, paths: set[str]) -> dict[str, Tensor]:
    return {path: module.weight.detach() for path, module in model.named_modules() if path in paths}


def _text_weights(encoder: nn.Module) -> dict[str, Tensor]:
    """Of the layers of its transformer, which alone every tool has names for."""
    layers = [(text_module_path(path), module) for path, module in encoder.named_modules()]
    return {
        path: module.weight.detach()
        for path, module in layers
        if isinstance(module, nn.Linear) and path.startswith("text_model.encoder.layers.")
    }


def _require_one_family(tuned: str, tuned_family: Family, base: str, base_family: Family) -> None:
    if tuned_family != base_family:
        raise AdapterError(f"{tuned} is made for {tuned_family}, but {base} is {base_family}.")


def bake(
    adapters: Sequence[tuple[Path, float]], base: str, target: Path, *, say: Say, dtype: torch.dtype = torch.float32
) -> Path:
    """The base with the adapters merged in, as a model of its own: of a file a file, else a diffusers folder.

    A folder's weights are stored as `dtype`, a file's as they were. The target appears whole or not at all.

    Raises:
        ModelError: the base cannot be had.
        AdapterError: an adapter does not fit, or the target exists or cannot be written.
    """
    if target.exists():
        raise AdapterError(f"{target} is there already. Choose another name.")
    if not target.parent.is_dir():
        raise AdapterError(f"{target}: there is no folder {target.parent}. Make it first.")
    if target.suffix == ".safetensors":
        if not Path(local_base(base) or base).is_file():
            raise AdapterError(
                f"{base} is no checkpoint file, so that what comes out is a diffusers folder: name it without "
                f"{target.suffix}."
            )
        changed = bake_checkpoint(Path(base), target, [(read_adapter(path), weight) for path, weight in adapters])
        say(f"Merged into {changed} tensors, each rounded once to its own format; all others as they were: {target}")
        return target
    pipeline = load_pipeline(resolve_base(base), weight_dtype=dtype, device=torch.device("cpu"))
    stack = AdapterStack(pipeline)
    names = [stack.load(path, f"{number}") for number, (path, _) in enumerate(adapters)]
    stack.set_adapters(names, [weight for _, weight in adapters])
    with stack.merged():
        _save_folder(pipeline, target)
    say(f"Merged in fp32 and saved as {str(dtype).removeprefix('torch.')}: {target}")
    return target


def _save_folder(pipeline: Any, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        pipeline.save_pretrained(temporary)
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{target}: cannot be written ({getattr(error, 'strerror', None) or error}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@torch.no_grad()
def verify(path: Path, base: str, *, say: Say) -> float:
    """Loads a file by our reader and by diffusers; returns the largest difference of an effective weight, in U-Net and
    text encoders, as a share of the largest change. Infinite if the file changes nothing here and something there.

    Raises:
        ModelError, AdapterError: base or file cannot be used, or diffusers refuses the file.
    """
    read_adapter(path)
    source = resolve_base(base)
    ours, theirs = (load_pipeline(source, weight_dtype=torch.float32, device=torch.device("cpu")) for _ in range(2))
    stack = AdapterStack(ours)
    stack.load(path)
    before = {name: tensor.detach().clone() for name, tensor in _effective(ours).items()}
    try:
        theirs.load_lora_weights(str(path), adapter_name="verified")
        theirs.fuse_lora(adapter_names=["verified"])
        theirs.unload_lora_weights()
    except _DIFFUSERS_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdapterError(
            f"{path}: we load it, diffusers does not ({reason}). `sdlora lora convert --format peft` writes what it "
            "loads."
        ) from error
    fused = _effective(theirs)
    with stack.merged():
        merged = _effective(ours)
        gaps = {name: _largest(merged[name] - fused[name]) for name in before}
        effect = {name: _largest(merged[name] - before[name]) for name in before}
    for part in PARTS:
        names = [name for name in before if name.startswith(f"{part}.")]
        if any(effect[name] or gaps[name] for name in names):
            largest, gap = max(effect[name] for name in names), max(gaps[name] for name in names)
            say(f"{_PART_TITLES[part]}: largest change of a weight {largest:.3g}; difference to diffusers {gap:.3g}.")
    worst, change = max(gaps.values()), max(effect.values())
    return worst / change if change else math.inf if worst else 0.0


def _effective(pipeline: Any) -> dict[str, Tensor]:
    models = [(part, getattr(pipeline, part, None)) for part in PARTS]
    return {
        f"{part}.{name}": tensor
        for part, model in models
        if model is not None
        for name, tensor in model.named_parameters()
    }


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())
