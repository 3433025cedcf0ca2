"""Settings tried against each other: from a configuration and lists of values to one configuration a run, and from
what the runs told to a table. Starts nothing."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sdlora.config import TrainConfig, load_config, setting_names, to_toml
from sdlora.errors import ConfigError, Problem, TrainingError
from sdlora.events import RunFinished, ValidationDone
from sdlora.ranking import read_events
from sdlora.run_dir import RunDir, write_text_atomic

__all__ = [
    "SweepResult",
    "SweepRun",
    "config_path",
    "expand_sweep",
    "failure_path",
    "incomparable_settings",
    "read_sweep",
    "run_folder",
    "sweep_results",
    "table",
    "write_results",
    "write_sweep",
]

_MAX_NAME = 80
_MAX_SAME_NAME = 100
# What is measured, and on what; `train.seed` draws the noise of it.
_MEASURE = [
    "train.seed",
    "train.snr_gamma",
    "objective.loss",
    "objective.huber_delta",
    "objective.weighting",
    "validation.path",
    "validation.share",
    "validation.count",
    "validation.timesteps",
    "model.base",
    "data.path",
    "data.resolution",
    "data.trigger",
    "data.caption_prefix",
    "data.caption_suffix",
    "data.background",
    "data.masks",
    "data.mask_outside",
]


@dataclass(frozen=True)
class SweepRun:
    """One run: its name, which is its folder's and its adapter's, and what is its own in its settings."""

    name: str
    changed: Mapping[str, str]
    """Setting -> value, both as after `--set`; `config` -> its name where there are several files."""
    config: TrainConfig


@dataclass(frozen=True)
class SweepResult:
    """What became of one run."""

    name: str
    changed: Mapping[str, str]
    state: Literal["finished", "failed", "not finished", "not begun"]
    held_out_loss: float | None = None
    """The lowest of its saves."""
    best_step: int | None = None
    """The step of that save."""
    steps: int | None = None
    """How many were made in all."""
    seconds: float | None = None
    path: str | None = None
    """The adapter of the best save."""
    error: str | None = None


def expand_sweep(
    configs: Sequence[Path | None], overrides: Sequence[str], over: Sequence[str], *, out_dir: Path
) -> tuple[SweepRun, ...]:
    """Every configuration (None: the defaults) with every combination of values, in that order.

    `overrides` are settings for all, as for `load_config`; each of `over` is `section.name=VALUES`, values with commas
    between them or a TOML list. All runs lie in `out_dir`.

    Raises:
        ConfigError: with every problem of any of them; also if there is only one run, or no picture is held out.
    """
    problems: list[Problem] = []
    grid = dict(_values(item, problems) for item in over)
    if problems:
        raise ConfigError("--over", problems)
    combinations = [
        (path, dict(zip(grid, values, strict=True))) for path in configs for values in itertools.product(*grid.values())
    ]
    width, runs = len(str(len(combinations))), []
    for number, (path, chosen) in enumerate(combinations, 1):
        changed = ({"config": path.stem} if path and len(configs) > 1 else {}) | chosen
        settings = [*overrides, *(f"{name}={value}" for name, value in chosen.items())]
        try:
            begun = load_config(path, settings)
            name = _name(f"{begun.run_name}-{number:0{width}}", changed)
            own = [f"output.dir={json.dumps(str(out_dir))}", f"output.name={json.dumps(name)}"]
            runs.append(SweepRun(name, changed, load_config(path, [*settings, *own])))
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ConfigError("the sweep", problems)
    _require_sense(runs)
    return tuple(runs)


def incomparable_settings(runs: Sequence[SweepRun]) -> list[str]:
    """The settings in which the runs differ and that decide what a held-out loss measures."""
    return [name for name in _MEASURE if len({repr(_setting(run.config, name)) for run in runs}) > 1]


def write_sweep(folder: Path, runs: Sequence[SweepRun]) -> None:
    """Writes `sweep.json` and the configuration of each run into the sweep's folder.

    Raises:
        ConfigError: another sweep lies there, or the folder cannot be made.
    """
    record = json.dumps([{"name": run.name, "changed": dict(run.changed)} for run in runs], indent=1)
    texts = {config_path(folder, run.name): to_toml(run.config) for run in runs}
    index = folder / "sweep.json"
    try:
        (folder / "configs").mkdir(parents=True, exist_ok=True)
        known = {path: path.read_text(encoding="utf-8") for path in (folder / "configs").glob("*.toml")}
        if known and (known != texts or not index.is_file() or index.read_text(encoding="utf-8") != record):
            problem = Problem("--out", f"{folder} holds another sweep.", "Choose another folder for this one.")
            raise ConfigError("the sweep", [problem])
        for path, text in (texts | {index: record}).items():
            write_text_atomic(path, text)
    except OSError as error:
        problem = Problem("--out", f"{folder} cannot be written ({error.strerror}).", "Choose another folder.")
        raise ConfigError("the sweep", [problem]) from error


def read_sweep(folder: Path) -> tuple[SweepRun, ...]:
    """The runs of the sweep in a folder, begun or not.

    Raises:
        TrainingError: there is none.
    """
    try:
        record = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        return tuple(
            SweepRun(entry["name"], entry["changed"], load_config(config_path(folder, entry["name"])))
            for entry in record
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{folder} is not the folder of a sweep: its sweep.json cannot be read.") from error


def config_path(folder: Path, name: str) -> Path:
    """Where the settings of a run lie before it is begun."""
    return folder / "configs" / f"{name}.toml"


def failure_path(folder: Path, name: str) -> Path:
    """Where a run that could not go on says why."""
    return folder / "failed" / f"{name}.txt"


def run_folder(folder: Path, name: str) -> Path | None:
    """The folder of a run that was begun: the newest where the first tries left no state to go on from."""
    tries = [folder / (name if number == 1 else f"{name}-{number}") for number in range(1, _MAX_SAME_NAME)]
    begun = [path for path in itertools.takewhile(Path.is_dir, tries) if (path / "config.toml").is_file()]
    return begun[-1] if begun else None


def sweep_results(folder: Path, runs: Sequence[SweepRun]) -> list[SweepResult]:
    """What became of each run; those that are finished come first, the lowest held-out loss at the top."""
    found = [_result(folder, run) for run in runs]
    return sorted(found, key=lambda one: (one.state != "finished", one.held_out_loss is None, one.held_out_loss or 0.0))


def write_results(folder: Path, results: Sequence[SweepResult]) -> Path:
    """Writes `results.json` into the sweep's folder; returns its path."""
    path = folder / "results.json"
    write_text_atomic(path, json.dumps([asdict(result) for result in results], indent=1, ensure_ascii=False))
    return path


def table(results: Sequence[SweepResult]) -> Iterator[str]:
    """Lines for people, the best first."""
    yield f"{'':>3}  {'held-out':>8}  {'best save':>9}  {'steps':>6}  {'minutes':>7}  settings and adapter"
    for place, result in enumerate(results, 1):
        changed = " ".join(f"{name}={value}" for name, value in result.changed.items())
        if result.state != "finished":
            yield f"{'-':>3}  {result.state}: {result.error or ''}  {changed} ({result.name})".replace(":   ", "  ")
            continue
        loss = "-" if result.held_out_loss is None else f"{result.held_out_loss:.4f}"
        minutes = (result.seconds or 0.0) / 60
        yield f"{place:>3}  {loss:>8}  {result.best_step or '-':>9}  {result.steps:>6}  {minutes:>7.1f}  {changed}"
        yield f"{'':>43}{result.path}"


def _values(item: str, problems: list[Problem]) -> tuple[str, list[str]]:
    """(setting, its values as texts for `--set`)."""
    name, separator, text = (part.strip() for part in item.partition("="))
    if not separator or name not in set(setting_names()) or name in ("output.name", "output.dir"):
        what = "not of the form section.name=VALUES with a setting of docs/CONFIG.md that is not the place of the run."
        problems.append(Problem(f"--over {item}", what))
        return name, []
    values = _listed(text) if text.startswith("[") else [value.strip() for value in text.split(",")]
    if not values or "" in values or len(set(values)) < len(values):
        problems.append(Problem(f"--over {item}", "a list of different values is wanted, e.g. 1e-4,2e-4."))
    return name, values


def _listed(text: str) -> list[str]:
    try:
        parsed = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return []
    return [value if isinstance(value, str) else json.dumps(value) for value in parsed]


def _name(stem: str, changed: Mapping[str, str]) -> str:
    """Short and readable; the number in it makes it the only one."""
    parts = [stem, *(f"{name.split('.')[-1]}-{value}" for name, value in changed.items())]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts))[:_MAX_NAME].rstrip("._-")


def _require_sense(runs: Sequence[SweepRun]) -> None:
    if len(runs) < 2:
        what = "there is only one run."
        remedy = "Give values to choose from, e.g. --over lora.rank=4,8,16, or several configurations."
        raise ConfigError("the sweep", [Problem("--over", what, remedy)])
    held_out = [run.config.validation for run in runs]
    if not all(one.path or one.share or one.count for one in held_out):
        what = "the runs are ranked by their loss on held-out pictures, and none are held out."
        remedy = "Add --set validation.share=0.2, or validation.path."
        raise ConfigError("the sweep", [Problem("validation", what, remedy)])


def _setting(config: TrainConfig, name: str) -> Any:
    section, field = name.split(".")
    return getattr(getattr(config, section), field)


def _result(folder: Path, run: SweepRun) -> SweepResult:
    root = run_folder(folder, run.name)
    failed = failure_path(folder, run.name)
    if failed.is_file():
        error = failed.read_text(encoding="utf-8").strip()
        return SweepResult(run.name, run.changed, "failed", error=error.splitlines()[0] if error else "")
    if root is None or not (root / "events.jsonl").is_file():
        return SweepResult(run.name, run.changed, "not begun")
    events = read_events(RunDir(root, run.name))
    ends = [event for event in events if isinstance(event, RunFinished)]
    measured = {event.step: event.held_out_loss for event in events if isinstance(event, ValidationDone)}
    measured.pop(0, None)
    if not ends or ends[-1].stopped_early:
        return SweepResult(run.name, run.changed, "not finished", error="run the sweep again to go on")
    return SweepResult(
        run.name,
        run.changed,
        "finished",
        held_out_loss=min(measured.values(), default=None),
        best_step=ends[-1].best_step,
        steps=ends[-1].step,
        seconds=ends[-1].seconds,
        path=str(root / f"{run.name}.safetensors"),
    )
