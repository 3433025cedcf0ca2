"""Does stopping on the held-out loss save steps at no worse style? On the embedded base, over seeds.

    python benchmarks/early_stop.py [--seeds 0 1 2] [--styles high-contrast blob-emoji] [--out outputs/early_stop]

Each style and seed is trained once, to the end of the fixed recipe, with 20 saves measured on ten held-out drawings.
A run with `validation.stop` is that run up to where it stops (tests/training/test_stopping.py shows it, bit for bit),
so each rule is asked what it would have done after every save, and the save it would have published is drawn with. The
gap closed is measured on the 30 other held-out drawings. To reach: at most half the steps, gap not worse.

It can be stopped at any time: trainings go on from their states, pictures that were measured are in OUT/table.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from sdlora import embedded
from sdlora.config import load_config
from sdlora.demo import STYLES, DemoStyle, draw, find_datasets, held_out_drawings
from sdlora.events import RunFinished, ValidationDone
from sdlora.fidelity import style_gap_closed
from sdlora.generation import Generator
from sdlora.length import SAVES_TO_STOP_BY
from sdlora.ranking import read_events
from sdlora.run_dir import RunDir
from sdlora.stopping import has_learnt
from sdlora.training import resume_run, train_adapter

VALIDATION = 10
STOP_AFTER = 5
STEPS = 200
"""Of `embedded.TRAINING` on 40 drawings."""
RULES: tuple[Literal["patience", "plateau"], ...] = ("patience", "plateau")


def split_held_out(dataset: Path, folder: Path) -> dict[str, Any]:
    """Copies the first drawings into `folder` for validation; returns the others, by subject."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = sorted((dataset / "heldout").glob("*.png"))
    for picture in pictures[:VALIDATION]:
        for file in (picture, picture.with_suffix(".txt")):
            shutil.copyfile(file, folder / file.name)
    used = {picture.with_suffix(".txt").read_text(encoding="utf-8").strip() for picture in pictures[:VALIDATION]}
    return {subject: drawing for subject, drawing in held_out_drawings(dataset).items() if subject not in used}


def trained(style: DemoStyle, seed: int, validation: Path, out: Path) -> RunDir:
    """The whole run of the fixed recipe, begun, gone on with or already there."""
    name = f"{style.folder}-{seed}"
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
        "train.save_every": STEPS // SAVES_TO_STOP_BY,
        "validation.path": str(validation),
        "validation.keep_best": False,
        "output.dir": str(out / "runs"),
        "output.name": name,
    }
    train_adapter(load_config(None, [*embedded.TRAINING, *(f"{key}={json.dumps(v)}" for key, v in settings.items())]))
    return run


@dataclass(frozen=True)
class Stopped:
    """Where a rule would have ended the run, and the save that would have been its result."""

    steps: int
    published: int


def stopped_by(rule: Literal["patience", "plateau"], losses: dict[int, float]) -> Stopped:
    """`losses` are those on the held-out drawings by step, from 0 on."""
    steps = list(losses)
    for count in range(1, len(steps) + 1):
        if has_learnt([losses[step] for step in steps[:count]], rule=rule, after=STOP_AFTER):
            break
    saved = steps[1:count]
    return Stopped(steps[count - 1], min(saved, key=losses.__getitem__))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--styles", nargs="*", default=[style.folder for style in STYLES])
    parser.add_argument("--out", type=Path, default=Path("outputs/early_stop"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = args.out / "table.json"
    gaps: dict[str, float] = json.loads(table.read_text()) if table.exists() else {}
    generator = Generator.from_base("tiny")
    print("| dataset | seed | rule | steps | published save | gap closed |\n|---|---|---|---|---|---|", flush=True)
    found: dict[str, list[tuple[float, float]]] = {rule: [] for rule in RULES}
    for style in (style for style in STYLES if style.folder in args.styles):
        validation = args.out / "validation" / style.folder
        drawings = split_held_out(find_datasets() / style.folder, validation)
        prompts, truth = [f"{subject}, {style.trigger}" for subject in drawings], list(drawings.values())
        without: list[Any] = []
        for seed in args.seeds:
            run = trained(style, seed, validation, args.out)
            events = read_events(run)
            losses = {event.step: event.held_out_loss for event in events if isinstance(event, ValidationDone)}
            last = next(event.step for event in events if isinstance(event, RunFinished))
            assert last == STEPS
            rows = {"fixed": Stopped(last, last), **{rule: stopped_by(rule, losses) for rule in RULES}}
            for rule, row in rows.items():
                key = f"{style.folder} {seed} {row.published}"
                if key not in gaps:
                    without = without or draw(generator, prompts)
                    name = generator.stack.load(run.checkpoint_adapter_path(row.published))
                    gaps[key] = style_gap_closed(draw(generator, prompts), without, truth)
                    generator.stack.unload(name)
                    table.write_text(json.dumps(gaps, indent=1))
                print(
                    f"| {style.folder} | {seed} | {rule} | {row.steps} | {row.published} | {gaps[key]:.3f} |",
                    flush=True,
                )
                if rule != "fixed":
                    fixed = gaps[f"{style.folder} {seed} {last}"]
                    found[rule].append((row.steps / last, gaps[key] - fixed))
    for rule, pairs in found.items():
        shares, gains = ([pair[n] for pair in pairs] for n in range(2))
        reached = fmean(shares) <= 0.5 and fmean(gains) >= 0
        print(
            f"\n{rule}: {fmean(shares):.2f} of the steps ({min(shares):.2f} to {max(shares):.2f}), "
            f"gap closed {fmean(gains):+.3f} ({min(gains):+.3f} to {max(gains):+.3f}): "
            f"{'reached' if reached else 'not reached'}"
        )


if __name__ == "__main__":
    main()
