"""Aspect-ratio buckets and crop geometry: integers in, integers out. No image is touched here.

A bucket is a size that pictures of a similar shape are brought to, so that they can share a batch and little is
cut off. A picture is scaled until it just covers its bucket; what sticks out is cut off evenly on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["CropPlan", "bucket_step", "make_buckets", "plan_closer_crop", "plan_crop"]

_MIN_AREA = Fraction(3, 4)
_CLOSEST = 1.25
_USUAL_STEP = 64


@dataclass(frozen=True)
class CropPlan:
    """How one picture becomes one training example; all in pixels."""

    bucket_hw: tuple[int, int]
    resized_hw: tuple[int, int]  # covers the bucket, and equals it in at least one direction
    crop_top_left_yx: tuple[int, int]  # of the bucket within the resized picture


def make_buckets(resolution: int, *, step: int = 64, max_aspect_ratio: float = 2.0) -> tuple[tuple[int, int], ...]:
    """All buckets (height, width), sorted: the largest square that fits, and longer shapes both ways.

    Sides are multiples of `step`; the area is at most resolution² and, but for the square, at least three quarters of
    it; long side / short side is at most `max_aspect_ratio`; one bucket for each shape.
    Raises `ValueError` if not even step x step fits.
    """
    if step < 1 or resolution < step or not max_aspect_ratio >= 1:
        raise ValueError(f"no buckets for resolution {resolution}, step {step}, aspect ratio {max_aspect_ratio}")
    square = resolution // step * step
    by_shape = {Fraction(1): (square, square)}
    for short in range(step, square + 1, step):
        long = min(resolution**2 // short, int(short * max_aspect_ratio)) // step * step
        if long > short and short * long >= _MIN_AREA * resolution**2:
            by_shape[Fraction(short, long)] = (short, long)
            by_shape[Fraction(long, short)] = (long, short)
    return tuple(sorted(by_shape.values()))


def bucket_step(resolution: int, size_step: int) -> int:
    """The step of the buckets for a base whose sides are multiples of `size_step`.

    Finer steps than 64 only make more buckets with fewer pictures each, once pictures are large.
    """
    return size_step if resolution < 8 * _USUAL_STEP else max(size_step, _USUAL_STEP)


def plan_crop(size_hw: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> CropPlan:
    """The bucket that keeps the largest share of a picture of `size_hw` (the larger one of equals), and the way there.

    Raises `ValueError` for an empty picture or no buckets.
    """
    if min(size_hw) < 1 or not buckets:
        raise ValueError(f"cannot crop a picture of size {size_hw} to one of {len(buckets)} buckets")
    bucket_hw = max(buckets, key=lambda bucket: (_kept_share(size_hw, bucket), bucket[0] * bucket[1]))
    resized_hw = _covering_size(size_hw, bucket_hw)
    top_left = ((resized_hw[0] - bucket_hw[0]) // 2, (resized_hw[1] - bucket_hw[1]) // 2)
    return CropPlan(bucket_hw=bucket_hw, resized_hw=resized_hw, crop_top_left_yx=top_left)


def plan_closer_crop(whole: CropPlan, size_hw: tuple[int, int], *, zoom: float, down: float, across: float) -> CropPlan:
    """Another cut-out of the same bucket from a picture of `size_hw`: from closer by, up to 1.25 times but never beyond
    the picture's own pixels, and anywhere. `zoom`, `down` and `across` are in [0, 1); `whole` is from `plan_crop`.
    """
    (height, width), (rows, columns) = whole.resized_hw, whole.bucket_hw
    closest = max(1.0, min(_CLOSEST, size_hw[0] / height, size_hw[1] / width))
    factor = 1 + zoom * (closest - 1)
    resized_hw = (round(height * factor), round(width * factor))
    top_left = (int(down * (resized_hw[0] - rows + 1)), int(across * (resized_hw[1] - columns + 1)))
    return CropPlan(bucket_hw=whole.bucket_hw, resized_hw=resized_hw, crop_top_left_yx=top_left)


def _kept_share(size_hw: tuple[int, int], bucket_hw: tuple[int, int]) -> Fraction:
    ratio = Fraction(size_hw[0] * bucket_hw[1], size_hw[1] * bucket_hw[0])
    return min(ratio, 1 / ratio)


def _covering_size(size_hw: tuple[int, int], bucket_hw: tuple[int, int]) -> tuple[int, int]:
    (height, width), (bucket_height, bucket_width) = size_hw, bucket_hw
    if height * bucket_width >= width * bucket_height:
        return _round_div(height * bucket_width, width), bucket_width
    return bucket_height, _round_div(width * bucket_height, height)


def _round_div(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
