"""Small runs: a training set of made-up latents, and a trainer on a tiny pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdlora.checkpoint import Checkpoint
from sdlora.config import TrainConfig
from sdlora.families import Components, components_from_pipeline
from sdlora.precision import Precision
from sdlora.prepare import LatentDistribution, PreparedExample, TrainingSet, View
from sdlora.preview_requests import Previews
from sdlora.processes import ALONE, Processes
from sdlora.run_dir import RunDir
from sdlora.trainer import Trainer
from tests.tiny import tiny_sd1, tiny_sd2, tiny_sdxl

TINY: dict[str, Callable[[], Any]] = {"sd1": tiny_sd1, "sd2": tiny_sd2, "sdxl": tiny_sdxl}


def make_config(**sections: dict[str, Any]) -> TrainConfig:
    """Rank 4, two images of batch 2, one save; any setting can be given otherwise."""
    train = {"exposures": 2, "batch_size": 2, "learning_rate": 1e-3, "save_every": 10_000, **sections.pop("train", {})}
    return TrainConfig.model_validate(
        {"data": {"path": "pictures", "trigger": "ink style"}, "lora": {"rank": 4}, "train": train, **sections}
    )


def make_training_set(
    components: Components, *, sizes_hw: Sequence[tuple[int, int]] = ((64, 64),) * 4, seed: int = 0
) -> TrainingSet:
    """Smooth random latents, one caption for each image; sizes are in pixels."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index, (height, width) in enumerate(sizes_hw):
        colour = torch.randn(4, 1, 1, generator=generator).expand(4, height // 8, width // 8).clone()
        examples.append(
            PreparedExample(
                name=f"{index}.png",
                views=(View(LatentDistribution(mean=colour, std=0.05 * torch.ones_like(colour))),),
                mirrored_views=(),
                caption_rows=(index + 1,),
                original_hw=(height, width),
                target_hw=(height, width),
            )
        )
    texts = ("", *(f"picture {n}" for n in range(len(sizes_hw))))
    return TrainingSet(tuple(examples), components.family.encode_prompts(components, texts), texts, 64)


class CalledPreviews:
    """Draws by calling a function with the step; `look` is called after each step."""

    def __init__(self, draw: Callable[[int], list[Path]], look: Callable[[], None] = lambda: None):
        self.asked: list[tuple[int, Path]] = []
        self._draw, self._look, self._done = draw, look, list[tuple[int, Path]]()

    def request(self, step: int, adapter: Path) -> None:
        assert adapter.is_file()
        self.asked.append((step, adapter))
        self._done += [(step, path) for path in self._draw(step)]

    def ready(self) -> list[tuple[int, Path]]:
        self._look()
        done, self._done = self._done, []
        return done

    def finish(self, is_stopped: Callable[[], bool]) -> Iterator[tuple[int, Path]]:
        yield from self.ready()

    def close(self) -> None:
        pass


def make_trainer(
    folder: Path,
    *,
    family: str = "sd1",
    components: Components | None = None,
    training_set: TrainingSet | None = None,
    precision: Precision | None = None,
    previews: Previews | None = None,
    checkpoint: Checkpoint | None = None,
    validation_set: TrainingSet | None = None,
    processes: Processes = ALONE,
    **sections: dict[str, Any],
) -> Trainer:
    components = components or components_from_pipeline(TINY[family]())
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(
        config=make_config(**sections),
        components=components,
        training_set=training_set or make_training_set(components),
        run_dir=RunDir(folder, "ink"),
        precision=precision or Precision("fp32", "cpu"),
        previews=previews,
        checkpoint=checkpoint,
        validation_set=validation_set,
        processes=processes,
    )


def write_pictures(folder: Path, *, count: int = 3, captions: bool = True) -> Path:
    """A dataset of flat 64 x 64 pictures, each of another colour."""
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (64, 64), (80 * index % 256, 40, 200)).save(folder / f"{index}.png")
        if captions:
            (folder / f"{index}.txt").write_text(f"thing {index}", encoding="utf-8")
    return folder
