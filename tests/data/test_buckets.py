"""Buckets and crops, by their properties."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sdlora.data.buckets import make_buckets, plan_closer_crop, plan_crop

sides = st.integers(1, 20_000)
sizes = st.tuples(sides, sides)
resolutions = st.integers(64, 1100)
steps = st.sampled_from((16, 32, 64))
ratios = st.floats(1.0, 4.0)

few = settings(max_examples=40, deadline=None)


@few
@given(resolutions, steps, ratios)
def test_buckets_are_multiples_of_the_step_within_area_and_aspect_ratio(
    resolution: int, step: int, ratio: float
) -> None:
    for height, width in make_buckets(resolution, step=step, max_aspect_ratio=ratio):
        assert height % step == 0
        assert width % step == 0
        assert 0 < height * width <= resolution**2
        assert max(height, width) <= ratio * min(height, width)


@few
@given(resolutions, steps, ratios)
def test_buckets_are_sorted_distinct_shapes_that_come_in_both_directions(
    resolution: int, step: int, ratio: float
) -> None:
    buckets = make_buckets(resolution, step=step, max_aspect_ratio=ratio)
    assert list(buckets) == sorted(set(buckets))
    assert {(width, height) for height, width in buckets} == set(buckets)
    assert len({Fraction(height, width) for height, width in buckets}) == len(buckets)
    assert (resolution // step * step, resolution // step * step) in buckets


def test_the_buckets_of_512_are_these() -> None:
    expected = ((320, 640), (384, 640), (448, 576), (512, 512), (576, 448), (640, 384), (640, 320))
    assert make_buckets(512) == tuple(sorted(expected))


def test_the_only_bucket_of_128_with_step_64_is_the_square() -> None:
    assert make_buckets(128) == ((128, 128),)


@pytest.mark.parametrize(
    ("resolution", "step", "ratio"), [(32, 64, 2.0), (512, 0, 2.0), (512, 64, 0.5), (512, 64, float("nan"))]
)
def test_impossible_buckets_are_refused(resolution: int, step: int, ratio: float) -> None:
    with pytest.raises(ValueError, match="no buckets"):
        make_buckets(resolution, step=step, max_aspect_ratio=ratio)


@few
@given(sizes, resolutions, steps)
def test_the_resized_picture_covers_its_bucket_and_touches_it_in_one_direction(
    size_hw: tuple[int, int], resolution: int, step: int
) -> None:
    plan = plan_crop(size_hw, make_buckets(resolution, step=step))
    over = [resized - bucket for resized, bucket in zip(plan.resized_hw, plan.bucket_hw, strict=True)]
    assert min(over) == 0


@few
@given(sizes, resolutions, steps)
def test_the_crop_lies_inside_the_resized_picture_and_in_its_middle(
    size_hw: tuple[int, int], resolution: int, step: int
) -> None:
    plan = plan_crop(size_hw, make_buckets(resolution, step=step))
    for start, bucket, resized in zip(plan.crop_top_left_yx, plan.bucket_hw, plan.resized_hw, strict=True):
        before, after = start, resized - bucket - start
        assert before >= 0
        assert after - before in (0, 1)


@few
@given(sizes, resolutions, steps)
def test_resizing_keeps_the_aspect_ratio_to_half_a_pixel(size_hw: tuple[int, int], resolution: int, step: int) -> None:
    plan = plan_crop(size_hw, make_buckets(resolution, step=step))
    (height, width), (resized_height, resized_width) = size_hw, plan.resized_hw
    by_height = abs(Fraction(resized_height * width, height) - resized_width)
    by_width = abs(Fraction(resized_width * height, width) - resized_height)
    assert min(by_height, by_width) <= Fraction(1, 2)


@few
@given(sizes, resolutions, steps)
def test_no_other_bucket_would_cut_off_less(size_hw: tuple[int, int], resolution: int, step: int) -> None:
    buckets = make_buckets(resolution, step=step)

    def cut_off(bucket_hw: tuple[int, int]) -> Fraction:
        scale = max(Fraction(bucket_hw[0], size_hw[0]), Fraction(bucket_hw[1], size_hw[1]))
        return 1 - Fraction(bucket_hw[0] * bucket_hw[1]) / (size_hw[0] * size_hw[1] * scale**2)

    assert cut_off(plan_crop(size_hw, buckets).bucket_hw) == min(map(cut_off, buckets))


@few
@given(sizes, resolutions)
def test_a_picture_on_its_side_gets_the_plan_on_its_side(size_hw: tuple[int, int], resolution: int) -> None:
    buckets = make_buckets(resolution)
    upright, lying = plan_crop(size_hw, buckets), plan_crop(size_hw[::-1], buckets)
    # A shape right between two buckets may fall to either of them.
    assume(lying.bucket_hw == upright.bucket_hw[::-1])
    assert lying.resized_hw == upright.resized_hw[::-1]
    assert lying.crop_top_left_yx == upright.crop_top_left_yx[::-1]


@pytest.mark.parametrize("resolution", [128, 512, 1024])
def test_a_picture_of_a_buckets_size_is_left_as_it_is(resolution: int) -> None:
    buckets = make_buckets(resolution)
    for bucket in buckets:
        plan = plan_crop(bucket, buckets)
        assert (plan.bucket_hw, plan.resized_hw, plan.crop_top_left_yx) == (bucket, bucket, (0, 0))


def test_a_wide_picture_is_scaled_to_the_height_of_its_bucket_and_cut_left_and_right() -> None:
    plan = plan_crop((1000, 1500), ((512, 512),))
    assert (plan.resized_hw, plan.crop_top_left_yx) == ((512, 768), (0, 128))


@pytest.mark.parametrize(("size_hw", "buckets"), [((0, 5), ((64, 64),)), ((5, 5), ())])
def test_an_empty_picture_or_no_bucket_is_refused(size_hw: tuple[int, int], buckets: tuple[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="cannot crop"):
        plan_crop(size_hw, buckets)


chances = st.floats(0, 1, exclude_max=True)


@few
@given(sizes, resolutions, chances, chances, chances)
def test_a_closer_crop_lies_inside_and_is_enlarged_no_further_than_the_whole(
    size_hw: tuple[int, int], resolution: int, zoom: float, down: float, across: float
) -> None:
    whole = plan_crop(size_hw, make_buckets(resolution))
    closer = plan_closer_crop(whole, size_hw, zoom=zoom, down=down, across=across)
    assert closer.bucket_hw == whole.bucket_hw
    for side in range(2):
        assert whole.resized_hw[side] <= closer.resized_hw[side] <= max(size_hw[side], whole.resized_hw[side])
        assert closer.resized_hw[side] <= 1.25 * whole.resized_hw[side] + 0.5
        assert 0 <= closer.crop_top_left_yx[side] <= closer.resized_hw[side] - closer.bucket_hw[side]


def test_closer_crops_reach_both_edges_and_a_quarter_closer() -> None:
    whole = plan_crop((1000, 1000), make_buckets(512))
    closest = plan_closer_crop(whole, (1000, 1000), zoom=1 - 1e-9, down=0.0, across=1 - 1e-9)
    assert (closest.resized_hw, closest.crop_top_left_yx) == ((640, 640), (0, 128))
    assert plan_closer_crop(whole, (1000, 1000), zoom=0.0, down=0.5, across=0.5) == whole
