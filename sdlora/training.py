"""From a configuration to an adapter file: the parts of training put together."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout

from sdlora import __version__
from sdlora.cache import DiskCache, cache_folder
from sdlora.checkpoint import KEPT, Checkpoint, read_latest_checkpoint, sweep_leftovers
from sdlora.config import TrainConfig, load_config, to_toml
from sdlora.data.dataset import ImageDataset, scan_dataset
from sdlora.errors import CheckpointError, ConfigError, DatasetError, ModelError, Problem, TrainingError
from sdlora.events import Event, Observer, RunFinished, from_json
from sdlora.families import Components, load_components, resolve_base, weights_fingerprint
from sdlora.length import plan_length
from sdlora.lora import detach_lora, target_modules, trainable_share
from sdlora.precision import Precision, choose_precision
from sdlora.prepare import TrainingSet, prepare_training_set
from sdlora.preview import PreviewDrawer
from sdlora.progress import JsonlWriter
from sdlora.resume import config_changes, dataset_changes, dataset_record, require_allowed
from sdlora.run_dir import RunDir, create_run_dir, write_text_atomic
from sdlora.trainer import Trainer

__all__ = ["Say", "require_attention", "resume_run", "train_adapter"]

logger = logging.getLogger(__name__)

Say = Callable[[str], None]


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
        ConfigError: the settings do not fit the base, or the run folder cannot be made.
        TrainingError: training cannot start or go on; NonFiniteError names the step and the images.
    """
    dataset = dataset or _scan(config, say)
    parts = _Parts.build(config, dataset, components, say)
    run_dir = create_run_dir(config.output.dir, config.run_name)
    with _locked(run_dir):
        write_text_atomic(run_dir.config_path, to_toml(config))
        write_text_atomic(run_dir.dataset_path, json.dumps(dataset_record(dataset), indent=1, ensure_ascii=False))
        return _train(parts, run_dir, checkpoint=None, observers=observers, say=say)


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
    finished is left as it is.

    Raises:
        CheckpointError: there is nothing to go on from, another process works in the folder, or something changed.
        The errors of `train_adapter`.
    """
    if not (root / "config.toml").is_file():
        raise CheckpointError(f"{root} is not the folder of a run: it holds no config.toml.")
    begun = load_config(root / "config.toml")
    config = load_config(root / "config.toml", overrides)
    run_dir = RunDir(root, begun.run_name)
    with _locked(run_dir):
        sweep_leftovers(run_dir.state_dir)
        checkpoint = read_latest_checkpoint(run_dir.state_dir, say=say)
        dataset = _scan(config, say)
        known = json.loads(run_dir.dataset_path.read_text(encoding="utf-8"))
        changes = config_changes(begun, config) + dataset_changes(known, record := dataset_record(dataset))
        require_allowed(root, changes, allow_change=allow_change)
        if checkpoint.step >= checkpoint.facts["num_steps"] and not changes:
            say(f"{root} is finished: {checkpoint.step} steps. Its adapter is {run_dir.adapter_path}.")
            return run_dir.adapter_path
        _tell_other_versions(checkpoint, say)
        parts = _Parts.build(config, dataset, components, say)
        if parts.base_fingerprint != checkpoint.facts["base"] and config.model.precision == begun.model.precision:
            detail = f"{parts.components.source} is not the base that this run was started on."
            raise CheckpointError(f"{root}: {detail} Give the right one with --set model.base=...")
        if changes:
            write_text_atomic(run_dir.config_path, to_toml(config))
            write_text_atomic(run_dir.dataset_path, json.dumps(record, indent=1, ensure_ascii=False))
        _forget_events_after(run_dir, checkpoint.step)
        say(f"Going on after step {checkpoint.step}.")
        return _train(parts, run_dir, checkpoint=checkpoint, observers=observers, say=say)


@dataclass(frozen=True, eq=False)
class _Parts:
    """What is ready before the run's folder is touched: every setting, picture and layer has been looked at."""

    config: TrainConfig
    components: Components
    training_set: TrainingSet
    validation_set: TrainingSet | None
    precision: Precision
    base_fingerprint: str

    @staticmethod
    def build(config: TrainConfig, dataset: ImageDataset, components: Components | None, say: Say) -> _Parts:
        device = components.unet.device if components is not None else _device()
        require_attention(config.model.attention, device)
        precision = choose_precision(config.model.precision, device)
        if components is None:
            source = resolve_base(config.model.base)
            components = load_components(source, weight_dtype=precision.weight_dtype, device=device)
        # Raises if nothing matches, before minutes of encoding.
        target_modules(components.unet, config.lora.targets)
        cache = _open_cache(config)
        training_set = _prepare(config, components, dataset, cache)
        held_out = _scan_held_out(config)
        validation_set = _prepare(config, components, held_out, cache) if held_out is not None else None
        for note in cache.notes() if cache is not None else []:
            say(note)
        return _Parts(config, components, training_set, validation_set, precision, weights_fingerprint(components.unet))


def _train(
    parts: _Parts, run_dir: RunDir, *, checkpoint: Checkpoint | None, observers: Sequence[Observer], say: Say
) -> Path:
    config, device = parts.config, parts.components.unet.device
    draw_previews = _preview_drawer(config, parts.components, parts.training_set, parts.precision, run_dir)
    components = parts.components.without_encoders()
    if config.model.attention == "xformers":
        components.unet.enable_xformers_memory_efficient_attention()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    plan = plan_length(len(parts.training_set.entries), config)
    trainer = Trainer(
        config=config,
        components=components,
        training_set=parts.training_set,
        run_dir=run_dir,
        precision=parts.precision,
        draw_previews=draw_previews,
        validation_set=parts.validation_set,
        checkpoint=checkpoint,
        facts={"base": parts.base_fingerprint, "versions": _versions(), "num_steps": plan.steps},
    )
    _introduce(trainer, components, parts.precision, device, say)
    try:
        _require_space(run_dir, components, len(plan.save_steps))
    except TrainingError:
        # The trainer takes its LoRA out at the end of a run, and this one never begins.
        detach_lora(components.unet)
        raise
    with JsonlWriter(run_dir.events_path) as events_file:
        _drive(trainer, [events_file, *observers])
    return run_dir.adapter_path


@contextmanager
def _locked(run_dir: RunDir) -> Iterator[None]:
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


def _forget_events_after(run_dir: RunDir, step: int) -> None:
    """Steps after the state will be made again, and told again."""
    if not run_dir.events_path.exists():
        return
    kept = []
    for line in run_dir.events_path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            event = from_json(line)
        except ValueError:
            # The last line of a killed run may be cut off.
            continue
        if event.step <= step and not isinstance(event, RunFinished):
            kept.append(line)
    write_text_atomic(run_dir.events_path, "".join(kept))


def _require_space(run_dir: RunDir, components: Components, num_saves: int) -> None:
    parameters, _ = trainable_share(components.unet)
    # A state holds the weights and two moments in fp32, and one more is written before the oldest goes; files are fp16.
    needed = parameters * (12 * (KEPT + 1) + 2 * num_saves)
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
    data = config.data
    dataset = scan_dataset(data.path, trigger=data.trigger, background=data.background_rgb)
    for warning in dataset.warnings:
        say(f"Note: {warning}")
    return dataset


def _scan_held_out(config: TrainConfig) -> ImageDataset | None:
    """
    Raises:
        DatasetError: the folder cannot be used, or is the one that is trained on.
    """
    path = config.validation.path
    if path is None:
        return None
    if path.resolve() == config.data.path.resolve():
        problem = Problem("validation.path", "these are the pictures that are trained on.", "Hold out others.")
        raise DatasetError(path, [problem])
    return scan_dataset(path, trigger=config.data.trigger, background=config.data.background_rgb)


def _device() -> torch.device:
    state = PartialState()
    if state.num_processes > 1:
        raise TrainingError("Training runs in one process. Start it without `accelerate launch --num_processes`.")
    device: torch.device = state.device
    return device


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
    config: TrainConfig, components: Components, dataset: ImageDataset, cache: DiskCache | None
) -> TrainingSet:
    return prepare_training_set(
        components,
        dataset.examples,
        resolution=config.data.resolution,
        trigger=config.data.trigger,
        background=config.data.background_rgb,
        flip=config.data.flip,
        cache=cache,
    )


def _preview_drawer(
    config: TrainConfig, components: Components, training_set: TrainingSet, precision: Precision, run_dir: RunDir
) -> PreviewDrawer | None:
    if not config.preview.prompts:
        return None
    return PreviewDrawer(
        components=components,
        settings=config.preview,
        resolution=training_set.resolution,
        precision=precision,
        run_dir=run_dir,
    )


def _introduce(trainer: Trainer, components: Components, precision: Precision, device: torch.device, say: Say) -> None:
    trainable, share = trainable_share(components.unet)
    say(f"{components.family.title}, {components.prediction_type} prediction, on {device} in {precision.name}.")
    say(f"Training {trainable:,} parameters, {share:.2%} of the U-Net's.")
    say(trainer.plan.explanation)
