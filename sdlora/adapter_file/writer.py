"""Write an adapter file that every known tool loads unchanged: kohya's keys, alpha equal to the rank, nothing else.

The header is laid out here and not by the safetensors library, whose order of metadata differs from call to call: the
same adapter gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sdlora import __version__
from sdlora.adapter_file.fold import fold
from sdlora.adapter_file.keys import flat_key, text_module_path, to_stability
from sdlora.adapter_file.metadata import AdapterMetadata, Family, build_metadata
from sdlora.adapter_file.reader import name_some, read_adapter
from sdlora.adapter_file.safety import MAX_RANK
from sdlora.adapter_file.types import PARTS, LoraPair, Part
from sdlora.errors import AdapterFileError

__all__ = ["write_adapter"]

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
) -> Path:
    """Write the pairs, by diffusers module path, to a .safetensors file; returns its path.

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
    stored = {
        _kohya_key(part, module, family): _stored_pair(path, module, pair, dtype)
        for part in PARTS
        for module, pair in parts[part].items()
    }
    if not stored:
        raise AdapterFileError(path, "there is nothing to write: the adapter has no layers.")
    texts = build_metadata(metadata, family=family, pairs=stored, version=__version__)
    content = _serialise(_tensors(stored, dtype), texts)
    _publish(path, content, stored, family)
    return path


def _kohya_key(part: Part, module: str, family: Family) -> str:
    if part == "unet":
        # Stability's names are kohya's own for SDXL; some tools take only these.
        return f"lora_unet_{to_stability(module) if family == 'sdxl' else flat_key(module)}"
    prefix = "lora_te" if family != "sdxl" else "lora_te1" if part == "text_encoder" else "lora_te2"
    return f"{prefix}_{flat_key(text_module_path(module))}"


def _stored_pair(path: Path, module: str, pair: LoraPair, dtype: torch.dtype) -> LoraPair:
    if not 1 <= pair.rank <= MAX_RANK:
        raise AdapterFileError(path, f"{module} has rank {pair.rank}; 1 to {MAX_RANK} can be written.")
    down, up = (factor.detach().to("cpu", dtype).contiguous() for factor in fold(pair))
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise AdapterFileError(path, f"not written: {module} has numbers that are not finite in {dtype}.")
    return LoraPair(down=down, up=up, alpha=float(pair.rank))


def _tensors(stored: Mapping[str, LoraPair], dtype: torch.dtype) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, pair in stored.items():
        alpha = torch.tensor(pair.alpha, dtype=dtype)
        # bfloat16 has no odd integers above 256.
        tensors[f"{key}.alpha"] = (
            alpha if alpha.item() == pair.alpha else alpha.new_tensor(pair.alpha, dtype=torch.float32)
        )
        tensors[f"{key}.lora_down.weight"] = pair.down
        tensors[f"{key}.lora_up.weight"] = pair.up
    return dict(sorted(tensors.items()))


def _serialise(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> bytes:
    """The safetensors bytes: header length (8 bytes), JSON header padded to 8, tensors in the order of the mapping."""
    entries, blobs, position = {}, [], 0
    for name, tensor in tensors.items():
        blob = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        span = [position, position + len(blob)]
        entries[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        blobs.append(blob)
        position = span[1]
    data = b"".join(blobs)
    digest = hashlib.sha256(data).hexdigest()
    # A1111's old hash: 64 KiB at 1 MiB of the file as it is with the training metadata alone.
    training = {key: value for key, value in texts.items() if key.startswith("ss_")}
    legacy = hashlib.sha256((_header(entries, training) + data)[2**20 : 2**20 + 2**16]).hexdigest()[:8]
    hashes = {"sshs_model_hash": digest, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{digest}"}
    return _header(entries, {**texts, **hashes}) + data


def _header(entries: Mapping[str, object], texts: Mapping[str, str]) -> bytes:
    text = json.dumps({"__metadata__": dict(sorted(texts.items())), **entries}, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _publish(path: Path, content: bytes, stored: Mapping[str, LoraPair], family: Family) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # The kernel applies the umask to the mode asked for here.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            _compare(path, temporary, stored, family)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise AdapterFileError(path, f"it cannot be written: {error.strerror}.") from error


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut; Windows cannot open folders and needs no such call."""
    if os.name != "posix" or not stat.S_ISDIR(folder.stat().st_mode):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _compare(path: Path, temporary: Path, stored: Mapping[str, LoraPair], family: Family) -> None:
    """Read the file as a stranger would and compare every key, factor and scale with what was meant."""
    read = {_kohya_key(part, module, family): pair for part, module, pair in read_adapter(temporary).pairs()}
    differing = [key for key in stored.keys() | read.keys() if not _same(stored.get(key), read.get(key))]
    if differing:
        raise AdapterFileError(
            path, f"not written: the disk gave back other numbers for {name_some(sorted(differing))}."
        )


def _same(left: LoraPair | None, right: LoraPair | None) -> bool:
    if left is None or right is None:
        return False
    return left.alpha == right.alpha and torch.equal(left.down, right.down) and torch.equal(left.up, right.up)
