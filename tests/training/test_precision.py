"""Which number format is used where."""

from __future__ import annotations

import pytest
import torch

from sdlora import precision as precision_module
from sdlora.precision import Precision, choose_precision, has_bf16_arithmetic


@pytest.mark.parametrize(
    ("device", "bf16", "expected"),
    [
        ("cuda", True, "fp16"),
        ("cuda", False, "fp16"),
        ("cpu", True, "bf16"),
        ("cpu", False, "fp32"),
        ("mps", True, "fp32"),
    ],
)
def test_the_device_decides_unless_told(
    device: str, bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision_module, "has_bf16_arithmetic", lambda: bf16)
    assert choose_precision("auto", torch.device(device)) == Precision(expected, device)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32"])
def test_what_is_asked_for_is_given(name: str) -> None:
    assert choose_precision(name, torch.device("cpu")).name == name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_products_are_computed_in_the_format(name: str, dtype: torch.dtype) -> None:
    precision = Precision(name, "cpu")  # type: ignore[arg-type]
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert precision.weight_dtype == dtype


def test_only_fp16_needs_a_scaler() -> None:
    scaler = Precision("fp16", "cpu").grad_scaler()
    assert scaler is not None and scaler.is_enabled()
    assert Precision("bf16", "cpu").grad_scaler() is None
    assert Precision("fp32", "cpu").grad_scaler() is None


def test_without_the_private_checks_the_answer_is_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert has_bf16_arithmetic() is False
