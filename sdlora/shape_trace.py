"""What one step takes in memory and arithmetic, from shapes alone: the real model is run on tensors without contents.

Exact where a formula would have to be kept up with every option: what the layers keep for the backward pass is counted
when they keep it, and let go of when they do. Products are in the number format of the base, as autocast makes them;
attention is the fused kernel's, which does not keep its large inner matrix.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPTextConfig

from sdlora.adapter_file import PARTS, Part
from sdlora.config import TrainConfig
from sdlora.families import BaseShapes, ModelFamily, detect_family
from sdlora.lora import LiveAdapter, plan_layers
from sdlora.precision import Precision

__all__ = ["EncodeTrace", "StepTrace", "trace_encode", "trace_step"]

_META = torch.device("meta")
_TOKENS = 77
_aten: Any = torch.ops.aten


@dataclass(frozen=True)
class StepTrace:
    """One forward and backward pass of a batch, without the optimizer."""

    weight_bytes: int
    """The frozen U-Net."""
    text_weight_bytes: int
    """The frozen text encoders, if they are adapted; else 0."""
    adapter_parameters: int
    file_bytes: int
    """Of the adapter's file, without its header."""
    peak_bytes: int
    """The most that activations and gradients take at one time, on top of the weights."""
    flops: int
    """Multiplications and additions, each counted."""


@dataclass(frozen=True)
class EncodeTrace:
    """The VAE's encoder on one picture."""

    weight_bytes: int
    """The whole VAE."""
    peak_bytes: int
    flops: int


def trace_step(
    shapes: BaseShapes, config: TrainConfig, precision: Precision, *, target_hw: tuple[int, int], batch_size: int
) -> StepTrace:
    """What a pass over `batch_size` pictures of that size (in pixels) takes.

    Raises:
        NothingToTrainError: a target matches no layer.
    """
    height, width = (side // shapes.vae_factor for side in target_hw)
    with _META:
        unet = UNet2DConditionModel.from_config(dict(shapes.unet))
    unet.requires_grad_(False).train()
    nn.Module.to(unet, dtype=precision.weight_dtype)
    weight_bytes = _bytes_of(unet)
    family = detect_family(shapes.unet)
    encoders = _text_encoders(shapes, family, precision) if config.lora.text_encoder else ()
    models: dict[Part, nn.Module] = {"unet": unet, **dict(zip(PARTS[1:], encoders, strict=False))}
    adapter = plan_layers(models, family, config.lora)
    text_weight_bytes = sum(map(_bytes_of, encoders))
    LiveAdapter(models, adapter, dropout=config.lora.dropout)
    if config.model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    inputs = _unet_inputs(unet, batch_size, height, width, precision.weight_dtype)
    with _fused_attention(), _products_in(precision.weight_dtype), _Tally(unet, *encoders, inputs) as tally:
        conditions = _read(family, encoders, batch_size) if encoders else inputs[2:]
        predicted = unet(*inputs[:2], conditions[0], added_cond_kwargs=conditions[1]).sample
        torch.autograd.backward(predicted.float().square().mean())
    file_bytes = adapter.file_bytes_in(config.output.dtype)
    return StepTrace(weight_bytes, text_weight_bytes, adapter.num_parameters, file_bytes, tally.peak, tally.flops)


def trace_encode(shapes: BaseShapes, *, target_hw: tuple[int, int]) -> EncodeTrace:
    """What encoding one picture of that size (in pixels) takes, in fp32."""
    with _META:
        vae = AutoencoderKL.from_config(dict(shapes.vae)).eval()
        picture = torch.empty(1, 3, *target_hw)
    with torch.no_grad(), _fused_attention(), _Tally(vae, picture) as tally:
        vae.encode(picture)
    return EncodeTrace(_bytes_of(vae), tally.peak, tally.flops)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Tensors without contents would be given the plain form of attention. Replaced where the models look it up, as a
    mode would not reach what checkpointing computes again."""

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        found: Tensor = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
        return found

    with patch.object(torch.nn.functional, "scaled_dot_product_attention", fused):
        yield


@contextmanager
def _products_in(dtype: torch.dtype) -> Iterator[None]:
    """What autocast does, which knows no tensors without contents: a layer of another format gets casts of its own."""
    linear, conv2d = torch.nn.functional.linear, torch.nn.functional.conv2d

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    def cast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(cast(x), cast(weight), cast(bias))  # type: ignore[arg-type]

    def cast_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **options: Any) -> Tensor:
        return conv2d(cast(x), cast(weight), cast(bias), *args, **options)  # type: ignore[arg-type]

    with (
        patch.object(torch.nn.functional, "linear", cast_linear),
        patch.object(torch.nn.functional, "conv2d", cast_conv2d),
    ):
        yield


class _Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what is allocated and let go of, and what is computed; `existing` tensors are not counted."""

    def __init__(self, *existing: nn.Module | Any):
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.flops = 0
        self._known: dict[int, int] = {}
        for item in existing:
            tensors = [*item.parameters(), *item.buffers()] if isinstance(item, nn.Module) else tree_leaves(item)
            for tensor in tensors:
                if isinstance(tensor, Tensor):
                    self._known[id(tensor.untyped_storage())] = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        self.flops += _flops(func, args, kwargs or {}, result)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)


def _flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    packet = func.overloadpacket
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))  # type: ignore[no-untyped-call]
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))  # type: ignore[no-untyped-call]
    count = flop_registry.get(packet)
    return int(count(*args, **kwargs, out_val=result)) if count is not None else 0


def _unet_inputs(
    unet: UNet2DConditionModel, batch_size: int, height: int, width: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Latents, timesteps, text and, for bases that take them, further conditions."""
    config = unet.config
    added = None
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": _empty(dtype, batch_size, pooled), "time_ids": _empty(dtype, batch_size, 6)}
    return (
        _empty(dtype, batch_size, config.in_channels, height, width),
        _empty(torch.int64, batch_size),
        _empty(dtype, batch_size, _TOKENS, config.cross_attention_dim),
        added,
    )


def _text_encoders(shapes: BaseShapes, family: ModelFamily, precision: Precision) -> tuple[nn.Module, ...]:
    """Frozen, in the number format that they are loaded in."""
    dtype = torch.float32 if precision.device_type == "cpu" else precision.weight_dtype
    with _META:
        encoders = [
            encoder_class(CLIPTextConfig(**config))
            for encoder_class, config in zip(family.text_encoder_classes, shapes.text, strict=True)
        ]
    return tuple(encoder.to(dtype=dtype).requires_grad_(False).train() for encoder in encoders)


def _read(family: ModelFamily, encoders: Sequence[Any], batch_size: int) -> tuple[Tensor, dict[str, Tensor] | None]:
    """What the U-Net takes of as many captions, no two alike, with the gradient of what is trained in the encoders."""

    class Tokens:
        model_max_length = _TOKENS

        def __call__(self, texts: Sequence[str], **options: Any) -> Any:
            return SimpleNamespace(input_ids=_empty(torch.int64, len(texts), _TOKENS))

    components = SimpleNamespace(tokenizers=(Tokens(),) * len(encoders), text_encoders=encoders)
    embeds = family.encode_prompts(components, ["a caption"] * batch_size, with_gradient=True)  # type: ignore[arg-type]
    embeds = embeds.to(dtype=torch.float32)
    no_sizes = [(0, 0)] * batch_size
    return embeds.encoder_hidden_states, family.added_cond_kwargs(embeds, no_sizes, no_sizes, no_sizes)


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=_META)


def _bytes_of(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
