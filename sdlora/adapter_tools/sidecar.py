"""The two files beside an adapter that A1111, Forge and InvokeAI look for: `<stem>.json` and `<stem>.png`."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from sdlora.adapter_file import AdapterMetadata, Family
from sdlora.adapter_tools.install import put_file

__all__ = ["sidecar_fields", "thumbnail_jpeg", "write_sidecars"]

_VERSIONS: Mapping[Family | None, str] = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL", None: "Unknown"}
_THUMBNAIL_SIDE = 256


def sidecar_fields(metadata: AdapterMetadata, family: Family | None) -> dict[str, object]:
    """What the JSON says, under the names that A1111 gave them; a preferred weight of 0 means none."""
    notes = [f"Base: {metadata.base_model}."]
    notes += [f"Licence: {metadata.license}."] if metadata.license else []
    return {
        "description": metadata.description or metadata.title,
        "sd version": _VERSIONS[family],
        "activation text": metadata.trigger_phrase or "",
        "preferred weight": metadata.recommended_weight or 0,
        "negative text": "",
        "notes": " ".join(notes),
    }


def write_sidecars(adapter: Path, fields: Mapping[str, object], picture: Image.Image | None = None) -> list[Path]:
    """Writes them beside `adapter` and returns their paths; what is there already is kept.

    Raises:
        AdapterError: a file of that name is there and holds something else.
    """
    text = json.dumps(dict(fields), indent=2, ensure_ascii=False) + "\n"
    written = [put_file(adapter.with_suffix(".json"), text.encode("utf-8"))]
    if picture is not None:
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, format="PNG")
        written.append(put_file(adapter.with_suffix(".png"), buffer.getvalue()))
    return written


def thumbnail_jpeg(picture: Image.Image) -> bytes:
    """The picture in a square of 256 pixels, without whatever else its file held."""
    small = picture.convert("RGB")
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()
