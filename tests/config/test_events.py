"""Events as lines of JSON, the run folder, and the watchers."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from sdlora.errors import ConfigError
from sdlora.events import CheckpointSaved, Event, PreviewReady, RunFinished, StepDone, from_json, to_json
from sdlora.progress import JsonlWriter, PlainProgress, ProgressBar, terminal_progress
from sdlora.run_dir import create_run_dir, write_text_atomic


def step(number: int, *, of: int = 100, loss: float = 0.5) -> StepDone:
    return StepDone(
        step=number,
        num_steps=of,
        loss=loss,
        learning_rate=1e-4,
        grad_norm=0.25,
        seconds=2.0 * number,
        images_per_second=4.0,
    )


EVENTS: list[Event] = [
    step(1),
    CheckpointSaved(step=1, path="ö/a.safetensors"),
    PreviewReady(step=1, path="a.png"),
    RunFinished(step=1, path="a\nb", seconds=1.5, stopped_early=True),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_survives_its_line_of_json(event: Event) -> None:
    line = to_json(event)
    assert "\n" not in line
    assert from_json(line) == event


def test_the_fields_of_a_line_are_fixed() -> None:
    assert json.loads(to_json(step(3))) == {
        "event": "StepDone",
        "step": 3,
        "num_steps": 100,
        "loss": 0.5,
        "learning_rate": 1e-4,
        "grad_norm": 0.25,
        "seconds": 6.0,
        "images_per_second": 4.0,
        "skipped": 0,
    }


@pytest.mark.parametrize("line", ["[]", "{}", '{"event": "Other"}', '{"event": "PreviewReady"}', "no json"])
def test_a_foreign_line_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        from_json(line)


def test_a_number_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError):
        to_json(step(1, loss=float("nan")))


def test_events_are_on_disk_as_soon_as_they_are_told(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with JsonlWriter(path) as writer:
        for event in EVENTS:
            writer(event)
        assert [from_json(line) for line in path.read_text(encoding="utf-8").splitlines()] == EVENTS


def test_plain_progress_writes_about_twenty_lines_and_the_end() -> None:
    stream = io.StringIO()
    progress = terminal_progress(stream)
    assert isinstance(progress, PlainProgress)
    for number in range(1, 101):
        progress(step(number))
    progress(RunFinished(step=100, path="out/a.safetensors", seconds=200.0))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 21
    assert lines[9] == "step 50/100  loss 0.5000  learning rate 1.00e-04  4.0 images/s  1:40 left"
    assert lines[-1] == "Finished 100 steps in 3:20: out/a.safetensors"


def test_a_stopped_run_says_where_its_adapter_is_and_how_to_go_on() -> None:
    stream = io.StringIO()
    PlainProgress(stream)(RunFinished(step=7, path="out/a.safetensors", seconds=1.0, stopped_early=True))
    assert "out/a.safetensors" in stream.getvalue()
    assert "sdlora resume out\n" in stream.getvalue()


def test_the_shown_loss_is_a_running_mean_without_start_bias() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, num_lines=2)
    for number, loss in ((1, 1.0), (2, 3.0)):
        progress(step(number, of=2, loss=loss))
    # 0.95 and 0.05 are the weights of old and new; unbiased: (0.95 * 0.05 * 1 + 0.05 * 3) / (0.95 * 0.05 + 0.05).
    assert "loss 1.0000" in stream.getvalue().splitlines()[0]
    assert "loss 2.0256" in stream.getvalue().splitlines()[1]


def test_a_bar_shows_loss_and_rate_and_gives_the_terminal_back() -> None:
    stream = io.StringIO()
    with ProgressBar(Console(file=stream, force_terminal=True, width=120, color_system=None)) as progress:
        progress(step(50, loss=0.1234))
        progress(CheckpointSaved(step=50, path="[a].safetensors"))
    text = stream.getvalue()
    assert "50/100" in text and "loss 0.1234" in text and "4.0 images/s" in text
    assert "saved [a].safetensors" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # cursor hidden, cursor shown


def test_an_earlier_run_is_never_written_over(tmp_path: Path) -> None:
    first = create_run_dir(tmp_path / "outputs", "ink")
    assert first.root == tmp_path / "outputs" / "ink"
    assert create_run_dir(tmp_path / "outputs", "ink").root == first.root  # empty, hence free
    first.config_path.write_text("x", encoding="utf-8")
    second = create_run_dir(tmp_path / "outputs", "ink")
    assert second.root.name == "ink-2"
    assert second.adapter_path == second.root / "ink.safetensors"
    assert second.checkpoint_adapter_path(40).name == "ink-step-000040.safetensors"


def test_a_run_folder_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"output\.dir"):
        create_run_dir(tmp_path / "file", "ink")


def test_a_text_file_is_replaced_whole_with_the_users_mode(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("old", encoding="utf-8")
    write_text_atomic(path, "näw\n")
    assert path.read_bytes() == "näw\n".encode()
    assert list(tmp_path.iterdir()) == [path]
    if os.name == "posix":
        mask = os.umask(0o022)
        os.umask(mask)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("module", ["config", "errors", "events", "length", "progress", "run_dir"])
def test_light_modules_load_no_model_library(module: str) -> None:
    code = (
        f"import sys, sdlora.{module}; "
        "print(sorted({'torch', 'diffusers', 'transformers', 'peft', 'accelerate'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
