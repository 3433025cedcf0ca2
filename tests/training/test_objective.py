"""The objective against diffusers' scheduler and helpers, and against the algebra it comes from."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from sdlora.objective import (
    add_noise,
    diffusion_loss,
    loss_weights,
    min_snr_weights,
    multires_noise,
    offset_noise,
    prediction_target,
    signal_to_noise,
    to_prediction_type,
)

TIMESTEPS = torch.tensor([0, 1, 250, 500, 998, 999])


def scheduler(**options: object) -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)


def normal(seed: int) -> torch.Tensor:
    return torch.randn(len(TIMESTEPS), 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_noise_is_added_as_the_scheduler_does() -> None:
    reference = scheduler()
    ours = add_noise(normal(0), normal(1), reference.alphas_cumprod, TIMESTEPS)
    torch.testing.assert_close(ours, reference.add_noise(normal(0), normal(1), TIMESTEPS))


def test_targets_are_noise_velocity_or_sample() -> None:
    reference = scheduler()
    alphas = reference.alphas_cumprod
    assert torch.equal(prediction_target("epsilon", normal(0), normal(1), alphas, TIMESTEPS), normal(1))
    assert torch.equal(prediction_target("sample", normal(0), normal(1), alphas, TIMESTEPS), normal(0))
    torch.testing.assert_close(
        prediction_target("v_prediction", normal(0), normal(1), alphas, TIMESTEPS),
        reference.get_velocity(normal(0), normal(1), TIMESTEPS),
    )


def test_snr_equals_diffusers() -> None:
    reference = scheduler()
    ours = signal_to_noise(reference.alphas_cumprod, TIMESTEPS)
    torch.testing.assert_close(ours, compute_snr(reference, TIMESTEPS))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_weights_equal_the_formulas_of_diffusers_examples(gamma: float) -> None:
    snr = compute_snr(scheduler(), TIMESTEPS)
    capped = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    torch.testing.assert_close(min_snr_weights("epsilon", snr, gamma), capped / snr)
    torch.testing.assert_close(min_snr_weights("v_prediction", snr, gamma), capped / (snr + 1))
    torch.testing.assert_close(min_snr_weights("sample", snr, gamma), capped)
    assert torch.equal(min_snr_weights("epsilon", snr, 0.0), torch.ones_like(snr))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_all_forms_weigh_the_same_error_of_the_image_alike(prediction_type: str) -> None:
    """An error made in e, v or x0 changes the reconstructed x0; its weighted loss must be min(SNR, 5) |dx0|^2."""
    alphas = scheduler().alphas_cumprod
    kind = to_prediction_type(prediction_type)
    latents, noise, error = normal(0).double(), normal(1).double(), normal(2).double()
    snr = signal_to_noise(alphas, TIMESTEPS)
    alpha = alphas[TIMESTEPS][:, None, None, None].double()
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    target = prediction_target(kind, latents, noise, alphas, TIMESTEPS)
    answer = target + error
    x0 = {
        "epsilon": (noisy - (1 - alpha).sqrt() * answer) / alpha.sqrt(),
        "v_prediction": alpha.sqrt() * noisy - (1 - alpha).sqrt() * answer,
        "sample": answer,
    }[prediction_type]
    expected = snr.clamp(max=5) * (x0 - latents).square().flatten(1).mean(1).float()
    ours = diffusion_loss(answer, target, min_snr_weights(kind, snr, 5.0))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


def test_zero_terminal_snr_gives_finite_weights() -> None:
    alphas = torch.tensor([0.9, 0.5, 0.0])
    steps = torch.tensor([0, 1, 2])
    snr = signal_to_noise(alphas, steps)
    assert snr[2] == 0
    assert min_snr_weights("epsilon", snr, 5.0).tolist() == pytest.approx([5 / 9, 1.0, 1.0])
    assert min_snr_weights("v_prediction", snr, 5.0).tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_a_noiseless_step_has_no_weight_for_epsilon() -> None:
    snr = signal_to_noise(torch.tensor([1.0]), torch.tensor([0]))
    assert min_snr_weights("epsilon", snr, 5.0).tolist() == [0.0]


def test_the_loss_is_one_number_per_example() -> None:
    target = torch.zeros(3, 4, 2, 2)
    pred = torch.stack([torch.full((4, 2, 2), value) for value in (1.0, 2.0, 3.0)]).half()
    losses = diffusion_loss(pred, target, torch.tensor([1.0, 0.5, 0.0]))
    assert losses.tolist() == [1.0, 2.0, 0.0]
    assert losses.dtype == torch.float32


def test_offset_noise_moves_whole_channels() -> None:
    noise, offsets = normal(0), torch.arange(24.0).reshape(6, 4)
    moved = offset_noise(noise, offsets, 0.1) - noise
    torch.testing.assert_close(moved, (0.1 * offsets)[:, :, None, None].expand_as(noise), rtol=1e-4, atol=1e-6)


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match="flow"):
        to_prediction_type("flow")


# Further weightings, losses and kinds of noise.


@pytest.mark.parametrize("kind", ["debiased", "p2", "min-snr"])
def test_a_weighting_means_the_same_whatever_the_model_predicts(kind: str) -> None:
    """One error of x0 seen as an error of e, of v and of x0 costs the same."""
    snr = torch.tensor([0.05, 0.5, 1.0, 7.0, 300.0])
    alpha = snr / (1 + snr)
    of_x0 = torch.full_like(snr, 0.3)
    # e = (x_t - sqrt(a) x0) / sqrt(1 - a), v = (sqrt(a) x_t - x0) / sqrt(1 - a), both at a fixed x_t.
    of_e, of_v = of_x0 * (alpha / (1 - alpha)).sqrt(), of_x0 / (1 - alpha).sqrt()
    costs = [
        loss_weights(kind, name, snr) * error.square()
        for name, error in (("epsilon", of_e), ("v_prediction", of_v), ("sample", of_x0))
    ]
    assert torch.allclose(costs[0], costs[1], rtol=1e-5)
    assert torch.allclose(costs[0], costs[2], rtol=1e-5)


def test_the_weightings_are_those_of_the_papers_for_epsilon() -> None:
    snr = torch.tensor([0.01, 1.0, 50.0])
    assert torch.allclose(loss_weights("debiased", "epsilon", snr), 1 / snr.sqrt())
    assert torch.allclose(loss_weights("p2", "epsilon", snr), 1 / (1 + snr))
    assert torch.equal(loss_weights("none", "epsilon", snr), torch.ones(3))
    assert torch.equal(loss_weights("min-snr", "epsilon", snr, 5.0), min_snr_weights("epsilon", snr, 5.0))


@pytest.mark.parametrize("kind", ["debiased", "p2", "min-snr", "none"])
@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "sample"])
def test_the_ends_of_the_schedule_have_finite_weights(kind: str, name: str) -> None:
    weights = loss_weights(kind, name, torch.tensor([0.0, 1e-9, 1e9]))
    assert weights.isfinite().all() and (weights >= 0).all()


def test_the_robust_losses_equal_their_formulas() -> None:
    error = torch.tensor([[-3.0, -0.05, 0.0, 0.02, 0.7]])
    ones, zero = torch.ones(1), torch.zeros_like(error)
    size, delta = error.abs(), 0.1
    huber = torch.where(size < delta, error**2, 2 * delta * (size - delta / 2)).mean()
    smooth = torch.where(size < delta, error**2 / delta, 2 * size - delta).mean()
    assert diffusion_loss(error, zero, ones, kind="huber", delta=delta).item() == pytest.approx(huber.item())
    assert diffusion_loss(error, zero, ones, kind="smooth_l1", delta=delta).item() == pytest.approx(smooth.item())
    assert diffusion_loss(error, zero, ones, kind="huber", delta=10).item() == pytest.approx(
        error.square().mean().item()
    )


def test_multires_noise_has_spread_one_and_more_of_the_coarse() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 4, 16, 16, generator=generator)
    coarse = [torch.randn(64, 4, side, side, generator=generator) for side in (8, 4, 2, 1)]
    mixed = multires_noise(noise, coarse, 0.5)
    assert torch.allclose(mixed.flatten(1).std(1), torch.ones(64), atol=1e-5)
    # The mean over the picture of white noise has a spread of 1/16.
    assert noise.mean((2, 3)).std() < 0.08 < 0.1 < mixed.mean((2, 3)).std()
    assert torch.allclose(multires_noise(noise, [], 0.5), noise / noise.flatten(1).std(1)[:, None, None, None])
