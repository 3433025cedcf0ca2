"""AdapterStack: several LoRA files on one pipeline, each with a weight, and the base untouched.

Two ways to apply the active adapters:

- live (always on): one forward hook per changed layer adds up @ (down @ x), where down and up are the factors of all
  active adapters side by side; weights may vary over steps, images and branches;
- merged (a `with` block): base + sum of weight * alpha / rank * up @ down, computed in fp32, stands in the layers,
  which then cost nothing extra; the originals are kept and copied back, bit for bit.

`applied()` takes the second where the weights allow it. The base's tensors are never touched outside such a block and
the pipeline's modules never change, so nothing of the fuse, unfuse or hotswap machinery of diffusers and PEFT is
involved. Every call checks first and changes then: one that raises leaves the stack as it was.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sdlora.adapter_file import PARTS, Part, read_adapter, resolve_layers, walk_modules
from sdlora.adapter_weight import AdapterWeight, Weight, as_weight, simplest
from sdlora.errors import AdapterError, DuplicateAdapterError, UnknownAdapterError
from sdlora.stack.merge import MergedLayers
from sdlora.stack.method import Method, parse_method
from sdlora.stack.plan import LoadedAdapter, Place, Plan, make_plan
from sdlora.stack.saved import SavedAdapter, read_state, write_state

__all__ = ["AdapterStack", "Mode"]

Mode: TypeAlias = Literal["base", "live", "merged"]
Given: TypeAlias = Weight | str | None
"""A weight as a caller may write it: a number, an object, the compact syntax, or None for 1."""


@dataclass(frozen=True)
class _State:
    """All that a stack is told. Replaced as a whole, or not at all."""

    loaded: Mapping[str, LoadedAdapter] = field(default_factory=dict)
    weights: Mapping[str, AdapterWeight] = field(default_factory=dict)
    is_enabled: bool = True
    method: Method = field(default_factory=Method)


class AdapterStack:
    """The adapters of one pipeline (StableDiffusionPipeline, StableDiffusionXLPipeline and their variants).

    The pipeline's unet and text encoders are those it has when the stack is made. Not thread-safe.

        stack = AdapterStack(pipeline)
        ink, blob = stack.load("ink.safetensors"), stack.load("blob.safetensors")
        stack.set_adapters([ink, blob], [0.7, "0@0,0.5@0.4"])
        with stack.applied():
            pipeline("a fox")
        stack.unload()
    """

    def __init__(self, pipeline: Any):
        if not isinstance(getattr(pipeline, "unet", None), nn.Module):
            raise TypeError(f"{type(pipeline).__name__} has no unet.")
        self._drawing = pipeline
        self._models: dict[Part, nn.Module] = {
            part: model for part in PARTS if isinstance(model := getattr(pipeline, part, None), nn.Module)
        }
        self._places: dict[nn.Module, Place] = {
            module: (part, path) for part, model in self._models.items() for path, module in model.named_modules()
        }
        self._cross_attention_dim = int(pipeline.unet.config.cross_attention_dim)
        self._state = _State()
        self._plan = Plan()
        self._hooks: list[RemovableHandle] = []
        self._merged: MergedLayers | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All loaded adapters, in the order of loading."""
        return tuple(self._state.loaded)

    @property
    def weights(self) -> Mapping[str, Weight]:
        """The weights that are set: a number, or an AdapterWeight where it is more than that.

        A loaded adapter that is not listed here is off.
        """
        return MappingProxyType({name: simplest(weight) for name, weight in self._state.weights.items()})

    @property
    def active(self) -> Mapping[str, AdapterWeight]:
        """The adapters that act now: those of `weights`, or none while the stack is disabled."""
        return MappingProxyType(self._state.weights if self._state.is_enabled else {})

    @property
    def method(self) -> str:
        """How the adapters are put together: "sum", unless `set_method` said otherwise."""
        return str(self._state.method)

    @property
    def is_enabled(self) -> bool:
        """Whether the weights count."""
        return self._state.is_enabled

    @property
    def is_merged(self) -> bool:
        """Whether the adapters stand in the layers, inside `merged()` or `applied()`."""
        return self._merged is not None

    @property
    def mode(self) -> Mode:
        """How the adapters are applied now: "merged" into the layers, "live" by hooks, or not at all ("base")."""
        if not self._plan.deltas:
            return "base"
        return "merged" if self.is_merged else "live"

    def load(self, path: str | Path, name: str | None = None) -> str:
        """Load a file and switch it on at weight 1, beside those that are on; returns its name (default: the stem).

        Raises AdapterFileError (unreadable, unsafe or malformed), AdapterMismatchError (for another model),
        DuplicateAdapterError (the name is taken).
        """
        path = Path(path)
        name = path.stem if name is None else name
        if not name:
            raise AdapterError(f"{path}: an adapter needs a name.")
        if name in self._state.loaded:
            raise DuplicateAdapterError(name)
        loaded = {**self._state.loaded, name: self._read(path)}
        self._apply(replace(self._state, loaded=loaded, weights={**self._state.weights, name: AdapterWeight()}))
        return name

    def set_adapters(self, names: str | Sequence[str], weights: Given | Sequence[Given] = None) -> None:
        """Switch on the listed adapters with these weights and every other one off; an empty list switches all off.

        One weight counts for all. It may be a number, negative or zero too, an AdapterWeight, or its compact syntax.
        Raises UnknownAdapterError, and AdapterError for a name listed twice, a weight that is not finite or another
        number of weights than names.
        """
        names = [names] if isinstance(names, str) else list(names)
        is_list = isinstance(weights, Sequence) and not isinstance(weights, str)
        values: list[Any] = list(weights) if is_list else [weights] * len(names)  # type: ignore[arg-type]
        if len(values) != len(names):
            raise AdapterError(f"{len(names)} adapters are named, but {len(values)} weights are given.")
        twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
        if twice is not None:
            raise AdapterError(f"The adapter {twice!r} is named twice. Name it once, with the sum of its weights.")
        checked = {name: self._checked(name, value) for name, value in zip(names, values, strict=True)}
        self._apply(replace(self._state, weights=checked))

    def set_weight(self, name: str, weight: Given) -> None:
        """Give one adapter a weight, switching it on if it was off; the others stay as they are."""
        self._apply(replace(self._state, weights={**self._state.weights, name: self._checked(name, weight)}))

    def follow(self, pipeline: Any) -> None:
        """Read steps and guidance from this pipeline from now on: one that draws with the same modules."""
        self._drawing = pipeline

    def set_method(self, method: str) -> None:
        """Put the adapters together in another way: one of "sum", "orthogonal", "switch", "composite", "k-lora".

        "switch:3" changes every three steps. In all but the sum the order of `set_adapters` counts. Raises AdapterError
        for a method that is not known, or that cannot be used with the adapters that are on.
        """
        self._apply(replace(self._state, method=parse_method(method)))

    def enable(self) -> None:
        """Let the weights count again."""
        self._apply(replace(self._state, is_enabled=True))

    def disable(self) -> None:
        """Let none of the adapters act; what is loaded and its weights stay, and can be changed."""
        self._apply(replace(self._state, is_enabled=False))

    def unload(self, name: str | None = None) -> None:
        """Forget one adapter, or all. Those that were off stay off."""
        if name is not None:
            self._get(name)
        kept = {} if name is None else {key: value for key, value in self._state.loaded.items() if key != name}
        weights = {key: value for key, value in self._state.weights.items() if key in kept}
        self._apply(replace(self._state, loaded=kept, weights=weights))

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as plain data that JSON or TOML can hold: files, hashes, weights."""
        adapters = [
            SavedAdapter(name, adapter.path, adapter.tensor_sha256, self._state.weights.get(name))
            for name, adapter in self._state.loaded.items()
        ]
        order = list(self._state.weights)
        return write_state(adapters, order=order, is_enabled=self._state.is_enabled, method=self.method)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Make the stack what it was at `state()`; files that are not loaded any more are read again.

        Raises AdapterError if the data is not of that form or a file has other tensors now, and what `load` raises.
        """
        saved = read_state(state)
        loaded = {adapter.name: self._found(adapter) for adapter in saved.adapters}
        self._apply(_State(loaded, saved.weights, saved.is_enabled, parse_method(saved.method)))

    @contextmanager
    def applied(self, weights: Mapping[str, Given] | None = None) -> Iterator[Mode]:
        """The cheapest exact way for the length of a `with` block; yields which: "merged", "live" or "base".

        Weights that never vary are merged. `weights`, if given, are set as by `set_adapters` for the block alone.
        """
        before = self._state
        if weights is not None:
            self.set_adapters(list(weights), list(weights.values()))
        try:
            if self.is_merged or self._plan.unet_dial is not None or not self._plan.deltas:
                yield self.mode
            else:
                with self.merged():
                    yield self.mode
        finally:
            if weights is not None:
                self._apply(before)

    @contextmanager
    def merged(self) -> Iterator[AdapterStack]:
        """Write the active adapters into the layers for the length of a `with` block.

        Inside, drawing costs what the base alone costs. Calls that change the stack write the layers anew, from the
        kept originals, and refuse weights that vary. On leaving, also by an exception, each layer gets back the bits
        it had and the stack is live. Needs memory for a second copy of the changed layers.
        """
        if self._merged is not None:
            raise AdapterError("The stack is merged already; leave that `with` block first.")
        self._check_base()
        self._refuse_varying(self._plan)
        layers = self._merged = MergedLayers()
        try:
            layers.write(self._plan.deltas)
            self._install(Plan())
            yield self
        finally:
            layers.restore()
            self._merged = None
            self._install(self._plan)

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

    def _get(self, name: str) -> LoadedAdapter:
        if name not in self._state.loaded:
            raise UnknownAdapterError(name, self.names)
        return self._state.loaded[name]

    def _found(self, saved: SavedAdapter) -> LoadedAdapter:
        known = (adapter for adapter in self._state.loaded.values() if adapter.tensor_sha256 == saved.tensor_hash)
        adapter = next(known, None) or self._read(saved.path)
        if adapter.tensor_sha256 != saved.tensor_hash:
            raise AdapterError(f"{saved.path} holds other tensors than when the stack was saved.")
        return adapter

    def _read(self, path: Path) -> LoadedAdapter:
        self._check_base()
        weights = read_adapter(path)
        layers = resolve_layers(weights, self._models, cross_attention_dim=self._cross_attention_dim)
        return LoadedAdapter(path, weights.tensor_sha256, layers)

    def _check_base(self) -> None:
        """Refuse a model whose layers are bypassed or adapted already: a LoRA would act partly or twice."""
        for part, model in self._models.items():
            for path, module in walk_modules(model):
                if {"lora_A", "base_layer"} <= module._modules.keys():
                    raise AdapterError(f"{part}.{path} already carries a LoRA of PEFT; unload it first.")
                if vars(module).get("fused_projections", False):
                    raise AdapterError(f"{part}.{path} has fused projections; call unfuse_qkv_projections() first.")

    def _checked(self, name: str, weight: Given) -> AdapterWeight:
        self._get(name)
        if isinstance(weight, int | float) and not math.isfinite(weight):
            raise AdapterError(f"The weight of {name!r} must be a finite number, not {weight!r}.")
        try:
            return AdapterWeight() if weight is None else as_weight(weight)
        except AdapterError as error:
            raise AdapterError(f"The weight of {name!r}: {error}") from error

    def _apply(self, state: _State) -> None:
        """Make this the state of the stack. Everything that can fail comes before the first change."""
        active = state.weights.items() if state.is_enabled else ()
        adapters = [(state.loaded[name], weight) for name, weight in active]
        plan = make_plan(adapters, self._places, lambda: self._drawing, state.method)
        if self._merged is not None:
            self._refuse_varying(plan)
            self._merged.write(plan.deltas)
        else:
            self._install(plan)
        self._state, self._plan = state, plan

    def _refuse_varying(self, plan: Plan) -> None:
        if plan.unet_dial is not None:
            raise AdapterError(
                "What varies over steps, images or branches, as these weights or this method do, cannot be merged; use "
                "applied()."
            )

    def _install(self, plan: Plan) -> None:
        """Put this plan's hooks in the place of those that are there."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = [layer.register_forward_hook(delta) for layer, delta in plan.deltas.items()]
        if plan.unet_dial is not None:
            before = self._models["unet"].register_forward_pre_hook(plan.unet_dial.before_unet, with_kwargs=True)
            self._hooks.append(before)
            if plan.unet_dial.is_composite:
                self._hooks.append(self._models["unet"].register_forward_hook(plan.unet_dial.after_unet))
