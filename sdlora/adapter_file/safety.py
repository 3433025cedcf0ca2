"""The door: what a safetensors file must look like before a byte of its tensors is read.

A header is a stranger's input. It is parsed once, strictly: duplicate names, holes, overlaps, trailing bytes, unknown
types and absurd sizes are refused, and a file that is something else (a pickle, a web page, an LFS pointer) is named.
Metadata values are only required to be strings: previews and tag tables of some tools are long and are never used here.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from sdlora.errors import AdapterFileError

__all__ = ["MAX_DIM", "MAX_HEADER_BYTES", "MAX_RANK", "MAX_TENSORS", "Header", "TensorInfo", "read_header"]

MAX_HEADER_BYTES = 8 * 2**20
MAX_FILE_BYTES = 4 * 2**30
MAX_TENSORS = 20_000
MAX_RANK = 512
MAX_DIM = 65_536
MAX_ALPHA_PER_RANK = 16.0

_DTYPE_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
# Only as a scalar alpha: some converters write it as an integer.
_ALPHA_DTYPE_BYTES = {**_DTYPE_BYTES, "F64": 8, "I64": 8, "I32": 4}
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,512}")
_PICKLE_START = re.compile(rb"\x80[\x00-\x05]|\(dp|ccopy_reg|\(lp|c__builtin__|cposix|cos\n")

_PICTURE_STARTS = ((b"\x89PNG", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"RIFF", "WEBP"), (b"GIF8", "GIF"))


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the header; `begin` and `end` count bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The tensors by name and the metadata; `size` counts the bytes before the first tensor."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    size: int


class _Refused(ValueError):
    """Why the JSON is not taken; becomes an AdapterFileError where the path is known."""


def read_header(file: BinaryIO, path: Path) -> Header:
    """Read and check the header of an open file. Raises AdapterFileError with one sentence."""
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise AdapterFileError(path, "this is not a regular file.")
    if status.st_size > MAX_FILE_BYTES:
        raise AdapterFileError(path, f"{status.st_size:,} bytes is far too large for a LoRA.")
    start = file.read(1024)
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{" or length > 2**48:
        raise AdapterFileError(path, _what_it_is(start))
    if length > MAX_HEADER_BYTES:
        raise AdapterFileError(path, f"its header claims {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read.")
    if status.st_size < 8 + length:
        raise AdapterFileError(path, "the file is truncated inside its header; fetch or copy it again.")
    file.seek(8)
    try:
        tensors, metadata = _parse(file.read(length))
    except _Refused as refused:
        raise AdapterFileError(path, str(refused)) from refused
    _check_layout(path, tensors, status.st_size - 8 - length)
    return Header(tensors, metadata, 8 + length)


def _what_it_is(start: bytes) -> str:
    """Name the kind of a file that is no safetensors file, by its first bytes."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "the file is empty; fetch or copy it again."
    if start.startswith(b"PK\x03\x04") and b"data.pkl" not in start and b".data/" not in start:
        return "this is a zip archive; unpack it and name the .safetensors file in it."
    if start.startswith(b"PK\x03\x04") or _PICKLE_START.match(start):
        return "this is a pickle checkpoint, which can run code when it is opened; ask for a .safetensors file."
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the file itself; run `git lfs pull`."
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "this is a web page, not a LoRA; the download needs another link or a login."
    if text.startswith((b"{", b"[")):
        return "this is a JSON text, not a safetensors file."
    kind = next((kind for mark, kind in _PICTURE_STARTS if start.startswith(mark)), None)
    if kind is not None:
        return f"this is a picture ({kind}), not a LoRA; a tool may have put it beside the .safetensors file."
    if start.startswith(b"GGUF"):
        return "this is a GGUF file, which is not read; ask for a .safetensors file."
    if len(start) < 10:
        return f"the file is truncated: it has only {len(start)} bytes."
    return "this is not a safetensors file."


def _parse(header: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except _Refused:
        raise
    except (ValueError, RecursionError) as error:
        raise _Refused("its header is not valid JSON.") from error
    if not isinstance(parsed, dict):
        raise _Refused("its header is not a JSON object.")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Refused("its metadata has values that are not texts.")
    if not parsed:
        raise _Refused("it holds no tensors.")
    if len(parsed) > MAX_TENSORS:
        raise _Refused(f"its header names {len(parsed):,} tensors; at most {MAX_TENSORS:,} are read.")
    return {name: _tensor_info(name, entry) for name, entry in parsed.items()}, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _Refused(f"its header has {twice[:80]!r} twice.")
    return result


def _no_constant(name: str) -> NoReturn:
    raise _Refused(f"its header holds the number {name}.")


def _tensor_info(name: str, entry: object) -> TensorInfo:
    if not _NAME.fullmatch(name):
        raise _Refused(f"its header names a tensor {name[:80]!r}, which is not a tensor name.")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Refused(f"the header's entry of {name!r} is malformed.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (_is_counts(shape) and _is_counts(offsets) and len(offsets) == 2 and isinstance(dtype, str)):
        raise _Refused(f"the header's entry of {name!r} is malformed.")
    if len(shape) > 4 or any(not 1 <= dim <= MAX_DIM for dim in shape):
        raise _Refused(f"{name!r} has the shape {shape[:8]}; no layer of Stable Diffusion has.")
    count = math.prod(shape)
    sizes = _ALPHA_DTYPE_BYTES if name.endswith(".alpha") and count == 1 else _DTYPE_BYTES
    if dtype not in sizes:
        raise _Refused(f"{name!r} is of type {dtype[:20]}; LoRA weights are F16, BF16 or F32.")
    if offsets[1] - offsets[0] != count * sizes[dtype]:
        raise _Refused(f"{name!r} has {offsets[1] - offsets[0]} bytes, its shape needs {count * sizes[dtype]}.")
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _is_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(path: Path, tensors: Mapping[str, TensorInfo], data_bytes: int) -> None:
    """Tensors must cover the data exactly: no hole, no overlap, nothing behind."""
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise AdapterFileError(path, f"the data of {name!r} overlaps another tensor's or leaves a hole.")
        position = info.end
    if position > data_bytes:
        missing = position - data_bytes
        raise AdapterFileError(path, f"the file is truncated: {missing:,} bytes are missing; fetch or copy it again.")
    if position < data_bytes:
        raise AdapterFileError(path, f"{data_bytes - position:,} bytes follow the last tensor; something was appended.")
