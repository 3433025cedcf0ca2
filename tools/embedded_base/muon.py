"""Muon for the matrices, AdamW for the rest: the optimiser both halves of the base are trained with.

Muon orthogonalises the momentum of every weight matrix by a Newton-Schulz iteration (Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon/). Convolution kernels are treated as [out, in * k * k] matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices to `matrices` [B, rows, cols], roughly: singular values become 0.7 to 1.2.

    The products are computed in bf16, for which the iteration's coefficients are made.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    transposed = x.shape[1] > x.shape[2]
    x = x.mT.contiguous() if transposed else x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if transposed else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum, Nesterov look-ahead, orthogonalised update; matrices of one shape are handled together."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    shapes.setdefault((param.shape[0], param[0].numel()), []).append(param)
            for (rows, cols), params in shapes.items():
                updates = []
                for param in params:
                    state = self.state[param]
                    if not state:
                        state["buffer"] = torch.zeros_like(param)
                    buffer = state["buffer"].lerp_(param.grad, 1 - group["momentum"])
                    updates.append(param.grad.lerp(buffer, group["momentum"]).flatten(1))
                scale = group["lr"] * max(1.0, rows / cols) ** 0.5
                for param, update in zip(params, orthogonalise(torch.stack(updates)), strict=True):
                    param.add_(update.view_as(param), alpha=-scale)


def build_optimizers(model: nn.Module, lr_matrix: float, lr_other: float, skip: tuple[str, ...] = ()) -> list:
    """Muon on hidden matrices; AdamW on vectors, embeddings and modules whose name contains one of `skip`."""
    matrices, others = [], []
    for name, param in model.named_parameters():
        if param.requires_grad:
            hidden = param.ndim >= 2 and not any(part in name for part in skip)
            (matrices if hidden else others).append(param)
    optimizers: list = [torch.optim.AdamW(others, lr=lr_other, betas=(0.9, 0.99), weight_decay=0.0)]
    return [Muon(matrices, lr=lr_matrix), *optimizers] if matrices else optimizers


class Schedule:
    """Warm up, hold, then fall linearly to zero over the last part of a wall-clock budget."""

    def __init__(self, optimizers: list, fall: float = 0.5):
        self.optimizers, self.fall = optimizers, fall
        self.base = [[group["lr"] for group in opt.param_groups] for opt in optimizers]

    def set(self, progress: float, step: int) -> float:
        """`progress` in [0, 1] of the budget; returns the factor used."""
        factor = min(1.0, (step + 1) / 30, max(0.0, (1 - progress) / self.fall))
        for optimizer, rates in zip(self.optimizers, self.base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        return factor


class Ema:
    """Exponential moving average of a model's parameters, in fp32."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: param.detach().clone() for name, param in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        names, params = zip(*model.named_parameters(), strict=True)
        torch._foreach_lerp_([self.shadow[name] for name in names], list(params), 1 - decay)

    def copy_to(self, model: nn.Module) -> None:
        self.put(self.shadow, model)

    @staticmethod
    @torch.no_grad()
    def put(averages: dict[str, Tensor], model: nn.Module) -> None:
        for name, param in model.named_parameters():
            param.copy_(averages[name])
