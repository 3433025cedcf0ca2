"""The command line: quick answers, one clear message per mistake, the exit code of its class."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from sdlora import cli

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate")


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "sdlora", *arguments], capture_output=True, text=True, cwd=cwd)


def heavy_imports_of(arguments: list[str]) -> str:
    """The heavy libraries that are imported by the time the command line has answered."""
    code = (
        "import sys\nfrom sdlora import cli\n"
        f"sys.argv = ['sdlora', *{arguments!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "art"
    folder.mkdir()
    for index in range(3):
        Image.linear_gradient("L").rotate(90 * index).convert("RGB").save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"subject {index}")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["check", "nowhere"],
        ["train", "nowhere"],
        ["train", ".", "--set", "lora.rnk=4"],
    ],
    ids=" ".join,
)
def test_help_and_mistakes_answer_without_importing_heavy_libraries(arguments: list[str]) -> None:
    assert heavy_imports_of(arguments).rstrip().endswith("HEAVY []")


def test_help_fits_a_screen_and_lists_the_daily_commands() -> None:
    text = CliRunner().invoke(cli.app, ["--help"]).output
    assert len(text.splitlines()) <= 24
    places = [text.index(f" {verb} ") for verb in ("demo", "check", "train", "generate")]
    assert places == sorted(places)


def test_check_says_what_it_found_and_how_a_caption_is_learnt(images: Path) -> None:
    result = run("check", str(images), "--trigger", "ink style")
    assert result.returncode == 0, result.stderr
    assert "3 images" in result.stdout
    assert '"subject 0, ink style"' in result.stdout


def test_a_broken_dataset_exits_with_3_and_names_every_file(images: Path) -> None:
    (images / "0.png").write_bytes(b"not a picture")
    (images / "1.txt").unlink()
    result = run("check", str(images))
    assert result.returncode == 3
    assert "0.png" in result.stderr and "1.png" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_misspelt_setting_exits_with_2_and_suggests_the_right_one(images: Path) -> None:
    result = run("train", str(images), "--base", "tiny", "--set", "lora.rnk=4", "--set", "train.exposures=0")
    assert result.returncode == 2
    assert "lora.rnk" in result.stderr and "'rank'" in result.stderr and "train.exposures" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "steps"),
        (["--guidance", "nan"], "guidance"),
        (["--width", "100"], "multiple of 8"),
        (["-n", "0"], "number of images"),
        (["--scheduler", "magic"], "magic"),
        (["--lora", "nowhere.safetensors:0.5"], "nowhere.safetensors"),
        (["--lora", "a.safetensors:loud"], "loud"),
    ],
)
def test_an_impossible_picture_exits_with_7_and_one_sentence(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = run("generate", "a fox", "--base", "tiny", *arguments, cwd=tmp_path)
    assert result.returncode == 7, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_pickle_as_lora_exits_with_5_and_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.safetensors").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch run'\ntR.")
    result = run("generate", "a fox", "--base", "tiny", "--lora", "evil.safetensors", cwd=tmp_path)
    assert result.returncode == 5, result.stderr
    assert "pickle" in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_default_base_that_cannot_be_had_exits_with_4_and_names_the_way_out(images: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(images.parent / "empty-cache"))
    result = run("train", str(images), "--trigger", "ink style", cwd=images.parent)
    assert result.returncode == 4, result.stderr
    assert "--base tiny" in result.stderr
