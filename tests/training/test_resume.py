"""A run that stopped goes on as if it had not: the same adapter, bit for bit, and the same log."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora import embedded
from sdlora.adapter_file import read_adapter
from sdlora.checkpoint import Checkpoint, read_latest_checkpoint
from sdlora.config import TrainConfig, load_config, setting_names, to_toml
from sdlora.data.dataset import scan_dataset
from sdlora.errors import CheckpointError, TrainingError
from sdlora.events import Event, RunFinished, StepDone, from_json
from sdlora.families import components_from_pipeline
from sdlora.precision import Precision
from sdlora.resume import CHANGE_CLASSES, dataset_changes, dataset_record
from sdlora.run_dir import RunDir
from sdlora.trainer import Trainer
from sdlora.training import rank_run, resume_run, train_adapter
from tests.tiny import tiny_sd1
from tests.training.helpers import CalledPreviews, make_config, make_trainer, make_training_set, write_pictures

SIX_STEPS: dict[str, Any] = {"exposures": 3, "batch_size": 2, "save_every": 10_000}  # 4 images: 2 steps an epoch


def told(events: list[Event]) -> list[tuple[Any, ...]]:
    return [(e.step, e.loss, e.learning_rate, e.grad_norm, e.skipped) for e in events if isinstance(e, StepDone)]


def run_until(trainer: Trainer, step: int) -> list[Event]:
    events = []
    for event in trainer.run():
        events.append(event)
        if isinstance(event, StepDone) and event.step == step:
            trainer.request_stop()
    return events


def newest(folder: Path) -> Checkpoint:
    return read_latest_checkpoint(folder / "state", say=print)


def weights(folder: Path) -> str:
    return read_adapter(folder / "ink.safetensors").tensor_sha256


@pytest.mark.parametrize("stop", [pytest.param(1, marks=pytest.mark.slow), 2, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora": {"rank": 4, "dropout": 0.2, "alpha": 2.0}, "train": {"noise_offset": 0.05}},
        {"train": {"batch_size": 1, "gradient_accumulation": 2}},
    ],
    ids=["plain", "dropout and noise offset", "accumulation"],
)
def test_a_stopped_run_ends_as_an_unbroken_one(tmp_path: Path, stop: int, settings: dict[str, Any]) -> None:
    settings = {**settings, "train": SIX_STEPS | settings.get("train", {})}
    whole = list(make_trainer(tmp_path / "whole", **settings).run())
    first = run_until(make_trainer(tmp_path / "parts", **settings), stop)
    assert isinstance(first[-1], RunFinished) and first[-1].stopped_early
    second = list(make_trainer(tmp_path / "parts", checkpoint=newest(tmp_path / "parts"), **settings).run())
    assert told(first) + told(second) == told(whole)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_a_mean_loss_that_spans_the_stop_is_the_same(tmp_path: Path) -> None:
    settings = {"train": {**SIX_STEPS, "log_every": 3, "save_every": 4}}
    whole = list(make_trainer(tmp_path / "whole", **settings).run())

    def crash() -> None:
        if trainer.state.step == 4:
            raise ZeroDivisionError

    trainer = make_trainer(tmp_path / "parts", previews=CalledPreviews(lambda step: [], crash), **settings)
    with pytest.raises(ZeroDivisionError):
        list(trainer.run())
    checkpoint = newest(tmp_path / "parts")
    assert checkpoint.step == 4
    second = list(make_trainer(tmp_path / "parts", checkpoint=checkpoint, **settings).run())
    assert told(second) == told(whole)[1:]


def test_previews_that_a_stop_left_are_asked_for_again(tmp_path: Path) -> None:
    settings = {"train": {**SIX_STEPS, "save_every": 1}, "preview": {"prompts": ["a fox"]}}
    first, second = CalledPreviews(lambda step: []), CalledPreviews(lambda step: [])
    trainer = make_trainer(tmp_path, previews=first, **settings)
    run_until(trainer, 3)
    run_dir = RunDir(tmp_path, "ink")
    run_dir.preview_path(1, 0).parent.mkdir(parents=True)
    run_dir.preview_path(1, 0).touch()
    # Saves that are told after the stop are not asked for any more.
    assert [step for step, _ in first.asked] == [1] and run_dir.saved_steps() == [1, 2, 3]
    events = list(make_trainer(tmp_path, previews=second, checkpoint=newest(tmp_path), **settings).run())
    assert second.asked == [(step, run_dir.checkpoint_adapter_path(step)) for step in (2, 3, 4, 5, 6)]
    assert isinstance(events[-1], RunFinished)


def test_a_crash_inside_accumulation_goes_on_from_the_step_before(tmp_path: Path) -> None:
    settings = {"train": {**SIX_STEPS, "batch_size": 1, "gradient_accumulation": 2}}
    list(make_trainer(tmp_path / "whole", **settings).run())
    broken = make_trainer(tmp_path / "parts", **settings)
    passes = []

    def fail_in_the_middle_of_step_four(*_: object) -> None:
        passes.append(1)
        if len(passes) == 8:
            raise RuntimeError("out of memory")

    handle = broken._unet.register_forward_pre_hook(fail_in_the_middle_of_step_four)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(broken.run())
    handle.remove()
    checkpoint = newest(tmp_path / "parts")
    assert checkpoint.step == 3
    list(make_trainer(tmp_path / "parts", checkpoint=checkpoint, **settings).run())
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@dataclass(frozen=True)
class LoudPrecision(Precision):
    """fp16 whose first gradients overflow, and whose scale soon grows again."""

    def grad_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-12, growth_interval=2)


def test_the_gradient_scaler_goes_on_too(tmp_path: Path) -> None:
    components = components_from_pipeline(tiny_sd1(), weight_dtype=torch.float16)
    settings: dict[str, Any] = {"components": components, "precision": LoudPrecision("fp16", "cpu"), "train": SIX_STEPS}
    settings["training_set"] = make_training_set(components_from_pipeline(tiny_sd1()))
    whole = list(make_trainer(tmp_path / "whole", **settings).run())
    assert told(whole)[0][-1] == 1  # one step skipped
    first = run_until(make_trainer(tmp_path / "parts", **settings), 4)
    second = list(make_trainer(tmp_path / "parts", checkpoint=newest(tmp_path / "parts"), **settings).run())
    assert told(first) + told(second) == told(whole)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_a_state_of_another_rank_is_refused_and_the_base_left_clean(tmp_path: Path) -> None:
    run_until(make_trainer(tmp_path), 1)
    components = components_from_pipeline(tiny_sd1())
    with pytest.raises(CheckpointError, match="another rank"):
        make_trainer(tmp_path, components=components, checkpoint=newest(tmp_path), lora={"rank": 8})
    assert components.unet.state_dict().keys() == tiny_sd1().unet.state_dict().keys()


def test_an_interrupt_in_the_middle_of_an_update_saves_nothing_half_done(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, train={**SIX_STEPS, "save_every": 2})

    def interrupt_third_update(*_: object) -> None:
        if trainer.state.step == 2:
            raise KeyboardInterrupt

    trainer._optimizer.register_step_pre_hook(interrupt_third_update)
    with pytest.raises(KeyboardInterrupt):
        list(trainer.run())
    assert newest(tmp_path).step == 2
    assert not (tmp_path / "ink.safetensors").exists()


# Whole runs, in folders.


def run_config(tmp_path: Path, base: Path, name: str = "ink", **sections: dict[str, Any]) -> TrainConfig:
    data = tmp_path / "data"
    if not data.exists():
        write_pictures(data, count=4)
    return make_config(
        model={"base": str(base), "precision": "fp32"},
        data={"path": data, "trigger": "ink style"},
        output={"dir": tmp_path / name, "name": "ink"},
        train=SIX_STEPS | sections.pop("train", {}),
        **sections,
    )


def stop_after(step: int):
    def observer(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return observer


needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="os.kill cannot send SIGINT to itself there")


@needs_signals
def test_a_run_in_a_folder_goes_on_with_one_log(tmp_path: Path, base: Path) -> None:
    whole = train_adapter(run_config(tmp_path, base, "whole"))
    parts = train_adapter(run_config(tmp_path, base, "parts"), observers=[stop_after(3)])
    said: list[str] = []
    assert resume_run(parts.parent, say=said.append) == parts
    assert "Going on after step 3." in said
    assert read_adapter(parts).tensor_sha256 == read_adapter(whole).tensor_sha256
    logs = [
        [from_json(line) for line in (path.parent / "events.jsonl").read_text("utf-8").splitlines()]
        for path in (whole, parts)
    ]
    assert told(logs[0]) == told(logs[1])
    assert [type(event) for event in logs[0]] == [type(event) for event in logs[1]]
    assert not list((parts.parent / "state").glob(".*"))


@needs_signals
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_second_signal_leaves_at_once_with_what_was_saved_before(tmp_path: Path, base: Path, number: int) -> None:
    config = run_config(tmp_path, base, train={"save_every": 2})

    def impatient(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(os.getpid(), number)
            # The first was taken as a request; the second comes while the run is ending.
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_adapter(config, observers=[impatient])
    root = tmp_path / "ink" / "ink"
    assert resume_run(root) == root / "ink.safetensors"
    whole = train_adapter(run_config(tmp_path, base, "whole"))
    assert read_adapter(root / "ink.safetensors").tensor_sha256 == read_adapter(whole).tensor_sha256


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, base: Path) -> None:
    path = train_adapter(run_config(tmp_path, base))
    before = path.stat().st_mtime_ns
    said: list[str] = []
    assert resume_run(path.parent, say=said.append) == path
    assert path.stat().st_mtime_ns == before
    assert "is finished: 6 steps" in said[0]


def test_a_folder_without_run_or_state_is_told(tmp_path: Path, base: Path) -> None:
    for action in (resume_run, rank_run):
        with pytest.raises(CheckpointError, match=r"not the folder of a run: it holds no config\.toml"):
            action(tmp_path)
    path = train_adapter(run_config(tmp_path, base))
    for folder in (path.parent / "state").iterdir():
        (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="no saved state"):
        resume_run(path.parent)


@needs_signals
def test_changes_are_told_and_weighed(tmp_path: Path, base: Path) -> None:
    root = train_adapter(run_config(tmp_path, base), observers=[stop_after(2)]).parent
    with pytest.raises(CheckpointError, match=r"train\.learning_rate: 0\.001 -> 0\.01\n.*--allow-change"):
        resume_run(root, overrides=["train.learning_rate=0.01"])
    with pytest.raises(CheckpointError, match=r"lora\.rank: 4 -> 8\n.*does not fit"):
        resume_run(root, overrides=["lora.rank=8"], allow_change=True)
    (tmp_path / "data" / "1.txt").write_text("something else")
    (tmp_path / "data" / "2.png").rename(tmp_path / "data" / "5.png")
    (tmp_path / "data" / "2.txt").rename(tmp_path / "data" / "5.txt")
    with pytest.raises(CheckpointError, match=r"2\.png is gone\n.*5\.png is new\n.*1\.png: caption 'thing 1' -> 'some"):
        resume_run(root)
    path = resume_run(root, overrides=["train.exposures=4", "train.log_every=2"], allow_change=True)
    assert read_adapter(path).metadata["sdlora.steps"] == "8"
    assert load_config(root / "config.toml").train.exposures == 4
    assert "5.png" in json.loads((root / "dataset.json").read_text())


@needs_signals
def test_another_base_is_refused_and_the_same_one_elsewhere_is_not(tmp_path: Path, base: Path) -> None:
    root = train_adapter(run_config(tmp_path, base), observers=[stop_after(2)]).parent
    other = tiny_sd1()
    with torch.no_grad():
        other.unet.conv_in.weight.add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="not the base that this run was started on"):
        resume_run(root, overrides=[f"model.base={tmp_path / 'other'}"])
    tiny_sd1().save_pretrained(tmp_path / "moved")
    resume_run(root, overrides=[f"model.base={tmp_path / 'moved'}"])
    whole = train_adapter(run_config(tmp_path, base, "whole"))
    assert read_adapter(root / "ink.safetensors").tensor_sha256 == read_adapter(whole).tensor_sha256


def test_an_old_run_still_goes_on(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder as sdlora 0.1 with schema 1 left it after step 3 of 6; never change it, add new ones beside it."""
    old = Path(__file__).parent / "old_runs" / "schema1"
    root = Path(shutil.copytree(old, tmp_path / "run"))
    write_pictures(tmp_path / "data", count=4)
    # Random models differ from one version of PyTorch to the next.
    recorded = json.loads((old / "state" / "step-000003" / "state.json").read_text(encoding="utf-8"))["base"]
    monkeypatch.setattr("sdlora.training.weights_fingerprint", lambda module: recorded)
    record = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
    for name, entry in record.items():
        entry["sha256"] = hashlib.sha256((tmp_path / "data" / name).read_bytes()).hexdigest()
    (root / "dataset.json").write_text(json.dumps(record), encoding="utf-8")
    path = resume_run(root, overrides=[f"data.path={tmp_path / 'data'}", f"model.base={base}"])
    assert read_adapter(path).metadata["sdlora.steps"] == "6"
    events = [from_json(line) for line in (root / "events.jsonl").read_text("utf-8").splitlines()]
    assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2, 3, 4, 5, 6]


def test_every_setting_has_its_meaning() -> None:
    assert set(CHANGE_CLASSES) == set(setting_names())


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path, base: Path) -> None:
    path = train_adapter(run_config(tmp_path, base))
    code = (
        "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire();"
        "print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, path.parent / ".lock"], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        with pytest.raises(CheckpointError, match="Another process works in"):
            resume_run(path.parent)
    finally:
        holder.kill()
        holder.wait()
    # What died holds nothing.
    assert resume_run(path.parent) == path


def test_too_little_space_is_told_before_the_first_step(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("sdlora.training.shutil.disk_usage", lambda path: usage)
    components = components_from_pipeline(tiny_sd1())
    with pytest.raises(TrainingError, match=r"needs \d+ MB for what is saved in the run, and 0 MB are free"):
        train_adapter(run_config(tmp_path, base), components=components)
    assert components.unet.state_dict().keys() == tiny_sd1().unet.state_dict().keys()


def test_a_state_is_saved_between_saves_as_time_goes_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdlora.trainer._STATE_SECONDS", 0.0)
    trainer = make_trainer(tmp_path, train=SIX_STEPS)
    seen = []
    for event in trainer.run():
        if isinstance(event, StepDone) and event.step > 1:
            trainer._saver.wait()
            seen.append(newest(tmp_path).step)
    assert seen == [1, 2, 3, 4, 5]


def saved_step(root: Path) -> int:
    """The newest state's, 0 if there is none."""
    return max((int(path.name.removeprefix("step-")) for path in (root / "state").glob("step-*")), default=0)


def told_step(root: Path) -> int:
    """The last step in the log; its last line may be cut off."""
    lines = (root / "events.jsonl").read_text(encoding="utf-8").splitlines() if (root / "events.jsonl").exists() else []
    return max(
        (int(match[1]) for line in lines if (match := re.search(r'"StepDone", "step": (\d+),', line))), default=0
    )


BEGIN_OR_GO_ON = """
import sys
from pathlib import Path
from sdlora.config import load_config
from sdlora.training import resume_run, train_adapter
root, settings = map(Path, sys.argv[1:])
if any((root / "state").glob("step-*")):
    resume_run(root)
else:
    train_adapter(load_config(settings))
"""


def kill_again_and_again(config: TrainConfig, folder: Path, *, kills: int) -> Path:
    """Begins the run and goes on with it, each process killed after a few steps, at any moment; the run's folder."""
    root = config.output.dir / "ink"
    settings = folder / "killed.toml"
    settings.write_text(to_toml(config), encoding="utf-8")
    random = torch.Generator().manual_seed(0)
    for _ in range(kills):
        saved, told = saved_step(root), told_step(root)
        command = [sys.executable, "-c", BEGIN_OR_GO_ON, str(root), str(settings)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        # Going on, it first forgets what was told after the state.
        while process.poll() is None and told > saved and told_step(root) > saved:
            time.sleep(0.02)
        # Steps and not seconds, so that slow machines get on too; without a state there is nothing to go on from.
        moment = 1 + int(torch.rand((), generator=random) * 6) + (0 if saved else 4)
        while process.poll() is None and told_step(root) < saved + moment:
            time.sleep(0.02)
        time.sleep(float(torch.rand((), generator=random)) * 0.3)
        assert process.poll() is None, f"over before it was killed: {process.stderr and process.stderr.read()!r}"
        process.kill()
        process.wait()
    return root


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_at_any_moment_change_nothing(tmp_path: Path, base: Path) -> None:
    train = {"exposures": 300, "save_every": 3}
    whole = train_adapter(run_config(tmp_path, base, "whole", train=train))
    root = kill_again_and_again(run_config(tmp_path, base, "killed", train=train), tmp_path, kills=50)
    assert saved_step(root) < 600
    resume_run(root)
    assert read_adapter(root / "ink.safetensors").tensor_sha256 == read_adapter(whole).tensor_sha256


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_forty_pictures_on_the_embedded_base_killed_ten_times_change_nothing(tmp_path: Path) -> None:
    settings = [
        *embedded.TRAINING,
        *("model.base=tiny", "train.exposures=24", "train.save_every=3", "output.name=ink"),
        f"data.path={Path(__file__).parents[2] / 'datasets' / 'high-contrast'}",
        *("data.trigger=high contrast style", "data.caption_dropout=0.1"),
    ]
    whole = train_adapter(load_config(None, [*settings, f"output.dir={tmp_path / 'whole'}"]))
    config = load_config(None, [*settings, f"output.dir={tmp_path / 'killed'}"])
    root = kill_again_and_again(config, tmp_path, kills=10)
    assert saved_step(root) < 120
    resume_run(root)
    assert read_adapter(root / "ink.safetensors").tensor_sha256 == read_adapter(whole).tensor_sha256


@needs_signals
def test_other_versions_are_told_and_do_not_stop_it(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("sdlora.training.version", lambda name: "0.0.1" if name == "peft" else "1.0")
        root = train_adapter(run_config(tmp_path, base), observers=[stop_after(2)]).parent
        said: list[str] = []
        patched.setattr("sdlora.training.version", lambda name: "0.0.2" if name == "peft" else "1.0")
        resume_run(root, say=said.append)
    assert "Note: other versions than when it was saved (peft 0.0.1 -> 0.0.2); results may differ" in " ".join(said)


def test_a_changed_picture_and_a_changed_mask_are_told(tmp_path: Path) -> None:
    folder, masks = write_pictures(tmp_path / "data", count=2), tmp_path / "masks"
    masks.mkdir()
    for name in ("0.png", "1.png"):
        shutil.copyfile(folder / name, masks / name)
    before = dataset_record(scan_dataset(folder, masks=str(masks), trigger="ink"))
    shutil.copyfile(folder / "1.png", folder / "0.png")
    shutil.copyfile(masks / "0.png", masks / "1.png")
    changes = dataset_changes(before, dataset_record(scan_dataset(folder, masks=str(masks), trigger="ink")))
    assert [str(change) for change in changes] == [
        "0.png: the picture changed (changes the run)",
        "1.png: its mask changed (changes the run)",
    ]


def test_what_cannot_be_saved_after_an_error_is_told_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Path:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr("sdlora.trainer.write_checkpoint", full)
    trainer = make_trainer(tmp_path, train=SIX_STEPS)
    with pytest.raises(ZeroDivisionError) as caught:
        for event in trainer.run():
            if isinstance(event, StepDone) and event.step == 2:
                trainer._set_learning_rate = lambda: 1 // 0  # type: ignore[method-assign]
    assert caught.value.__notes__ == ["What was learnt could not be saved either: the disk is full"]
