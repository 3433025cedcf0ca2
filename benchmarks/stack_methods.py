"""How much of two styles a stack of both brings, by each way to put adapters together: a table in docs/PERFORMANCE.md.

    python benchmarks/stack_methods.py                                          # about 5 minutes on two cores
    python benchmarks/stack_methods.py --adapters outputs/demo --pictures 40    # with what `sdlora demo` trained

Trains one adapter on each dataset of the repository on the embedded base, draws held-out subjects with both adapters
at weight 1, and measures how much of the gap to each style was closed, beside the seconds a picture takes. Adapters and
rows that are already in OUT, from the same base, adapters and pictures, are kept: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora import embedded
from sdlora.config import load_config
from sdlora.demo import STYLES, DemoStyle, draw, find_datasets, held_out_drawings
from sdlora.fidelity import style_gap_closed
from sdlora.generation import Generator
from sdlora.sheet import write_sheet
from sdlora.stack.method import METHODS
from sdlora.training import train_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exposures", type=int, default=40)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--adapters", type=Path, help="folder of blob-emoji.safetensors and high-contrast.safetensors")
    parser.add_argument("--out", type=Path, default=Path("outputs/stack_methods"))
    options = parser.parse_args()
    if options.adapters is None:
        paths = [trained(style, options.out, options.exposures) for style in STYLES]
    else:
        paths = [options.adapters / f"{style.folder}.safetensors" for style in STYLES]
    drawings = [held_out_drawings(find_datasets() / style.folder) for style in STYLES]
    subjects = sorted(set(drawings[0]) & set(drawings[1]))[: options.pictures]
    references = [[pictures[subject] for subject in subjects] for pictures in drawings]
    phrase = " and ".join(style.trigger for style in STYLES)
    generator = Generator.from_base("tiny")
    names = [generator.stack.load(path) for path in paths]
    rows = Rows(generator, [f"{subject}, {phrase}" for subject in subjects], names, options.out)
    without, _ = rows.drawn("without", [], "sum")
    print(f"{len(subjects)} subjects, both adapters at weight 1")
    print(f"| method | {' | '.join(style.trigger for style in STYLES)} | s a picture |")
    columns = {"without": without}
    chosen = [("the first alone", names[:1], "sum"), ("the second alone", names[1:], "sum")]
    for title, adapters, method in (*chosen, *((method, names, method) for method in (*METHODS, "switch:3"))):
        columns[title], seconds = rows.drawn(title, adapters, method)
        gaps = [style_gap_closed(columns[title], without, reference) for reference in references]
        print(f"| {title} | {' | '.join(f'{gap:.2f}' for gap in gaps)} | {seconds:.2f} |", flush=True)
    write_sheet(columns, subjects, options.out / "sheet.png")


class Rows:
    """Pictures by title, each set in a folder of its own with what it depends on."""

    def __init__(self, generator: Generator, prompts: Sequence[str], names: Sequence[str], folder: Path):
        self._generator, self._prompts, self._folder = generator, prompts, folder
        generator.stack.set_adapters([])
        hashes = [generator.stack.tensor_hash(name) for name in names]
        self._of = {"base": generator.stack.base_checksum(), "adapters": hashes, "prompts": list(prompts)}

    def drawn(self, title: str, names: Sequence[str], method: str) -> tuple[list[Image.Image], float]:
        """The pictures and the seconds each took, drawn unless they are there."""
        folder = self._folder / "rows" / title.replace(":", "-").replace(" ", "-")
        files = [folder / f"{number:02d}.png" for number in range(len(self._prompts))]
        record = folder / "row.json"
        known: dict[str, Any] = json.loads(record.read_text("utf-8")) if record.is_file() else {}
        if {**known, "seconds": None} == {**self._of, "seconds": None}:
            return [Image.open(file).convert("RGB") for file in files], known["seconds"]
        self._generator.stack.set_method("sum")
        self._generator.stack.set_adapters(names)
        self._generator.stack.set_method(method)
        begin = time.perf_counter()
        pictures = draw(self._generator, self._prompts)
        seconds = (time.perf_counter() - begin) / len(pictures)
        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        for file, picture in zip(files, pictures, strict=True):
            picture.save(file)
        record.write_text(json.dumps({**self._of, "seconds": seconds}), "utf-8")
        return pictures, seconds


def trained(style: DemoStyle, folder: Path, exposures: int) -> Path:
    """The adapter of a style, trained unless it is there."""
    path = folder / style.folder / f"{style.folder}.safetensors"
    if not path.is_file():
        config = load_config(
            None,
            [
                *embedded.TRAINING,
                'model.base="tiny"',
                f'data.path="{find_datasets() / style.folder}"',
                f'data.trigger="{style.trigger}"',
                f'output.dir="{folder}"',
                f'output.name="{style.folder}"',
                f"train.exposures={exposures}",
            ],
        )
        train_adapter(config)
    return path


if __name__ == "__main__":
    main()
