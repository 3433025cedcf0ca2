"""The LoRA in the U-Net: put there by peft, started from our own seed, read back for the file, taken out again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sdlora.adapter_file import LoraPair
from sdlora.errors import NothingToTrainError
from sdlora.randomness import counter_generator

__all__ = [
    "PRESETS",
    "attach_lora",
    "detach_lora",
    "lora_pairs",
    "named_parameters",
    "target_modules",
    "trainable_parameters",
    "trainable_share",
]

_CROSS_ATTENTION = ("*.attn2.to_q", "*.attn2.to_k", "*.attn2.to_v", "*.attn2.to_out.0")
_SELF_ATTENTION = ("*.attn1.to_q", "*.attn1.to_k", "*.attn1.to_v", "*.attn1.to_out.0")
_FEED_FORWARD = ("*.ff.net.0.proj", "*.ff.net.2")

PRESETS = {
    "cross-attention": _CROSS_ATTENTION,
    "attention": _CROSS_ATTENTION + _SELF_ATTENTION,
    "attention+ff": _CROSS_ATTENTION + _SELF_ATTENTION + _FEED_FORWARD,
}


def target_modules(unet: UNet2DConditionModel, targets: str | Sequence[str]) -> tuple[str, ...]:
    """Module paths of the linear and convolution layers that a preset or the given patterns match, sorted.

    A pattern is a shell wildcard over the whole path or over its end after a dot.

    Raises:
        NothingToTrainError: names the patterns that match no layer; each must match one.
    """
    patterns = PRESETS[targets] if isinstance(targets, str) else tuple(targets)
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    matches = {
        pattern: {name for name in layers if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")}
        for pattern in patterns
    }
    unmatched = [pattern for pattern, names in matches.items() if not names]
    if unmatched or not patterns:
        raise NothingToTrainError(unmatched)
    return tuple(sorted(set().union(*matches.values())))


def attach_lora(
    unet: UNet2DConditionModel,
    *,
    adapter_name: str,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "cross-attention",
    seed: int = 0,
) -> tuple[str, ...]:
    """Freezes the U-Net and adds trainable fp32 pairs down [r, in], up [out, r] to the targets; returns their paths.

    `down` starts Kaiming-uniform (a = sqrt(5), i.e. uniform in +-1/sqrt(in)) from `seed` and the layer's path, `up` at
    zero, so that the adapter starts without effect (arXiv 2106.09685, sec. 4.1). Scale is alpha / rank; alpha None
    means rank. The global random generator is left as it was.

    Raises:
        NothingToTrainError: a pattern matches no layer.
        ValueError: the U-Net has a LoRA already.
    """
    if any(isinstance(module, LoraLayer) for module in unet.modules()):
        raise ValueError("the U-Net has a LoRA already; detach it first")
    modules = target_modules(unet, targets)
    unet.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=list(modules),
    )
    with torch.random.fork_rng():
        unet.add_adapter(config, adapter_name=adapter_name)
    for path, layer in _lora_layers(unet):
        down, up = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        # peft takes over the base's fp16, which a gradient scaler refuses and small updates vanish in.
        down.to(torch.float32)
        up.to(torch.float32)
        start = torch.empty(down.weight.shape)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=counter_generator(seed, "lora-start", path))
        with torch.no_grad():
            down.weight.copy_(start)
            up.weight.zero_()
    assert tuple(sorted(path for path, _ in _lora_layers(unet))) == modules
    assert all(parameter.dtype == torch.float32 for parameter in trainable_parameters(unet))
    return modules


def detach_lora(unet: UNet2DConditionModel) -> None:
    """Takes every LoRA out; the base's modules and tensors are the ones from before, still frozen."""
    unet.unload_lora()


def lora_pairs(unet: UNet2DConditionModel, adapter_name: str) -> dict[str, LoraPair]:
    """The adapter's weights by module path, fp32 on the CPU, copied."""
    return {
        path: LoraPair(
            down=_copied(layer.lora_A[adapter_name].weight),
            up=_copied(layer.lora_B[adapter_name].weight),
            alpha=float(layer.lora_alpha[adapter_name]),
        )
        for path, layer in _lora_layers(unet)
        if adapter_name in layer.lora_A
    }


def named_parameters(unet: UNet2DConditionModel, adapter_name: str) -> dict[str, nn.Parameter]:
    """What training changes, as `PATH.down` and `PATH.up`: names of ours, which no version of peft changes."""
    named = {}
    for path, layer in _lora_layers(unet):
        named[f"{path}.down"] = layer.lora_A[adapter_name].weight
        named[f"{path}.up"] = layer.lora_B[adapter_name].weight
    return named


def trainable_parameters(unet: UNet2DConditionModel) -> list[nn.Parameter]:
    """The parameters that training changes, always as a list: an iterator would be empty at its second use."""
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def trainable_share(unet: UNet2DConditionModel) -> tuple[int, float]:
    """Number of trainable parameters, and their share of those of the base (0..1)."""
    trainable = sum(parameter.numel() for parameter in trainable_parameters(unet))
    total = sum(parameter.numel() for parameter in unet.parameters())
    return trainable, trainable / (total - trainable)


def _lora_layers(unet: UNet2DConditionModel) -> Iterator[tuple[str, LoraLayer]]:
    for path, module in unet.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def _copied(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True)
