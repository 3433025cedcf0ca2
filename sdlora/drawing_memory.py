"""What a process that draws takes in memory: enough to say where there is room for one."""

from __future__ import annotations

__all__ = ["drawing_bytes"]

_MERGED = 0.5
"""The stack keeps the originals of the layers that it writes into, and they are not half of the weights."""
_PER_PIXEL = 1024
"""Numbers that are live when the VAE decodes; SD's own has 768 a pixel."""
_LIBRARIES = 1_000_000_000
"""PyTorch and its kernels; on a GPU, its context."""


def drawing_bytes(parameters: int, itemsize: int, resolution: int) -> int:
    """For one picture of `resolution` pixels a side; `parameters` are those of U-Net, VAE and text encoders, each of
    `itemsize` bytes."""
    return round(itemsize * ((1 + _MERGED) * parameters + _PER_PIXEL * resolution**2)) + _LIBRARIES
