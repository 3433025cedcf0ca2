"""Write an adapter file that every known tool loads unchanged: kohya's keys, alpha equal to the rank, nothing else.

Where ranks differ from layer to layer, all have one alpha: diffusers loses alphas that differ on attention layers.
Two other dialects are written on request, for libraries that ask for them; alpha is folded in these too.

The header is laid out here and not by the safetensors library, whose order of metadata differs from call to call: the
same adapter gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sdlora import __version__
from sdlora.adapter_file.fold import fold
from sdlora.adapter_file.keys import flat_key, text_module_path, to_stability
from sdlora.adapter_file.metadata import AdapterMetadata, Family, build_metadata, family_of
from sdlora.adapter_file.reader import name_some, read_adapter
from sdlora.adapter_file.safety import MAX_ALPHA_PER_RANK, MAX_HEADER_BYTES, MAX_RANK, Header, read_header
from sdlora.adapter_file.types import PARTS, LoraPair, Part
from sdlora.errors import AdapterFileError
from sdlora.run_dir import sync_folder

__all__ = ["Dialect", "replace_metadata", "rewrite_metadata", "write_adapter"]

Dialect = Literal["kohya", "peft", "diffusers"]
Stored = dict[tuple[Part, str], LoraPair]

_DTYPE_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def write_adapter(
    path: str | Path,
    unet: Mapping[str, LoraPair],
    *,
    family: Family,
    metadata: AdapterMetadata,
    text_encoder: Mapping[str, LoraPair] | None = None,
    text_encoder_2: Mapping[str, LoraPair] | None = None,
    dtype: torch.dtype = torch.float16,
    dialect: Dialect = "kohya",
) -> Path:
    """Write the pairs, by diffusers module path, to a .safetensors file; returns its path.

    `dialect` "kohya" loads everywhere; "peft" and "diffusers" (its older one) load in Python libraries only. DoRA's
    lengths are stored in fp32; the older dialect of diffusers has no word for them, and PEFT's only for those by row.

    alpha / rank is folded into the factors, which are stored as `dtype` (fp16, bf16 or fp32). The file appears whole or
    not at all: it is written beside `path`, synced, read back and compared, then renamed. Its mode follows the umask.
    Raises AdapterFileError if the numbers are not finite or too large for `dtype`, or the disk does not take the file.
    """
    path = Path(path)
    if dtype not in _DTYPE_NAMES:
        raise ValueError(f"Adapters are stored as float16, bfloat16 or float32, not {dtype}.")
    if text_encoder_2 and family != "sdxl":
        raise ValueError("Only SDXL has a second text encoder.")
    parts = {"unet": unet, "text_encoder": text_encoder or {}, "text_encoder_2": text_encoder_2 or {}}
    pairs = {(part, module): pair for part in PARTS for module, pair in parts[part].items()}
    if not pairs:
        raise AdapterFileError(path, "there is nothing to write: the adapter has no layers.")
    alpha = _alpha_of_all([pair.rank for pair in pairs.values()]) if dialect == "kohya" else None
    stored = {key: _stored_pair(path, key[1], pair, dtype, dialect, alpha) for key, pair in pairs.items()}
    named = {".".join(key): pair for key, pair in stored.items()}
    texts = build_metadata(metadata, family=family, pairs=named, version=__version__)
    content = _serialise(_tensors(stored, dtype, family, dialect), texts)
    _publish(path, content, partial(_compare, path, stored))
    return path


def rewrite_metadata(source: str | Path, target: str | Path, changes: Mapping[str, str | None]) -> Path:
    """Copies an adapter file with other header texts; None takes a text away. The tensors' bytes stay the same.

    `source` and `target` may be the same file, which is then replaced as a whole. Returns `target`.

    Raises:
        AdapterFileError: the source is no sound safetensors file, the texts are too long to be read again, or the disk
            does not take the target.
    """
    source, target = Path(source), Path(target)
    try:
        with source.open("rb") as file:
            header = read_header(file, source)
            file.seek(header.size)
            data = file.read()
    except OSError as error:
        raise AdapterFileError(source, f"it cannot be read: {error.strerror}.") from error
    texts = {key: value for key, value in {**header.metadata, **changes}.items() if value is not None}
    written = _header(_entries(header), texts)
    if len(written) - 8 > MAX_HEADER_BYTES:
        reason = (
            f"not written: its header would have {len(written):,} bytes, and at most {MAX_HEADER_BYTES:,} are read."
        )
        raise AdapterFileError(target, reason)
    _publish(target, written + data, lambda _: None)
    return target


def replace_metadata(source: str | Path, target: str | Path, metadata: AdapterMetadata) -> Path:
    """Copies an adapter file with nothing in its header but what `write_adapter` would put there; returns `target`.

    Raises:
        AdapterFileError: the source is no sound adapter, tells no family, or the disk does not take the target.
    """
    source, target = Path(source), Path(target)
    weights = read_adapter(source)
    family = family_of(weights)
    if family is None:
        raise AdapterFileError(source, "nothing in the file tells whether it is for SD 1.x, SD 2.x or SDXL.")
    pairs = {f"{part}.{module}": pair for part, module, pair in weights.pairs()}
    texts = build_metadata(metadata, family=family, pairs=pairs, version=__version__)
    with source.open("rb") as file:
        header = read_header(file, source)
        file.seek(header.size)
        data = file.read()
    _publish(target, _with_hashes(_entries(header), data, texts), lambda _: None)
    return target


def _entries(header: Header) -> dict[str, object]:
    return {
        name: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.begin, info.end]}
        for name, info in header.tensors.items()
    }


@dataclass(frozen=True)
class _Names:
    """What a layer's tensors are called; None where the dialect has no such tensor."""

    down: str
    up: str
    alpha: str | None
    dora_scale: str | None


def _tensor_names(part: Part, module: str, family: Family, dialect: Dialect) -> _Names:
    if dialect == "kohya":
        key = _kohya_key(part, module, family)
        return _Names(f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha", f"{key}.dora_scale")
    key = f"{part}.{module if part == 'unet' else text_module_path(module)}"
    if dialect == "peft":
        return _Names(f"{key}.lora_A.weight", f"{key}.lora_B.weight", None, f"{key}.lora_magnitude_vector")
    # diffusers knows its old text encoder files by this word, and refuses others.
    word = "lora" if part == "unet" else "lora_linear_layer"
    return _Names(f"{key}.{word}.down.weight", f"{key}.{word}.up.weight", None, None)


def _kohya_key(part: Part, module: str, family: Family) -> str:
    if part == "unet":
        # Stability's names are kohya's own for SDXL; some tools take only these.
        return f"lora_unet_{to_stability(module) if family == 'sdxl' else flat_key(module)}"
    prefix = "lora_te" if family != "sdxl" else "lora_te1" if part == "text_encoder" else "lora_te2"
    return f"{prefix}_{flat_key(text_module_path(module))}"


def _alpha_of_all(ranks: list[int]) -> float:
    """The rank of most layers, as long as no layer gets more alpha than is read."""
    counts = Counter(ranks)
    return min(float(max(counts, key=lambda rank: (counts[rank], rank))), MAX_ALPHA_PER_RANK * min(ranks))


def _stored_pair(
    path: Path, module: str, pair: LoraPair, dtype: torch.dtype, dialect: Dialect, alpha: float | None
) -> LoraPair:
    """With this alpha, or without one, which means that it is the rank."""
    if not 1 <= pair.rank <= MAX_RANK:
        remedy = "Bring it down with `sdlora lora resize`."
        raise AdapterFileError(path, f"{module} has rank {pair.rank}; 1 to {MAX_RANK} can be written. {remedy}")
    alpha = float(pair.rank) if alpha is None else alpha
    down, up = (factor.detach().to("cpu", dtype).contiguous() for factor in fold(pair, weight=pair.rank / alpha))
    lengths = pair.dora_scale
    if lengths is not None:
        if dialect == "diffusers" or (dialect == "peft" and lengths.shape[1] != 1):
            raise AdapterFileError(path, f"DoRA as in {module} cannot be said in the {dialect} dialect; take kohya.")
        lengths = lengths.detach().to("cpu", torch.float32).contiguous()
    if not all(torch.isfinite(tensor).all() for tensor in (down, up, lengths) if tensor is not None):
        raise AdapterFileError(path, f"not written: {module} has numbers that are not finite in {dtype}.")
    return LoraPair(down=down, up=up, alpha=alpha, dora_scale=lengths)


def _tensors(stored: Stored, dtype: torch.dtype, family: Family, dialect: Dialect) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for (part, module), pair in stored.items():
        names = _tensor_names(part, module, family, dialect)
        tensors |= {names.down: pair.down, names.up: pair.up}
        if names.alpha is not None:
            alpha = torch.tensor(pair.alpha, dtype=dtype)
            # bfloat16 has no odd integers above 256.
            exact = alpha.item() == pair.alpha
            tensors[names.alpha] = alpha if exact else alpha.new_tensor(pair.alpha, dtype=torch.float32)
        if names.dora_scale is not None and pair.dora_scale is not None:
            tensors[names.dora_scale] = _stored_lengths(pair, dialect)
    return dict(sorted(tensors.items()))


def _stored_lengths(pair: LoraPair, dialect: Dialect) -> Tensor:
    """[out, 1] or [1, in] with the axes of the layer; for PEFT a vector, of convolutions [1, out, 1, 1]."""
    assert pair.dora_scale is not None
    axes = [1] * (pair.down.ndim - 2)
    if dialect == "peft":
        return pair.dora_scale.reshape([1, -1, *axes] if axes else [-1])
    return pair.dora_scale.reshape(*pair.dora_scale.shape, *axes)


def _serialise(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> bytes:
    """The safetensors bytes: header length (8 bytes), JSON header padded to 8, tensors in the order of the mapping."""
    entries: dict[str, object] = {}
    blobs, position = [], 0
    for name, tensor in tensors.items():
        blob = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        span = [position, position + len(blob)]
        entries[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        blobs.append(blob)
        position = span[1]
    return _with_hashes(entries, b"".join(blobs), texts)


def _with_hashes(entries: Mapping[str, object], data: bytes, texts: Mapping[str, str]) -> bytes:
    digest = hashlib.sha256(data).hexdigest()
    # A1111's old hash: 64 KiB at 1 MiB of the file as it is with the training metadata alone.
    training = {key: value for key, value in texts.items() if key.startswith("ss_")}
    legacy = hashlib.sha256((_header(entries, training) + data)[2**20 : 2**20 + 2**16]).hexdigest()[:8]
    hashes = {"sshs_model_hash": digest, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{digest}"}
    return _header(entries, {**texts, **hashes}) + data


def _header(entries: Mapping[str, object], texts: Mapping[str, str]) -> bytes:
    # A file's name may hold bytes that are no text; half a surrogate in the header would spoil the file for others.
    clean = {key: value.encode("utf-8", "replace").decode("utf-8") for key, value in sorted(texts.items())}
    text = json.dumps({"__metadata__": clean, **entries}, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _publish(path: Path, content: bytes, check: Callable[[Path], None]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # The kernel applies the umask to the mode asked for here.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            check(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise AdapterFileError(path, f"it cannot be written: {error.strerror}.") from error


def _compare(path: Path, stored: Stored, temporary: Path) -> None:
    """Read the file as a stranger would and compare every layer, factor and scale with what was meant."""
    meant = {
        (part, module if part == "unet" else text_module_path(module)): pair for (part, module), pair in stored.items()
    }
    read = {(part, module): pair for part, module, pair in read_adapter(temporary).pairs()}
    differing = [".".join(key) for key in meant.keys() | read.keys() if not _same(meant.get(key), read.get(key))]
    if differing:
        raise AdapterFileError(
            path, f"not written: the disk gave back other numbers for {name_some(sorted(differing))}."
        )


def _same(left: LoraPair | None, right: LoraPair | None) -> bool:
    if left is None or right is None:
        return False
    if (left.dora_scale is None) != (right.dora_scale is None) or left.alpha != right.alpha:
        return False
    tensors = ((left.down, right.down), (left.up, right.up), (left.dora_scale, right.dora_scale))
    return all(torch.equal(a, b) for a, b in tensors if a is not None and b is not None)
