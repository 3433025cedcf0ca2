"""InvokeAI's own detection, patcher and sidecar reader on our files; the wheel is fetched and thrown away again."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = "6.14.2"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("invokeai")
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, f"invokeai=={VERSION}"]
    subprocess.run(list(map(str, fetch)), check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    command = [sys.executable, "tools/interop/invokeai_reader.py", str(folder / "wheel")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=_environment())
    return json.loads(done.stdout.splitlines()[-1])


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.network
@pytest.mark.slow
def test_it_tells_the_base_of_every_family_and_finds_the_trigger(result) -> None:
    assert result["widths"] == {"sd1": 768, "sd2": 1024, "sdxl": 2048}
    assert result["triggers"] == ["brush", "ink style"]


@pytest.mark.network
@pytest.mark.slow
def test_its_patcher_writes_the_weights_that_are_merged_by_hand(result) -> None:
    gaps = result["gaps"]
    assert len(gaps) == 11
    assert max(gaps.values()) < 1e-4, gaps
