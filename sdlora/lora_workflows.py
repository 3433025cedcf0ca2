"""What `sdlora lora ...` does, from paths to files. The source files are only read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from sdlora.adapter_file import (
    AdapterWeights,
    Dialect,
    Family,
    LoraPair,
    Part,
    carried_metadata,
    family_of,
    read_adapter,
    rewrite_metadata,
    write_adapter,
)
from sdlora.adapter_tools import (
    AdapterReport,
    difference,
    extract_pairs,
    inspect_adapter,
    merge_adapters,
    resize_adapter,
)
from sdlora.errors import AdapterError, AdapterFileError
from sdlora.families import load_components, load_pipeline, resolve_base
from sdlora.lora import target_modules
from sdlora.stack import AdapterStack

__all__ = [
    "bake",
    "compare",
    "convert",
    "edit_metadata",
    "extract",
    "find_adapters",
    "inspect_all",
    "merge",
    "resize",
    "verify",
]

_NEEDED = (
    *("ss_network_", "ss_base_model_version", "ss_v2", "sshs_", "modelspec.architecture", "sdlora.family"),
    "lora_adapter_metadata",
)

Say = Callable[[str], None]
Parts = Mapping[Part, Mapping[str, LoraPair]]


def find_adapters(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and every .safetensors file below the folders.

    Raises:
        AdapterError: a folder holds none.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
        if not inside:
            raise AdapterError(f"{path}: there is no .safetensors file in this folder.")
        found += inside
    return found


def inspect_all(paths: Sequence[Path]) -> Iterator[AdapterReport | AdapterFileError]:
    """One report a file, or the reason why it is none; one bad file does not stop the others."""
    for path in find_adapters(paths):
        try:
            yield inspect_adapter(path)
        except AdapterFileError as error:
            yield error


def convert(source: Path, target: Path, *, dialect: Dialect, dtype: torch.dtype) -> Path:
    """The same adapter in another dialect or number format; its effect stays, alpha is folded in."""
    weights = read_adapter(source)
    return _write(target, _parts(weights), weights, dialect=dialect, dtype=dtype)


def resize(source: Path, target: Path, *, rank: int | None, energy: float | None, dtype: torch.dtype, say: Say) -> Path:
    """The best adapter of lower rank; says what was lost.

    Raises:
        AdapterError: neither rank nor energy is given, or one is out of range.
    """
    weights = read_adapter(source)
    try:
        resized = resize_adapter(weights, rank=rank, energy=energy)
    except ValueError as error:
        raise AdapterError(f"Resizing: {error}.") from error
    worst = max(resized.errors, key=resized.errors.__getitem__)
    mean = sum(resized.errors.values()) / len(resized.errors)
    say(f"Lost of each layer's change: {mean:.1%} on average, {resized.error:.1%} at most ({worst}).")
    return _write(target, resized.parts, weights, dtype=dtype)


def merge(
    adapters: Sequence[tuple[Path, float]],
    target: Path,
    *,
    rank: int | None,
    energy: float | None,
    dtype: torch.dtype,
    say: Say,
) -> Path:
    """Several adapters as one ordinary file: exact, or brought to a rank, and then what was lost is said.

    Raises:
        AdapterError: they were made for different families, or do not fit each other.
    """
    loaded = [(read_adapter(path), weight) for path, weight in adapters]
    families = {family_of(weights) for weights, _ in loaded}
    if len(families) > 1:
        names = ", ".join(sorted(family or "unknown" for family in families))
        raise AdapterError(f"These adapters were made for different models: {names}.")
    parts: Parts = merge_adapters(loaded)
    first = loaded[0][0]
    if rank is not None or energy is not None:
        together = AdapterWeights(parts["unet"], parts["text_encoder"], parts["text_encoder_2"])
        resized = resize_adapter(together, rank=rank, energy=energy)
        say(f"Lost of a layer's change: {resized.error:.1%} at most.")
        parts = resized.parts
    triggers = [w.metadata.get("modelspec.trigger_phrase") for w, weight in loaded if weight]
    return _write(target, parts, first, dtype=dtype, trigger=", ".join(t for t in triggers if t) or None)


def compare(left: Path, right: Path) -> dict[str, float]:
    """By layer how far two adapters are apart: 0 equal, 1 without anything in common or only in one."""
    return difference(read_adapter(left), read_adapter(right))


def edit_metadata(source: Path, target: Path, *, changes: Mapping[str, str | None], strip: bool) -> Path:
    """Copies a file with other header texts; `strip` takes all away but what loaders need to know the family by."""
    taken: dict[str, str | None] = {}
    if strip:
        taken = {key: None for key in read_adapter(source).metadata if not key.startswith(_NEEDED)}
    return rewrite_metadata(source, target, {**taken, **changes})


def extract(tuned: str, base: str, target: Path, *, rank: int, targets: str | Sequence[str], say: Say) -> Path:
    """An adapter of what a fine-tuned model's U-Net has that its base has not.

    Raises:
        ModelError: a model cannot be had.
        AdapterError: they are of different families, or equal in these layers.
    """
    models = [
        load_components(resolve_base(name), weight_dtype=torch.float32, device=torch.device("cpu"))
        for name in (tuned, base)
    ]
    if models[0].family.name != models[1].family.name:
        raise AdapterError(f"{tuned} is {models[0].family.title}, but {base} is {models[1].family.title}.")
    paths = target_modules(models[1].unet, targets)
    weights = [
        {path: module.weight.detach() for path, module in model.unet.named_modules() if path in paths}
        for model in models
    ]
    errors: dict[str, float] = {}
    pairs = extract_pairs(weights[0], weights[1], rank=rank, tell=errors.__setitem__)
    say(f"{len(pairs)} layers; lost of a layer's change: {max(errors.values()):.1%} at most.")
    header = {"sdlora.base_model": base, **({"sdlora.base": "tiny"} if base == "tiny" else {})}
    metadata = carried_metadata(header, title=target.stem)
    return write_adapter(target, pairs, family=models[1].family.name, metadata=metadata)


def bake(adapters: Sequence[tuple[Path, float]], base: str, target: Path, *, say: Say) -> Path:
    """The base with the adapters merged in, as a diffusers folder of its own.

    Raises:
        ModelError: the base cannot be had.
        AdapterError: an adapter does not fit, or the target exists.
    """
    if target.exists():
        raise AdapterError(f"{target} is there already. Choose another folder.")
    pipeline = load_pipeline(resolve_base(base), weight_dtype=torch.float32, device=torch.device("cpu"))
    stack = AdapterStack(pipeline)
    names = [stack.load(path, f"{number}") for number, (path, _) in enumerate(adapters)]
    stack.set_adapters(names, [weight for _, weight in adapters])
    with stack.merged():
        pipeline.save_pretrained(target)
    say(f"Merged in fp32 and saved in fp32: {target}")
    return target


def verify(path: Path, base: str, *, say: Say) -> float:
    """Loads a file by our reader and by diffusers, and returns the largest difference of an effective weight.

    Raises:
        ModelError, AdapterError: base or file cannot be used.
    """
    source = resolve_base(base)
    ours, theirs = (load_pipeline(source, weight_dtype=torch.float32, device=torch.device("cpu")) for _ in range(2))
    before = {name: p.detach().clone() for name, p in ours.unet.named_parameters()}
    stack = AdapterStack(ours)
    stack.load(path)
    theirs.load_lora_weights(str(path), adapter_name="verified")
    theirs.fuse_lora(adapter_names=["verified"])
    theirs.unload_lora_weights()
    fused = dict(theirs.unet.named_parameters())
    with stack.merged():
        merged = dict(ours.unet.named_parameters())
        gaps = {name: float((merged[name] - fused[name]).abs().max()) for name in before}
        effect = max(float((merged[name] - before[name]).abs().max()) for name in before)
    worst = max(gaps, key=gaps.__getitem__)
    say(f"Largest change of a weight by the adapter: {effect:.3g}; largest difference to diffusers: {gaps[worst]:.3g}.")
    return gaps[worst] / max(effect, 1e-12)


def _parts(weights: AdapterWeights) -> Parts:
    return {"unet": weights.unet, "text_encoder": weights.text_encoder, "text_encoder_2": weights.text_encoder_2}


def _write(
    target: Path,
    parts: Parts,
    source: AdapterWeights,
    *,
    dtype: torch.dtype,
    dialect: Dialect = "kohya",
    trigger: str | None = None,
) -> Path:
    metadata = dict(source.metadata) | ({"modelspec.trigger_phrase": trigger} if trigger else {})
    return write_adapter(
        target,
        parts["unet"],
        family=_family(source),
        metadata=carried_metadata(metadata, title=target.stem),
        text_encoder=parts["text_encoder"],
        text_encoder_2=parts["text_encoder_2"],
        dtype=dtype,
        dialect=dialect,
    )


def _family(weights: AdapterWeights) -> Family:
    family = family_of(weights)
    if family is None:
        raise AdapterError(
            f"{weights.path}: nothing in the file tells whether it is for SD 1.x, SD 2.x or SDXL. Say it with "
            "`sdlora lora metadata FILE --set sdlora.family=sd1`."
        )
    return family
