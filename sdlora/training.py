"""From a configuration to an adapter file: the parts of training put together."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout

from sdlora import __version__
from sdlora.cache import DiskCache, cache_folder
from sdlora.checkpoint import KEPT, Checkpoint, read_latest_checkpoint, sweep_leftovers
from sdlora.config import TrainConfig, load_config, to_toml
from sdlora.data.captions import CaptionRules
from sdlora.data.dataset import ImageDataset, scan_configured, scan_dataset
from sdlora.data.held_out import split_held_out
from sdlora.data.names import list_names, shown_name
from sdlora.errors import CheckpointError, ConfigError, DatasetError, ModelError, Problem, TrainingError
from sdlora.events import CheckpointSaved, Event, Observer, PreviewReady, RunFinished, to_json
from sdlora.families import Components, load_components, resolve_base, weights_fingerprint
from sdlora.lora import AdapterPlan, base_models, plan_adapter
from sdlora.out_of_memory import telling_out_of_memory
from sdlora.precision import Precision, choose_precision
from sdlora.prepare import TrainingSet, prepare_training_set
from sdlora.preview_requests import Previews
from sdlora.previews.choice import draw_missing, previews_of
from sdlora.processes import Processes, current_processes, training_device
from sdlora.progress import JsonlWriter
from sdlora.ranking import RankedSave, rank_saves, read_events, write_ranking
from sdlora.resume import config_changes, dataset_changes, dataset_record, own_pictures, require_allowed
from sdlora.run_dir import RunDir, create_run_dir, write_text_atomic
from sdlora.trackers import require_tracker, tracker_for
from sdlora.trainer import Trainer

__all__ = ["Say", "rank_run", "require_attention", "resume_run", "train_adapter"]

logger = logging.getLogger(__name__)

Say = Callable[[str], None]
_TOLD_SAVES = 5


def train_adapter(
    config: TrainConfig,
    *,
    dataset: ImageDataset | None = None,
    components: Components | None = None,
    observers: Sequence[Observer] = (),
    say: Say = logger.info,
) -> Path:
    """Trains a LoRA as `config` says, into a new run folder; returns the adapter's path, `RUN/NAME.safetensors`.

    `dataset` saves scanning the folder again, `components` loading the base again (they must lie on one device and are
    given back unchanged). Each observer gets each event; `say` gets sentences for people. Ctrl-C (or SIGTERM) ends the
    run after the step it is in, with what was learnt saved, and is told by `RunFinished.stopped_early`; `resume_run`
    goes on from there. A second Ctrl-C leaves at once.

    Raises:
        DatasetError: the images cannot be trained on.
        ModelError: the base cannot be had or used here.
        AdapterError: the adapter to go on from cannot be used with it.
        ConfigError: the settings do not fit the base, or the run folder cannot be made.
        TrainingError: training cannot start or go on; NonFiniteError names the step and the images.
    """
    processes = current_processes()
    say, observers = (say, observers) if processes.is_main else (_silently, ())
    dataset, prior = dataset or _scan(config, say), _scan_prior(config)
    parts = _Parts.build(config, dataset, prior, components, say)
    run_dir = create_run_dir(config.output.dir, config.run_name) if processes.is_main else None
    run_dir = processes.from_main(run_dir)
    assert run_dir is not None
    with _locked(run_dir, processes):
        if processes.is_main:
            _record(run_dir, config, dataset_record(dataset, prior))
        return _train(parts, run_dir, processes, checkpoint=None, observers=observers, say=say)


def resume_run(
    root: Path,
    *,
    overrides: Sequence[str] = (),
    allow_change: bool = False,
    components: Components | None = None,
    observers: Sequence[Observer] = (),
    say: Say = logger.info,
) -> Path:
    """Goes on with the run in folder `root` from its newest sound state; returns the adapter's path.

    On a CPU the adapter becomes the one of a run that never stopped, bit for bit. `overrides` are settings as for
    `load_config`; those that lead to another adapter, like changed pictures, need `allow_change`. A run that is
    finished is left as it is, but for previews that it was stopped before.

    Raises:
        CheckpointError: there is nothing to go on from, another process works in the folder, or something changed.
        The errors of `train_adapter`.
    """
    if not (root / "config.toml").is_file():
        raise CheckpointError(f"{root} is not the folder of a run: it holds no config.toml.")
    processes = current_processes()
    say, observers = (say, observers) if processes.is_main else (_silently, ())
    begun = load_config(root / "config.toml")
    config = load_config(root / "config.toml", overrides)
    run_dir = RunDir(root, begun.run_name)
    with _locked(run_dir, processes):
        if processes.is_main:
            sweep_leftovers(run_dir.state_dir)
        processes.wait()
        checkpoint = read_latest_checkpoint(run_dir.state_dir, say=say)
        dataset, prior = _scan(config, say), _scan_prior(config)
        known = json.loads(run_dir.dataset_path.read_text(encoding="utf-8"))
        changes = config_changes(begun, config) + dataset_changes(known, record := dataset_record(dataset, prior))
        require_allowed(root, changes, allow_change=allow_change)
        trainer_facts = checkpoint.facts["trainer"]
        # States of before `examples_per_step` was kept are of one process.
        trainer_facts.setdefault("examples_per_step", begun.train.batch_size * begun.train.gradient_accumulation)
        # States of before `finished` was kept say it by their step.
        if trainer_facts.get("finished", checkpoint.step >= checkpoint.facts["num_steps"]) and not changes:
            say(f"{root} is finished: {checkpoint.step} steps. Its adapter is {run_dir.adapter_path}.")
            if processes.is_main:
                _draw_missing(run_dir, config, components, observers, say)
            return run_dir.adapter_path
        _tell_other_versions(checkpoint, say)
        parts = _Parts.build(config, dataset, prior, components, say)
        begun_on = [checkpoint.facts["base"], *checkpoint.facts.get("text_encoders", ())]
        same_precision = config.model.precision == begun.model.precision
        if [parts.base_fingerprint, *parts.text_fingerprints] != begun_on and same_precision:
            detail = f"{parts.components.source} is not the base that this run was started on."
            raise CheckpointError(f"{root}: {detail} Give the right one with --set model.base=...")
        if parts.start_hash != checkpoint.facts.get("start"):
            detail = "lora.init_from is not the adapter that this run was begun with."
            raise CheckpointError(f"{root}: {detail} Give the right one with --set lora.init_from=...")
        # All have read what is written anew here.
        processes.wait()
        if processes.is_main:
            if changes:
                _record(run_dir, config, record)
            _mend_events(run_dir, checkpoint.step)
        say(f"Going on after step {checkpoint.step}.")
        return _train(parts, run_dir, processes, checkpoint=checkpoint, observers=observers, say=say)


def _draw_missing(
    run_dir: RunDir, config: TrainConfig, components: Components | None, observers: Sequence[Observer], say: Say
) -> None:
    """The previews that a finished run lacks, and those that nobody heard of."""
    if not config.preview.prompts or not run_dir.events_path.is_file():
        return
    untold = list(_untold(run_dir, read_events(run_dir)))
    undrawn = run_dir.undrawn_steps(len(config.preview.prompts))
    if not untold and not undrawn:
        return
    with JsonlWriter(run_dir.events_path) as writer:
        watching: list[Observer] = [writer, *observers]

        def tell(event: Event) -> None:
            for observer in watching:
                observer(event)

        for event in untold:
            tell(event)
        if undrawn:
            say("Drawing the last previews.")
            for step, path in draw_missing(run_dir, config, components):
                tell(PreviewReady(step=step, path=str(path)))
    rank_run(run_dir.root)


def _silently(message: str) -> None:
    """What all processes but the first one say."""


def _record(run_dir: RunDir, config: TrainConfig, dataset: Mapping[str, Mapping[str, Any]]) -> None:
    write_text_atomic(run_dir.config_path, to_toml(config))
    write_text_atomic(run_dir.dataset_path, json.dumps(dataset, indent=1, ensure_ascii=False))


def rank_run(root: Path) -> list[RankedSave]:
    """The saves of the run in folder `root`, the best first; also written there as `ranking.json`.

    Raises:
        TrainingError: it is not the folder of a run.
        DatasetError: its pictures, wanted where previews were drawn, are not where they were.
    """
    if not (root / "config.toml").is_file():
        raise CheckpointError(f"{root} is not the folder of a run: it holds no config.toml.")
    config = load_config(root / "config.toml")
    run_dir = RunDir(root, config.run_name)
    names = own_pictures(json.loads(run_dir.dataset_path.read_text(encoding="utf-8")))
    pictures = [config.data.path / name for name in names]
    ranked = _ranked(run_dir, config, pictures)
    write_ranking(run_dir, ranked)
    return ranked


def _ranked(run_dir: RunDir, config: TrainConfig, pictures: Sequence[Path]) -> list[RankedSave]:
    return rank_saves(
        read_events(run_dir),
        pictures,
        background=config.data.background_rgb,
        tolerance=config.validation.tolerance,
    )


@dataclass(frozen=True, eq=False)
class _Parts:
    """What is ready before the run's folder is touched: every setting, picture and layer has been looked at."""

    config: TrainConfig
    components: Components
    """Without encoders, whose memory is free from here on unless somebody else holds them."""
    training_set: TrainingSet
    validation_set: TrainingSet | None
    prior_set: TrainingSet | None
    precision: Precision
    base_fingerprint: str
    text_fingerprints: list[str]
    """Of the text encoders, if they are adapted."""
    start_hash: str | None
    """Of the adapter that the run begins with, if it is not a new one."""
    pictures: tuple[Path, ...]
    previews: Callable[[RunDir, Say], Previews] | None
    """Makes them, for a run's folder."""

    @staticmethod
    def build(
        config: TrainConfig,
        dataset: ImageDataset,
        prior: ImageDataset | None,
        components: Components | None,
        say: Say,
    ) -> _Parts:
        device = components.unet.device if components is not None else training_device()
        given = components is not None
        require_attention(config.model.attention, device)
        require_tracker(config.output.tracker)
        precision = choose_precision(config.model.precision, device)
        if components is None:
            source = resolve_base(config.model.base)
            components = load_components(source, weight_dtype=precision.weight_dtype, device=device)
        # Raises if nothing matches, before minutes of encoding.
        start = plan_adapter(components, config.lora).start
        with telling_out_of_memory(
            config,
            precision,
            doing="encoding the pictures",
            resolution=config.data.resolution or components.default_resolution,
            step=components.size_step,
        ):
            cache = _open_cache(config)
            trained_on, held_out = _split(config, dataset, say)
            training_set = _prepare(config, components, trained_on, cache)
            validation_set = _prepare_steady(config, components, held_out, CaptionRules.of(config.data).steady(), cache)
            prior_set = _prepare_steady(config, components, prior, CaptionRules(), cache)
        for note in cache.notes() if cache is not None else []:
            say(note)
        adapts_text = config.lora.text_encoder
        return _Parts(
            config=config,
            components=components.without_encoders(keep_text=adapts_text),
            training_set=training_set,
            validation_set=validation_set,
            prior_set=prior_set,
            precision=precision,
            base_fingerprint=weights_fingerprint(components.unet),
            text_fingerprints=[weights_fingerprint(encoder) for encoder in components.text_encoders if adapts_text],
            start_hash=start.tensor_sha256 if start is not None else None,
            pictures=tuple(example.path for example in dataset.examples),
            previews=previews_of(config, components, training_set.resolution, given=given),
        )


def _train(
    parts: _Parts,
    run_dir: RunDir,
    processes: Processes,
    *,
    checkpoint: Checkpoint | None,
    observers: Sequence[Observer],
    say: Say,
) -> Path:
    config, components, device = parts.config, parts.components, parts.components.unet.device
    if config.model.attention == "xformers":
        components.unet.enable_xformers_memory_efficient_attention()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    previews = parts.previews(run_dir, say) if parts.previews is not None and processes.is_main else None
    trainer = Trainer(
        config=config,
        components=components,
        training_set=parts.training_set,
        run_dir=run_dir,
        precision=parts.precision,
        previews=previews,
        validation_set=parts.validation_set,
        prior_set=parts.prior_set,
        checkpoint=checkpoint,
        facts={
            "base": parts.base_fingerprint,
            "text_encoders": parts.text_fingerprints,
            "start": parts.start_hash,
            "versions": _versions(),
        },
        processes=processes,
    )
    _introduce(trainer, components, config, parts.precision, device, say)
    if not processes.is_main:
        _drive(trainer, [])
        return run_dir.adapter_path
    try:
        _require_space(run_dir, trainer.adapter_plan, len(trainer.plan.save_steps), config.output.dtype)
    except TrainingError:
        # The trainer takes its LoRA out at the end of a run, and this one never begins.
        trainer.detach()
        raise
    with ExitStack() as stack:
        watching: list[Observer] = [stack.enter_context(JsonlWriter(run_dir.events_path))]
        if previews is not None:
            stack.callback(previews.close)
        tracker = tracker_for(config, run_dir)
        if tracker is not None:
            stack.callback(tracker.close)
            watching.append(tracker)
        stack.enter_context(
            telling_out_of_memory(
                config,
                parts.precision,
                doing="training",
                resolution=parts.training_set.resolution,
                step=components.size_step,
                run=run_dir.root,
            )
        )
        _drive(trainer, [*watching, *observers])
    if trainer.finished is not None and not trainer.finished.stopped_early:
        _rank(parts, run_dir, say)
    return run_dir.adapter_path


def _rank(parts: _Parts, run_dir: RunDir, say: Say) -> None:
    """Says which saves are best, where something was measured."""
    ranked = _ranked(run_dir, parts.config, parts.pictures)
    if len(ranked) < 2 or (ranked[0].held_out_loss is None and ranked[0].style_distance is None):
        return
    say(f"The saves, the best first ({write_ranking(run_dir, ranked)}):")
    for save in ranked[:_TOLD_SAVES]:
        say(f"  step {save.step}: {save.reason}")


@contextmanager
def _locked(run_dir: RunDir, processes: Processes) -> Iterator[None]:
    """The first process holds the folder for all."""
    if not processes.is_main:
        yield
        return
    lock = FileLock(run_dir.lock_path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"Another process works in {run_dir.root}. Wait until it is done, or stop it first."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _versions() -> dict[str, str]:
    return {"sdlora": __version__, **{name: version(name) for name in ("torch", "diffusers", "peft")}}


def _tell_other_versions(checkpoint: Checkpoint, say: Say) -> None:
    now = _versions()
    other = [
        f"{name} {old} -> {now.get(name)}" for name, old in checkpoint.facts["versions"].items() if old != now.get(name)
    ]
    if other:
        say(f"Note: other versions than when it was saved ({', '.join(other)}); results may differ in the last digits.")


def _mend_events(run_dir: RunDir, step: int) -> None:
    """Steps after the state will be made again, and told again; what lies there of before it and nobody heard of is
    told: saves and previews."""
    told = read_events(run_dir) if run_dir.events_path.exists() else []
    events: list[Event] = [event for event in told if not isinstance(event, RunFinished)]
    events += _untold(run_dir, told)
    lines = [f"{to_json(event)}\n" for event in events if event.step <= step]
    write_text_atomic(run_dir.events_path, "".join(lines))


def _untold(run_dir: RunDir, told: Iterable[Event]) -> Iterator[CheckpointSaved | PreviewReady]:
    """The saves and previews that lie there and are not among the events."""
    # By name: the folder may have been moved, or was named otherwise.
    names = {(event.step, Path(event.path).name) for event in told if isinstance(event, CheckpointSaved | PreviewReady)}
    for step in run_dir.saved_steps():
        adapter = run_dir.checkpoint_adapter_path(step)
        if (step, adapter.name) not in names:
            yield CheckpointSaved(step=step, path=str(adapter))
        for picture in run_dir.drawn_previews(step).values():
            if (step, picture.name) not in names:
                yield PreviewReady(step=step, path=str(picture))


def _require_space(run_dir: RunDir, adapter: AdapterPlan, num_saves: int, dtype: str) -> None:
    # A state holds the weights and two moments in fp32, and one more is written before the oldest goes.
    needed = 12 * adapter.num_parameters * (KEPT + 1) + adapter.file_bytes_in(dtype) * num_saves
    free = shutil.disk_usage(run_dir.root).free
    if free < needed:
        raise TrainingError(
            f"{run_dir.root} needs {needed / 1e6:.0f} MB for what is saved in the run, and {free / 1e6:.0f} MB are "
            "free there. Free some, or choose another place with --out."
        )


def _drive(trainer: Trainer, observers: Sequence[Observer]) -> None:
    def tell(event: Event) -> None:
        for observer in observers:
            observer(event)

    with _stopping_on_interrupt(trainer), closing(trainer.run()) as events:
        for event in events:
            tell(event)


@contextmanager
def _stopping_on_interrupt(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the trainer to stop in order; the next one is as usual."""
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set signal handlers; others are stopped by their owner.
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        restore()
        trainer.request_stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield
    finally:
        restore()


def _scan(config: TrainConfig, say: Say) -> ImageDataset:
    dataset = scan_configured(config.data)
    for warning in dataset.warnings:
        say(f"Note: {warning}")
    return dataset


def _scan_prior(config: TrainConfig) -> ImageDataset | None:
    """
    Raises:
        ConfigError: what is to be kept of the base is just what is learnt.
        DatasetError: the folder cannot be used, or is the one that is trained on.
    """
    prior, data = config.prior, config.data
    if prior.weight and not (prior.prompts or prior.path or data.trigger):
        what = "without a trigger, what the base draws is what the pictures are to change."
        problem = Problem("prior.weight", what, "Give data.trigger, or prior.prompts or prior.path.")
        raise ConfigError("the settings", [problem])
    if prior.path is None:
        return None
    if prior.path.resolve() == data.path.resolve():
        raise DatasetError(
            prior.path, [Problem("prior.path", "these are the pictures that are trained on.", "Give others.")]
        )
    return scan_dataset(prior.path, background=data.background_rgb)


def _split(config: TrainConfig, dataset: ImageDataset, say: Say) -> tuple[ImageDataset, ImageDataset | None]:
    """What is trained on, and what is held out: a folder of its own or some of the pictures.

    Raises:
        DatasetError: the folder cannot be used or is the one that is trained on, or no picture would be left.
    """
    path = config.validation.path
    if path is None:
        trained_on, held_out = split_held_out(dataset, share=config.validation.share, count=config.validation.count)
        if held_out is not None:
            names = list_names(shown_name(example.path, dataset.root) for example in held_out.examples)
            say(f"Held out are {len(held_out.examples)} of {len(dataset.examples)} pictures: {names}.")
        return trained_on, held_out
    if path.resolve() == config.data.path.resolve():
        problem = Problem("validation.path", "these are the pictures that are trained on.", "Hold out others.")
        raise DatasetError(path, [problem])
    return dataset, scan_dataset(path, trigger=config.data.trigger, background=config.data.background_rgb)


def require_attention(attention: str, device: torch.device) -> None:
    """Checks that "sdpa" or "xformers" attention works here.

    Raises:
        ModelError: xformers is asked for on a device without CUDA, or is not installed.
    """
    if attention != "xformers":
        return
    if device.type != "cuda":
        raise ModelError(f'xformers attention needs a CUDA device, not {device.type}. Use model.attention = "sdpa".')
    if importlib.util.find_spec("xformers") is None:
        raise ModelError('xformers is not installed. `pip install sdlora[xformers]`, or model.attention = "sdpa".')


def _open_cache(config: TrainConfig) -> DiskCache | None:
    """
    Raises:
        ConfigError: it would lie among the pictures.
    """
    if not config.data.cache:
        return None
    folder, data = cache_folder(config.data.cache_dir), config.data.path
    if folder.resolve().is_relative_to(data.resolve()):
        what = f"the cache {folder} lies inside the dataset folder {data}, which is only read."
        problem = Problem("data.cache_dir", what, "Choose a place outside it, there or with SDLORA_CACHE.")
        raise ConfigError("the settings", [problem])
    return DiskCache(folder)


def _prepare(
    config: TrainConfig,
    components: Components,
    dataset: ImageDataset,
    cache: DiskCache | None,
) -> TrainingSet:
    keeps_answers = config.prior.weight and not config.prior.path
    return prepare_training_set(
        components,
        dataset.examples,
        resolution=config.data.resolution,
        captions=CaptionRules.of(config.data),
        background=config.data.background_rgb,
        flip=config.data.flip,
        crop_variants=config.data.crop_variants,
        mask_outside=config.data.mask_outside,
        prior_prompts=config.prior.prompts if keeps_answers else None,
        seed=config.train.seed,
        cache=cache,
    )


def _prepare_steady(
    config: TrainConfig,
    components: Components,
    dataset: ImageDataset | None,
    captions: CaptionRules,
    cache: DiskCache | None,
) -> TrainingSet | None:
    """One cut-out and one caption of each picture, if there are any: those held out, or those learnt besides."""
    if dataset is None:
        return None
    return prepare_training_set(
        components,
        dataset.examples,
        resolution=config.data.resolution,
        captions=captions,
        background=config.data.background_rgb,
        flip=config.data.flip,
        mask_outside=config.data.mask_outside,
        cache=cache,
    )


def _introduce(
    trainer: Trainer,
    components: Components,
    config: TrainConfig,
    precision: Precision,
    device: torch.device,
    say: Say,
) -> None:
    say(f"{components.family.title}, {components.prediction_type} prediction, on {device} in {precision.name}.")
    adapter = trainer.adapter_plan
    models = base_models(components)
    frozen = sum(weight.numel() for part in adapter.layers for weight in models[part].parameters())
    whose = "the U-Net's and the text encoders'" if adapter.adapts_text else "the U-Net's"
    share = adapter.num_parameters / (frozen - adapter.num_parameters)
    say(f"Training {adapter.num_parameters:,} parameters, {share:.2%} of {whose}.")
    if adapter.start is not None:
        ranks = ", ".join(map(str, sorted({layer.rank for part in adapter.layers.values() for layer in part.values()})))
        say(f"Going on from {adapter.start.path.name}: its layers are kept, with their ranks ({ranks}).")
    if adapter.num_lengths:
        say(
            "Note: this is DoRA. sdlora and LyCORIS draw its files right; diffusers, kohya's networks.lora, ComfyUI "
            "and A1111 draw something else, without an error. `sdlora lora bake` makes a base of it for every tool."
        )
    falls = config.optimizer.name != "adamw-schedulefree" and config.optimizer.schedule != "constant"
    if config.validation.stop != "never" and falls:
        say(
            "Note: where validation.stop ends the run, its learning rate has hardly fallen, and the style is not all "
            "there. optimizer.name=adamw-schedulefree needs no fall; it takes about 2.5 times AdamW's rate."
        )
    size = adapter.file_bytes_in(config.output.dtype)
    say(f"Each adapter file: {size:,} bytes of weights in {adapter.num_layers} layers.")
    say(trainer.plan.explanation)
