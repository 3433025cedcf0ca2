"""What the base answers without its adapter, in the middle of training one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from torch import nn

__all__ = ["base_alone"]


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """Within it the model answers as if it had no adapter, to the bit; afterwards everything is as it was.

    Not around a backward pass: the adapter's weights take no gradient meanwhile.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
