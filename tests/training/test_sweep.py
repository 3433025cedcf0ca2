"""Sweeps: which runs there are, that they are made, gone on with and ranked, here by submitit and for Slurm."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdlora import cli, sweep_jobs
from sdlora.adapter_file import read_adapter
from sdlora.config import load_config, to_toml
from sdlora.errors import ConfigError, TrainingError
from sdlora.events import StepDone, ValidationDone
from sdlora.ranking import read_events
from sdlora.run_dir import RunDir
from sdlora.sweep import (
    SweepRun,
    config_path,
    expand_sweep,
    incomparable_settings,
    read_sweep,
    run_folder,
    sweep_results,
    table,
    write_sweep,
)
from sdlora.sweep_jobs import TrainJob, run_here, submit_to_slurm
from sdlora.training import train_adapter
from tests.training.helpers import write_pictures
from tests.training.test_resume import needs_signals, stop_after

HELD_OUT = "validation.count=1"


def small(tmp_path: Path, base: Path) -> list[str]:
    """Settings of a run of two steps on three pictures, one more held out."""
    if not (tmp_path / "data").exists():
        write_pictures(tmp_path / "data", count=4)
    numbers = ["train.exposures=2", "train.batch_size=3", "train.save_every=1", "validation.timesteps=1"]
    places = [f"data.path={tmp_path / 'data'}", f"model.base={base}", "data.cache=false", "model.precision=fp32"]
    return [*places, *numbers, "lora.rank=2", "data.trigger=ink style", HELD_OUT]


def test_every_combination_is_a_run_of_its_own(tmp_path: Path) -> None:
    over = ["lora.rank=4, 8", 'lora.targets=["attention", ["*.attn2.to_k", "*.attn1.to_k"]]']
    runs = expand_sweep([None], ["data.path=my art", HELD_OUT, "train.seed=3"], over, out_dir=tmp_path)
    assert [run.name for run in runs[:2]] == [
        "my-art-1-rank-4-targets-attention",
        "my-art-2-rank-4-targets-_.attn2.to_k_.attn1.to_k",
    ]
    assert [(run.config.lora.rank, run.config.lora.targets) for run in runs] == [
        (4, "attention"),
        (4, ("*.attn2.to_k", "*.attn1.to_k")),
        (8, "attention"),
        (8, ("*.attn2.to_k", "*.attn1.to_k")),
    ]
    assert all(run.config.train.seed == 3 and run.config.output.dir == tmp_path for run in runs)
    assert [run.config.run_name for run in runs] == [run.name for run in runs]
    assert not incomparable_settings(runs)


def test_configurations_are_tried_against_each_other(tmp_path: Path) -> None:
    for name, settings in (("soft", ["objective.loss=huber"]), ("plain", [])):
        (tmp_path / f"{name}.toml").write_text(to_toml(load_config(None, ["data.path=x", HELD_OUT, *settings])))
    files = [tmp_path / "soft.toml", tmp_path / "plain.toml"]
    runs = expand_sweep(files, [], ["train.seed=1,2"], out_dir=tmp_path)
    assert [dict(run.changed) for run in runs] == [
        {"config": "soft", "train.seed": "1"},
        {"config": "soft", "train.seed": "2"},
        {"config": "plain", "train.seed": "1"},
        {"config": "plain", "train.seed": "2"},
    ]
    # Another loss and another noise give other numbers for the same adapter.
    assert incomparable_settings(runs) == ["train.seed", "objective.loss"]


@pytest.mark.parametrize(
    ("over", "settings", "said"),
    [
        (["lora.rnk=4,8"], [HELD_OUT], "--over lora.rnk=4,8: not of the form"),
        (["lora.rank"], [HELD_OUT], "--over lora.rank: not of the form"),
        (["output.name=a,b"], [HELD_OUT], "not the place of the run"),
        (["lora.rank=4,4"], [HELD_OUT], "a list of different values is wanted"),
        (["lora.rank=4,many"], [HELD_OUT], r"lora\.rank: must be"),
        (["lora.rank=4"], [HELD_OUT], "there is only one run"),
        (["lora.rank=4,8"], [], "none are held out"),
    ],
)
def test_what_makes_no_sweep_is_told(tmp_path: Path, over: list[str], settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        expand_sweep([None], ["data.path=x", *settings], over, out_dir=tmp_path)


def test_a_folder_holds_one_sweep(tmp_path: Path) -> None:
    settings = ["data.path=x", HELD_OUT]
    runs = expand_sweep([None], settings, ["lora.rank=4,8"], out_dir=tmp_path)
    write_sweep(tmp_path, runs)
    write_sweep(tmp_path, runs)
    assert read_sweep(tmp_path) == runs
    with pytest.raises(ConfigError, match="holds another sweep"):
        write_sweep(tmp_path, expand_sweep([None], settings, ["lora.rank=4,16"], out_dir=tmp_path))
    with pytest.raises(TrainingError, match="not the folder of a sweep"):
        read_sweep(tmp_path / "configs")


@needs_signals
def test_jobs_train_go_on_and_are_ranked(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "sweep"
    over = ["train.learning_rate=1e-3,1e-2"]
    runs = expand_sweep([None], small(tmp_path, base), over, out_dir=out)
    write_sweep(out, runs)
    assert [result.state for result in sweep_results(out, runs)] == ["not begun", "not begun"]
    train_adapter(load_config(config_path(out, runs[1].name)), observers=[stop_after(1)])
    assert {result.state for result in sweep_results(out, runs)} == {"not begun", "not finished"}
    for run in runs:
        assert TrainJob(out, run.name)()
    results = sweep_results(out, runs)
    losses = {}
    for run in runs:
        events = read_events(RunDir(out / run.name, run.name))
        assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2]
        losses[run.name] = min(e.held_out_loss for e in events if isinstance(e, ValidationDone) and e.step)
    assert [result.name for result in results] == sorted(losses, key=losses.__getitem__)
    assert [result.held_out_loss for result in results] == sorted(losses.values())
    lines = list(table(results))
    assert results[0].path and Path(results[0].path).is_file() and results[0].path in lines[2]
    assert f"train.learning_rate={results[0].changed['train.learning_rate']}" in lines[1]
    # Again: nothing is left to do.
    before = Path(results[0].path).stat().st_mtime_ns
    assert TrainJob(out, results[0].name)() and Path(results[0].path).stat().st_mtime_ns == before


def test_a_run_that_cannot_go_on_says_why_and_can_be_tried_again(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "sweep"
    runs = expand_sweep([None], small(tmp_path, base), ['lora.targets=["attention", ["nothing*"]]'], out_dir=out)
    write_sweep(out, runs)
    assert not TrainJob(out, runs[1].name)()
    failed = sweep_results(out, runs)[-1]
    assert failed.state == "failed" and "No layer of the model matches 'nothing*'" in str(failed.error)
    assert any("failed: No layer" in line and "nothing*" in line for line in table([failed]))
    # A folder with settings and no state is a try that left nothing; the next one gets a folder of its own.
    (out / runs[0].name).mkdir()
    (out / runs[0].name / "config.toml").write_text("")
    assert TrainJob(out, runs[0].name)()
    assert run_folder(out, runs[0].name) == out / f"{runs[0].name}-2"
    assert sweep_results(out, runs)[0].state == "finished"


def test_the_dry_run_prints_the_jobs_and_writes_nothing(tmp_path: Path, base: Path) -> None:
    arguments = ["runs", "sweep", "--out", str(tmp_path / "sweep"), "--over", "lora.rank=2,4", "--dry-run"]
    arguments += [part for setting in small(tmp_path, base) for part in ("--set", setting)]
    slurm = ["--engine", "slurm", "--job", "slurm_partition=gpu", "--job", "timeout_min=60"]
    result = CliRunner().invoke(cli.app, [*arguments, *slurm])
    assert result.exit_code == 0, result.output
    assert "data-1-rank-2: lora.rank=2\ndata-2-rank-4: lora.rank=4\n" in result.output
    assert "2 jobs, one Slurm array, slurm_partition=gpu, timeout_min=60" in result.output
    assert not (tmp_path / "sweep").exists()
    for wrong, said in ((["--engine", "ray"], "must be local or slurm"), (["--job", "gpu"], "not of the form")):
        result = CliRunner().invoke(cli.app, [*arguments, *wrong])
        assert isinstance(result.exception, ConfigError) and said in str(result.exception)


def test_without_submitit_one_sentence_tells_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_jobs.importlib.util, "find_spec", lambda name: None)
    for start in (run_here, lambda *all: submit_to_slurm(*all, parallel=None, parameters={})):
        with pytest.raises(TrainingError, match=r"pip install sdlora\[sweep\]"):
            start(tmp_path, [])


# By submitit itself.


def fake_slurm(folder: Path) -> Path:
    """Programs called srun and sbatch; the latter keeps what it is given and answers as Slurm does."""
    folder.mkdir()
    (folder / "srun").write_text("#!/bin/sh\n")
    (folder / "sbatch").write_text(f'#!/bin/sh\ncp "$1" {folder}/script.sh\necho "Submitted batch job 4711"\n')
    for program in folder.iterdir():
        program.chmod(0o755)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins are shell scripts")
def test_slurm_gets_one_array_with_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    runs = expand_sweep([None], ["data.path=x", HELD_OUT], ["lora.rank=4,8,16"], out_dir=tmp_path / "sweep")
    write_sweep(tmp_path / "sweep", runs)
    with pytest.raises(TrainingError, match="There is no Slurm here"):
        monkeypatch.setenv("PATH", str(tmp_path))
        submit_to_slurm(tmp_path / "sweep", runs, parallel=2, parameters={})
    programs = fake_slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin")
    asked = {"slurm_partition": "gpu", "timeout_min": 60, "gpus_per_node": 1}
    said: list[str] = []
    ids = submit_to_slurm(tmp_path / "sweep", runs, parallel=2, parameters=asked, say=said.append)
    assert ids == ["4711_0", "4711_1", "4711_2"]
    assert "job 4711_1" in said[1] and said[1].startswith(runs[1].name)
    script = (programs / "script.sh").read_text()
    for line in ("--array=0-2%2", "--partition=gpu", "--time=60", "--gpus-per-node=1"):
        assert f"#SBATCH {line}\n" in script
    # What each job will call lies beside the script, and says what it is.
    import submitit
    from submitit.core.utils import DelayedSubmission

    pickles = sorted((tmp_path / "sweep" / "jobs").glob("*_submitted.pkl"))
    called = [DelayedSubmission.load(path).function for path in pickles]
    assert sorted(job.name for job in called) == sorted(run.name for run in runs)
    again = called[0].checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission) and again.function is called[0]
    with pytest.raises(TrainingError, match="Slurm does not take the jobs"):
        submit_to_slurm(tmp_path / "sweep", runs, parallel=2, parameters={"colour": "red"})


@pytest.mark.slow
def test_runs_here_are_processes_of_submitit(tmp_path: Path) -> None:
    """The command, on the base inside the package."""
    pytest.importorskip("submitit")
    data = Path(__file__).parents[2] / "datasets" / "high-contrast"
    arguments = ["runs", "sweep", str(data), "--trigger", "ink style", "--base", "tiny", "--out", str(tmp_path)]
    arguments += ["--over", "lora.rank=2,4", "--set", "train.exposures=1", "--set", "validation.count=8"]
    arguments += ["--set", "train.batch_size=8", "--set", f"data.cache_dir={tmp_path / 'cache'}", "--parallel", "2"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [one["state"] for one in found] == ["finished", "finished"]
    assert found[0]["held_out_loss"] <= found[1]["held_out_loss"]
    assert {read_adapter(Path(one["path"])).metadata["ss_network_dim"] for one in found} == {"2", "4"}
    assert len(list((tmp_path / "jobs").glob("*_result.pkl"))) == 2
    again = CliRunner().invoke(cli.app, ["runs", "results", str(tmp_path), "--json"])
    assert json.loads(again.output) == found
    # A run that a process of its own cannot make is told, and the others are not held up.
    runs = [SweepRun("nowhere", {}, load_config(None, ["data.path=x"])), *read_sweep(tmp_path)[:1]]
    said: list[str] = []
    run_here(tmp_path, runs, say=said.append)
    assert any(line.startswith("nowhere: failed") for line in said) and said[-1].endswith(": done")
