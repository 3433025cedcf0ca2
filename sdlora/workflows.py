"""Where the parts meet: from options to files. The only modules that know everybody are this one and `demo`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image

from sdlora.adapter_file import read_adapter
from sdlora.adapter_tools import find_by_tensor_hash
from sdlora.adapter_weight import AdapterWeight, Weight, as_weight, simplest
from sdlora.calibration import recommended_weight
from sdlora.config import DEFAULT_BASE, TrainConfig, load_config
from sdlora.data.captions import CaptionRules
from sdlora.data.dataset import ImageDataset
from sdlora.data.decode import decode_image
from sdlora.emphasis import escape_brackets
from sdlora.errors import GenerationError
from sdlora.generation import Generator, StepDrawn, Thrift, pixel_hash
from sdlora.generation.files import preview_files, share_out
from sdlora.picture_file import Recipe, read_recipe, save_picture
from sdlora.progress import terminal_progress
from sdlora.request import GenerationRequest
from sdlora.resume import own_pictures
from sdlora.run_dir import RunDir
from sdlora.sheet import write_page, write_sheet
from sdlora.side_by_side import draw_side_by_side
from sdlora.training import resume_run, train_adapter

__all__ = [
    "ComparedAdapters",
    "PromptJob",
    "compare_adapters",
    "compared",
    "draw_again",
    "generate_files",
    "resume_with_progress",
    "train_with_progress",
]

Say = Callable[[str], None]
_PRECISIONS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_RUN_PROMPTS = 4


@dataclass(frozen=True)
class PromptJob:
    """A prompt without its tags, and the files and weights of the adapters it is drawn with."""

    prompt: str
    adapters: tuple[tuple[Path, Weight | None], ...]
    """A weight of None is what the file recommends, else 1."""


def generate_files(
    jobs: Sequence[PromptJob],
    request: GenerationRequest,
    *,
    base: str | None,
    precision: str,
    out_dir: Path,
    warn: Say,
    thrift: Thrift | None = None,
    on_step: Callable[[StepDrawn], None] | None = None,
    preview_every: int | None = None,
    method: str = "sum",
) -> Iterator[Path | GenerationError]:
    """Draw the pictures and yield each file's path as it is written. Nothing existing is overwritten.

    `method` is how the adapters of a prompt are put together, as `AdapterStack.set_method` takes it.

    Base None: the one that every adapter says it was trained on if that is the embedded base, else the default base. Of
    several jobs, one that cannot be drawn yields its error, and the next is begun. Processes that accelerate started
    together share whole batches out, so that the files are those that one process would write, to the last pixel.

    Raises:
        GenerationError: the request is out of range, or the only job cannot be drawn.
        ModelError: the base cannot be had.
        AdapterError: an adapter cannot be used.
    """
    files = list(dict.fromkeys(path for job in jobs for path, _ in job.adapters))
    base = base or _base_of_adapters(files) or DEFAULT_BASE
    first = _next_index(out_dir)
    shared = share_out(_numbered_batches(jobs, request, first))
    generator = Generator.from_base(
        base, precision=precision, device=shared.device, thrift=thrift, warn=warn, on_step=on_step
    )
    names = _load_all(generator, files)
    with preview_files(generator, out_dir, every=preview_every, process=shared.process):
        for number, batches in groupby(shared.items, lambda batch: batch.job):
            job = jobs[number]
            part = [(batch.first + row, seed) for batch in batches for row, seed in enumerate(batch.seeds)]
            try:
                _set_weights(generator, names, job.adapters, method)
                drawn = generator.draw_many([job.prompt] * len(part), [seed for _, seed in part], request)
                for (index, seed), picture in zip(part, drawn, strict=True):
                    path = out_dir / f"{index:05d}-seed{seed}.png"
                    yield save_picture(picture.image, path, picture.recipe)
            except GenerationError as error:
                if len(jobs) == 1:
                    raise
                yield GenerationError(f"{job.prompt[:60]!r}: {error}")


@dataclass(frozen=True)
class _Batch:
    """Pictures that are computed at once: another batch around a picture would round its sums otherwise."""

    job: int
    """Its place in the list of jobs: of two alike each has its own batches."""
    seeds: Sequence[int]
    first: int
    """The number of the first picture's file."""


def _numbered_batches(jobs: Sequence[PromptJob], request: GenerationRequest, first: int) -> list[_Batch]:
    """Of every job in order; only the last batch of a job may be a short one."""
    seeds, size = range(request.seed, request.seed + request.num_images), request.batch_size
    return [
        _Batch(number, seeds[start : start + size], first + number * len(seeds) + start)
        for number in range(len(jobs))
        for start in range(0, len(seeds), size)
    ]


def draw_again(
    picture: Path,
    *,
    base: str | None,
    folders: Sequence[Path],
    out_dir: Path,
    say: Say,
    warn: Say,
    init_image: Path | None = None,
) -> Path:
    """Draw a picture of ours again from the recipe inside it, and say whether it came out the same.

    Adapters are found below the folders by the hash of their tensors, so that a new name or header does not matter; the
    picture it was drawn over by the hash of its pixels.

    Raises:
        GenerationError: no recipe, an adapter or the picture it was drawn over is nowhere, or the base was a local
            model and `base` does not name it.
        ModelError: the base cannot be had.
    """
    recipe = read_recipe(picture)
    base = base or _base_of_recipe(picture, recipe)
    start = _start_of_recipe(picture, recipe, init_image, folders)
    files: list[tuple[Path, Weight | None]] = []
    for record in recipe.adapters:
        found = find_by_tensor_hash(record.tensor_hash, folders, name=record.file)
        if found is None:
            places = ", ".join(map(str, folders))
            raise GenerationError(
                f"{picture} was drawn with {record.file} (tensor hash {record.tensor_hash[:12]}), which is nowhere "
                f"below {places}. Name its folder with --lora-dir."
            )
        files.append((found, simplest(as_weight(record.weight))))
    thrift = Thrift(vae_tiling=recipe.vae_tiling)
    precision = _PRECISIONS.get(recipe.precision, "auto")
    generator = Generator.from_base(base, precision=precision, thrift=thrift, warn=warn)
    names = _load_all(generator, [path for path, _ in files])
    _set_weights(generator, names, files, recipe.method)
    drawn = next(generator.draw(recipe.request(start)))
    path = save_picture(drawn.image, _free_path(out_dir / picture.name), drawn.recipe)
    say(_likeness(picture, drawn.image, recipe, drawn.recipe))
    return path


@dataclass(frozen=True)
class ComparedAdapters:
    """What a comparison is about: label -> adapter file, the prompts that suit them, and the base they were made on."""

    files: Mapping[str, Path]
    prompts: tuple[str, ...]
    base: str | None


def compared(paths: Sequence[Path]) -> ComparedAdapters:
    """Adapter files as they are; a run's folder stands for its saved adapters, oldest first, and brings its prompts.

    Raises:
        GenerationError: a folder is no run, or holds no adapter.
    """
    files: dict[str, Path] = {}
    prompts: tuple[str, ...] = ()
    base: str | None = None
    for path in paths:
        if not path.is_dir():
            files[path.stem] = path
            continue
        if not (path / "config.toml").is_file():
            raise GenerationError(f"{path} is not the folder of a run: it holds no config.toml.")
        config = load_config(path / "config.toml")
        run_dir = RunDir(path, config.run_name)
        saved = sorted((path / "checkpoints").glob("step-*/*.safetensors"))
        last = [run_dir.adapter_path] if run_dir.adapter_path.is_file() else []
        files |= {file.stem: file for file in [*saved, *last]}
        prompts, base = prompts or _prompts_of_run(run_dir, config), base or config.model.base
    if not files:
        raise GenerationError(f"There is no adapter in {', '.join(map(str, paths))}.")
    return ComparedAdapters(files, prompts, base)


def compare_adapters(
    subject: ComparedAdapters,
    *,
    prompts: Sequence[str],
    weights: Sequence[float],
    seeds: Sequence[int],
    request: GenerationRequest,
    base: str | None,
    precision: str,
    path: Path,
    say: Say,
    warn: Say,
) -> Path:
    """A sheet: a row a prompt and seed, a column the base alone and each adapter at each weight. If the last adapter
    has a trigger that is in the prompts, one more column shows it, at the first weight, on the prompts without that.

    The cells of a row are one batch (`request.batch_size` at most), each drawn with weights of its own. Beside the
    sheet a page of the same name, .html, shows it in a browser.

    Raises:
        GenerationError: there is no prompt, or the request is out of range.
        ModelError, AdapterError: base or adapter cannot be used.
    """
    prompts = list(prompts) or list(subject.prompts)
    if not prompts:
        raise GenerationError('A comparison needs prompts. Give them with --prompt "a fox", as often as needed.')
    files = list(subject.files.values())
    base = base or subject.base or _base_of_adapters(files) or DEFAULT_BASE
    generator = Generator.from_base(base, precision=precision, warn=warn)
    names = _load_all(generator, files)
    cells = [(prompt, seed) for prompt in prompts for seed in seeds]
    rows = [f"{prompt} · {seed}" if len(seeds) > 1 else prompt for prompt, seed in cells]
    headings: dict[str, dict[str, float]] = {"without": {}}
    for label, file in subject.files.items():
        for weight in weights:
            headings[f"{label} {weight:g}" if len(weights) > 1 or weight != 1 else label] = {names[file]: weight}
    unasked = _without_trigger(files[-1], prompts)
    last = f"{list(subject.files)[-1]}, no trigger"
    columns: dict[str, list[Image.Image]] = {heading: [] for heading in [*headings, *([last] if unasked else [])]}
    for row, (prompt, seed) in zip(rows, cells, strict=True):
        say(f"{row}: {len(columns)} pictures")
        pictures = draw_side_by_side(generator, prompt, seed, list(headings.values()), request)
        if unasked:
            pictures += draw_side_by_side(generator, unasked[prompt], seed, [{names[files[-1]]: weights[0]}], request)
        for column, picture in zip(columns.values(), pictures, strict=True):
            column.append(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sheet(columns, rows, path)
    write_page(columns, rows, path.with_suffix(".html"), title=f"{', '.join(subject.files)} on {Path(base).name}")
    return path


def _without_trigger(adapter: Path, prompts: Sequence[str]) -> dict[str, str]:
    """The prompts without the phrase that calls the adapter; empty if it has none or they do not have it."""
    rules = CaptionRules(trigger=read_adapter(adapter).metadata.get("modelspec.trigger_phrase"))
    without = {prompt: rules.compose_without_trigger(prompt) for prompt in prompts}
    return without if rules.trigger and any(old != new for old, new in without.items()) else {}


def train_with_progress(config: TrainConfig, dataset: ImageDataset, *, say: Say, stream: TextIO) -> Path:
    """Train as `config` says, with a progress bar on `stream`; returns the adapter's path.

    Raises:
        ModelError: the base cannot be had or used here.
        TrainingError: training cannot start or go on.
    """
    with terminal_progress(stream) as progress:
        path = train_adapter(config, dataset=dataset, observers=[progress], say=say)
    _tell_how_to_draw(path, say)
    return path


def resume_with_progress(run: Path, overrides: Sequence[str], *, allow_change: bool, say: Say, stream: TextIO) -> Path:
    """Go on with the run in a folder, with a progress bar on `stream`; returns the adapter's path.

    Raises:
        CheckpointError: there is nothing to go on from, or something changed that must not.
        DatasetError, ModelError, TrainingError: as in `train_with_progress`.
    """
    with terminal_progress(stream) as progress:
        path = resume_run(run, overrides=overrides, allow_change=allow_change, observers=[progress], say=say)
    _tell_how_to_draw(path, say)
    return path


def _tell_how_to_draw(path: Path, say: Say) -> None:
    if not path.is_file():
        # Of several processes only one writes the adapter, and tells; this one was ready before it.
        return
    say(f'{path} ({path.stat().st_size / 1024:.0f} kB). Draw with it: sdlora generate "..." --lora {path}')


def _load_all(generator: Generator, files: Sequence[Path]) -> dict[Path, str]:
    """File -> its name in the stack: the stem, with a number where two files share it."""
    names: dict[Path, str] = {}
    for path in files:
        if path not in names:
            taken = sum(other.stem == path.stem for other in names)
            names[path] = generator.stack.load(path, path.stem if not taken else f"{path.stem}-{taken + 1}")
    return names


def _set_weights(
    generator: Generator, names: Mapping[Path, str], adapters: Sequence[tuple[Path, Weight | None]], method: str
) -> None:
    """A file that is named twice counts with the sum of its weights, which must be plain numbers then."""
    weights: dict[str, Weight] = {}
    for path, given in adapters:
        weight = recommended_weight(read_adapter(path).metadata) if given is None else given
        before = weights.get(names[path], 0.0)
        if before == 0.0:
            weights[names[path]] = weight
        elif isinstance(before, AdapterWeight) or isinstance(weight, AdapterWeight):
            raise GenerationError(f"{path.name} is named twice. Give its weight {weight} once.")
        else:
            weights[names[path]] = before + weight
    generator.stack.set_adapters(list(weights), list(weights.values()))
    generator.stack.set_method(method)


def _base_of_adapters(files: Sequence[Path]) -> str | None:
    """ "tiny" if every adapter says that it was trained on the embedded base."""
    bases = {read_adapter(path).metadata.get("sdlora.base") for path in files}
    return "tiny" if bases == {"tiny"} else None


def _base_of_recipe(picture: Path, recipe: Recipe) -> str:
    if recipe.base == "tiny" or re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.base):
        return recipe.base
    raise GenerationError(f"{picture} was drawn with the local model {recipe.base!r}. Say where it lies with --base.")


def _start_of_recipe(picture: Path, recipe: Recipe, given: Path | None, folders: Sequence[Path]) -> Path | None:
    """The picture that this one was drawn over: the given one, or one of its name beside this one or in the folders."""
    if not recipe.init_hash:
        return None
    places = [picture.parent, Path(), *folders]
    candidates = [given] if given else [place / recipe.init_image for place in places if recipe.init_image]
    for path in candidates:
        if path.is_file() and pixel_hash(decode_image(path)) == recipe.init_hash:
            return path
    if given is not None:
        raise GenerationError(f"{given} is not the picture that {picture} was drawn over: its pixels differ.")
    name = recipe.init_image or "a picture without a file"
    raise GenerationError(f"{picture} was drawn over {name}, which was not found. Say where it lies with --init.")


def _prompts_of_run(run_dir: RunDir, config: TrainConfig) -> tuple[str, ...]:
    """The run's own preview prompts, else some of its captions, with the trigger, as in training: brackets are no
    weights."""
    if config.preview.prompts:
        return tuple(map(escape_brackets, config.preview.prompts))
    if not run_dir.dataset_path.is_file():
        return ()
    record = json.loads(run_dir.dataset_path.read_text(encoding="utf-8"))
    rules = CaptionRules.of(config.data)
    captions = [escape_brackets(rules.compose(entry["caption"])) for entry in own_pictures(record).values()]
    different = list(dict.fromkeys(captions))
    return tuple(different[:: max(1, len(different) // _RUN_PROMPTS)][:_RUN_PROMPTS])


def _likeness(original: Path, drawn: Image.Image, before: Recipe, now: Recipe) -> str:
    with Image.open(original) as image:
        first = np.asarray(image.convert("RGB")).astype(int)
    second = np.asarray(drawn).astype(int)
    if first.shape == second.shape and (first == second).all():
        return "The same picture, to the last pixel."
    changed = [
        f"{name} {old} -> {now.versions.get(name)}"
        for name, old in before.versions.items()
        if old != now.versions.get(name)
    ]
    changed += [f"sampler {before.scheduler} -> {now.scheduler}"] if before.scheduler != now.scheduler else []
    changed += [f"precision {before.precision} -> {now.precision}"] if before.precision != now.precision else []
    why = f" Changed since: {', '.join(changed)}." if changed else " Drawn on another kind of machine?"
    if first.shape != second.shape:
        return f"Not the same: another size.{why}"
    return f"Not the same: pixels differ by up to {np.abs(first - second).max()} of 255.{why}"


def _free_path(path: Path) -> Path:
    candidates = (path if n == 1 else path.with_stem(f"{path.stem}-{n}") for n in range(1, 10_000))
    return next(candidate for candidate in candidates if not candidate.exists())


def _next_index(folder: Path) -> int:
    numbers = [int(match[1]) for path in folder.glob("*.png") if (match := re.match(r"(\d{5})-", path.name))]
    return max(numbers, default=0) + 1
