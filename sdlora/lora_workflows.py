"""What `sdlora lora ...` does with files alone, from paths to files. The source files are only read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

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
    difference,
    inspect_adapter,
    merge_adapters,
    new_file,
    put_file,
    resize_adapter,
    sidecar_fields,
    tool_folder,
    write_sidecars,
)
from sdlora.errors import AdapterError, AdapterFileError
from sdlora.publishing import open_picture

__all__ = ["compare", "convert", "edit_metadata", "find_adapters", "inspect_all", "install", "merge", "resize"]

_NEEDED = (
    *("ss_network_", "ss_base_model_version", "ss_v2", "sshs_", "modelspec.architecture", "sdlora.family"),
    "lora_adapter_metadata",
)

_WORKED_OUT = ("sshs_", "modelspec.hash_sha256")

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


def convert(
    source: Path,
    target: Path,
    *,
    dialect: Dialect,
    dtype: torch.dtype,
    say: Say,
    drop_foreign: bool = False,
    overwrite: bool = False,
) -> Path:
    """The same adapter in another dialect or number format; its effect stays, alpha is folded in.

    `drop_foreign` leaves out, and names, tensors that are no part of a LoRA; otherwise a file with such is refused.
    """
    new_file(target, overwrite=overwrite)
    weights = read_adapter(source, drop_foreign=drop_foreign)
    if weights.foreign:
        say(f"Left out {len(weights.foreign)} tensors that are no part of a LoRA: {', '.join(weights.foreign)}.")
    return _write(target, _parts(weights), weights, dialect=dialect, dtype=dtype)


def resize(
    source: Path,
    target: Path,
    *,
    rank: int | None,
    energy: float | None,
    dtype: torch.dtype,
    say: Say,
    overwrite: bool = False,
) -> Path:
    """The best adapter of lower rank; says what was lost.

    Raises:
        AdapterError: neither rank nor energy is given, one is out of range, or the target is there.
    """
    new_file(target, overwrite=overwrite)
    weights = read_adapter(source)
    try:
        resized = resize_adapter(weights, rank=rank, energy=energy)
    except ValueError as error:
        raise AdapterError(f"{error} (--rank, --energy).") from error
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
    overwrite: bool = False,
) -> Path:
    """Several adapters as one ordinary file: exact, or brought to a rank, and then what was lost is said.

    Raises:
        AdapterError: they were made for different families, do not fit each other, or the target is there.
    """
    if target.is_file() and not overwrite:
        raise AdapterError(
            f"{target} is there already, and the first file named is the one to write: "
            "`sdlora lora merge NEW.safetensors A:0.7 B:0.5`. Choose another name, or say --overwrite."
        )
    new_file(target, overwrite=overwrite)
    loaded = [(read_adapter(path), weight) for path, weight in adapters]
    families = {family_of(weights) for weights, _ in loaded}
    if len(families) > 1:
        names = ", ".join(sorted(family or "unknown" for family in families))
        hint = " `sdlora lora metadata FILE --set sdlora.family=sd1` says it of a file." if None in families else ""
        raise AdapterError(f"These adapters were made for different models: {names}.{hint}")
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


def edit_metadata(
    source: Path, target: Path, *, changes: Mapping[str, str | None], strip: bool, overwrite: bool = False
) -> Path:
    """Copies a file with other header texts; `strip` takes all away but what loaders need to know the family by.

    Raises:
        AdapterError: a text is to be set that is worked out from the tensors, one is to be removed that is not there,
            or the target is there and is not the source.
    """
    if target != source:
        new_file(target, overwrite=overwrite)
    known = outline_adapter(source, allow_foreign=True).metadata
    for key, text in changes.items():
        if not key:
            raise AdapterError("A text needs a name: --set key=value.")
        if text is None and key not in known:
            raise AdapterError(f"{source} has no text called {key!r}; `sdlora lora metadata {source}` shows all.")
        if text is not None and key.startswith(_WORKED_OUT):
            raise AdapterError(f"{key} is worked out from the tensors and cannot be set.")
    taken = {key: None for key in known if not key.startswith(_NEEDED)} if strip else {}
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
