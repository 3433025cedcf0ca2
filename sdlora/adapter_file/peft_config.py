"""The alpha of files in PEFT's dialect, which keep it beside the tensors: in the header or in `adapter_config.json`.

Only numbers are taken from a stranger's configuration, and names only as plain text: nothing of it reaches PEFT.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdlora.adapter_file.types import Part
from sdlora.errors import AdapterFileError

__all__ = ["PeftAlphas"]

_MAX_CONFIG_BYTES = 2**20
_UNSUPPORTED = {
    "lora_bias": "LoRA with biases",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
}


class PeftAlphas:
    """Looks up the alpha of a module; None where the file says nothing, which every tool takes as alpha = rank."""

    def __init__(self, path: Path, metadata: Mapping[str, str]):
        self._path = path
        self._configs = self._read(metadata)

    def alpha(self, part: Part, module: str, rank: int) -> float | None:
        """The alpha with which alpha / rank is the scale the file means (rsLoRA's alpha / sqrt(rank) included)."""
        config = self._configs.get(part)
        if config is None:
            return None
        alpha = self._pattern(config, "alpha_pattern", module)
        if alpha is None:
            alpha = config.get("lora_alpha")
        if alpha is None:
            return None
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
            raise AdapterFileError(self._path, "the lora_alpha in its PEFT configuration is not a number.")
        return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") is True else 1.0)

    def is_dora(self, part: Part) -> bool:
        """Whether the file says that its layers have lengths of their own."""
        return bool(self._configs.get(part, {}).get("use_dora"))

    def _pattern(self, config: Mapping[str, Any], key: str, module: str) -> object:
        """PEFT's patterns are matched as the end of a module path, here without their regular-expression meaning."""
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            raise AdapterFileError(self._path, f"the {key} in its PEFT configuration is not an object.")
        return next((v for name, v in pattern.items() if name and f".{module}".endswith(f".{name.lstrip('^.')}")), None)

    def _read(self, metadata: Mapping[str, str]) -> dict[Part, dict[str, Any]]:
        # PEFT saves a folder of these two names.
        sidecar = self._path.with_name("adapter_config.json")
        if "lora_adapter_metadata" in metadata:
            flat = self._json_object(metadata["lora_adapter_metadata"])
            parts = {part: self._config_of(flat, part) for part in ("unet", "text_encoder", "text_encoder_2")}
            return {part: config for part, config in parts.items() if config}  # type: ignore[misc]
        if (
            self._path.name == "adapter_model.safetensors"
            and sidecar.is_file()
            and sidecar.stat().st_size <= _MAX_CONFIG_BYTES
        ):
            text = sidecar.read_text(encoding="utf-8", errors="replace")
            config = self._checked(self._json_object(text))
            return {"unet": config, "text_encoder": config}
        return {}

    def _json_object(self, text: str) -> dict[str, Any]:
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise AdapterFileError(self._path, "its PEFT configuration is not valid JSON.") from error
        if not isinstance(parsed, dict):
            raise AdapterFileError(self._path, "its PEFT configuration is not a JSON object.")
        return parsed

    def _config_of(self, flat: Mapping[str, Any], part: str) -> dict[str, Any]:
        prefix = f"{part}."
        return self._checked({key.removeprefix(prefix): v for key, v in flat.items() if key.startswith(prefix)})

    def _checked(self, config: dict[str, Any]) -> dict[str, Any]:
        method = next((name for key, name in _UNSUPPORTED.items() if config.get(key)), None)
        if method is not None:
            raise AdapterFileError(self._path, f"this is a {method} file, which is not supported; ask for a LoRA.")
        return config
