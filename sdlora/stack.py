"""AdapterStack: several LoRA files on one pipeline, each with a weight, and the base untouched.

Two ways to apply the active adapters:

- live (always on): one forward hook per changed layer adds up @ (down @ x), where down and up are the factors of all
  active adapters side by side, so that a stack of five costs what a single adapter of their summed rank costs;
- merged (a `with` block): base + sum of weight * alpha / rank * up @ down, computed in fp32, stands in the layers,
  which then cost nothing extra; the originals are kept and copied back, bit for bit.

The base's tensors are never touched outside that block and the pipeline's modules never change, so nothing of the fuse,
unfuse or hotswap machinery of diffusers and PEFT is involved. Every call checks first and changes then: one that raises
leaves the stack as it was.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from sdlora.adapter_file import PARTS, LoraPair, Part, fold, read_adapter, resolve_layers
from sdlora.errors import AdapterError, DuplicateAdapterError, UnknownAdapterError

__all__ = ["AdapterStack"]


class AdapterStack:
    """The adapters of one pipeline (StableDiffusionPipeline, StableDiffusionXLPipeline and their variants).

    The pipeline's unet and text encoders are those it has when the stack is made. Not thread-safe.

        stack = AdapterStack(pipeline)
        ink, blob = stack.load("ink.safetensors"), stack.load("blob.safetensors")
        stack.set_adapters([ink, blob], [0.7, 0.5])
        with stack.merged():
            pipeline("a fox")
        stack.unload()
    """

    def __init__(self, pipeline: Any):
        if not isinstance(getattr(pipeline, "unet", None), nn.Module):
            raise TypeError(f"{type(pipeline).__name__} has no unet.")
        self._models: dict[Part, nn.Module] = {
            part: model for part in PARTS if isinstance(model := getattr(pipeline, part, None), nn.Module)
        }
        self._cross_attention_dim = int(pipeline.unet.config.cross_attention_dim)
        self._loaded: dict[str, _Loaded] = {}
        self._weights: dict[str, float] = {}
        self._deltas: Mapping[nn.Module, _LiveDelta] = {}
        self._hooks: list[RemovableHandle] = []
        self._is_merged = False

    @property
    def names(self) -> tuple[str, ...]:
        """All loaded adapters, in the order of loading."""
        return tuple(self._loaded)

    @property
    def weights(self) -> Mapping[str, float]:
        """The weights of the active adapters. A loaded adapter that is not listed here is off."""
        return MappingProxyType(self._weights)

    @property
    def is_merged(self) -> bool:
        """Whether the stack is inside `merged()`."""
        return self._is_merged

    def load(self, path: str | Path, name: str | None = None) -> str:
        """Load a file and switch it on at weight 1, beside those that are on; returns its name (default: the stem).

        Raises AdapterFileError (unreadable, unsafe or malformed), AdapterMismatchError (for another model),
        DuplicateAdapterError (the name is taken).
        """
        self._refuse_while_merged("load an adapter")
        path = Path(path)
        name = path.stem if name is None else name
        if not name:
            raise AdapterError(f"{path}: an adapter needs a name.")
        if name in self._loaded:
            raise DuplicateAdapterError(name)
        self._check_base()
        weights = read_adapter(path)
        layers = resolve_layers(weights, self._models, cross_attention_dim=self._cross_attention_dim)
        loaded = {**self._loaded, name: _Loaded(path, weights.tensor_sha256, layers)}
        self._apply(loaded, {**self._weights, name: 1.0})
        return name

    def set_adapters(self, names: str | Sequence[str], weights: float | Sequence[float | None] | None = None) -> None:
        """Switch on the listed adapters with these weights and every other one off; an empty list switches all off.

        One number counts for all, None for 1. A weight may be negative or zero. Raises UnknownAdapterError, and
        AdapterError for a name listed twice, a weight that is not finite or another number of weights than names.
        """
        self._refuse_while_merged("change weights")
        names = [names] if isinstance(names, str) else list(names)
        values = list(weights) if isinstance(weights, Sequence) else [weights] * len(names)
        if len(values) != len(names):
            raise AdapterError(f"{len(names)} adapters are named, but {len(values)} weights are given.")
        twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
        if twice is not None:
            raise AdapterError(f"The adapter {twice!r} is named twice. Name it once, with the sum of its weights.")
        checked = {name: self._checked(name, value) for name, value in zip(names, values, strict=True)}
        self._apply(self._loaded, checked)

    def set_weight(self, name: str, weight: float) -> None:
        """Give one adapter a weight, switching it on if it was off; the others stay as they are."""
        self._refuse_while_merged("change weights")
        self._apply(self._loaded, {**self._weights, name: self._checked(name, weight)})

    def unload(self, name: str | None = None) -> None:
        """Forget one adapter, or all. Those that were off stay off."""
        self._refuse_while_merged("unload an adapter")
        if name is not None:
            self._get(name)
        kept = {} if name is None else {key: value for key, value in self._loaded.items() if key != name}
        self._apply(kept, {key: value for key, value in self._weights.items() if key in kept})

    @contextmanager
    def merged(self) -> Iterator[AdapterStack]:
        """Write the active adapters into the layers for the length of a `with` block.

        Inside, drawing costs what the base alone costs, and calls that would change the stack raise AdapterError. On
        leaving, also by an exception, each layer gets back the bits it had and the stack is live as before. Needs
        memory for a second copy of the changed layers.
        """
        self._refuse_while_merged("merge again")
        self._check_base()
        changed = self._merged_weights()
        originals = {layer: _weight(layer).detach().clone() for layer in changed}
        self._is_merged = True
        try:
            self._remove_hooks()
            _write(changed)
            changed.clear()
            yield self
        finally:
            _write(originals)
            self._is_merged = False
            self._install(self._deltas)

    def file_name(self, name: str) -> str:
        """The name of the file an adapter came from, without its folder."""
        return self._get(name).path.name

    def tensor_hash(self, name: str) -> str:
        """SHA-256 of the tensor bytes of an adapter's file, 64 hex digits; it survives renaming and new metadata."""
        return self._get(name).tensor_sha256

    def base_checksum(self) -> str:
        """SHA-256 over every tensor of unet and text encoders as they are now, with names, types and shapes."""
        digest = hashlib.sha256()
        for part, model in self._models.items():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _refuse_while_merged(self, action: str) -> None:
        if self._is_merged:
            raise AdapterError(f"Cannot {action} while the stack is merged; leave its `with` block first.")

    def _get(self, name: str) -> _Loaded:
        if name not in self._loaded:
            raise UnknownAdapterError(name, self.names)
        return self._loaded[name]

    def _check_base(self) -> None:
        """Refuse a model whose layers are bypassed or adapted already: a LoRA would act partly or twice."""
        for part, model in self._models.items():
            for path, module in model.named_modules():
                if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
                    raise AdapterError(f"{part}.{path} already carries a LoRA of PEFT; unload it first.")
                if getattr(module, "fused_projections", False):
                    raise AdapterError(f"{part}.{path} has fused projections; call unfuse_qkv_projections() first.")

    def _checked(self, name: str, weight: float | None) -> float:
        self._get(name)
        weight = 1.0 if weight is None else weight
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
            raise AdapterError(f"The weight of {name!r} must be a finite number, not {weight!r}.")
        return float(weight)

    def _apply(self, loaded: Mapping[str, _Loaded], weights: Mapping[str, float]) -> None:
        """Make this the state of the stack. Everything that can fail comes before the first change."""
        deltas = self._plan(loaded, weights)
        self._loaded, self._weights, self._deltas = dict(loaded), dict(weights), deltas
        self._install(deltas)

    def _plan(self, loaded: Mapping[str, _Loaded], weights: Mapping[str, float]) -> dict[nn.Module, _LiveDelta]:
        """The change of every layer that an active adapter of non-zero weight touches."""
        active = [(loaded[name], weight) for name, weight in weights.items() if weight != 0]
        # By content and not by time of loading: sums in floating point depend on their order, results must not.
        active.sort(key=lambda item: (item[0].tensor_sha256, item[1]))
        pairs: dict[nn.Module, list[tuple[LoraPair, float]]] = {}
        for adapter, weight in active:
            for layer, pair in adapter.layers.items():
                pairs.setdefault(layer, []).append((pair, weight))
        return {layer: _LiveDelta.of(layer, weighted) for layer, weighted in pairs.items()}

    def _install(self, deltas: Mapping[nn.Module, _LiveDelta]) -> None:
        self._remove_hooks()
        self._hooks = [layer.register_forward_hook(delta) for layer, delta in deltas.items()]

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _merged_weights(self) -> dict[nn.Module, Tensor]:
        """base + delta of every changed layer, in the layer's type; nothing is written yet."""
        merged = {}
        for layer, delta in self._deltas.items():
            weight = _weight(layer)
            if not weight.is_floating_point():
                raise AdapterError("A quantised base cannot be merged into; use the stack without merged().")
            merged[layer] = (weight.float() + delta.dense().to(weight.device).view_as(weight)).to(weight.dtype)
            if not torch.isfinite(merged[layer]).all():
                raise AdapterError(f"With these weights a merged layer is not finite in {weight.dtype}; lower them.")
        return merged


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A file matched with the layers it changes."""

    path: Path
    tensor_sha256: str
    layers: Mapping[nn.Module, LoraPair]


class _LiveDelta:
    """A forward hook that adds one low-rank term to the output of a Linear or Conv2d."""

    def __init__(self, down: Tensor, up: Tensor):
        self._down = down  # [sum of ranks, in(, k, k)], fp32
        self._up = up  # [out, sum of ranks(, 1, 1)], fp32, weights and scales folded in
        self._placed = (down, up)

    @staticmethod
    def of(layer: nn.Module, weighted: Sequence[tuple[LoraPair, float]]) -> _LiveDelta:
        """The adapters' factors side by side. Raises AdapterError if they are not finite in the layer's type."""
        factors = [fold(pair, weight=weight) for pair, weight in weighted]
        delta = _LiveDelta(torch.cat([down for down, _ in factors]), torch.cat([up for _, up in factors], dim=1))
        weight = _weight(layer)
        if weight.dtype in (torch.float16, torch.bfloat16, torch.float32) and weight.device.type != "meta":
            placed = delta._place(weight.device, weight.dtype)
            if not all(torch.isfinite(factor).all() for factor in placed):
                raise AdapterError(f"With these weights an adapter is not finite in {weight.dtype}; lower them.")
        return delta

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        down, up = self._place(output.device, output.dtype)
        # Offloading may leave the input on another device, and layer-wise casting in another type.
        hidden = inputs[0].to(output.device, output.dtype)
        if isinstance(layer, nn.Conv2d):
            hidden = F.conv2d(hidden, down, None, layer.stride, layer.padding, layer.dilation)
            return output + F.conv2d(hidden, up)
        return output + F.linear(F.linear(hidden, down), up)

    def dense(self) -> Tensor:
        """The full matrix of the term, [out, in * k * k], in fp32."""
        return self._up.flatten(1) @ self._down.flatten(1)

    def _place(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        down = self._placed[0]
        if down.device != device or down.dtype != dtype:
            # From the fp32 factors each time: a pipeline that went through fp16 gets its precision back.
            self._placed = (self._down.to(device, dtype), self._up.to(device, dtype))
        return self._placed


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


@torch.no_grad()
def _write(weights: Mapping[nn.Module, Tensor]) -> None:
    for layer, weight in weights.items():
        _weight(layer).copy_(weight)
