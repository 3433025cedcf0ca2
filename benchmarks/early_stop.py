"""Does stopping on the held-out loss save steps at no worse style? On the embedded base, over seeds.

    python benchmarks/early_stop.py --seeds 0 1 2 --out outputs/early_stop

Each seed and dataset is trained by the fixed recipe and by each rule of `validation.stop`. Ten held-out drawings
are the validation set, the gap closed is measured on the others. To reach: at most half the steps, gap not worse. Rows
already in OUT/table.json are kept, so that it can be stopped and continued.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from sdlora import embedded
from sdlora.config import load_config
from sdlora.demo import STYLES, DemoStyle, draw, find_datasets, held_out_drawings
from sdlora.events import RunFinished
from sdlora.fidelity import style_gap_closed
from sdlora.generation import Generator
from sdlora.training import train_adapter

VALIDATION = 10


def split_held_out(dataset: Path, folder: Path) -> dict[str, Any]:
    """Copies the first drawings into `folder` for validation; returns the others, by subject."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = sorted((dataset / "heldout").glob("*.png"))
    for picture in pictures[:VALIDATION]:
        for file in (picture, picture.with_suffix(".txt")):
            shutil.copyfile(file, folder / file.name)
    used = {picture.with_suffix(".txt").read_text(encoding="utf-8").strip() for picture in pictures[:VALIDATION]}
    return {subject: drawing for subject, drawing in held_out_drawings(dataset).items() if subject not in used}


def train(style: DemoStyle, seed: int, rule: str, validation: Path, out: Path) -> tuple[Path, int, int | None, float]:
    """The adapter, the steps made, the step of the save that became it, and the seconds."""
    settings: dict[str, object] = {
        "model.base": "tiny",
        "data.path": str(find_datasets() / style.folder),
        "data.trigger": style.trigger,
        "train.seed": seed,
        "output.dir": str(out / "runs"),
        "output.name": f"{style.folder}-{rule}-{seed}",
    }
    if rule != "fixed":
        settings |= {"validation.path": str(validation), "validation.stop": rule}
    finished: list[RunFinished] = []
    started = time.perf_counter()
    path = train_adapter(
        load_config(None, [*embedded.TRAINING, *(f"{name}={value!r}" for name, value in settings.items())]),
        observers=[lambda event: finished.append(event) if isinstance(event, RunFinished) else None],
    )
    return path, finished[0].step, finished[0].best_step, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--rules", nargs="*", default=["fixed", "patience", "plateau"])
    parser.add_argument("--styles", nargs="*", default=[style.folder for style in STYLES])
    parser.add_argument("--out", type=Path, default=Path("outputs/early_stop"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = args.out / "table.json"
    rows: list[dict[str, Any]] = json.loads(table.read_text()) if table.exists() else []
    done = {(row["dataset"], row["seed"], row["rule"]) for row in rows}
    generator = Generator.from_base("tiny")
    print("| dataset | seed | rule | steps | best save | gap closed | seconds |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        for style in (style for style in STYLES if style.folder in args.styles):
            validation = Path(place) / style.folder
            drawings = split_held_out(find_datasets() / style.folder, validation)
            prompts, truth = [f"{subject}, {style.trigger}" for subject in drawings], list(drawings.values())
            without = draw(generator, prompts)
            for seed in args.seeds:
                for rule in args.rules:
                    if (style.folder, seed, rule) in done:
                        continue
                    path, steps, best, seconds = train(style, seed, rule, validation, args.out)
                    name = generator.stack.load(path)
                    gap = style_gap_closed(draw(generator, prompts), without, truth)
                    generator.stack.unload(name)
                    rows.append(
                        {
                            "dataset": style.folder,
                            "seed": seed,
                            "rule": rule,
                            "steps": steps,
                            "best_step": best,
                            "gap_closed": gap,
                            "seconds": seconds,
                        }
                    )
                    table.write_text(json.dumps(rows, indent=1))
                    print(
                        f"| {style.folder} | {seed} | {rule} | {steps} | {best or ''} | {gap:.3f} | {seconds:.0f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
