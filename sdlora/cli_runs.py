"""`sdlora runs ...`: what else there is to do with training runs and their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["app"]

app = typer.Typer(name="runs", help="Rank a run's saves, translate other trainers' recipes.", no_args_is_help=True)
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
