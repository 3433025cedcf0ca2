"""Random choices come from counters and leave the global generator alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.batches import ExposureOrder
from sdlora.randomness import counter_generator, counter_seed, counter_uniform, spread_timesteps


def test_every_argument_matters_and_nothing_else() -> None:
    seeds = {
        counter_seed(0, "noise", 1, 2),
        counter_seed(1, "noise", 1, 2),
        counter_seed(0, "flip", 1, 2),
        counter_seed(0, "noise", 12),
        counter_seed(0, "noise", 2, 1),
        counter_seed(0, "noise", 1),
    }
    assert len(seeds) == 6
    torch.manual_seed(5)
    assert counter_seed(0, "noise", 1, 2) in seeds


def test_the_numbers_are_the_same_for_ever() -> None:
    """A run that goes on with a later version must draw what it would have drawn."""
    assert counter_seed(0, "noise", 0) == 8703359565644503973
    first = torch.randn(2, generator=counter_generator(0, "noise", 0))
    assert torch.equal(first, torch.randn(2, generator=counter_generator(0, "noise", 0)))


def test_the_global_generator_is_not_touched() -> None:
    before = torch.get_rng_state()
    torch.randn(3, generator=counter_generator(0, "noise", 0))
    counter_uniform(0, "flip", 1)
    spread_timesteps(torch.arange(8), seed=0, num_train_timesteps=1000)
    ExposureOrder([0] * 5, group_size=2, seed=0).epoch(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_uniform_numbers_are_uniform() -> None:
    numbers = [counter_uniform(3, "caption-dropout", n) for n in range(10_000)]
    assert all(0 <= number < 1 for number in numbers)
    # Three standard deviations of a binomial with n = 10000, p = 0.1.
    assert abs(sum(number < 0.1 for number in numbers) - 1000) < 90


@settings(deadline=None)
@given(start=st.integers(0, 10**6), size=st.integers(2, 32), seed=st.integers(0, 99))
def test_each_batch_spreads_its_timesteps(start: int, size: int, seed: int) -> None:
    timesteps = spread_timesteps(torch.arange(start, start + size), seed=seed, num_train_timesteps=1000)
    assert int(timesteps.min()) >= 0 and int(timesteps.max()) < 1000
    ordered = sorted(timesteps.tolist())
    gaps = [b - a for a, b in zip(ordered, [*ordered[1:], ordered[0] + 1000], strict=True)]
    # Three-distance theorem for the golden ratio: no gap is longer than 1.9 times the mean one (at 2 points: 0.618).
    assert max(gaps) <= 1.9 * 1000 / size + 1


def test_timesteps_are_uniform_in_the_long_run() -> None:
    timesteps = spread_timesteps(torch.arange(10_000), seed=0, num_train_timesteps=1000)
    counts = torch.bincount(timesteps // 100, minlength=10)
    assert counts.sum() == 10_000
    assert int((counts - 1000).abs().max()) <= 5


sizes = st.lists(st.sampled_from(["square", "tall", "wide"]), min_size=1, max_size=30)


@settings(deadline=None)
@given(sizes=sizes, group_size=st.integers(1, 8), seed=st.integers(0, 9))
def test_every_epoch_shows_each_entry_once(sizes: list[str], group_size: int, seed: int) -> None:
    order = ExposureOrder(sizes, group_size=group_size, seed=seed)
    shown = [order.entry(exposure) for exposure in range(2 * len(sizes))]
    assert sorted(shown[: len(sizes)]) == sorted(shown[len(sizes) :]) == list(range(len(sizes)))


@settings(deadline=None)
@given(sizes=sizes, group_size=st.integers(1, 8))
def test_entries_of_one_size_stand_together_as_far_as_they_go(sizes: list[str], group_size: int) -> None:
    epoch = ExposureOrder(sizes, group_size=group_size, seed=0).epoch(3)
    num_full = sum(count // group_size for count in Counter(sizes).values())
    groups = [epoch[n * group_size : (n + 1) * group_size] for n in range(num_full)]
    assert all(len({sizes[entry] for entry in group}) == 1 for group in groups)


def test_the_order_differs_from_epoch_to_epoch_and_can_be_asked_for_anywhere() -> None:
    order = ExposureOrder(["a"] * 20, group_size=4, seed=1)
    assert order.epoch(0) != order.epoch(1)
    assert order.epoch(0) != list(range(20))
    assert [order.entry(n) for n in (45, 3, 45)] == [order.epoch(2)[5], order.epoch(0)[3], order.epoch(2)[5]]


@pytest.mark.parametrize(("bias", "mean"), [("none", 0.5), ("noisy", 2 / 3), ("clean", 1 / 3)])
def test_timesteps_can_be_biased_and_kept_to_a_part(bias: str, mean: float) -> None:
    exposures = torch.arange(5000)
    timesteps = spread_timesteps(exposures, seed=0, num_train_timesteps=1000, span=(0.2, 0.7), bias=bias)
    assert timesteps.min() >= 200 and timesteps.max() < 700
    assert timesteps.double().mean().item() == pytest.approx(200 + 500 * mean, abs=4)
    quarters = torch.histc(timesteps.float(), 4, 200, 700) / 5000
    expected = {"none": [1, 1, 1, 1], "noisy": [1 / 4, 3 / 4, 5 / 4, 7 / 4], "clean": [7 / 4, 5 / 4, 3 / 4, 1 / 4]}
    assert quarters.tolist() == pytest.approx([share / 4 for share in expected[bias]], abs=0.01)
