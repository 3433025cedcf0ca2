"""Does stopping on the held-out loss save steps at no worse style? On the embedded base, over seeds.

    python benchmarks/early_stop.py [--seeds 0 1 2] [--styles high-contrast blob-emoji] [--out outputs/early_stop]

Each style and seed is trained three times: by the fixed recipe (`embedded.TRAINING`) to its end, at the package's own
length of 100 exposures and at the demo's of 40; and, planned as long as the first, by `embedded.TO_STOP` with ten
held-out drawings until it ends itself. The gap that the results close is measured on the 30 other held-out drawings.
To reach: at most half the steps of the fixed recipe, gap not worse.

It can be stopped at any time: trainings go on from their states, what was measured is in OUT/table.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sdlora import embedded
from sdlora.config import load_config
from sdlora.demo import STYLES, DemoStyle, draw, find_datasets, held_out_drawings
from sdlora.events import RunFinished
from sdlora.fidelity import style_gap_closed
from sdlora.generation import Generator
from sdlora.ranking import read_events
from sdlora.run_dir import RunDir
from sdlora.training import resume_run, train_adapter

VALIDATION = 10
_USUAL = ("train.exposures=100",)
RECIPES: dict[str, tuple[str, ...]] = {
    "fixed": _USUAL,
    "demo": (),
    "stopping": (*_USUAL, *embedded.TO_STOP),
}


def split_held_out(dataset: Path, folder: Path) -> dict[str, Any]:
    """Copies the first drawings into `folder` for validation; returns the others, by subject."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = sorted((dataset / "heldout").glob("*.png"))
    for picture in pictures[:VALIDATION]:
        for file in (picture, picture.with_suffix(".txt")):
            shutil.copyfile(file, folder / file.name)
    used = {picture.with_suffix(".txt").read_text(encoding="utf-8").strip() for picture in pictures[:VALIDATION]}
    return {subject: drawing for subject, drawing in held_out_drawings(dataset).items() if subject not in used}


def trained(style: DemoStyle, seed: int, recipe: str, validation: Path, out: Path) -> RunDir:
    """The run by that recipe, begun, gone on with or already there."""
    name = f"{style.folder}-{seed}-{recipe}"
    run = RunDir(out / "runs" / name, name)
    if run.state_dir.exists() and any(run.state_dir.glob("step-*")):
        resume_run(run.root)
        return run
    # Without a state there is nothing to go on from.
    shutil.rmtree(run.root, ignore_errors=True)
    settings: dict[str, object] = {
        "model.base": "tiny",
        "data.path": str(find_datasets() / style.folder),
        "data.trigger": style.trigger,
        "train.seed": seed,
        "output.dir": str(out / "runs"),
        "output.name": name,
        **({"validation.path": str(validation)} if recipe == "stopping" else {}),
    }
    given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    train_adapter(load_config(None, [*embedded.TRAINING, *RECIPES[recipe], *given]))
    return run


@dataclass(frozen=True)
class Measured:
    """How long a run was, and how much of the gap its result closes."""

    steps: int
    gap: float


class Bench:
    """One style: its drawings, and what was measured so far."""

    def __init__(self, style: DemoStyle, generator: Generator, out: Path):
        self.style, self._generator, self._out = style, generator, out
        self._validation = out / "validation" / style.folder
        drawings = split_held_out(find_datasets() / style.folder, self._validation)
        self._prompts, self._truth = [f"{subject}, {style.trigger}" for subject in drawings], list(drawings.values())
        self._table = out / f"table-{style.folder}.json"
        self._without: list[Any] = []

    def measure(self, seed: int, recipe: str) -> Measured:
        """Trains, if that was not done yet, draws and compares."""
        known: dict[str, Any] = json.loads(self._table.read_text()) if self._table.exists() else {}
        key = f"{seed} {recipe}"
        if key not in known:
            run = trained(self.style, seed, recipe, self._validation, self._out)
            self._without = self._without or draw(self._generator, self._prompts)
            name = self._generator.stack.load(run.adapter_path)
            gap = style_gap_closed(draw(self._generator, self._prompts), self._without, self._truth)
            self._generator.stack.unload(name)
            steps = next(event.step for event in read_events(run) if isinstance(event, RunFinished))
            known[key] = {"steps": steps, "gap": gap}
            self._table.write_text(json.dumps(known, indent=1))
        return Measured(**known[key])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--styles", nargs="*", default=[style.folder for style in STYLES])
    parser.add_argument("--out", type=Path, default=Path("outputs/early_stop"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    generator = Generator.from_base("tiny")
    print(
        "| dataset | seed |", *(f"{recipe}: steps, gap |" for recipe in RECIPES), "\n|---|---|---|---|---|", flush=True
    )
    for style in (style for style in STYLES if style.folder in args.styles):
        bench = Bench(style, generator, args.out)
        found: list[dict[str, Measured]] = []
        for seed in args.seeds:
            found.append({recipe: bench.measure(seed, recipe) for recipe in RECIPES})
            cells = (f"{one.steps}, {one.gap:.3f} |" for one in found[-1].values())
            print(f"| {style.folder} | {seed} |", *cells, flush=True)
        for other in ("fixed", "demo"):
            share = fmean(rows["stopping"].steps / rows[other].steps for rows in found)
            gain = fmean(rows["stopping"].gap - rows[other].gap for rows in found)
            print(f"{style.folder}: {share:.2f} of the steps of {other}, gap {gain:+.3f}", flush=True)


if __name__ == "__main__":
    main()
