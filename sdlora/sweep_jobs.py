"""The runs of a sweep as jobs of submitit: processes on this computer, or a job array on Slurm."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sdlora.config import load_config
from sdlora.errors import SdloraError, TrainingError
from sdlora.progress import terminal_progress
from sdlora.run_dir import write_text_atomic
from sdlora.sweep import SweepRun, config_path, failure_path, run_folder
from sdlora.training import resume_run, train_adapter

__all__ = ["TrainJob", "require_submitit", "run_here", "submit_to_slurm"]

Say = Callable[[str], None]
_NO_LIMIT_MINUTES = 60 * 24 * 365
_LOOK_SECONDS = 0.2


class TrainJob:
    """One run in a process of its own: begun, gone on with, or left alone if it is finished.

    Called again for a run that was stopped in any way, it goes on exactly where the last state is.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder.resolve(), name

    def __call__(self) -> bool:
        """Whether the run got to its end or was stopped in order; else the sweep's folder says why not."""
        failure = failure_path(self.folder, self.name)
        failure.unlink(missing_ok=True)
        try:
            with terminal_progress(sys.stdout) as progress:
                root = run_folder(self.folder, self.name)
                if root is not None and any((root / "state").glob("step-*")):
                    resume_run(root, observers=[progress], say=_say)
                else:
                    config = load_config(config_path(self.folder, self.name))
                    train_adapter(config, observers=[progress], say=_say)
        except SdloraError as error:
            failure.parent.mkdir(exist_ok=True)
            write_text_atomic(failure, f"{error}\n")
            return False
        return True

    def checkpoint(self) -> Any:
        """What Slurm is to start again when it takes the machine away: the same run, which goes on from its state."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def require_submitit() -> None:
    """
    Raises:
        TrainingError: it is not installed.
    """
    if importlib.util.find_spec("submitit") is None:
        raise TrainingError("A sweep's runs are started by submitit, which is missing: `pip install sdlora[sweep]`.")


def run_here(folder: Path, runs: Sequence[SweepRun], *, parallel: int = 1, say: Say = print) -> None:
    """Runs them on this computer, `parallel` at a time, each with a GPU of its own as far as there are any; returns
    when all are over. What they print is in `folder/jobs`.

    Raises:
        TrainingError: submitit is not installed.
    """
    require_submitit()
    import submitit

    executor = submitit.LocalExecutor(folder / "jobs")
    gpus, waiting, free = _gpus(), list(runs), list(range(parallel))
    working: dict[int, tuple[SweepRun, Any]] = {}
    try:
        while waiting or working:
            while waiting and free:
                run, slot = waiting.pop(0), free.pop(0)
                own = {"gpus_per_node": 1, "visible_gpus": (gpus[slot % len(gpus)],)} if gpus else {}
                executor.update_parameters(timeout_min=_NO_LIMIT_MINUTES, **own)
                job = executor.submit(TrainJob(folder, run.name))
                working[slot] = run, job
                say(f"{run.name}: begun; its output is {job.paths.stdout}")
            time.sleep(_LOOK_SECONDS)
            for slot, (run, job) in list(working.items()):
                if job.done(force_check=True):
                    del working[slot]
                    free.append(slot)
                    say(f"{run.name}: {_how_it_ended(job)}")
    finally:
        # After an interrupt each is asked to stop in order, as by Ctrl-C.
        for _, job in working.values():
            job.cancel(check=False)


def submit_to_slurm(
    folder: Path, runs: Sequence[SweepRun], *, parallel: int | None, parameters: Mapping[str, Any], say: Say = print
) -> list[str]:
    """Hands them to Slurm as a job array, at most `parallel` at a time; returns the jobs' ids and does not wait.

    `parameters` are submitit's: `timeout_min`, `gpus_per_node`, `mem_gb`, `slurm_partition` ...

    Raises:
        TrainingError: submitit or Slurm is missing, or a parameter is not known or refused.
    """
    require_submitit()
    import submitit
    from submitit.core.utils import FailedSubmissionError

    try:
        executor = submitit.AutoExecutor(folder / "jobs", cluster="slurm")
        limits = {} if parallel is None else {"slurm_array_parallelism": parallel}
        executor.update_parameters(name="sdlora-sweep", **limits, **parameters)
        with executor.batch():
            jobs = [executor.submit(TrainJob(folder, run.name)) for run in runs]
    except (NameError, ValueError, AssertionError, FailedSubmissionError) as error:
        raise TrainingError(f"Slurm does not take the jobs: {error}") from error
    except RuntimeError as error:
        raise TrainingError(f"There is no Slurm here: {error} Without --engine they run on this computer.") from error
    for run, job in zip(runs, jobs, strict=True):
        say(f"{run.name}: job {job.job_id}; its output will be {job.paths.stdout}")
    return [str(job.job_id) for job in jobs]


def _how_it_ended(job: Any) -> str:
    error = job.exception()
    if error is not None:
        return f"ended by an error that its output tells: {job.paths.stderr}"
    return "done" if job.result() else "failed"


def _gpus() -> list[int]:
    """Those that this process may use, by the machine's own numbers."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed and all(part.strip().isdecimal() for part in allowed.split(",")):
        return [int(part) for part in allowed.split(",")]
    return list(range(torch.cuda.device_count()))


def _say(sentence: str) -> None:
    sys.stdout.write(f"{sentence}\n")
    sys.stdout.flush()
