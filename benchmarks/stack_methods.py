"""How much of two styles a stack of both brings, by each way to put adapters together: a table in docs/PERFORMANCE.md.

    python benchmarks/stack_methods.py --exposures 40 --out outputs/stack_methods

Trains one adapter on each dataset of the repository on the embedded base (adapters already in OUT are kept), draws
held-out subjects with both adapters at weight 1, and measures how much of the gap to each style was closed, beside the
seconds a picture takes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from sdlora import embedded
from sdlora.config import load_config
from sdlora.demo import STYLES, DemoStyle, draw, find_datasets, held_out_drawings
from sdlora.fidelity import style_gap_closed
from sdlora.generation import Generator
from sdlora.stack.method import METHODS
from sdlora.training import train_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exposures", type=int, default=40)
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("outputs/stack_methods"))
    options = parser.parse_args()
    paths = [trained(style, options.out, options.exposures) for style in STYLES]
    drawings = [held_out_drawings(find_datasets() / style.folder) for style in STYLES]
    subjects = sorted(set(drawings[0]) & set(drawings[1]))[: options.pictures]
    references = [[pictures[subject] for subject in subjects] for pictures in drawings]
    phrase = " and ".join(style.trigger for style in STYLES)
    prompts = [f"{subject}, {phrase}" for subject in subjects]
    generator = Generator.from_base("tiny")
    without = draw(generator, prompts)
    names = [generator.stack.load(path) for path in paths]
    print(f"{len(subjects)} subjects, adapters of {options.exposures} exposures at weight 1")
    print(f"| method | {' | '.join(style.trigger for style in STYLES)} | s a picture |")
    rows = [("the first alone", names[:1], "sum"), ("the second alone", names[1:], "sum")]
    rows += [(method, names, method) for method in (*METHODS, "switch:3")]
    for title, chosen, method in rows:
        generator.stack.set_method("sum")
        generator.stack.set_adapters(chosen)
        generator.stack.set_method(method)
        begin = time.perf_counter()
        pictures = draw(generator, prompts)
        seconds = (time.perf_counter() - begin) / len(pictures)
        gaps = [style_gap_closed(pictures, without, reference) for reference in references]
        print(f"| {title} | {' | '.join(f'{gap:.2f}' for gap in gaps)} | {seconds:.2f} |", flush=True)


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
