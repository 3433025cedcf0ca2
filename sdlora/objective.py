"""The training objective: noisy latents, targets, weights and loss. Tensors in, tensors out; no models, no randomness.

Symbols: a clean latent x0, noise e, and a(t) = `alphas_cumprod[t]`; the noisy latent is sqrt(a) x0 + sqrt(1 - a) e and
the signal-to-noise ratio SNR = a / (1 - a). Latents are [B, C, h, w], timesteps int64 [B], per-example results [B].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "LossKind",
    "PredictionType",
    "Weighting",
    "add_noise",
    "diffusion_loss",
    "loss_weights",
    "min_snr_weights",
    "multires_noise",
    "offset_noise",
    "prediction_target",
    "signal_to_noise",
    "to_prediction_type",
]

PredictionType: TypeAlias = Literal["epsilon", "v_prediction", "sample"]
LossKind: TypeAlias = Literal["mse", "huber", "smooth_l1"]
Weighting: TypeAlias = Literal["min-snr", "debiased", "p2", "none"]

_LARGEST_SNR = 1000.0


def to_prediction_type(name: str) -> PredictionType:
    """The name as a type.

    Raises:
        ValueError: it is none of "epsilon", "v_prediction", "sample".
    """
    if name not in get_args(PredictionType):
        raise ValueError(f"prediction_type must be one of {', '.join(get_args(PredictionType))}, not {name!r}")
    return cast(PredictionType, name)


def offset_noise(noise: Tensor, channel_offsets: Tensor, strength: float) -> Tensor:
    """Noise plus `strength` times one constant per example and channel ([B, C], standard normal)."""
    return noise + strength * channel_offsets[:, :, None, None]


def multires_noise(noise: Tensor, coarse: Sequence[Tensor], discount: float) -> Tensor:
    """Noise with coarser noise on top, brought back to a standard deviation of 1 per example (Whitaker, 2023).

    `coarse` are standard normal tensors [B, C, h', w'], each about half the size of the one before; the first counts
    `discount` times, the next the square of it, and so on.
    """
    total = noise
    for number, level in enumerate(coarse, 1):
        enlarged = F.interpolate(level, size=noise.shape[-2:], mode="bilinear", align_corners=False)
        total = total + discount**number * enlarged
    return total / total.flatten(1).std(1)[:, None, None, None]


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """sqrt(a) x0 + sqrt(1 - a) e (DDPM, arXiv 2006.11239, eq. 4)."""
    signal, sigma = _signal_and_sigma(alphas_cumprod, timesteps)
    return signal * latents + sigma * noise


def prediction_target(
    prediction_type: PredictionType, latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor
) -> Tensor:
    """What the model should answer: e, x0, or v = sqrt(a) e - sqrt(1 - a) x0 (arXiv 2202.00512, sec. 4)."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return latents
    signal, sigma = _signal_and_sigma(alphas_cumprod, timesteps)
    return signal * noise - sigma * latents


def signal_to_noise(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """SNR = a / (1 - a), [B], in [0, inf]; 0 at the last step of a schedule with zero terminal SNR."""
    alpha = alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    return alpha / (1 - alpha)


def min_snr_weights(prediction_type: PredictionType, snr: Tensor, gamma: float) -> Tensor:
    """Loss weights of Min-SNR (arXiv 2303.09556, sec. 3.4), [B]; gamma 0 gives ones.

    The paper weighs the error of x0 by min(SNR, gamma). An error of e is one of x0 times SNR, and one of v is one of
    x0 times SNR + 1, so those divide by it. For e the quotient min(1, gamma / SNR) is 1 at SNR = 0, not 0 / 0.
    """
    if gamma == 0:
        return torch.ones_like(snr)
    if prediction_type == "epsilon":
        return gamma / snr.clamp(min=gamma)
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return snr.clamp(max=gamma)


def loss_weights(kind: Weighting, prediction_type: PredictionType, snr: Tensor, gamma: float = 5.0) -> Tensor:
    """Loss weights [B] of a weighting by its name; `gamma` is Min-SNR's.

    "debiased" weighs the error of e by 1 / sqrt(SNR) (arXiv 2310.08442, eq. 11), "p2" by 1 / (1 + SNR) (arXiv
    2204.00227, eq. 8 with k = gamma = 1). The error of v is that of e times (SNR + 1) / SNR, that of x0 1 / SNR.
    """
    if kind == "none":
        return torch.ones_like(snr)
    if kind == "min-snr":
        return min_snr_weights(prediction_type, snr, gamma)
    bounded = snr.clamp(max=_LARGEST_SNR)
    if kind == "debiased":
        if prediction_type == "epsilon":
            # At SNR = 0 an error of e says nothing about the picture; the weight must not run away there.
            return bounded.clamp(min=1 / _LARGEST_SNR).rsqrt()
        return bounded.sqrt() / (snr + 1) if prediction_type == "v_prediction" else bounded.sqrt()
    if prediction_type == "epsilon":
        return 1 / (1 + snr)
    return bounded / (1 + bounded).square() if prediction_type == "v_prediction" else bounded / (1 + bounded)


def diffusion_loss(
    model_pred: Tensor,
    target: Tensor,
    weights: Tensor,
    *,
    kind: LossKind = "mse",
    delta: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    """Weighted mean error of each example in fp32, [B]. A `mask` [B, 1, h, w] in 0..1 says how much each place counts;
    the mean is over all places, so that one counts the same in every picture.

    "huber" is twice PyTorch's and "smooth_l1" twice its own, so that both equal "mse" for errors below `delta` (times
    1 / delta for the latter).
    """
    error = model_pred.float() - target.float()
    if kind == "mse":
        each = error.square()
    elif kind == "huber":
        each = 2 * F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)
    else:
        each = 2 * F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=delta)
    if mask is not None:
        each = each * mask
    return weights * each.flatten(1).mean(1)


def _signal_and_sigma(alphas_cumprod: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    alpha = alphas_cumprod.to(timesteps.device, torch.float32)[timesteps][:, None, None, None]
    return alpha.sqrt(), (1 - alpha).sqrt()
