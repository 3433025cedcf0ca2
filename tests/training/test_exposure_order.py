"""The order of exposures, for whatever buckets: nothing is lost, nothing shown twice."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.batches import ExposureOrder

BUCKETS = st.lists(st.integers(1, 9), min_size=1, max_size=6)  # images in each


@settings(max_examples=40, deadline=None)
@given(BUCKETS, st.integers(1, 12), st.integers(0, 2**32))
def test_every_image_is_shown_exactly_once_an_epoch_however_small_its_bucket(
    buckets: list[int], group_size: int, seed: int
) -> None:
    sizes = [bucket for bucket, count in enumerate(buckets) for _ in range(count)]
    order = ExposureOrder(sizes, group_size=group_size, seed=seed)
    for epoch in range(3):
        start = epoch * len(sizes)
        assert Counter(order.entry(start + n) for n in range(len(sizes))) == Counter(range(len(sizes)))


@settings(max_examples=40, deadline=None)
@given(BUCKETS, st.integers(1, 5))
def test_full_groups_of_one_size_come_first_and_hold_one_size(buckets: list[int], group_size: int) -> None:
    sizes = [bucket for bucket, count in enumerate(buckets) for _ in range(count)]
    shown = [sizes[entry] for entry in ExposureOrder(sizes, group_size=group_size, seed=0).epoch(0)]
    num_full = sum(count // group_size for count in buckets)
    groups = [shown[n * group_size : (n + 1) * group_size] for n in range(num_full)]
    assert all(len(set(group)) == 1 for group in groups)
    rest = Counter(shown[num_full * group_size :])
    assert rest == Counter({bucket: n % group_size for bucket, n in enumerate(buckets) if n % group_size})
