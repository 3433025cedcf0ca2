"""Previews from a process of their own: what `generate` draws, a loop that never waits, and an end with the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sdlora.adapter_file import read_adapter
from sdlora.cli import app
from sdlora.config import PreviewConfig, TrainConfig
from sdlora.errors import GenerationError
from sdlora.events import CheckpointSaved, Event, PreviewReady, RunFinished, from_json
from sdlora.generation import Generator
from sdlora.picture_file import read_recipe
from sdlora.previews import beside
from sdlora.previews.beside import PreviewsBeside
from sdlora.previews.place import Place
from sdlora.request import GenerationRequest
from sdlora.run_dir import RunDir
from sdlora.training import resume_run, train_adapter
from tests.training.helpers import make_config, write_pictures

FAKE = """
import json, sys, time
start = json.loads(sys.stdin.readline())
{before}
for line in sys.stdin:
    task = json.loads(line)
    for index, path in enumerate(task["pictures"]):
        {draw}
        print(json.dumps(dict(picture=index)), flush=True)
    else:
        print(json.dumps(dict(done=True)), flush=True)
"""
PROMPT = "a fox (running:1.4)"
ABLE = "print(json.dumps(dict(able=True)), flush=True)"


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[PreviewsBeside, list[str]]]]:
    """Previews of two prompts by a process of a few lines, and what they say; closed in the end."""
    made: list[PreviewsBeside] = []

    def of(
        *, before: str = ABLE, draw: str = "pass", place: Callable[[], Place] = lambda: Place("cpu", 1)
    ) -> tuple[PreviewsBeside, list[str]]:
        script = FAKE.format(before=before, draw=draw)
        monkeypatch.setattr(beside, "_COMMAND", [sys.executable, "-c", script])
        said: list[str] = []
        previews = PreviewsBeside(
            base="tiny",
            settings=PreviewConfig(prompts=("a", "b")),
            resolution=64,
            run_dir=RunDir(tmp_path, "ink"),
            place=place,
            say=said.append,
        )
        made.append(previews)
        return previews, said

    yield of
    for previews in made:
        previews.close()


def never() -> bool:
    return False


def test_nothing_is_started_before_it_is_asked_for(make: Any) -> None:
    previews, said = make()
    assert previews.ready() == [] and list(previews.finish(never)) == []
    assert previews._process is None and not said


def test_pictures_come_in_order_and_asking_does_not_wait(make: Any, tmp_path: Path) -> None:
    previews, said = make(draw="time.sleep(0.2)")
    # The process is started by another thread, so that not even that is waited for.
    started = time.perf_counter()
    for step in (1, 2):
        previews.request(step, tmp_path / f"{step}.safetensors")
        assert previews.ready() == []
    assert time.perf_counter() - started < 0.15
    found = list(previews.finish(never))
    assert found == [(step, RunDir(tmp_path, "ink").preview_path(step, n)) for step in (1, 2) for n in (0, 1)]
    assert said == ["Drawing the last previews."]


def test_a_stop_leaves_the_rest_and_ends_the_process(make: Any, tmp_path: Path) -> None:
    previews, said = make(draw="time.sleep(60)")
    previews.request(1, tmp_path / "1.safetensors")
    while previews._process is None:
        time.sleep(0.01)
    started = time.perf_counter()
    assert list(previews.finish(lambda: True)) == []
    assert said[1:] == [f"Some previews are left out. To draw them: sdlora resume {tmp_path}"]
    previews.close()
    previews.close()
    assert time.perf_counter() - started < 2
    assert previews._process.poll() is not None and not previews._thread.is_alive()


@pytest.mark.parametrize(
    ("fake", "sentence"),
    [
        ({"before": 'print(json.dumps(dict(unable="no base.")), flush=True)'}, "No previews from step 1 on: no base."),
        ({"before": "sys.exit(3)"}, "No previews from step 1 on: the process that draws them ended by itself (3)."),
        ({"before": "raise KeyError('x')"}, "No previews from step 1 on: KeyError: 'x'"),
        (
            {"draw": "import os; os.kill(os.getpid(), 9)"},
            "No previews from step 1 on: the process that draws them ended",
        ),
    ],
)
def test_a_process_that_cannot_is_told_once_and_the_run_goes_on(
    make: Any, tmp_path: Path, fake: dict[str, str], sentence: str
) -> None:
    previews, said = make(**fake)
    for step in (1, 2, 3):
        previews.request(step, tmp_path / f"{step}.safetensors")
    assert list(previews.finish(never)) == []
    assert len(said) == 2 and said[1].startswith(sentence)


@pytest.mark.parametrize("error", [GenerationError("no memory."), RuntimeError("no memory.")])
def test_no_place_is_told_too(make: Any, tmp_path: Path, error: Exception) -> None:
    def nowhere() -> Place:
        raise error

    previews, said = make(place=nowhere)
    previews.request(1, tmp_path / "1.safetensors")
    assert list(previews.finish(never)) == []
    assert said[1:] == ["No previews from step 1 on: no memory."]


def test_what_one_save_lacks_the_next_may_have(make: Any, tmp_path: Path) -> None:
    broken = 'if task["step"] == 1: print(json.dumps(dict(failed="too strong.")), flush=True); break'
    previews, said = make(draw=broken)
    for step in (1, 2):
        previews.request(step, tmp_path / f"{step}.safetensors")
    assert [step for step, _ in previews.finish(never)] == [2, 2]
    assert said[1:] == ["No preview of step 1: too strong."]


@pytest.fixture
def _on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are rounded by how they are cut into threads, and the tests have one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def config_for(tmp_path: Path, base: Path, *, out: str = "out", **preview: Any) -> TrainConfig:
    """Four steps, saves after the second and the last."""
    if not (tmp_path / "data").exists():
        write_pictures(tmp_path / "data", count=4)
    return make_config(
        model={"base": str(base), "precision": "fp32"},
        data={"path": tmp_path / "data", "trigger": "ink style"},
        output={"dir": tmp_path / out, "name": "ink"},
        train={"save_every": 2, "learning_rate": 0.05, "warmup_fraction": 0.0},
        preview={"prompts": [PROMPT], "num_inference_steps": 3, "guidance_scale": 5.0, **preview}
        if preview.pop("wanted", True)
        else {},
    )


def pixels(path: str | Path) -> Any:
    with Image.open(path) as picture:
        return np.asarray(picture)


def truth(base: Path, adapter: Path) -> Any:
    generator = Generator.from_base(str(base), device="cpu")
    generator.stack.load(adapter)
    request = GenerationRequest(prompt=PROMPT, num_inference_steps=3, guidance_scale=5.0, prompt_syntax="plain")
    return np.asarray(next(generator.draw(request)).image)


@pytest.mark.usefixtures("_on_one_core")
def test_a_preview_is_what_generate_draws_and_the_run_is_the_same(tmp_path: Path, base: Path) -> None:
    events: list[Event] = []
    said: list[str] = []
    path = train_adapter(config_for(tmp_path, base), observers=[events.append], say=said.append)
    plain = train_adapter(config_for(tmp_path, base, out="plain", wanted=False))
    assert read_adapter(path).tensor_sha256 == read_adapter(plain).tensor_sha256
    assert "Drawing the last previews." in said
    previews = [event for event in events if isinstance(event, PreviewReady)]
    saves = [event for event in events if isinstance(event, CheckpointSaved)]
    assert [event.step for event in previews] == [event.step for event in saves] == [2, 4]
    for preview, save in zip(previews, saves, strict=True):
        assert events.index(save) < events.index(preview)
        assert (pixels(preview.path) == truth(base, Path(save.path))).all()
        assert read_recipe(Path(preview.path)).adapters[0].file == Path(save.path).name
    assert isinstance(events[-1], RunFinished)
    assert not psutil.Process().children()


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill cannot send SIGINT to itself there")
@pytest.mark.usefixtures("_on_one_core")
def test_a_run_that_is_stopped_leaves_its_previews_to_resume(tmp_path: Path, base: Path) -> None:
    """Stopped in the last step, the run is finished and only pictures are wanting."""
    config = config_for(tmp_path, base)

    def interrupt(event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    path = train_adapter(config, observers=[interrupt])
    run_dir = RunDir(path.parent, "ink")
    assert run_dir.undrawn_steps(1) == [2, 4] and not psutil.Process().children()
    told: list[Event] = []
    before = path.stat().st_mtime_ns
    assert resume_run(path.parent, observers=[told.append]) == path
    assert path.stat().st_mtime_ns == before and not run_dir.undrawn_steps(1)
    assert [type(event) for event in told] == [PreviewReady, PreviewReady]
    for step in (2, 4):
        assert (pixels(run_dir.preview_path(step, 0)) == truth(base, run_dir.checkpoint_adapter_path(step))).all()
    lines = run_dir.events_path.read_text(encoding="utf-8").splitlines()
    assert [event for event in map(from_json, lines) if isinstance(event, PreviewReady)] == told


@pytest.mark.usefixtures("_on_one_core")
def test_pictures_that_are_there_are_not_drawn_again_and_all_are_told_once(tmp_path: Path, base: Path) -> None:
    config = config_for(tmp_path, base, where="between", prompts=[PROMPT, "a tree"])
    path = train_adapter(config)
    run_dir = RunDir(path.parent, "ink")
    lines = run_dir.events_path.read_text(encoding="utf-8").splitlines()
    # One is gone, one was drawn and nobody heard of it, one is of an earlier file of that step.
    gone, untold, old = (run_dir.preview_path(step, index) for step, index in ((2, 0), (2, 1), (4, 1)))
    gone.unlink()
    os.utime(old, (1, 1))
    kept = run_dir.preview_path(4, 0).stat().st_mtime_ns
    left = [line for line in lines if str(gone) not in line and str(untold) not in line and str(old) not in line]
    run_dir.events_path.write_text("\n".join(left) + "\n", encoding="utf-8")
    told: list[Event] = []
    resume_run(path.parent, observers=[told.append])
    assert told == [PreviewReady(step=step, path=str(file)) for step, file in ((2, untold), (2, gone), (4, old))]
    assert run_dir.preview_path(4, 0).stat().st_mtime_ns == kept
    assert (pixels(gone) == truth(base, run_dir.checkpoint_adapter_path(2))).all() and old.stat().st_mtime > 1
    resume_run(path.parent, observers=[told.append])
    assert len(told) == 3


@pytest.mark.usefixtures("_on_one_core")
def test_a_preview_can_be_drawn_again(tmp_path: Path, base: Path) -> None:
    """Its LoRA is found in its run, wherever that is."""
    path = train_adapter(config_for(tmp_path, base, where="between"))
    picture = RunDir(path.parent, "ink").preview_path(2, 0)
    result = CliRunner().invoke(app, ["again", str(picture), "--base", str(base), "--out", str(tmp_path / "again")])
    assert result.exit_code == 0, result.output
    assert "The same picture, to the last pixel." in result.output
    assert (pixels(tmp_path / "again" / "0.png") == pixels(picture)).all()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal there")
def test_a_killed_run_takes_its_process_along(tmp_path: Path, base: Path) -> None:
    program = f"""
from pathlib import Path
from sdlora.config import PreviewConfig
from sdlora.previews.beside import PreviewsBeside
from sdlora.previews.place import Place
from sdlora.run_dir import RunDir
import time
previews = PreviewsBeside(
    base={str(base)!r}, settings=PreviewConfig(prompts=("a",) * 99, num_inference_steps=900), resolution=64,
    run_dir=RunDir(Path({str(tmp_path)!r}), "ink"), place=lambda: Place("cpu", 1), say=print)
previews.request(1, Path({str(tmp_path / "ink.safetensors")!r}))
while previews._process is None: time.sleep(0.01)
print(previews._process.pid, flush=True)
time.sleep(600)
"""
    run = train_adapter(config_for(tmp_path, base, wanted=False))
    (tmp_path / "ink.safetensors").write_bytes(run.read_bytes())
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, encoding="utf-8") as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        # Drawing by now, and not reading its tasks.
        while child.cpu_times().user < 6:
            time.sleep(0.1)
        assert child.nice() == 19 and os.getpgid(child.pid) != os.getpgid(parent.pid)
        parent.kill()
        child.wait(timeout=10)
