"""`sdlora runs ...`: what else there is to do with training runs and their settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sdlora.options import as_overrides

if TYPE_CHECKING:
    from sdlora.sweep import SweepRun

__all__ = ["app"]

app = typer.Typer(name="runs", help="Rank a run's saves, sweep settings, read others' recipes.", no_args_is_help=True)
out = Console(highlight=False, soft_wrap=True)


@app.command()
def recipe(
    file: Annotated[Path, typer.Argument(help="A kohya .toml, a OneTrainer .json, or a LoRA (.safetensors).")],
    images: Annotated[int | None, typer.Option("--images", min=1, help="How many pictures it is for.")] = None,
    data: Annotated[str, typer.Option("--data", help="Folder to put into the configuration.")] = "PICTURES",
) -> None:
    """Print another trainer's recipe as a configuration of ours, learning rate converted."""
    from sdlora.recipes import read_recipe_file, translate

    # Not through rich, which would take [sections] for markup and fold long lines.
    typer.echo(translate(read_recipe_file(file), images=images, data=data).to_toml(), nl=False)


@app.command()
def rank(
    run: Annotated[Path, typer.Argument(help="The run's folder, e.g. outputs/my_art.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, the best first.")] = False,
) -> None:
    """The saves of a run, the best first, with reasons; writes ranking.json into its folder."""
    from sdlora.training import rank_run

    ranked = rank_run(run)
    if as_json:
        import dataclasses
        import json

        typer.echo(json.dumps([dataclasses.asdict(save) for save in ranked], ensure_ascii=False))
        return
    for save in ranked:
        out.print(f"step {save.step}: {save.reason}\n  {save.path}", markup=False)


@app.command()
def sweep(
    data: Annotated[Path | None, typer.Argument(help="Folder with images and captions. It is only read.")] = None,
    over: Annotated[
        list[str] | None, typer.Option("--over", help="section.name=VALUES to try, e.g. lora.rank=4,8,16; repeatable.")
    ] = None,
    config: Annotated[
        list[Path] | None, typer.Option("--config", help="TOML file; several are tried against each other.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.name=value, for all runs.")] = None,
    trigger: Annotated[str | None, typer.Option("--trigger", help="Phrase that calls the style.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="Checkpoint, folder, Hub id, or `tiny`.")] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of the sweep.")] = Path("outputs/sweep"),
    engine: Annotated[str, typer.Option("--engine", help="local, or slurm: a job array.")] = "local",
    parallel: Annotated[int | None, typer.Option("--parallel", min=1, help="Runs at a time.")] = None,
    job: Annotated[
        list[str] | None, typer.Option("--job", help="Slurm: slurm_partition=gpu, timeout_min=60, gpus_per_node=1 ...")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the jobs.")] = False,
) -> None:
    """Train with every combination of settings; the same command again goes on. Ranked by held-out loss."""
    from sdlora.data.dataset import scan_configured
    from sdlora.errors import ConfigError, Problem
    from sdlora.sweep import expand_sweep, write_sweep

    if engine not in ("local", "slurm"):
        raise ConfigError("the sweep", [Problem("--engine", f"must be local or slurm (got {engine!r}).")])
    files: list[Path | None] = [*config] if config else [None]
    given = {"data.path": data, "data.trigger": trigger, "model.base": base}
    runs = expand_sweep(files, as_overrides(files[0], given, settings or []), over or [], out_dir=out_dir)
    for path in dict.fromkeys(run.config.data.path for run in runs):
        images = len(scan_configured(next(run.config.data for run in runs if run.config.data.path == path)).examples)
        out.print(f"{path}: {images} pictures", markup=False)
    parameters = _job_parameters(job or [])
    if dry_run:
        _tell_jobs(runs, engine, parameters)
        return
    from sdlora.sweep_jobs import require_submitit, run_here, submit_to_slurm

    require_submitit()
    write_sweep(out_dir, runs)
    if engine == "slurm":
        submit_to_slurm(out_dir, runs, parallel=parallel, parameters=parameters, say=typer.echo)
        typer.echo(f"Their results, at any time: sdlora runs results {out_dir}")
        return
    run_here(out_dir, runs, parallel=parallel or 1, say=typer.echo)
    _tell_results(out_dir, runs)


@app.command()
def results(
    folder: Annotated[Path, typer.Argument(help="The sweep's folder, e.g. outputs/sweep.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, the best first.")] = False,
) -> None:
    """What became of a sweep's runs, the best first; writes results.json into its folder."""
    from sdlora.sweep import read_sweep, sweep_results, write_results

    runs = read_sweep(folder)
    if as_json:
        typer.echo(write_results(folder, sweep_results(folder, runs)).read_text(encoding="utf-8"))
        return
    _tell_results(folder, runs)


def _job_parameters(items: list[str]) -> dict[str, int | str]:
    from sdlora.errors import ConfigError, Problem

    pairs = [item.partition("=") for item in items]
    if wrong := [item for item, (name, _, value) in zip(items, pairs, strict=True) if not name or not value]:
        raise ConfigError("the sweep", [Problem(f"--job {item}", "not of the form name=value.") for item in wrong])
    return {name: int(value) if value.isdecimal() else value for name, _, value in pairs}


def _tell_jobs(runs: tuple[SweepRun, ...], engine: str, parameters: dict[str, int | str]) -> None:
    for run in runs:
        typer.echo(f"{run.name}: {' '.join(f'{name}={value}' for name, value in run.changed.items())}")
    asked = "".join(f", {name}={value}" for name, value in parameters.items())
    typer.echo(f"{len(runs)} jobs, {'one Slurm array' if engine == 'slurm' else 'on this computer'}{asked}")


def _tell_results(folder: Path, runs: tuple[SweepRun, ...]) -> None:
    from sdlora.sweep import incomparable_settings, sweep_results, table, write_results

    found = sweep_results(folder, runs)
    for line in table(found):
        typer.echo(line)
    differing = incomparable_settings(runs)
    if differing:
        typer.echo(
            f"Note: {', '.join(differing)} decides what a held-out loss measures, so the order of these runs means "
            "little. Look at pictures instead: sdlora compare ADAPTERS."
        )
    typer.echo(str(write_results(folder, found)))
