"""In which number format what is computed: the frozen base, the autocast, the gradient scaler.

| name | frozen base | autocast | scaler |
|---|---|---|---|
| fp16 | fp16 | fp16 | yes: small gradients would become 0 |
| bf16 | bf16 | bf16 | no: its exponents reach as far as those of fp32 |
| fp32 | fp32 | none | no |

The adapter's own weights and the optimizer are fp32 in all three. The base is stored in the format that autocast would
turn it into at every use, so that this costs no accuracy (measured on a CPU: the same loss to the last digit, a third
less time than with fp32 storage).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch

from sdlora.errors import ModelError

__all__ = ["DTYPES", "Precision", "choose_precision", "has_bf16_arithmetic"]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""By the names of settings and options."""


@dataclass(frozen=True)
class Precision:
    """A number format on a kind of device ("cpu", "cuda")."""

    name: Literal["fp16", "bf16", "fp32"]
    device_type: str

    @property
    def weight_dtype(self) -> torch.dtype:
        """Storage of the frozen base."""
        return DTYPES[self.name]

    @property
    def compute_dtype(self) -> torch.dtype:
        """What matrix products are computed in."""
        return DTYPES[self.name]

    def autocast(self) -> AbstractContextManager[None]:
        """The context for a forward pass; does nothing for fp32."""
        return torch.autocast(self.device_type, dtype=self.compute_dtype, enabled=self.name != "fp32")

    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """A new gradient scaler, or None where the format needs none."""
        return torch.amp.GradScaler(self.device_type) if self.name == "fp16" else None


def choose_precision(requested: Literal["auto", "fp16", "bf16", "fp32"], device: torch.device) -> Precision:
    """The precision asked for; for "auto" fp16 on CUDA, bf16 on CPUs with bf16 arithmetic, else fp32.

    fp16 on a CPU is slow, but it is the same path as on a GPU, and so can be tested anywhere.

    Raises:
        ModelError: bf16 is asked for on a GPU that has none.
    """
    if requested == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ModelError("This GPU has no bf16 arithmetic. Use precision fp16.")
    if requested != "auto":
        return Precision(requested, device.type)
    if device.type == "cuda":
        return Precision("fp16", "cuda")
    return Precision("bf16" if device.type == "cpu" and has_bf16_arithmetic() else "fp32", device.type)


def has_bf16_arithmetic() -> bool:
    """Whether this CPU multiplies bf16 numbers itself; where it must convert them, fp32 is faster."""
    # The checks are not public in PyTorch, so they may be missing: then the answer is no.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(check()) for check in checks if check is not None)
