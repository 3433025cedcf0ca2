"""What the base answers without its adapter, in the middle of training one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from torch import nn

__all__ = ["base_alone", "base_restored"]


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


@contextmanager
def base_restored(model: nn.Module) -> Iterator[None]:
    """Within it the model holds its own layers in the place of peft's, in evaluation; afterwards everything is as it
    was. Without an adapter only the evaluation is new."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, LoraLayer)
    ]
    modes = [(module, module.training) for module in model.modules()]
    for parent, name, layer in places:
        setattr(parent, name, layer.get_base_layer())
    model.eval()
    try:
        yield
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)
        for module, training in modes:
            module.training = training
