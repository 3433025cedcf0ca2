"""`sdlora demo` in small: a few steps instead of hundreds, the same code, the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from sdlora import demo, embedded
from sdlora.errors import DatasetError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder, said = tmp_path_factory.mktemp("demo"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "NUM_INFERENCE_STEPS", 1)
        patch.setattr(demo, "HELD_OUT", 4)
        demo.run_demo(folder, say=said.append, exposures=1)
    return folder, said


def test_it_writes_both_adapters_the_sheet_and_the_page(written: tuple[Path, list[str]]) -> None:
    folder, _ = written
    for name in ("blob-emoji.safetensors", "high-contrast.safetensors"):
        with safe_open(folder / name, "pt") as file:
            assert any("attn2_to_q" in key for key in file.keys())  # noqa: SIM118
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width >= 5 * 128
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")


def test_it_says_the_gap_the_size_and_that_the_base_is_back(written: tuple[Path, list[str]]) -> None:
    _, said = written
    text = "\n".join(said)
    for word in ("blob-emoji:", "high-contrast:", "gap closed", "kB", "identical", "sha256"):
        assert word in text


def test_the_last_column_is_the_first_one(written: tuple[Path, list[str]]) -> None:
    folder, _ = written
    with Image.open(folder / "sheet.png") as sheet:
        side, left = 128, sheet.width - 5 * 128
        first = sheet.crop((left, 28, left + side, sheet.height))
        last = sheet.crop((sheet.width - side, 28, sheet.width, sheet.height))
        styled = sheet.crop((left + 2 * side, 28, left + 3 * side, sheet.height))
    assert first.tobytes() == last.tobytes()
    assert first.tobytes() != styled.tobytes()


def test_without_the_datasets_it_says_where_to_run_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "sdlora" / "demo.py"))
    with pytest.raises(DatasetError, match="clone"):
        demo.find_datasets()
