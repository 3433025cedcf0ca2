"""What `sdlora lora ...` does, from paths to files. The source files are only read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from sdlora.adapter_file import (
    TRAINING_KEYS,
    AdapterWeights,
    Dialect,
    Family,
    LoraPair,
    Part,
    carried_metadata,
    family_of,
    outline_adapter,
    read_adapter,
    rewrite_metadata,
    write_adapter,
)
from sdlora.adapter_tools import (
    AdapterReport,
    bake_checkpoint,
    difference,
    extract_pairs,
    inspect_adapter,
    merge_adapters,
    open_layers,
    put_file,
    resize_adapter,
    sidecar_fields,
    tool_folder,
    write_sidecars,
)
from sdlora.errors import AdapterError, AdapterFileError
from sdlora.families import load_components, load_pipeline, resolve_base
from sdlora.lora import PRESETS, target_modules, target_patterns
from sdlora.publishing import open_picture
from sdlora.stack import AdapterStack

__all__ = [
    "bake",
    "compare",
    "convert",
    "edit_metadata",
    "extract",
    "find_adapters",
    "inspect_all",
    "install",
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
    # Nothing that one of them says of its training is true of all.
    shared = {key: text for key, text in first.metadata.items() if key not in TRAINING_KEYS}
    source = dataclasses.replace(first, metadata=shared)
    return _write(target, parts, source, dtype=dtype, trigger=", ".join(t for t in triggers if t) or None)


def compare(left: Path, right: Path) -> dict[str, float]:
    """By layer how far two adapters are apart: 0 equal, 1 without anything in common or only in one."""
    return difference(read_adapter(left), read_adapter(right))


def edit_metadata(source: Path, target: Path, *, changes: Mapping[str, str | None], strip: bool) -> Path:
    """Copies a file with other header texts; `strip` takes all away but what loaders need to know the family by."""
    taken: dict[str, str | None] = {}
    if strip:
        taken = {key: None for key in read_adapter(source).metadata if not key.startswith(_NEEDED)}
    return rewrite_metadata(source, target, {**taken, **changes})


def install(source: Path, places: Sequence[tuple[str, Path]], *, picture: Path | None, say: Say) -> None:
    """Copies a file, and what tools read beside it, into the folders of other tools; no other file is touched.

    Raises:
        AdapterError: a tool is not there, would not load the file, or has another file of that name.
    """
    outline = outline_adapter(source)
    if outline.dialects != ("kohya",):
        raise AdapterError(
            f"{source}: other tools skip {'/'.join(outline.dialects)} keys. `sdlora lora convert` it first."
        )
    fields = sidecar_fields(carried_metadata(outline.metadata, title=source.stem), family_of(outline))
    preview = open_picture(picture) if picture is not None else None
    # All folders first, so that a wrong name leaves no half of the work behind.
    for tool, folder in [(tool, tool_folder(tool, root)) for tool, root in places]:
        adapter = put_file(folder / source.name, source.read_bytes())
        # ComfyUI reads no such files.
        beside = [] if tool == "comfyui" else write_sidecars(adapter, fields, preview)
        say(f"{tool}: {', '.join(map(str, [adapter, *beside]))}")
        if tool == "invokeai":
            say(f"In InvokeAI: Models, Add Models, Scan Folder, {folder}.")


def extract(tuned: str, base: str, target: Path, *, rank: int, targets: str | Sequence[str], say: Say) -> Path:
    """An adapter of what a fine-tuned model's U-Net has that its base has not; of two files one layer at a time.

    Raises:
        ModelError: a model cannot be had.
        ConfigError: the targets are for another family.
        AdapterError: they are of different families, or equal in these layers.
    """
    family, weights = _layers_of_files(tuned, base, targets) or _layers_of_models(tuned, base, targets)
    errors: dict[str, float] = {}
    pairs = extract_pairs(weights[0], weights[1], rank=rank, tell=errors.__setitem__)
    say(f"{len(pairs)} layers; lost of a layer's change: {max(errors.values()):.1%} at most.")
    header = {"sdlora.base_model": base, **({"sdlora.base": "tiny"} if base == "tiny" else {})}
    metadata = carried_metadata(header, title=target.stem)
    return write_adapter(target, pairs, family=family, metadata=metadata)


def _layers_of_files(
    tuned: str, base: str, targets: str | Sequence[str]
) -> tuple[Family, list[Mapping[str, Tensor]]] | None:
    """The layers of two checkpoint files, read when they are asked for; None if one of them is no file, or if only
    the models know the targets."""
    if not (Path(tuned).is_file() and Path(base).is_file()) or (isinstance(targets, str) and targets not in PRESETS):
        return None
    both = [open_layers(Path(name)) for name in (tuned, base)]
    _require_one_family(tuned, both[0].family, base, both[1].family)
    patterns = PRESETS[targets] if isinstance(targets, str) else targets
    paths = [path for path in both[1] if any(fnmatchcase(path, f"*{pattern.lstrip('*')}") for pattern in patterns)]
    return both[1].family, [layers.only(paths) for layers in both]


def _layers_of_models(tuned: str, base: str, targets: str | Sequence[str]) -> tuple[Family, list[Mapping[str, Tensor]]]:
    models = [
        load_components(resolve_base(name), weight_dtype=torch.float32, device=torch.device("cpu"))
        for name in (tuned, base)
    ]
    _require_one_family(tuned, models[0].family.name, base, models[1].family.name)
    paths = target_modules(models[1].unet, target_patterns(targets, models[1].family))
    weights: list[Mapping[str, Tensor]] = [
        {path: module.weight.detach() for path, module in model.unet.named_modules() if path in paths}
        for model in models
    ]
    return models[1].family.name, weights


def _require_one_family(tuned: str, tuned_family: Family, base: str, base_family: Family) -> None:
    if tuned_family != base_family:
        raise AdapterError(f"{tuned} is made for {tuned_family}, but {base} is {base_family}.")


def bake(adapters: Sequence[tuple[Path, float]], base: str, target: Path, *, say: Say) -> Path:
    """The base with the adapters merged in, as a model of its own: of a file a file, else a diffusers folder.

    Raises:
        ModelError: the base cannot be had.
        AdapterError: an adapter does not fit, or the target exists.
    """
    if target.exists():
        raise AdapterError(f"{target} is there already. Choose another name.")
    if Path(base).is_file() and target.suffix == ".safetensors":
        changed = bake_checkpoint(Path(base), target, [(read_adapter(path), weight) for path, weight in adapters])
        say(f"Merged into {changed} tensors, each rounded once to its own format; all others as they were: {target}")
        return target
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
