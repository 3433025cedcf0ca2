"""From a configuration to an adapter file: the parts of training put together."""

from __future__ import annotations

import importlib.util
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

import torch
from accelerate import PartialState

from sdlora.config import TrainConfig, to_toml
from sdlora.data.dataset import ImageDataset, scan_dataset
from sdlora.errors import ModelError, TrainingError
from sdlora.events import Event, Observer
from sdlora.families import Components, load_components, resolve_base
from sdlora.lora import target_modules, trainable_share
from sdlora.precision import Precision, choose_precision
from sdlora.prepare import TrainingSet, prepare_training_set
from sdlora.preview import PreviewDrawer
from sdlora.progress import JsonlWriter
from sdlora.run_dir import RunDir, create_run_dir, write_text_atomic
from sdlora.trainer import Trainer

__all__ = ["Say", "require_attention", "train_adapter"]

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
    given back unchanged). Each observer gets each event; `say` gets sentences for people. Ctrl-C ends the run after
    the step it is in, with what was learnt saved, and is told by `RunFinished.stopped_early`; a second one at once.

    Raises:
        DatasetError: the images cannot be trained on.
        ModelError: the base cannot be had or used here.
        ConfigError: the settings do not fit the base, or the run folder cannot be made.
        TrainingError: training cannot start or go on; NonFiniteError names the step and the images.
    """
    dataset = dataset or _scan(config, say)
    device = components.unet.device if components is not None else _device()
    require_attention(config.model.attention, device)
    precision = choose_precision(config.model.precision, device)
    if components is None:
        source = resolve_base(config.model.base)
        components = load_components(source, weight_dtype=precision.weight_dtype, device=device)
    # Raises if nothing matches, before minutes of encoding.
    target_modules(components.unet, config.lora.targets)
    training_set = _prepare(config, components, dataset)
    run_dir = create_run_dir(config.output.dir, config.run_name)
    write_text_atomic(run_dir.config_path, to_toml(config))
    draw_previews = _preview_drawer(config, components, training_set, precision, run_dir)
    components = components.without_encoders()
    if config.model.attention == "xformers":
        components.unet.enable_xformers_memory_efficient_attention()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trainer = Trainer(
        config=config,
        components=components,
        training_set=training_set,
        run_dir=run_dir,
        precision=precision,
        draw_previews=draw_previews,
    )
    _introduce(trainer, components, precision, device, say)
    with JsonlWriter(run_dir.events_path) as events_file:
        _drive(trainer, [events_file, *observers])
    return run_dir.adapter_path


def _drive(trainer: Trainer, observers: Sequence[Observer]) -> None:
    def tell(event: Event) -> None:
        for observer in observers:
            observer(event)

    with _stopping_on_interrupt(trainer), closing(trainer.run()) as events:
        for event in events:
            tell(event)


@contextmanager
def _stopping_on_interrupt(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C asks the trainer to stop in order; the next one is as usual."""
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set signal handlers; others are stopped by their owner.
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        trainer.request_stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _scan(config: TrainConfig, say: Say) -> ImageDataset:
    data = config.data
    dataset = scan_dataset(data.path, trigger=data.trigger, background=data.background_rgb)
    for warning in dataset.warnings:
        say(f"Note: {warning}")
    return dataset


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


def _prepare(config: TrainConfig, components: Components, dataset: ImageDataset) -> TrainingSet:
    return prepare_training_set(
        components,
        dataset.examples,
        resolution=config.data.resolution,
        trigger=config.data.trigger,
        background=config.data.background_rgb,
        flip=config.data.flip,
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
