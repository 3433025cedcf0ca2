"""What a target preset and a rank buy on the embedded base: the table in README.

    python benchmarks/style_table.py --out outputs/style_table

Trains every combination on both datasets, draws the held-out subjects, and measures the style gap closed, the subjects
kept (share of pictures whose own drawing is among the five nearest by luminance edges, against the base's own share),
the time and the file's size. Rows already in OUT/table.json are kept, so that it can be stopped and continued.

The first row of a dataset tells what its numbers can mean: there the "pictures with the adapter" are the style's own
true drawings of the training subjects. Nothing can be more of the style, but the subjects are others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

import sdlora
from sdlora import embedded
from sdlora.config import load_config
from sdlora.data.dataset import scan_dataset
from sdlora.demo import STYLES, DemoStyle, draw, find_datasets, held_out_drawings
from sdlora.fidelity import style_gap_closed, subject_topk
from sdlora.generation import Generator
from sdlora.training import train_adapter

PRESETS = ("cross-attention", "attention", "attention+ff")
RANKS = (4, 16)
TRUE_DRAWINGS = "true drawings of other subjects"


@dataclass(frozen=True, eq=False)
class Reference:
    """What every row of one dataset is measured against."""

    prompts: list[str]
    truth: list[Image.Image]
    without: list[Image.Image]
    top5_base: float

    @staticmethod
    def of(style: DemoStyle, generator: Generator) -> Reference:
        drawings = held_out_drawings(find_datasets() / style.folder)
        subjects, truth = list(drawings), list(drawings.values())
        prompts = [f"{subject}, {style.trigger}" for subject in subjects]
        top5 = subject_topk(draw(generator, subjects), truth, k=5, edges=True)
        return Reference(prompts, truth, draw(generator, prompts), top5)


def measure(
    style: DemoStyle, preset: str, rank: int, reference: Reference, generator: Generator, args: argparse.Namespace
) -> dict[str, object]:
    settings: dict[str, object] = {
        "model.base": "tiny",
        "data.path": str(find_datasets() / style.folder),
        "data.trigger": style.trigger,
        "lora.targets": preset,
        "lora.rank": rank,
        "output.dir": str(args.out / "runs"),
        "output.name": f"{style.folder}-{preset.replace('+', '-')}-r{rank}",
    }
    started = time.perf_counter()
    given = [*embedded.TRAINING, *(f"{k}={v!r}" for k, v in settings.items()), *(args.set or [])]
    path = train_adapter(load_config(None, given))
    seconds = time.perf_counter() - started
    name = generator.stack.load(path)
    with_adapter = draw(generator, reference.prompts)
    generator.stack.unload(name)
    return {
        "dataset": style.folder,
        "targets": preset,
        "rank": rank,
        "gap_closed": style_gap_closed(with_adapter, reference.without, reference.truth),
        "subject_top5": subject_topk(with_adapter, reference.truth, k=5, edges=True),
        "subject_top5_base": reference.top5_base,
        "seconds": seconds,
        "kilobytes": path.stat().st_size / 1024,
    }


def measure_true_drawings(style: DemoStyle, reference: Reference) -> dict[str, object]:
    """The training half itself in the place of what an adapter draws."""
    drawings = []
    for example in scan_dataset(find_datasets() / style.folder).examples:
        with Image.open(example.path) as image:
            drawings.append(image.convert("RGB"))
    gap = style_gap_closed(drawings, reference.without, reference.truth)
    return {"dataset": style.folder, "targets": TRUE_DRAWINGS, "rank": None, "gap_closed": gap}


def to_markdown(rows: list[dict[str, object]]) -> str:
    lines = [
        "| dataset | targets | rank | gap closed | subject kept | training | file |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["targets"] == TRUE_DRAWINGS:
            lines.append(f"| {row['dataset']} | {TRUE_DRAWINGS} | | {row['gap_closed']:.2f} | | | |")
            continue
        kept = float(row["subject_top5"]) / max(float(row["subject_top5_base"]), 1e-9)  # type: ignore[arg-type]
        lines.append(
            f"| {row['dataset']} | {row['targets']} | {row['rank']} | {row['gap_closed']:.2f} | {kept:.0%} "
            f"| {row['seconds']:.0f} s | {row['kilobytes']:.0f} kB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/style_table"))
    parser.add_argument("--set", action="append", help="section.name=value, for every row")
    parser.add_argument("--style", choices=[style.folder for style in STYLES], help="only this dataset")
    parser.add_argument("--presets", nargs="*", default=PRESETS)
    parser.add_argument("--ranks", nargs="*", type=int, default=RANKS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = args.out / "table.json"
    rows: list[dict[str, object]] = json.loads(table.read_text())["rows"] if table.exists() else []
    done = {(row["dataset"], row["targets"], row["rank"]) for row in rows}
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "sdlora": sdlora.__version__,
    }

    def keep(row: dict[str, object]) -> None:
        rows.append(row)
        table.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
        print(to_markdown([row]).splitlines()[-1], flush=True)

    generator = Generator.from_base("tiny")
    for style in STYLES if args.style is None else [s for s in STYLES if s.folder == args.style]:
        reference = Reference.of(style, generator)
        if (style.folder, TRUE_DRAWINGS, None) not in done:
            keep(measure_true_drawings(style, reference))
        for preset in args.presets:
            for rank in args.ranks:
                if (style.folder, preset, rank) in done:
                    continue
                keep(measure(style, preset, rank, reference, generator, args))
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
