"""`sdlora data ...`: what is kept between runs, and what is known of a dataset before one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["app"]

app = typer.Typer(name="data", help="Look after datasets and what is kept of them.", no_args_is_help=True)
out = Console(highlight=False, soft_wrap=True)


@app.callback()
def _group() -> None:
    """Makes a group of what is one command so far."""


@app.command()
def cache(
    folder: Annotated[Path | None, typer.Option("--dir", help="The cache, if data.cache_dir was set.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove everything in it.")] = False,
    max_age: Annotated[
        float | None, typer.Option("--max-age", min=0.0, help="Remove what was not used for so many days.")
    ] = None,
    max_gb: Annotated[
        float | None, typer.Option("--max-gb", min=0.0, help="Remove what was unused longest, down to this size.")
    ] = None,
) -> None:
    """The encoded images and captions kept for the next run: where, how much. They can always be made again."""
    from sdlora.cache import cache_folder, cache_usage, prune_cache

    root = cache_folder(folder)
    if clear or max_age is not None or max_gb is not None:
        limit = 0 if clear else None if max_gb is None else int(max_gb * 1e9)
        removed = prune_cache(root, max_age_days=max_age, max_bytes=limit)
        out.print(f"Removed {_amount(removed.entries, removed.size_bytes)}.", markup=False)
    usage = cache_usage(root)
    out.print(f"{root}:", markup=False)
    for kind, found in usage.items():
        out.print(f"  {kind}: {_amount(found.entries, found.size_bytes)}", markup=False)


def _amount(entries: int, size_bytes: int) -> str:
    return f"{entries} {'entry' if entries == 1 else 'entries'}, {size_bytes / 1e6:.1f} MB"
