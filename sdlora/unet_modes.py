"""How the U-Net computes while it is trained: checkpointing, memory layout, compiled blocks. Undone after the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from sdlora.config import ModelConfig

__all__ = ["enter_modes", "leave_modes", "uncompiled"]

_BACKEND = "inductor"


def enter_modes(unet: UNet2DConditionModel, settings: ModelConfig) -> None:
    """Sets the modes of `settings`; call it when the LoRA is in the U-Net, as compiled blocks hold their layers."""
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if settings.channels_last:
        _lay_out(unet, torch.channels_last)
    if settings.compile:
        # Regional: one small graph for all transformer blocks of a size, in seconds and not in minutes.
        unet.compile_repeated_blocks(backend=_BACKEND)


def leave_modes(unet: UNet2DConditionModel, settings: ModelConfig) -> None:
    """Takes back what `enter_modes` set."""
    if settings.gradient_checkpointing:
        unet.disable_gradient_checkpointing()
    if settings.channels_last:
        _lay_out(unet, torch.contiguous_format)
    if settings.compile:
        for module in unet.modules():
            # What `Module.compile` sets; there is no call that takes it back.
            module._compiled_call_impl = None


@contextmanager
def uncompiled(unet: UNet2DConditionModel) -> Iterator[None]:
    """Within it no compiled block is used, so that layers can be exchanged without compiling anew."""
    calls = [(module, module._compiled_call_impl) for module in unet.modules() if module._compiled_call_impl]
    for module, _ in calls:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in calls:
            module._compiled_call_impl = call


def _lay_out(unet: UNet2DConditionModel, memory_format: Any) -> None:
    # Not diffusers' own `to`, which warns of layers to be kept in fp32 that are none here.
    torch.nn.Module.to(unet, memory_format=memory_format)  # type: ignore[call-overload]
