"""AdamW without a schedule: instead of a learning rate that falls, an average that is good at any step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["AdamWScheduleFree"]


class AdamWScheduleFree(torch.optim.Optimizer):
    """Schedule-free AdamW (arXiv 2405.15682, algorithm 1).

    Steps z are AdamW's without momentum; x is their average, weighted by the square of the highest rate so far; the
    parameters are y = (1 - beta1) z + beta1 x, where gradients are taken. x is what to use: `average`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        numbers = {"k": 0, "lr_max": 0.0, "weight_sum": 0.0}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **numbers})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["lr_max"] = max(group["lr_max"], group["lr"])
            weight = group["lr_max"] ** 2
            group["weight_sum"] += weight
            group["k"] += 1
            share = weight / group["weight_sum"] if group["weight_sum"] else 0.0
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._move(group, parameters, share)

    def _move(self, group: dict[str, Any], y: list[Tensor], share: float) -> None:
        """One step of z, of which x takes in that share, and what this means for y."""
        rate, (beta1, beta2) = group["lr"], group["betas"]
        gradients = [parameter.grad for parameter in y if parameter.grad is not None]
        z, squares = ([self._state(parameter)[key] for parameter in y] for key in ("z", "exp_avg_sq"))
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        lengths = torch._foreach_div(squares, 1 - beta2 ** group["k"])
        torch._foreach_sqrt_(lengths)
        torch._foreach_add_(lengths, group["eps"])
        directions = torch._foreach_div(gradients, lengths)
        if group["weight_decay"]:
            torch._foreach_add_(directions, y, alpha=group["weight_decay"])
        # The definition of y, with x put in terms of the y and z of before.
        torch._foreach_lerp_(y, z, share)
        torch._foreach_add_(y, directions, alpha=rate * (beta1 * (1 - share) - 1))
        torch._foreach_sub_(z, directions, alpha=rate)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["z"] = parameter.detach().clone()
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    @torch.no_grad()
    def average(self) -> None:
        """Puts x in the place of y in all parameters. To go on, y must be put back as it was: the way back rounds."""
        for group in self.param_groups:
            beta1 = group["betas"][0]
            for parameter in group["params"]:
                if parameter in self.state:
                    parameter.lerp_(self.state[parameter]["z"], 1 - 1 / beta1)
