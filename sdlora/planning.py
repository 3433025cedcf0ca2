"""`sdlora plan`: the plan of a run on this machine, with real steps where there is a GPU, in words for a newcomer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import psutil
import torch

from sdlora.cheaper import cheaper_settings
from sdlora.config import TrainConfig
from sdlora.data.dataset import ImageDataset
from sdlora.families import base_shapes, load_components, local_base
from sdlora.plan import RunPlan, largest_bucket, machine_flops, plan_run
from sdlora.precision import Precision, choose_precision
from sdlora.probe import Probed, fitting_config, probe_steps

__all__ = ["Planned", "describe", "make_plan", "way_out"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """A plan, and what it is of."""

    plan: RunPlan
    config: TrainConfig
    """On a GPU laid out to fit it."""
    precision: Precision
    free_bytes: int
    """The machine's free memory."""
    changed: bool = False
    """Whether the configuration is another than the one asked for."""

    @property
    def fits(self) -> bool:
        """Whether the run's memory is there now."""
        return self.plan.peak_bytes <= self.free_bytes


def make_plan(config: TrainConfig, dataset: ImageDataset, *, probe: bool | None = None) -> Planned:
    """Plans the run on this machine's GPU, or CPU where there is none.

    `probe` makes real steps instead of arithmetic, which loads the base; None: on a GPU, if the base is on this
    computer. On a GPU the probe also finds batch size, accumulation and checkpointing that fit.

    Raises:
        ModelError: the base is nowhere to be had, or cannot be loaded.
        NothingToTrainError: a target matches no layer.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    precision = choose_precision(config.model.precision, device)
    shapes = base_shapes(config.model.base)
    library_bytes = 0 if on_gpu else psutil.Process().memory_info().rss
    free_bytes = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available + library_bytes

    def planned(settings: TrainConfig) -> RunPlan:
        return plan_run(
            settings,
            dataset.examples,
            shapes,
            precision=precision,
            flops_per_second=None if on_gpu else machine_flops(precision),
            library_bytes=library_bytes,
        )

    if probe is False or (probe is None and not on_gpu) or local_base(config.model.base) is None:
        return Planned(planned(config), config, precision, free_bytes)
    components = load_components(config.model.base, weight_dtype=precision.weight_dtype, device=device)
    target_hw = largest_bucket(
        dataset.examples, config.data.resolution or components.default_resolution, components.size_step
    )
    if not on_gpu:
        measured = probe_steps(config, components, precision, target_hw=target_hw)
        return Planned(_with(planned(config), measured), config, precision, free_bytes)
    found = fitting_config(config, components, precision, target_hw=target_hw)
    if found is None:
        return Planned(planned(config), config, precision, free_bytes)
    fitting, measured = found
    return Planned(_with(planned(fitting), measured), fitting, precision, free_bytes, fitting != config)


def _with(plan: RunPlan, probed: Probed) -> RunPlan:
    memory = plan.memory if probed.peak_bytes is None else {"measured in a step": probed.peak_bytes}
    return replace(
        plan,
        memory=memory,
        seconds_per_step=probed.seconds,
        seconds=probed.seconds * plan.length.steps,
        measured=True,
    )


def describe(planned: Planned, *, price_per_hour: float | None = None) -> Iterator[tuple[str, str, str]]:
    """Rows of (what, how much, why)."""
    plan, config = planned.plan, planned.config
    height, width = plan.target_hw
    yield "steps", f"{plan.length.steps}", plan.length.explanation
    numbers = f"{plan.adapter_parameters:,} numbers, rank {config.lora.rank}, in {config.output.dtype}"
    yield "adapter", _size(plan.file_bytes), numbers
    parts = ", ".join(f"{name} {_size(size)}" for name, size in plan.memory.items())
    how = "real steps" if plan.measured and "measured in a step" in plan.memory else "computed"
    at = f"{width} x {height} pixels, {config.train.batch_size} at once, {planned.precision.name}"
    yield (
        "memory",
        _size(plan.peak_bytes),
        f"{how} at {at}: {parts}; encoding the pictures: {_size(plan.encoding_bytes)}",
    )
    yield "free now", _size(planned.free_bytes), "it fits" if planned.fits else "too little: see below"
    yield "time", *_time(plan)
    yield "disk", _size(plan.disk_bytes), f"{len(plan.length.save_steps)} saves, and the state to go on from"
    if price_per_hour is not None:
        cost = plan.cost(price_per_hour)
        yield "cost", "unknown" if cost is None else f"{cost:.2f}", f"at {price_per_hour:g} an hour"


def way_out(planned: Planned) -> list[str]:
    """What to change: settings that the probe found to fit, or what to try where nothing does."""
    config, plan = planned.config, planned.plan
    if planned.changed:
        train, model = config.train, config.model
        return [
            "To fit this GPU, the plan takes other settings than given:",
            f"  --set train.batch_size={train.batch_size} "
            f"--set train.gradient_accumulation={train.gradient_accumulation} "
            f"--set model.gradient_checkpointing={str(model.gradient_checkpointing).lower()}",
        ]
    if planned.fits:
        return []
    resolution = max(plan.target_hw)
    lines = cheaper_settings(config, precision=planned.precision.name, resolution=resolution)
    return ["To need less memory, in this order:", *(f"  {line}" for line in lines)]


def _time(plan: RunPlan) -> tuple[str, str]:
    if plan.seconds is None or plan.seconds_per_step is None:
        return "unknown", f"{plan.step_flops / 1e12:.2f} TFLOP a step; with the base on this computer it is measured"
    how = "measured" if plan.measured else f"computed from {plan.step_flops / 1e12:.2f} TFLOP; +-50 %"
    return _duration(plan.seconds), f"{plan.seconds_per_step:.2f} s a step, {how}"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
