"""The optimizer of a run, its learning rate over time, and what is done to the weights after a step."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdlora.config import TrainConfig
from sdlora.errors import TrainingError
from sdlora.schedule_free import AdamWScheduleFree

__all__ = [
    "AdapterAverage",
    "Lion",
    "averaged_weights",
    "build_optimizer",
    "can_guard_itself",
    "learning_rate_at",
    "limit_norms",
    "optimizer_facts",
    "optimizer_tensors",
    "restore_optimizer",
]


_FROM_SETTINGS = ("lr", "lr_scale", "weight_decay")


def build_optimizer(
    named: Mapping[str, nn.Parameter], config: TrainConfig, *, fused: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that `config.optimizer.name` asks for, over `LAYER.down`, `LAYER.up` and DoRA's `LAYER.lengths`.

    `fused` takes AdamW's kernel that updates all tensors at once, which rounds otherwise.

    The up factors learn `lora_plus_ratio` times as fast (LoRA+, arXiv 2402.12354), text encoders at their own rate;
    what has a rate of its own is a group, whose `lr_scale` says so.

    Raises:
        TrainingError: it needs a package that is not installed.
    """
    settings, train = config.optimizer, config.train
    kinds: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        # Lengths that decay would pull the base's own weights towards zero.
        kinds.setdefault((_lr_scale(name, config), name.endswith(".lengths")), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": params, "lr_scale": scale, **({"weight_decay": 0.0} if are_lengths else {})}
        for (scale, are_lengths), params in kinds.items()
    ]
    options: dict[str, Any] = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True if fused else None)
    if settings.name == "adafactor":
        return torch.optim.Adafactor(groups, **options)
    if settings.name == "lion":
        return Lion(groups, **options)
    if settings.name == "adamw-schedulefree":
        return AdamWScheduleFree(groups, **options)
    module, cls, extra = {
        "prodigy": ("prodigyopt", "Prodigy", {"use_bias_correction": True, "safeguard_warmup": True}),
        "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", {}),
    }[settings.name]
    try:
        found = getattr(importlib.import_module(module), cls)
    except ImportError as error:
        raise TrainingError(
            f"The optimizer {settings.name} needs a package that is not installed: `pip install sdlora[optimizers]`."
        ) from error
    optimizer: torch.optim.Optimizer = found(groups, **options, **extra)
    return optimizer


def _lr_scale(name: str, config: TrainConfig) -> float:
    """How many times `train.learning_rate` a factor learns with."""
    settings = config.optimizer
    scale = settings.lora_plus_ratio if name.endswith(".up") else 1.0
    if not name.startswith("text_encoder") or settings.name == "prodigy":
        return scale
    rate = settings.text_encoder_learning_rate
    return scale * (0.1 if rate is None else rate / config.train.learning_rate)


@contextmanager
def averaged_weights(optimizer: AdamWScheduleFree, named: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """The adapter is the schedule-free optimizer's average for the length of a `with` block, and itself again after."""
    live = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizer.average()
    try:
        yield
    finally:
        # A run must not depend on how often it was looked at.
        _write(named, live)


def can_guard_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step with `optimizer.found_inf` set to 1 leaves weights and state alone, without asking the host."""
    return isinstance(optimizer, torch.optim.AdamW) and all(group["fused"] for group in optimizer.param_groups)


class Lion(torch.optim.Optimizer):
    """Steps by the sign of the momentum (arXiv 2302.06675, algorithm 2); takes a third to a tenth of AdamW's rate."""

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                momentum = state.setdefault("exp_avg", torch.zeros_like(parameter))
                direction = momentum.lerp(parameter.grad, 1 - beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - beta2)


def learning_rate_at(
    update: int, *, peak: float, warmup_steps: int, num_steps: int, schedule: str = "cosine", restarts: int = 3
) -> float:
    """The learning rate of an update (from 0): a straight rise to `peak`, then by schedule.

    "cosine" falls to 0 as half a cosine (arXiv 1608.03983), "cosine-restarts" does so `restarts` times, "linear" falls
    straight to 0, "constant" stays.
    """
    if update < warmup_steps:
        return peak * (update + 1) / (warmup_steps + 1)
    progress = min(1.0, (update - warmup_steps) / max(1, num_steps - warmup_steps))
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine-restarts" and progress < 1:
        progress = progress * restarts % 1.0
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def limit_norms(named: Mapping[str, nn.Parameter], scales: Mapping[str, float], largest: float) -> int:
    """Shrinks every layer whose change, its scale * up @ down, has a Frobenius norm above `largest`; how many it were.

    Both factors take half of it (in the logarithm). As in kohya's scale_weight_norms.
    """
    shrunk = 0
    for name, up in named.items():
        if not name.endswith(".up"):
            continue
        layer = name.removesuffix(".up")
        down = named[f"{layer}.down"]
        norm = scales[layer] * _product_norm(down, up)
        if norm > largest:
            factor = math.sqrt(largest / norm)
            down.mul_(factor)
            up.mul_(factor)
            shrunk += 1
    return shrunk


def _product_norm(down: Tensor, up: Tensor) -> float:
    # |U D|^2 = trace(U^T U D D^T): rank x rank instead of out x in.
    left, right = up.flatten(1), down.flatten(1)
    return math.sqrt(max(0.0, float(((left.T @ left) * (right @ right.T)).sum())))


class AdapterAverage:
    """Exponential moving average of the adapter; while young it forgets faster, so that its start does not linger."""

    def __init__(self, named: Mapping[str, nn.Parameter], decay: float):
        self._named, self._decay = named, decay
        self.shadow = {name: parameter.detach().clone() for name, parameter in named.items()}

    @torch.no_grad()
    def update(self, number: int) -> None:
        """After update `number`, from 1."""
        decay = min(self._decay, (1 + number) / (10 + number))
        for name, parameter in self._named.items():
            self.shadow[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The adapter is its own average for the length of a `with` block."""
        live = {name: parameter.detach().clone() for name, parameter in self._named.items()}
        _write(self._named, self.shadow)
        try:
            yield
        finally:
            _write(self._named, live)


@torch.no_grad()
def _write(named: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in named.items():
        parameter.copy_(values[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """KEY/NAME -> tensor of the optimizer's state, copied to the CPU."""
    return {
        f"{key}/{name}": value.detach().to("cpu", copy=True)
        for name, parameter in named.items()
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def optimizer_facts(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """The rest of its state, as JSON values: numbers by parameter, and the numbers of its groups."""
    numbers = {
        f"{key}/{name}": value
        for name, parameter in named.items()
        for key, value in optimizer.state[parameter].items()
        if _is_number(value)
    }
    groups = [
        {key: value for key, value in group.items() if _is_number(value) and key not in _FROM_SETTINGS}
        for group in optimizer.param_groups
    ]
    return {"name": type(optimizer).__name__, "numbers": numbers, "groups": groups}


@torch.no_grad()
def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:
    """Puts a state back that the two functions above took."""
    for place, value in (*tensors.items(), *facts["numbers"].items()):
        key, _, name = place.partition("/")
        parameter = named[name]
        # The number of steps stays on the CPU, but for the fused kernel, which reads it on the device.
        if isinstance(value, Tensor) and (value.ndim > 0 or can_guard_itself(optimizer)):
            value = value.to(parameter.device)
        optimizer.state[parameter][key] = value
    for group, numbers in zip(optimizer.param_groups, facts["groups"], strict=True):
        group.update(numbers)


def _is_number(value: object) -> bool:
    return isinstance(value, bool | int | float) and math.isfinite(value)
