"""What `sdlora stack ...` does, from paths to files. Adapter files are only read, unless a weight is to be stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sdlora import embedded
from sdlora.adapter_file import (
    PARTS,
    AdapterWeights,
    LoraPair,
    Part,
    adaptable_layers,
    carried_metadata,
    family_of,
    read_adapter,
    rewrite_metadata,
    write_adapter,
)
from sdlora.adapter_file.keys import flat_key
from sdlora.adapter_tools import find_by_tensor_hash, merge_adapters, new_file, resize_adapter
from sdlora.adapter_weight import AdapterWeight, Weight, as_weight
from sdlora.calibration import (
    Calibration,
    calibrate,
    calibration_metadata,
    effect,
    recommended_weight,
    roughness,
)
from sdlora.config import DEFAULT_BASE
from sdlora.errors import AdapterError
from sdlora.families import load_pipeline, resolve_base
from sdlora.generation import Generator
from sdlora.interference import StackReport, report_stack
from sdlora.request import GenerationRequest
from sdlora.side_by_side import draw_side_by_side
from sdlora.stack.method import orthogonalised, parse_method
from sdlora.stack_file import StackEntry, StackFile, read_stack_file, write_stack_file

__all__ = ["calibrate_adapter", "export_stack", "find_stack", "inspect_stack", "save_stack"]

Say = Callable[[str], None]
Given = tuple[Path, Weight | None]
_CALIBRATION_WEIGHTS = tuple(step / 5 for step in range(9))
_CALIBRATION_PROMPTS = ("a fox", "a house", "a woman", "an apple")
_CALIBRATION_SEEDS = (0, 1)


def save_stack(target: Path, adapters: Sequence[Given], *, base: str | None, method: str) -> Path:
    """Write a stack file. Base None: what the adapters say they were made on, if they all say the same.

    Raises:
        AdapterError: an adapter cannot be read, they are for different families, or the method is not known.
    """
    parse_method(method)
    read = _read(adapters)
    headers = [weights.metadata for weights, _ in read.values()]
    said = {header.get("sdlora.base") or header.get("sdlora.base_model") for header in headers}
    own = said.pop() if len(said) == 1 else None
    if base is not None and Path(base).exists():
        # A stack file is made to be sent: of a place on this machine only the name.
        base = Path(base).name
    entries = [
        StackEntry(name, weights.path.name, weights.tensor_sha256, weight) for name, (weights, weight) in read.items()
    ]
    return write_stack_file(target, StackFile(tuple(entries), base or own, method))


def find_stack(path: Path, folders: Sequence[Path]) -> tuple[StackFile, list[Path]]:
    """A stack file and where its adapters are now: beside it or below the folders, by the hash of their tensors.

    Raises:
        AdapterError: the file is not sound, or an adapter is nowhere.
    """
    stack = read_stack_file(path)
    places = [path.resolve().parent, *folders]
    found = []
    for entry in stack.adapters:
        file = find_by_tensor_hash(entry.tensor_hash, places, name=entry.file)
        if file is None:
            where = ", ".join(map(str, places))
            raise AdapterError(
                f"{path}: {entry.file} (tensor hash {entry.tensor_hash[:12]}) is nowhere below {where}. Put it beside "
                "the stack file, or name its folder with --lora-dir."
            )
        found.append(file)
    return stack, found


def export_stack(
    stack: StackFile,
    files: Sequence[Path],
    target: Path,
    *,
    rank: int | None,
    energy: float | None,
    dtype: torch.dtype,
    say: Say,
    overwrite: bool = False,
) -> Path:
    """One ordinary LoRA that at weight 1 does what the stack does: exact, or brought to a rank and what that loses.

    Raises:
        AdapterError: a weight or the method varies, the adapters are for different families, or the target is there.
    """
    new_file(target, overwrite=overwrite)
    method = parse_method(stack.method)
    varying = next((entry for entry in stack.adapters if entry.weight.varies), None)
    if varying is not None or not method.is_constant:
        what = f"The weight of {varying.name!r} is {varying.weight}" if varying else f"The method is {method}"
        raise AdapterError(
            f"{what}, which varies while a picture is drawn; a LoRA file has one strength for all steps."
        )
    read = _read([(file, entry.weight) for file, entry in zip(files, stack.adapters, strict=True)])
    scaled = [_scaled(weights, weight) for weights, weight in read.values()]
    if method.name == "orthogonal":
        scaled = _orthogonalised(scaled)
    parts = merge_adapters([(weights, 1.0) for weights in scaled])
    if rank is not None or energy is not None:
        resized = resize_adapter(_holding(scaled[0], parts), rank=rank, energy=energy)
        for name, error in sorted(resized.errors.items(), key=lambda item: -item[1]):
            say(f"{error:8.2%}  {name}")
        say(f"Lost of a layer's change: {resized.error:.1%} at most.")
        parts = resized.parts
    family = family_of(scaled[0])
    if family is None:
        raise AdapterError(f"{scaled[0].path}: nothing in the file tells whether it is for SD 1.x, SD 2.x or SDXL.")
    triggers = [weights.metadata.get("modelspec.trigger_phrase") for weights in scaled]
    texts = dict(scaled[0].metadata) | {"modelspec.trigger_phrase": ", ".join(text for text in triggers if text)}
    return write_adapter(
        target,
        parts["unet"],
        family=family,
        metadata=carried_metadata(texts, title=target.stem),
        text_encoder=parts["text_encoder"],
        text_encoder_2=parts["text_encoder_2"],
        dtype=dtype,
    )


def inspect_stack(adapters: Sequence[Given], *, base: str | None) -> StackReport:
    """How the adapters meet; with a base also how strong they are beside its own weights.

    Raises:
        AdapterError: an adapter cannot be read, or they do not fit each other or the base.
        ModelError: the base cannot be had.
    """
    read = _read(adapters)
    return report_stack(read, None if base is None else _base_norms(base))


def calibrate_adapter(
    path: Path,
    *,
    base: str | None,
    prompts: Sequence[str],
    request: GenerationRequest,
    precision: str,
    store: bool,
    say: Say,
    warn: Say,
) -> Calibration:
    """Draw the same pictures at growing weights, a row in one batch, and find where the effect flattens.

    Without prompts: four plain subjects, with the file's own trigger.

    Raises:
        AdapterError, ModelError: file or base cannot be used.
        GenerationError: the request is out of range.
    """
    metadata = read_adapter(path).metadata
    trigger = metadata.get("modelspec.trigger_phrase")
    prompts = prompts or [f"{prompt}, {trigger}" if trigger else prompt for prompt in _CALIBRATION_PROMPTS]
    base = base or ("tiny" if metadata.get("sdlora.base") == "tiny" else DEFAULT_BASE)
    if base == "tiny":
        request = request.with_defaults(embedded.NUM_INFERENCE_STEPS, embedded.GUIDANCE_SCALE)
    generator = Generator.from_base(base, precision=precision, warn=warn)
    name = generator.stack.load(path)
    rows = []
    for prompt in prompts:
        for seed in _CALIBRATION_SEEDS:
            say(f"{prompt} · {seed}: {len(_CALIBRATION_WEIGHTS)} pictures")
            weights = [{name: weight} for weight in _CALIBRATION_WEIGHTS]
            rows.append(draw_side_by_side(generator, prompt, seed, weights, request))
    columns = list(zip(*rows, strict=True))
    rough = [roughness(column) for column in columns]
    result = calibrate(
        _CALIBRATION_WEIGHTS,
        [effect(column, columns[0]) for column in columns],
        [value / max(rough[0], 1e-6) for value in rough],
    )
    if store:
        rewrite_metadata(path, path, calibration_metadata(result))
    return result


def _read(adapters: Sequence[Given]) -> dict[str, tuple[AdapterWeights, AdapterWeight]]:
    """By name (the stem, with a number where two share it), each with its weight."""
    read: dict[str, tuple[AdapterWeights, AdapterWeight]] = {}
    for path, given in adapters:
        weights = read_adapter(path)
        taken = sum(other.path.stem == path.stem for other, _ in read.values())
        weight = as_weight(recommended_weight(weights.metadata) if given is None else given)
        read[f"{path.stem}-{taken + 1}" if taken else path.stem] = (weights, weight)
    families = {family_of(weights) for weights, _ in read.values()}
    if len(families) > 1:
        names = ", ".join(sorted(family or "unknown" for family in families))
        raise AdapterError(f"These adapters were made for different models: {names}.")
    return read


def _scaled(weights: AdapterWeights, weight: AdapterWeight) -> AdapterWeights:
    """The adapter as it is at weight 1 after this weight was put into it; layers of strength 0 are left out."""
    parts: dict[Part, dict[str, LoraPair]] = {part: {} for part in PARTS}
    for part, path, pair in weights.pairs():
        strength = weight.of_layer(part, path)
        if strength != 0:
            parts[part][path] = replace(pair, alpha=pair.alpha * strength)
    return _holding(weights, parts)


def _orthogonalised(adapters: Sequence[AdapterWeights]) -> list[AdapterWeights]:
    parts: list[dict[Part, dict[str, LoraPair]]] = [{} for _ in adapters]
    places = dict.fromkeys((part, path) for weights in adapters for part, path, _ in weights.pairs())
    for part, path in places:
        owners = [index for index, weights in enumerate(adapters) if path in weights.part(part)]
        pairs = orthogonalised([adapters[index].part(part)[path] for index in owners])
        for index, pair in zip(owners, pairs, strict=True):
            parts[index].setdefault(part, {})[path] = pair
    return [_holding(weights, own) for weights, own in zip(adapters, parts, strict=True)]


def _holding(weights: AdapterWeights, parts: Mapping[Part, Mapping[str, LoraPair]]) -> AdapterWeights:
    """The same adapter with other pairs."""
    unet, text_encoder, text_encoder_2 = (parts.get(part, {}) for part in PARTS)
    return replace(weights, unet=unet, text_encoder=text_encoder, text_encoder_2=text_encoder_2)


def _base_norms(base: str) -> Callable[[str, str], float | None]:
    pipeline = load_pipeline(resolve_base(base), weight_dtype=torch.float32, device=torch.device("cpu"))
    models = {part: model for part in PARTS if (model := getattr(pipeline, part, None)) is not None}
    layers = {part: adaptable_layers(part, model) for part, model in models.items()}

    def norm(part: str, path: str) -> float | None:
        layer = layers.get(part, {}).get(flat_key(path))  # type: ignore[call-overload]
        return None if layer is None else float(layer.weight.detach().norm())

    return norm
