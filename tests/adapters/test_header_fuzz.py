"""No damaged or hostile file causes anything but one sentence: no other error, no memory, no code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .header_fuzz import damaged, read_or_refuse, seeds

ROOT = Path(__file__).parents[2]


def test_a_thousand_damaged_files_are_refused_in_one_line_each(tmp_path) -> None:
    assert all(read_or_refuse(content, tmp_path / "a.safetensors") for content in seeds())
    read = sum(read_or_refuse(content, tmp_path / "a.safetensors") for content in damaged(1000, seed=2))
    # Some mutations do no harm, such as spaces after the header; most do.
    assert 5 < read < 500


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is POSIX's")
def test_six_thousand_more_use_little_memory_and_run_no_code() -> None:
    command = [sys.executable, "-m", "tests.adapters.header_fuzz", "6000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["did"] == []
    assert result["growth_mb"] < 200
    assert result["read"] + result["refused"] == 6000 and result["refused"] > 3000
