"""What a run will take, told before it: steps, memory, time, disk, money. Arithmetic on shapes; no weight is loaded."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sdlora.checkpoint import KEPT
from sdlora.config import TrainConfig
from sdlora.data.buckets import bucket_step, make_buckets, plan_crop
from sdlora.data.dataset import ImageCaption
from sdlora.drawing_memory import drawing_bytes
from sdlora.families import BaseShapes
from sdlora.length import LengthPlan, plan_length
from sdlora.precision import Precision
from sdlora.shape_trace import trace_encode, trace_step

__all__ = ["FIRST_USE_BYTES", "RunPlan", "largest_bucket", "machine_flops", "plan_run"]

_STATE_TENSORS = {"adamw": 2, "prodigy": 4, "lion": 1, "adamw8bit": 0.5, "adafactor": 0.05, "adamw-schedulefree": 2}
"""Numbers of the adapter's size that an optimizer keeps."""
_CPU_HEAP = 1.2
"""What the C library's heap takes for what is live in it (benchmarks/plan_memory.py)."""
FIRST_USE_BYTES = 120_000_000
"""What the libraries take when they are first used, beyond what importing them took (as above)."""
_REACHED = 0.6
"""Share of the speed of one large matrix product that a whole step reaches on a CPU (docs/PERFORMANCE.md)."""


@dataclass(frozen=True)
class RunPlan:
    """What a run takes; sizes in bytes, times in seconds."""

    length: LengthPlan
    images: int
    target_hw: tuple[int, int]
    """The largest size that pictures are brought to, in pixels."""
    adapter_parameters: int
    file_bytes: int
    memory: Mapping[str, int]
    """What lies in memory in a step, part by part."""
    encoding_bytes: int
    """What encoding the pictures takes, before the first step."""
    step_flops: int
    seconds_per_step: float | None
    seconds: float | None
    disk_bytes: int
    measured: bool = False
    """Whether memory and time come from real steps."""
    base_known: bool = True

    @property
    def peak_bytes(self) -> int:
        """The most that is taken at one time."""
        return max(sum(self.memory.values()), self.encoding_bytes)

    def cost(self, price_per_hour: float) -> float | None:
        """In the price's own currency; None while the time is not known."""
        return None if self.seconds is None else self.seconds / 3600 * price_per_hour

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "peak_bytes": self.peak_bytes}


def plan_run(
    config: TrainConfig,
    examples: Sequence[ImageCaption],
    shapes: BaseShapes,
    *,
    precision: Precision,
    flops_per_second: float | None,
    library_bytes: int,
) -> RunPlan:
    """The plan of a run over these pictures.

    `flops_per_second` is the machine's for large matrix products (None: the time is not told), `library_bytes` what the
    process takes without any model.

    Raises:
        NothingToTrainError: a target matches no layer.
    """
    length = plan_length(sum(example.repeats for example in examples), config)
    target_hw = largest_bucket(examples, config.data.resolution or shapes.default_resolution, shapes.size_step)
    step = trace_step(shapes, config, precision, target_hw=target_hw, batch_size=config.train.batch_size)
    encode = trace_encode(shapes, target_hw=target_hw)
    # Text encoders are fp32 on a CPU; elsewhere they are in the base's own format.
    text_bytes = shapes.text_parameters * (4 if precision.device_type == "cpu" else precision.weight_dtype.itemsize)
    encoders = encode.weight_bytes + text_bytes
    on_cpu = precision.device_type == "cpu"
    heap, libraries = (_CPU_HEAP, library_bytes + FIRST_USE_BYTES) if on_cpu else (1.0, library_bytes)
    kept = 1 + _STATE_TENSORS[config.optimizer.name] + (1 if config.optimizer.ema_decay else 0)
    memory = {
        "libraries": libraries,
        "base": step.weight_bytes,
        **({"text encoders": step.text_weight_bytes} if step.text_weight_bytes else {}),
        "adapter and optimizer": round(4 * kept * step.adapter_parameters),
        # Copies on the host, and the same once more as the bytes of the files.
        **({"a save being written": round(4 * 2 * (kept + 1) * step.adapter_parameters)} if on_cpu else {}),
        "activations and gradients": round(heap * step.peak_bytes),
        **_preview_memory(
            config,
            shapes,
            precision,
            encoder_bytes=encoders - step.text_weight_bytes,
            parameters=step.weight_bytes // precision.weight_dtype.itemsize
            + encode.weight_bytes // 4
            + shapes.text_parameters,
        ),
    }
    # With previews the last save is a file beside the result.
    num_files = len(length.save_steps) + bool(config.preview.prompts)
    # A pass has `batch_size` pictures, a step as many passes as are accumulated.
    flops = step.flops * config.train.gradient_accumulation
    rate = None if flops_per_second is None else flops_per_second * _REACHED
    seconds_per_step = None if rate is None else flops / rate
    views = len(examples) * (2 if config.data.flip else 1)
    return RunPlan(
        length=length,
        images=len(examples),
        target_hw=target_hw,
        adapter_parameters=step.adapter_parameters,
        file_bytes=step.file_bytes,
        memory=memory,
        encoding_bytes=libraries + step.weight_bytes + encoders + round(heap * encode.peak_bytes),
        step_flops=flops,
        seconds_per_step=seconds_per_step,
        seconds=None if rate is None else (flops * length.steps + views * encode.flops) / rate,
        disk_bytes=num_files * step.file_bytes + round(4 * kept * step.adapter_parameters) * (KEPT + 1),
        base_known=shapes.known,
    )


def _preview_memory(
    config: TrainConfig, shapes: BaseShapes, precision: Precision, *, encoder_bytes: int, parameters: int
) -> dict[str, int]:
    """Between two steps previews need the encoders; beside them another process on the CPU, or what is free of a GPU,
    which the run does without."""
    if not config.preview.prompts:
        return {}
    if config.preview.where == "between":
        return {"encoders for previews": encoder_bytes}
    if precision.device_type != "cpu":
        return {}
    resolution = config.data.resolution or shapes.default_resolution
    return {"previews, drawn beside": drawing_bytes(parameters, 4, resolution)}


def largest_bucket(examples: Sequence[ImageCaption], resolution: int, size_step: int) -> tuple[int, int]:
    """The largest size (height, width) that one of the pictures is brought to."""
    buckets = make_buckets(max(resolution, size_step), step=bucket_step(resolution, size_step))
    return max((plan_crop(example.size_hw, buckets).bucket_hw for example in examples), key=math.prod)


def machine_flops(precision: Precision, *, seconds: float = 0.3) -> float:
    """Multiplications and additions a second of a large matrix product on this CPU, in the number format given."""
    size = 1024
    left, right = (torch.ones(size, size, dtype=precision.weight_dtype) for _ in range(2))
    left @ right
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        left @ right
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - started)
