"""The settings of a training run: what they are, how they are read, written and documented. Loads no model library.

A setting comes from its default, then the TOML file, then `--set section.name=value`; the last one wins. All mistakes
are reported together. The text under each field is its documentation: docs/CONFIG.md is made from it.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from sdlora.errors import ConfigError, Problem

__all__ = [
    "DEFAULT_BASE",
    "TARGET_PRESETS",
    "BlockSettings",
    "DataConfig",
    "LoraSettings",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "OutputConfig",
    "PreviewConfig",
    "PriorConfig",
    "TrainConfig",
    "TrainSettings",
    "ValidationConfig",
    "config_reference",
    "load_config",
    "setting_names",
    "to_toml",
]

DEFAULT_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
TARGET_PRESETS = (
    "cross-attention",
    "attention",
    "attention+ff",
    "attention+ff+conv",
    "style-blocks",
    "b-lora-style",
    "b-lora-content",
)

Count: TypeAlias = Annotated[int, Field(strict=True, ge=1)]
Seed: TypeAlias = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Fraction: TypeAlias = Annotated[float, Field(strict=True, ge=0, le=1)]
NotNegative: TypeAlias = Annotated[float, Field(strict=True, ge=0)]
Positive: TypeAlias = Annotated[float, Field(strict=True, gt=0)]

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,99}")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
    )


class ModelConfig(_Section):
    """The model that is trained on, and how it computes."""

    base: str = Field(default=DEFAULT_BASE, min_length=1)
    """The base model: a `.safetensors` checkpoint, a diffusers folder, a Hugging Face id, or `tiny` for the small model
    inside this package."""

    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Number format of the computation. `auto`: fp16 on CUDA, bf16 on CPUs that have it, else fp32. The LoRA's own
    weights are always kept in fp32."""

    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Attention kernel. `sdpa` is PyTorch's own; `xformers` needs that package and a CUDA device."""

    gradient_checkpointing: bool = Field(default=False, strict=True)
    """Computes parts of the U-Net twice to keep less in memory: slower, for GPUs with little of it."""

    channels_last: bool = Field(default=False, strict=True)
    """Lays pictures out in memory with their channels side by side, which convolutions on newer GPUs prefer."""

    compile: bool = Field(default=False, strict=True)
    """Compiles the transformer blocks (torch.compile) when a run begins, once for each size of picture: worth it in
    long runs. Needs a C++ compiler."""


class DataConfig(_Section):
    """The pictures and their captions."""

    path: Path
    """The folder with the images. It is only read."""

    trigger: str | None = Field(default=None, min_length=1)
    """A phrase added to every caption; in a prompt it later calls the style. Required if an image has no caption."""

    resolution: int | None = Field(default=None, strict=True, ge=64, le=4096, multiple_of=8)
    """Side in pixels of the square whose area the images are brought to (they keep about their shape). None: the base
    model's own, e.g. 512 for SD 1.5, 1024 for SDXL."""

    background: str = Field(default="#ffffff", pattern=r"^#[0-9A-Fa-f]{6}$")
    """Colour under transparent images, as `#rrggbb`."""

    caption_dropout: Fraction = 0.1
    """Share of exposures shown without caption, which keeps guidance working. 0.05 to 0.1 is usual."""

    caption_prefix: str = ""
    """Stands before every caption, with a space between."""

    caption_suffix: str = ""
    """Stands after every caption and the trigger, e.g. `, white background`."""

    shuffle_tags: bool = Field(default=False, strict=True)
    """Captions are tags with commas between, and come in another order from exposure to exposure. Trigger, prefix and
    suffix stay where they are."""

    keep_tags: Annotated[int, Field(strict=True, ge=0)] = 0
    """The first so many tags of a caption are neither moved nor left out."""

    tag_dropout: Fraction = 0.0
    """Share of the tags that an exposure leaves out, so that no tag is needed for the style. 0 to 0.2."""

    caption_variants: Annotated[int, Field(strict=True, ge=1, le=1000)] = 8
    """How many different captions an image has with `shuffle_tags` or `tag_dropout`; encoded before the run."""

    flip: bool = Field(default=False, strict=True)
    """Also show images mirrored, at random. Wrong for art with lettering, signatures or a fixed direction of light."""

    crop_variants: Annotated[int, Field(strict=True, ge=1, le=100)] = 1
    """How many cut-outs of each image are shown, in turn by chance. The first is as large as its shape allows, the
    others are anywhere in the image and up to 1.25 times closer, but never enlarged for it."""

    masks: str | None = Field(default=None, min_length=1)
    """Which parts of the images are learnt: a folder with grey images of the same names and sizes (white: learnt,
    black: not), or `alpha` for the images' own transparency. None: all."""

    mask_outside: Fraction = 0.0
    """How much what is black in a mask counts nevertheless."""

    cache: bool = Field(default=True, strict=True)
    """Keeps encoded images and captions on the disk, so that the next run on them starts at once. The adapter is the
    same, bit for bit. `sdlora data cache` shows and empties it."""

    cache_dir: Path | None = None
    """Where they are kept. None: the folder in the environment variable SDLORA_CACHE, else the system's place for
    caches."""

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """`background` as red, green, blue in 0..255."""
        red, green, blue = bytes.fromhex(self.background[1:])
        return red, green, blue


class BlockSettings(_Section):
    """A row of `lora.blocks`."""

    match: str = Field(min_length=1)
    rank: int = Field(strict=True, ge=0, le=512)
    alpha: Positive | None = None


class LoraSettings(_Section):
    """The low-rank adapter."""

    rank: int = Field(default=16, strict=True, ge=1, le=512)
    """Inner width of the adapter. More holds more detail, gives a larger file and copies the images sooner."""

    alpha: Positive | None = None
    """The adapter's change is multiplied by alpha / rank. None: equal to rank, so that weight 1.0 is full strength."""

    dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs set to zero in training, against copying. 0 to 0.1."""

    targets: str | tuple[str, ...] = "cross-attention"
    """The layers that get an adapter: `cross-attention` (where text meets picture; the smallest file), `attention`
    (also self-attention), `attention+ff` (also feed-forward), `attention+ff+conv` (also the convolutions, as LoCon), or
    a list of patterns such as `["*.attn1.to_v", "*.attn2.to_k"]`, each of which must match a layer. `style-blocks` is
    the attention of the blocks that carry style: the way up of SD 1.x and 2.x; of SDXL the two blocks of B-LoRA, which
    are also there one by one as `b-lora-style` and `b-lora-content` (arXiv 2403.14572)."""

    blocks: tuple[BlockSettings, ...] = ()
    """Rank and alpha of single layers: rows of `match` (a pattern like those of `targets`), `rank` and `alpha`, such as
    `[{match = "up_blocks.*", rank = 32, alpha = 16}, {match = "mid_block.*", rank = 0}]`. The last row that matches a
    layer counts; rank 0 leaves it out; without alpha it keeps the strength that `rank` and `alpha` of all have. Each
    row must match a layer of `targets`."""

    text_encoder: bool = Field(default=False, strict=True)
    """Also adapts the text encoders (their attention and feed-forward layers), which then stay in memory and work in
    every step. Rarely better for a style and sooner spoilt. Rows of `blocks` reach them as `text_encoder.*` and, in
    SDXL, `text_encoder_2.*`: rank 0 leaves one out."""

    init_from: Path | None = None
    """Goes on from this adapter file instead of starting anew. Its layers, ranks and strengths are kept: `rank`,
    `alpha` and `targets` then say nothing, and `text_encoder` must fit it. None: a new adapter."""

    timestep_min_rank: int | None = Field(default=None, strict=True, ge=1, le=512)
    """In training only this many ranks work at the noisiest timestep, rising evenly to all at the cleanest (T-LoRA,
    arXiv 2507.05964): against copying when there are very few pictures. Half of `rank` is usual. The file is a plain
    LoRA, with all ranks at every timestep. None: off."""

    dora: bool = Field(default=False, strict=True)
    """Also learns the length of each row of a layer, beside the direction that the pair turns it to (DoRA, arXiv
    2402.09353). No low-rank file can say that: the lengths are stored as `dora_scale`, which sdlora and LyCORIS draw
    right, while diffusers and kohya's `networks.lora` leave them out and ComfyUI and A1111 take them otherwise, all
    without an error. `sdlora lora bake` puts such an adapter into the base, for every tool."""

    rslora: bool = Field(default=False, strict=True)
    """Divides alpha by the root of the rank instead of the rank (rsLoRA, arXiv 2312.03732), so that a high rank learns
    as fast as a low one; then set alpha to a small number such as 4. The file has the usual form: its strength is right
    in every tool."""

    @model_validator(mode="after")
    def _one_source_of_ranks(self) -> Self:
        if self.init_from is not None and (self.blocks or self.rslora):
            raise ValueError(
                "the file of init_from decides ranks and strengths; it cannot have blocks or rslora beside it"
            )
        if self.dora and self.timestep_min_rank is not None:
            raise ValueError("dora measures all ranks together; it cannot have a timestep_min_rank")
        return self

    @field_validator("targets", mode="before")
    @classmethod
    def _known_preset_or_patterns(cls, value: object) -> object:
        if isinstance(value, str) and value not in TARGET_PRESETS:
            raise ValueError(
                f"no preset is called {value!r}{_did_you_mean(value, TARGET_PRESETS)}; "
                f"presets: {', '.join(TARGET_PRESETS)}; own patterns are written as a list"
            )
        if isinstance(value, list | tuple) and (not value or not all(isinstance(x, str) and x for x in value)):
            raise ValueError("patterns are a list of one or more texts")
        if not isinstance(value, str | list | tuple):
            raise ValueError(f"a preset ({', '.join(TARGET_PRESETS)}) or a list of patterns is wanted")
        return value


class TrainSettings(_Section):
    """How long and how strongly is trained."""

    exposures: Count = 100
    """How often each image is seen. The one number for the length: steps, warm-up and saves follow from it, so that it
    keeps its meaning for any number of images and any batch size. 60 to 170 is usual for 30 to 60 images."""

    batch_size: Count = 2
    """Images computed at once. More needs more memory."""

    gradient_accumulation: Count = 1
    """Batches whose gradients are added before one update: a larger batch for the same memory."""

    learning_rate: Positive = 1e-4
    """Peak step size of AdamW. With alpha = rank, 5e-5 to 3e-4 for Stable Diffusion; a small base takes more."""

    warmup_fraction: Fraction = 0.05
    """Share of the steps in which the learning rate rises from 0 to its peak; then it falls to 0 along a cosine."""

    weight_decay: NotNegative = 0.01
    """AdamW's decay of the adapter's weights."""

    snr_gamma: NotNegative = 5.0
    """Caps the weight of the easy, nearly noiseless steps (Min-SNR, arXiv 2303.09556, which uses 5). 0: off."""

    noise_offset: NotNegative = 0.0
    """Adds to the noise a random constant per channel of this size; 0.03 to 0.05 helps very dark or bright styles."""

    max_grad_norm: Positive = 1.0
    """Gradients longer than this are shortened to it before the update."""

    seed: Seed = 0
    """Start of every random choice. Same seed, same machine, same settings: same adapter."""

    save_every: Count | None = None
    """Steps between saved adapters. None: five saves, evenly spread, the last at the end; 20 with `validation.stop`."""

    log_every: Count = 1
    """Steps between progress events; each tells the mean loss since the one before."""


class ObjectiveConfig(_Section):
    """What is learnt from a picture and how much it counts."""

    loss: Literal["mse", "huber", "smooth_l1"] = "mse"
    """How an error is measured. `huber` and `smooth_l1` care less about single large errors, such as stains and
    artefacts in the images."""

    huber_delta: Positive = 0.1
    """Where `huber` and `smooth_l1` turn from squared to absolute error."""

    weighting: Literal["min-snr", "debiased", "p2", "none"] = "min-snr"
    """How much each noise level counts: Min-SNR with `train.snr_gamma` (arXiv 2303.09556), debiased estimation
    (arXiv 2310.08442), P2 (arXiv 2204.00227), or all alike."""

    multires_discount: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """Adds coarse noise, each halving of the size weaker by this factor: helps with large dark or bright areas, like
    `train.noise_offset`. 0.1 to 0.4 is usual; 0: off."""

    input_perturbation: NotNegative = 0.0
    """Further noise of this size in the input but not in the target, against copying (arXiv 2301.11706 uses 0.1)."""

    timestep_range: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Which part of the noise schedule is trained, from clean (0) to pure noise (1)."""

    timestep_bias: Literal["none", "noisy", "clean"] = "none"
    """Shows noisy timesteps (layout, colours) or clean ones (strokes, texture) more often than the others."""

    @field_validator("timestep_range")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] < value[1]:
            raise ValueError("the first number must be below the second")
        return value


class OptimizerConfig(_Section):
    """How the weights are changed."""

    name: Literal["adamw", "adamw8bit", "adafactor", "lion", "prodigy", "adamw-schedulefree"] = "adamw"
    """`lion` takes a third to a tenth of AdamW's learning rate, `prodigy` finds its own and takes 1. `adamw8bit` and
    `prodigy` need `pip install sdlora[optimizers]`. `adamw-schedulefree` (arXiv 2405.15682) averages instead of
    lowering its rate, so that any save is as good as the end of a run of that length; `schedule` does not matter to
    it."""

    schedule: Literal["cosine", "cosine-restarts", "linear", "constant"] = "cosine"
    """The learning rate after the warm-up."""

    restarts: Count = 3
    """How often `cosine-restarts` begins anew."""

    text_encoder_learning_rate: Positive | None = None
    """Peak step size for `lora.text_encoder`. None: a tenth of `train.learning_rate`; with `prodigy` the same one."""

    lora_plus_ratio: Positive = 1.0
    """How many times as fast the up factors learn (LoRA+, arXiv 2402.12354 uses 16, with a lower learning rate)."""

    ema_decay: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """The saved adapter is an average over the last steps; 0.99 spans about 100 of them. 0: off."""

    max_norm: NotNegative = 0.0
    """No layer's change may grow larger than this (Frobenius norm); it is shrunk after the step. 0: off."""

    @model_validator(mode="after")
    def _one_rate_for_prodigy(self) -> Self:
        if self.name == "prodigy" and self.lora_plus_ratio != 1:
            raise ValueError("prodigy finds one learning rate for all; it cannot have a lora_plus_ratio")
        if self.name == "prodigy" and self.text_encoder_learning_rate is not None:
            raise ValueError("prodigy finds one learning rate for all; it cannot have a text_encoder_learning_rate")
        if self.name == "adamw-schedulefree" and (self.ema_decay or self.max_norm):
            raise ValueError("adamw-schedulefree averages by itself; it goes with neither ema_decay nor max_norm")
        return self


class ValidationConfig(_Section):
    """Pictures that are never trained on, to see when the adapter begins to copy instead of learning the style."""

    path: Path | None = None
    """Folder with pictures and captions in the same style. Their loss is measured before the first step and at each
    save, always with the same noise. None: not done, unless `share` or `count` is given."""

    share: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """Instead of a folder: about this share of the training pictures, at least one. Their contents decide which, so
    that pictures that come or go change nothing for the others."""

    count: Annotated[int, Field(strict=True, ge=0)] = 0
    """Instead of a folder: this many of the training pictures. One that is added later replaces at most one of them."""

    timesteps: Count = 4
    """Noise levels per picture."""

    stop: Literal["never", "patience", "plateau", "rise"] = "never"
    """Ends the run when the held-out loss has told enough: `rise` when it is more than `tolerance` above its lowest
    value, `patience` when that value is `stop_after` measurements old, `plateau` when the last `stop_after` hardly vary
    any more (DVAR, arXiv 2302.04841). With each, 20 saves are made instead of five unless `train.save_every` says
    otherwise. It goes with `optimizer.name = "adamw-schedulefree"`: a learning rate that falls over the planned length
    has hardly fallen where the run ends."""

    stop_after: Annotated[int, Field(strict=True, ge=2)] = 5
    """Measurements that `stop` looks back on."""

    keep_best: bool = Field(default=True, strict=True)
    """The latest save whose held-out loss is at most `tolerance` above the lowest becomes the result; all others stay
    in `checkpoints`."""

    tolerance: Annotated[float, Field(strict=True, ge=0)] = 0.1
    """How much higher than the lowest the held-out loss of the result may be, as a share: a style goes on arriving
    while that loss begins to rise. 0: the lowest itself."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("path", "share", "count") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say what is held out; keep one")
        return self


class PriorConfig(_Section):
    """Keeps what the base draws without the trigger as it is, while the adapter learns."""

    weight: NotNegative = 0.0
    """How much the base's own answers count beside the pictures. 0.1 to 1 is usual; a step then computes each prompt
    with and without the adapter as well. 0: off."""

    prompts: tuple[str, ...] = ()
    """Plain prompts, such as `a fox` or `a house by a lake`, whose answers with the adapter must stay those of the base
    alone, at the same noisy images; no further pictures are needed. Empty: the captions without the trigger."""

    path: Path | None = None
    """Instead: a folder of pictures with captions in no particular style, which are learnt besides, as many as others,
    so that the adapter keeps to what the trigger calls."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.prompts and self.path:
            raise ValueError("prompts and path both say what is kept; keep one")
        if not self.weight and (self.prompts or self.path):
            raise ValueError("without a weight above 0 nothing is kept")
        return self


class PreviewConfig(_Section):
    """Pictures drawn at each save, to watch the style arrive."""

    prompts: tuple[str, ...] = ()
    """What to draw, by `generate`'s own code from the saved file. Empty: nothing. Brackets are no weights."""

    where: Literal["auto", "beside", "between"] = "auto"
    """`beside` the training, in a process of its own of lowest priority: the training never waits, and the base is
    loaded once more, on another GPU, in free memory of the same one, or for the CPU. `between` two steps, with the
    models in memory: the training waits. `auto` is `beside`, for models that a program passes in `between`."""

    num_inference_steps: Count = 20
    """Denoising steps of a preview."""

    guidance_scale: NotNegative = 7.5
    """How strongly a preview follows its prompt."""

    seed: Seed = 0
    """Seed of every preview, so that those of different steps can be compared."""


class OutputConfig(_Section):
    """Where the results go."""

    dir: Path = Path("outputs")
    """The folder in which the run's own folder is made."""

    name: str | None = None
    """Name of the run's folder and of the adapter file. None: the name of the data folder. A folder that exists is
    never reused: `-2`, `-3`, ... is added to the folder's name. It is the adapter's title, for all to see."""

    author: str | None = Field(default=None, min_length=1, max_length=200)
    """Whose name stands in the adapter's header. None: nobody's."""

    license: str | None = Field(default=None, min_length=1, max_length=200)
    """The licence that stands in the adapter's header, e.g. `cc-by-4.0`. None: nothing is said."""

    recommended_weight: Annotated[float, Field(strict=True, gt=0, le=10)] | None = None
    """The weight that tools suggest for the adapter. None: nothing is said, which they take as 1."""

    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Number format of the weights in the adapter files. `fp16` is read by every tool and loses nothing that shows;
    `fp32` keeps every bit of the training, in twice the space. States for going on are fp32 always."""

    with_captions: bool = Field(default=False, strict=True)
    """Writes into the header what the captions say and how often, for A1111's cloud of tags. Private unless wanted."""

    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also sends the numbers of the run there: losses, learning rate, speed and the settings of training; no captions,
    pictures or paths. Each needs its package: `pip install sdlora[tensorboard]`, `[wandb]`, `[trackio]`. TensorBoard
    writes into the run's folder, the other two to where they are set up to."""

    @field_validator("name")
    @classmethod
    def _safe_file_name(cls, value: str | None) -> str | None:
        if value is None:
            return value
        if not _FILE_NAME.fullmatch(value) or value.endswith((" ", ".")) or value.split(".")[0].lower() in _RESERVED:
            raise ValueError("a plain file name is wanted: letters, digits, space and . _ + -, at most 100 characters")
        return value


class TrainConfig(_Section):
    """All settings of one training run; frozen and checked."""

    model: ModelConfig = ModelConfig()
    data: DataConfig
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    validation: ValidationConfig = ValidationConfig()
    prior: PriorConfig = PriorConfig()
    preview: PreviewConfig = PreviewConfig()
    output: OutputConfig = OutputConfig()

    @property
    def run_name(self) -> str:
        """`output.name`, or one made of the data folder's name."""
        if self.output.name is not None:
            return self.output.name
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", self.data.path.resolve().name).strip("-_")[:80]
        return stem if stem and stem.lower() not in _RESERVED else "adapter"

    @model_validator(mode="after")
    def _stops_by_something(self) -> Self:
        held_out = self.validation.path or self.validation.share or self.validation.count
        if self.validation.stop != "never" and not held_out:
            raise ValueError(
                "validation.stop needs held-out pictures: give their folder as validation.path, or validation.share"
            )
        return self


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """The settings of a TOML file (None: only defaults), with `section.name=value` overrides laid over it.

    A value is read as TOML where it is that (`3`, `true`, `["a", "b"]`), else as plain text; `none` takes a setting
    of the file back to its default.

    Raises:
        ConfigError: with every problem of the file and the overrides.
    """
    problems: list[Problem] = []
    values = _read_toml(path, problems) if path is not None else {}
    for override in overrides:
        _apply_override(values, override, problems)
    try:
        config = TrainConfig.model_validate(values)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            problem = _explain(details)
            if problem.where not in {known.where for known in problems}:
                problems.append(problem)
    if problems:
        raise ConfigError(path if path is not None else "the settings", problems)
    return config


def to_toml(config: TrainConfig) -> str:
    """The settings as TOML that `load_config` reads back equal; a setting that is None is left out."""
    lines: list[str] = []
    for section, settings in config.model_dump(mode="json", exclude_none=True).items():
        lines += [f"[{section}]", *(f"{name} = {_toml_value(value)}" for name, value in settings.items()), ""]
    return "\n".join(lines)


def config_reference() -> str:
    """The text of docs/CONFIG.md: every setting with its type, default and meaning."""
    lines = [
        "# Settings",
        "",
        "Made from the docstrings in `sdlora/config.py`; do not edit. A setting goes into its section of a TOML file",
        "(`--config FILE`) or onto the command line (`--set train.exposures=60`), which wins.",
    ]
    for section, field in TrainConfig.model_fields.items():
        model = _section_model(field)
        lines += ["", f"## [{section}]", "", _one_line(model.__doc__)]
        for name, setting in model.model_fields.items():
            lines += [
                "",
                f"### `{section}.{name}`",
                "",
                f"*{_type_text(setting)}; {_default_text(setting)}*",
                "",
                _one_line(setting.description),
            ]
    return "\n".join(lines) + "\n"


def _read_toml(path: Path, problems: list[Problem]) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        problems.append(Problem(str(path), "there is no such file.", "Check the path given to --config."))
    except OSError as error:
        problems.append(Problem(str(path), f"it cannot be read ({error.strerror})."))
    except UnicodeDecodeError as error:
        problems.append(Problem(str(path), f"it is not UTF-8 text (byte {error.start}).", "Save it as UTF-8."))
    except tomllib.TOMLDecodeError as error:
        problems.append(Problem(str(path), f"it is not TOML: {error}.", 'Texts need quotes: name = "value".'))
    return {}


def _apply_override(values: dict[str, Any], override: str, problems: list[Problem]) -> None:
    dotted, separator, text = override.partition("=")
    path = [part.strip() for part in dotted.split(".")]
    if not separator or not all(path):
        problems.append(Problem(f"--set {override}", "not of the form section.name=value."))
        return
    *sections, name = path
    target = values
    for section in sections:
        inner = target.setdefault(section, {})
        if not isinstance(inner, dict):
            problems.append(Problem(f"--set {override}", f"{section!r} is not a section."))
            return
        target = inner
    if text.strip().lower() == "none":
        target.pop(name, None)
    else:
        target[name] = _override_value(text.strip())


def _override_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # A line break in the text could smuggle in a second key.
    return parsed["value"] if parsed.keys() == {"value"} else text


def _explain(details: Mapping[str, Any]) -> Problem:
    """The problem that a pydantic error record stands for, in words of the user's."""
    location = [str(part) for part in details["loc"]]
    # The location of a union's member ends in the member's type, which is no setting; that of a table's row is one.
    is_row = len(location) == 4 and location[2].isdecimal()
    where = ".".join(location if is_row else location[:2])
    match details["type"]:
        case "extra_forbidden":
            return _explain_unknown(location)
        case "missing" if where in ("data", "data.path"):
            return Problem("data.path", "no dataset folder is given.", "Name the folder with the images.")
        case "missing":
            return Problem(where, "this setting is missing.")
        case "model_type" | "model_attributes_type":
            return Problem(where, f"this is a section, not a value (got {details['input']!r}).", f"Write [{where}].")
        case "value_error":
            return Problem(where, f"{details['ctx']['error']}.")
        case "literal_error":
            wanted = details["ctx"]["expected"]
            options = re.findall(r"'([^']*)'", wanted)
            hint = _did_you_mean(str(details["input"]), options)
            return Problem(where, f"must be {wanted} (got {details['input']!r}){hint or '.'}")
    message = details["msg"].removeprefix("Input should be").strip().replace("valid tuple", "list")
    verb = "must be " if details["msg"].startswith("Input should be") else ""
    return Problem(where, f"{verb}{message} (got {details['input']!r}).")


def _explain_unknown(location: Sequence[str]) -> Problem:
    where, name = ".".join(location), location[-1]
    homes = [path for path in setting_names() if path.split(".")[1] == name]
    if homes:
        return Problem(where, f"this setting belongs in {' or '.join(homes)}.")
    if len(location) == 1:
        known, noun = list(TrainConfig.model_fields), "section"
    else:
        known, noun = list(_section_model(TrainConfig.model_fields[location[0]]).model_fields), "setting"
    close = difflib.get_close_matches(name, known, n=1)
    if not close:
        close = _full_paths_close_to(name)
    hint = f", did you mean {close[0]!r}?" if close else f". Known here: {', '.join(known)}."
    return Problem(where, f"unknown {noun}{hint}")


def _full_paths_close_to(name: str) -> list[str]:
    by_name = {path.split(".")[1]: path for path in setting_names()}
    return [by_name[close] for close in difflib.get_close_matches(name, list(by_name), n=1)]


def setting_names() -> Iterator[str]:
    """Every setting as `section.name`."""
    for section, field in TrainConfig.model_fields.items():
        yield from (f"{section}.{name}" for name in _section_model(field).model_fields)


def _section_model(field: FieldInfo) -> type[_Section]:
    model = field.annotation
    assert isinstance(model, type) and issubclass(model, _Section)
    return model


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name} = {_toml_value(inner)}' for name, inner in value.items())}}}"
    # JSON's texts, numbers and booleans are TOML's, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _type_text(field: FieldInfo) -> str:
    schema = field.annotation
    if getattr(schema, "__origin__", None) is Literal:
        return "one of " + ", ".join(f"`{option}`" for option in schema.__args__)  # type: ignore[union-attr]
    text = str(schema)
    if "BlockSettings" in text:
        return "list of tables"
    names = {
        "Path": "path",
        "bool": "true or false",
        "float": "number",
        "int": "whole number",
        "tuple": "list of texts",
    }
    found = [words for name, words in names.items() if re.search(rf"\b{name}\b", text)]
    if re.search(r"\bstr\b", text.replace("tuple[str", "")):
        found.insert(0, "text")
    return " or ".join(found)


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.default
    if default is None:
        return "default: none"
    plain = list(default) if isinstance(default, tuple) else default
    return f"default: `{_toml_value(plain if isinstance(plain, list | int | float | bool) else str(plain))}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
