"""Less memory, or more speed, where the machine asks for it. None of it changes what is drawn beyond rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sdlora.errors import GenerationError

__all__ = ["Thrift", "apply_thrift", "check_thrift", "offloaded"]


@dataclass(frozen=True, kw_only=True)
class Thrift:
    """How a pipeline of our own is set up."""

    vae_tiling: bool = False
    """Decode large pictures in overlapping tiles; seams are blended, so that pixels differ slightly."""
    vae_slicing: bool = False
    """Decode the pictures of a batch one by one."""
    offload: Literal["model", "sequential"] | None = None
    """Keep the weights in main memory and bring them to the GPU as whole models or layer by layer."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Attention kernel; `xformers` needs that package and a CUDA device."""
    compile: bool = False
    """Compile the U-Net by torch.compile: a slow first picture, faster ones after it. Other weights of adapters compile
    nothing anew."""


def check_thrift(thrift: Thrift, device: torch.device) -> None:
    """Raises:
    GenerationError: a name is unknown, or the device cannot do it.
    """
    if thrift.offload not in (None, "model", "sequential"):
        raise GenerationError(f"Nothing offloads by {thrift.offload!r}. Known: model, sequential.")
    if thrift.attention not in ("sdpa", "xformers"):
        raise GenerationError(f"No attention is called {thrift.attention!r}. Known: sdpa, xformers.")
    if thrift.offload is not None and device.type == "cpu":
        raise GenerationError("Offloading brings weights to a GPU, and there is none. Leave --offload out.")
    if thrift.offload is not None and thrift.compile:
        raise GenerationError("Weights that come and go cannot be compiled. Use --offload or --compile, not both.")
    if thrift.attention == "xformers" and device.type != "cuda":
        raise GenerationError(f"xformers attention needs a CUDA device, not {device.type}. Use --attention sdpa.")


def apply_thrift(pipeline: Any, thrift: Thrift) -> None:
    """Set up a pipeline for good; offloading alone is done while drawing, see `offloaded`.

    Raises:
        GenerationError: xformers is not installed.
    """
    if thrift.vae_tiling:
        pipeline.vae.enable_tiling()
    if thrift.vae_slicing:
        pipeline.vae.enable_slicing()
    if thrift.attention == "xformers":
        try:
            pipeline.enable_xformers_memory_efficient_attention()
        except ModuleNotFoundError as error:
            raise GenerationError("xformers is not installed. Use: pip install 'sdlora[xformers]'") from error
    if thrift.compile:
        pipeline.unet.compile()


@contextmanager
def offloaded(pipeline: Any, offload: Literal["model", "sequential"] | None, device: torch.device) -> Iterator[None]:
    """While drawing, weights come to `device` when they are needed; afterwards all lie in main memory, without hooks.

    Entered after adapters were merged: layers that are not there cannot be merged into.
    """
    if offload is None:
        yield
        return
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)
    try:
        yield
    finally:
        pipeline.remove_all_hooks()
        pipeline._all_hooks = []
        pipeline.to("cpu")
