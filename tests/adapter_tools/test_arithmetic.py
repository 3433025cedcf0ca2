"""Merging, resizing and comparing, against the dense matrices that they never form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdlora.adapter_file import AdapterWeights, LoraPair
from sdlora.adapter_tools import difference, energy_rank, extract_pairs, merge_adapters, resize_adapter
from sdlora.errors import AdapterError

LINEAR, CONV = "mid_block.attentions.0.proj_in", "conv_in"


def pair(rank: int, *, seed: int = 0, out: int = 24, into: int = 16, kernel: int = 0, alpha: float = 2.0) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    down = (rank, into, kernel, kernel) if kernel else (rank, into)
    up = (out, rank, 1, 1) if kernel else (out, rank)
    return LoraPair(torch.randn(down, generator=generator), torch.randn(up, generator=generator), alpha)


def adapter(*pairs: tuple[str, LoraPair]) -> AdapterWeights:
    return AdapterWeights(unet=dict(pairs))


def dense(p: LoraPair) -> Tensor:
    return p.alpha / p.rank * p.up.flatten(1).double() @ p.down.flatten(1).double()


@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_a_merge_is_the_weighted_sum(kernel: int) -> None:
    a, b = pair(3, seed=1, kernel=kernel, alpha=1.5), pair(5, seed=2, kernel=kernel, alpha=4.0)
    only = pair(2, seed=3)
    merged = merge_adapters([(adapter((LINEAR, a)), 0.7), (adapter((LINEAR, b), (CONV, only)), -0.5)])
    result = merged["unet"][LINEAR]
    assert (result.rank, result.scale) == (8, 1.0)
    assert torch.allclose(dense(result), 0.7 * dense(a) - 0.5 * dense(b), atol=1e-5)
    assert torch.allclose(dense(merged["unet"][CONV]), -0.5 * dense(only), atol=1e-5)


def test_an_adapter_of_weight_zero_is_left_out_and_only_zeros_are_refused() -> None:
    a, b = adapter((LINEAR, pair(3))), adapter((LINEAR, pair(5, seed=1)))
    assert merge_adapters([(a, 1.0), (b, 0.0)])["unet"][LINEAR].rank == 3
    with pytest.raises(AdapterError, match="nothing to merge"):
        merge_adapters([(a, 0.0)])


def test_adapters_for_other_models_do_not_merge() -> None:
    with pytest.raises(AdapterError, match="made for other models"):
        merge_adapters([(adapter((LINEAR, pair(3))), 1.0), (adapter((LINEAR, pair(3, into=20))), 1.0)])


@pytest.mark.parametrize("kernel", [0, 3])
def test_a_resized_layer_is_the_best_of_its_rank_and_its_error_is_told(kernel: int) -> None:
    original = pair(8, kernel=kernel)
    resized = resize_adapter(adapter((LINEAR, original)), rank=3)
    small = resized.parts["unet"][LINEAR]
    assert small.down.shape[1:] == original.down.shape[1:] and small.rank == 3
    up, values, down = torch.linalg.svd(dense(original), full_matrices=False)
    best = up[:, :3] @ torch.diag(values[:3]) @ down[:3]
    assert torch.allclose(dense(small), best, atol=1e-4)
    gap = (dense(small) - dense(original)).norm() / dense(original).norm()
    assert resized.errors[f"unet.{LINEAR}"] == pytest.approx(float(gap), rel=1e-4)


def test_resizing_to_the_same_rank_or_above_changes_nothing() -> None:
    original = adapter((LINEAR, pair(6)), (CONV, pair(4, kernel=3)))
    resized = resize_adapter(original, rank=100)
    assert resized.error < 1e-6
    assert max(difference(original, AdapterWeights(unet=resized.parts["unet"])).values()) < 1e-5


def test_the_energy_decides_the_rank_of_each_layer() -> None:
    flat = pair(8, alpha=8.0)
    steep = LoraPair(flat.down, flat.up * torch.tensor([2.0**-n for n in range(8)]), 8.0)
    parts = resize_adapter(adapter((LINEAR, flat), (CONV, steep)), energy=0.9).parts["unet"]
    assert parts[CONV].rank < parts[LINEAR].rank < 8
    assert resize_adapter(adapter((CONV, steep)), energy=0.9, rank=1).parts["unet"][CONV].rank == 1


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), st.floats(0.01, 1))
@settings(max_examples=100, deadline=None)
def test_the_energy_rank_is_the_smallest_that_holds_enough(values: list[float], energy: float) -> None:
    ordered = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank, squares = energy_rank(ordered, energy), ordered.square()
    assert squares[:rank].sum() >= energy * squares.sum() * (1 - 1e-9)
    assert rank == 1 or squares[: rank - 1].sum() < energy * squares.sum()


def test_a_rank_larger_than_the_layer_and_a_zero_adapter_are_no_trouble() -> None:
    wide = pair(32, out=8, into=8)
    resized = resize_adapter(adapter((LINEAR, wide)), energy=1.0)
    assert resized.parts["unet"][LINEAR].rank <= 8
    nothing = LoraPair(torch.zeros(4, 16), torch.zeros(24, 4), 4.0)
    assert resize_adapter(adapter((LINEAR, nothing)), rank=2).error == 0.0


@pytest.mark.parametrize("wrong", [{}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}])
def test_a_size_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        resize_adapter(adapter((LINEAR, pair(3))), **wrong)


def test_the_difference_is_that_of_the_dense_changes() -> None:
    a, b = pair(3, seed=1), pair(5, seed=2, alpha=3.0)
    gaps = difference(adapter((LINEAR, a), (CONV, a)), adapter((LINEAR, b)))
    expected = (dense(a) - dense(b)).norm() / max(dense(a).norm(), dense(b).norm())
    assert gaps[f"unet.{LINEAR}"] == pytest.approx(float(expected), rel=1e-6)
    assert gaps[f"unet.{CONV}"] == 1.0
    assert difference(adapter((LINEAR, a)), adapter((LINEAR, a)))[f"unet.{LINEAR}"] < 1e-7
    assert difference(adapter((LINEAR, a)), adapter((LINEAR, pair(3, into=20))))[f"unet.{LINEAR}"] == 1.0


@pytest.mark.parametrize("shape", [(24, 16), (24, 16, 3, 3)])
def test_what_a_low_rank_tuning_changed_is_extracted_exactly(shape: tuple[int, ...]) -> None:
    base = {"a": torch.randn(shape, generator=torch.Generator().manual_seed(0)), "b": torch.ones(4, 4)}
    change = pair(3, kernel=shape[-1] if len(shape) == 4 else 0)
    tuned = {"a": base["a"] + dense(change).float().view(shape), "b": base["b"]}
    errors: dict[str, float] = {}
    pairs = extract_pairs(tuned, base, rank=4, tell=errors.__setitem__)
    assert list(pairs) == ["a"]
    assert torch.allclose(dense(pairs["a"]), dense(change), atol=1e-4)
    assert errors["a"] < 1e-5
    assert extract_pairs(tuned, base, rank=4, energy=0.5)["a"].rank < 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_numbers_in_a_coarser_format_are_no_change_and_a_real_change_is_one(dtype: torch.dtype) -> None:
    fine = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    coarse = fine.to(dtype)
    for tuned, base in ((fine, coarse), (coarse, fine), (coarse.float(), fine), (coarse, coarse)):
        assert extract_pairs({"a": tuned}, {"a": base}, rank=2) == {}
    changed = coarse.clone()
    changed[0, 0] = torch.nextafter(changed[0, 0].float(), torch.tensor(9.0)) + 0.1
    assert extract_pairs({"a": changed}, {"a": fine}, rank=2)["a"].rank == 2


def test_models_that_do_not_fit_are_refused_and_equal_ones_give_nothing() -> None:
    base = {"a": torch.ones(4, 4)}
    assert extract_pairs(base, base, rank=2) == {}
    with pytest.raises(AdapterError, match="same layers"):
        extract_pairs({"c": torch.ones(4, 4)}, base, rank=2)
    with pytest.raises(AdapterError, match=r"\[4, 5\] in one model"):
        extract_pairs({"a": torch.ones(4, 5)}, base, rank=2)


def test_nothing_here_reads_or_writes_files() -> None:
    assert adapter((LINEAR, pair(2))).path == Path()
