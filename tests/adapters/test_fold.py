"""Folding: the product stays, the scale goes into the factors, fp16 keeps what it can."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.adapter_file import LoraPair, fold, is_finite
from sdlora.adapter_file.fold import largest_entry

SMALLEST_NORMAL_FP16 = torch.finfo(torch.float16).smallest_normal

pairs = st.builds(
    lambda seed, rank, in_dim, out_dim, down_exponent, up_exponent, alpha: LoraPair(
        down=torch.randn(rank, in_dim, generator=torch.Generator().manual_seed(seed)) * 10.0**down_exponent,
        up=torch.randn(out_dim, rank, generator=torch.Generator().manual_seed(seed + 1)) * 10.0**up_exponent,
        alpha=alpha,
    ),
    seed=st.integers(0, 1000),
    rank=st.integers(1, 8),
    in_dim=st.integers(1, 12),
    out_dim=st.integers(1, 12),
    down_exponent=st.integers(-4, 2),
    up_exponent=st.integers(-6, 2),
    alpha=st.floats(0.05, 64),
)


def product(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return up.double() @ down.double()


@settings(max_examples=100, deadline=None)
@given(pairs, st.floats(-3, 3).filter(lambda weight: abs(weight) > 1e-3))
def test_the_product_of_the_folded_factors_is_the_weighted_change(pair, weight) -> None:
    expected = product(pair.down, pair.up) * (weight * pair.alpha / pair.rank)
    # One fp32 rounding of each entry of up; the powers of two are exact. The sum over the rank may cancel.
    bound = product(pair.down.abs(), pair.up.abs()) * abs(weight * pair.alpha / pair.rank) * 2**-22
    assert torch.all((product(*fold(pair, weight=weight)) - expected).abs() <= bound)


@settings(max_examples=100, deadline=None)
@given(pairs)
def test_both_factors_end_up_equally_large(pair) -> None:
    down, up = fold(pair)
    ratio = (down.abs().max() / up.abs().max()).item()
    assert 0.49 <= ratio <= 2.04


@settings(max_examples=50, deadline=None)
@given(pairs)
def test_folding_twice_changes_nothing_more(pair) -> None:
    down, up = fold(pair)
    again = fold(LoraPair(down=down, up=up, alpha=float(pair.rank)))
    assert torch.equal(again[0], down)
    assert torch.equal(again[1], up)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-6, 1e-3))
def test_a_small_up_factor_survives_fp16(seed, size) -> None:
    generator = torch.Generator().manual_seed(seed)
    pair = LoraPair(
        down=torch.randn(4, 64, generator=generator) / 8, up=torch.randn(64, 4, generator=generator) * size, alpha=1.0
    )
    down, up = (factor.half() for factor in fold(pair))
    expected = product(pair.down, pair.up) / 4
    # Half a unit in the last place (2**-11) of either factor, on the largest entries.
    error = (product(down, up) - expected).abs().max() / expected.abs().max()
    assert error < 2 * 2**-11
    assert up.abs().max() > SMALLEST_NORMAL_FP16


def test_an_untrained_pair_stays_without_effect() -> None:
    down, up = fold(LoraPair(down=torch.randn(2, 3), up=torch.zeros(3, 2), alpha=1.0))
    assert torch.count_nonzero(up) == 0
    assert torch.isfinite(down).all()


def test_convolutions_keep_their_shapes() -> None:
    down, up = fold(LoraPair(down=torch.randn(2, 3, 3, 3), up=torch.randn(5, 2, 1, 1), alpha=1.0))
    assert down.shape == (2, 3, 3, 3)
    assert up.shape == (5, 2, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_one_broken_number_among_many_is_seen(dtype: torch.dtype, broken: float) -> None:
    for place in (0, 12, 32 * 40 - 1):
        numbers = torch.randn(32, 40).to(dtype)
        assert is_finite(numbers) and largest_entry(numbers) == float(numbers.abs().amax())
        numbers.view(-1)[place] = broken
        assert not is_finite(numbers)
