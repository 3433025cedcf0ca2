"""The command line. Heavy libraries are imported inside the commands, so that help and mistakes answer at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from sdlora import __version__
from sdlora.adapter_weight import Weight
from sdlora.cli_data import app as data_app
from sdlora.cli_lora import app as lora_app
from sdlora.cli_runs import app as runs_app
from sdlora.cli_stack import app as stack_app
from sdlora.errors import GenerationError, SdloraError
from sdlora.options import as_overrides

if TYPE_CHECKING:
    from sdlora.config import TrainConfig
    from sdlora.generation import StepDrawn

__all__ = ["app", "main"]


class _WithShortForms(TyperGroup):
    """Takes `sdlora inspect FILE` for `sdlora lora inspect FILE`, and so for each of these tools."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        tools = getattr(self.commands.get("lora"), "commands", {})
        if args and args[0] not in self.commands and args[0] in tools:
            args = ["lora", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="sdlora",
    cls=_WithShortForms,
    help="Train style LoRAs for Stable Diffusion, stack, draw with, share them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(lora_app)
app.add_typer(data_app)
app.add_typer(runs_app)
app.add_typer(stack_app)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

DataFolder = Annotated[Path, typer.Argument(help="Folder with images and captions. It is only read.")]
Trigger = Annotated[str | None, typer.Option("--trigger", help='Phrase that calls the style, e.g. "blob emoji style".')]

Base = Annotated[str | None, typer.Option("--base", help="Checkpoint, folder, Hub id, or `tiny` (built in).")]
Steps = Annotated[int | None, typer.Option("--steps")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="How strictly the prompt is followed.")]
DrawPrecision = Annotated[str, typer.Option("--precision", help="auto, fp16, bf16, fp32.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="As often as needed.")]
Seeds = Annotated[str, typer.Option("--seeds", help="E.g. 1,2,3.")]
Cells = Annotated[int, typer.Option("--batch-size", help="Cells computed at once.")]
Sheet = Annotated[Path, typer.Option("--out", help="The sheet to write.")]
LoraDir = Annotated[Path, typer.Option("--lora-dir", help="Where <lora:name> is looked for.")]
_OVER, _THRIFT = "Drawing over a picture, and larger", "Memory and speed"


def _say(message: str) -> None:
    out.print(message, markup=False)


def _warn(message: str) -> None:
    err.print(f"[yellow]warning:[/] {escape(message)}")


def _say_once(message: str) -> None:
    """Of several processes that train together, the first one talks."""
    if os.environ.get("RANK", "0") == "0":
        _say(message)


def _warn_once(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        _warn(message)


def _version(value: bool) -> None:
    if value:
        _say(f"sdlora {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Where the pictures and adapters go.")] = Path("outputs/demo"),
    exposures: Annotated[int | None, typer.Option(help="How often each image is seen in training.", min=1)] = None,
) -> None:
    """Train two styles on the small built-in model; see them, stacked."""
    from sdlora.demo import run_demo

    run_demo(out_dir, say=_say, exposures=exposures)


@app.command()
def check(data: DataFolder, trigger: Trigger = None) -> None:
    """Look through a dataset: every problem, each remedy."""
    from sdlora.data.dataset import compose_caption, scan_dataset

    dataset = scan_dataset(data, trigger=trigger)
    _say(f"{data}: {dataset.layout}")
    example = dataset.examples[0]
    _say(f'An example: {example.path.name} is learnt as "{compose_caption(example.caption, trigger)}"')
    for problem in dataset.warnings:
        _warn(str(problem))
    if trigger is None:
        _say('Without --trigger the style has no name of its own to be called by. Usual: --trigger "my ink style".')
    _say("This can be trained on.")


@app.command()
def plan(
    data: Annotated[Path | None, typer.Argument(help="Folder with images and captions. It is only read.")] = None,
    trigger: Trigger = None,
    base: Base = None,
    config: Annotated[Path | None, typer.Option("--config", help="TOML file; see docs/CONFIG.md.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.name=value, as often as needed.")] = None,
    price: Annotated[float | None, typer.Option("--price", min=0, help="Of the machine for an hour.")] = None,
    probe: Annotated[
        bool | None, typer.Option("--probe/--no-probe", help="Make a few real steps. By itself on a GPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Before training: steps, memory, time, disk and cost of it."""
    given = {"data.path": data, "data.trigger": trigger, "model.base": base}
    train_config = _train_config(config, given, settings or [])
    from sdlora.data.dataset import scan_dataset

    dataset = scan_dataset(
        train_config.data.path, trigger=train_config.data.trigger, background=train_config.data.background_rgb
    )
    from sdlora.planning import describe, make_plan, way_out

    planned = make_plan(train_config, dataset, probe=probe)
    if as_json:
        import json

        facts = {"fits": planned.fits, "free_bytes": planned.free_bytes, "precision": planned.precision.name}
        cost = None if price is None else planned.plan.cost(price)
        typer.echo(json.dumps({**planned.plan.to_dict(), **facts, "cost": cost}))
        return
    for what, much, why in describe(planned, price_per_hour=price):
        _say(f"{what:9} {much:>10}  {why}")
    if not planned.plan.base_known:
        _say(f"{train_config.model.base} is not on this computer; the shapes of its kind are assumed.")
    for line in way_out(planned):
        _say(line)


@app.command()
def train(
    data: Annotated[Path | None, typer.Argument(help="Folder with images and captions. It is only read.")] = None,
    trigger: Trigger = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", "--pretrained_model_name_or_path", help="Checkpoint, folder, Hub id, or `tiny` (built in)."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="TOML file; see docs/CONFIG.md.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.name=value, as often as needed.")] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", "--output_dir", help="Folder for runs.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run and its file.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", "--network_dim")] = None,
    targets: Annotated[str | None, typer.Option("--targets", help="cross-attention, attention, attention+ff.")] = None,
    exposures: Annotated[int | None, typer.Option(help="How often each image is seen: the length.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", "--learning_rate")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", "--train_batch_size")] = None,
    resolution: Annotated[int | None, typer.Option("--resolution")] = None,
    precision: Annotated[str | None, typer.Option("--precision", "--mixed_precision")] = None,
    seed: Annotated[int | None, typer.Option("--seed")] = None,
    xformers: Annotated[bool, typer.Option("--xformers", help="Attention by xformers (CUDA only).")] = False,
    with_captions: Annotated[
        bool, typer.Option("--with-captions", help="Write the captions' words into the file's header.")
    ] = False,
) -> None:
    """Train a style LoRA on a folder of images."""
    given = {
        "data.path": data,
        "data.trigger": trigger,
        "data.resolution": resolution,
        "model.base": base,
        "model.precision": {"no": "fp32"}.get(precision or "", precision),
        "model.attention": "xformers" if xformers else None,
        "lora.rank": rank,
        "lora.targets": targets,
        "train.exposures": exposures,
        "train.learning_rate": learning_rate,
        "train.batch_size": batch_size,
        "train.seed": seed,
        "output.dir": out_dir,
        "output.name": name,
        "output.with_captions": True if with_captions else None,
    }
    train_config = _train_config(config, given, settings or [])

    from sdlora.data.dataset import scan_configured

    dataset = scan_configured(train_config.data)
    _say_once(f"{train_config.data.path}: {dataset.layout}")
    for problem in dataset.warnings:
        _warn_once(str(problem))

    from sdlora.workflows import train_with_progress

    train_with_progress(train_config, dataset, say=_say_once, stream=sys.stdout)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="The run's folder, e.g. outputs/my_art.")],
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.name=value, as often as needed.")] = None,
    allow_change: Annotated[
        bool, typer.Option("--allow-change", help="Go on though pictures or settings lead to another adapter.")
    ] = False,
) -> None:
    """Go on with a run that was stopped, exactly where it was."""
    from sdlora.workflows import resume_with_progress

    resume_with_progress(run, settings or [], allow_change=allow_change, say=_say_once, stream=sys.stdout)


def _train_config(config: Path | None, given: Mapping[str, object], settings: Sequence[str]) -> TrainConfig:
    """File, options and `--set`, the last one wins."""
    from sdlora.config import load_config

    return load_config(config, as_overrides(config, given, settings))


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help='What to draw; "<lora:name:0.8>" and {this|that} work.')] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", help="FILE or FILE:WEIGHT (0.8, 0@0,0.8@0.4, 0.8:lbw=OUTALL ...); repeatable."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="File with a prompt a line; - reads standard input.")
    ] = None,
    base: Base = None,
    num_images: Annotated[int, typer.Option("-n", "--num-images", help="For each prompt.")] = 1,
    seed: Annotated[int, typer.Option("--seed", help="The first picture's; the next ones count up.")] = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Annotated[str, typer.Option("--negative", help="What to keep out.")] = "",
    height: Annotated[int | None, typer.Option("--height")] = None,
    width: Annotated[int | None, typer.Option("--width")] = None,
    scheduler: Annotated[
        str | None, typer.Option("--scheduler", "--sampler", help='"DPM++ 2M Karras", euler-a, ddim, lcm ...')
    ] = None,
    clip_skip: Annotated[
        int | None, typer.Option("--clip-skip", help="2: the text encoder's last layer but one.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain-prompt", help="Brackets are no weights: (word:1.2).")] = False,
    precision: DrawPrecision = "auto",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pictures computed at once.")] = 1,
    init: Annotated[Path | None, typer.Option("--init", help="A picture to draw over.", rich_help_panel=_OVER)] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", help="How much of it is redrawn, 0 to 1.", rich_help_panel=_OVER)
    ] = None,
    hires: Annotated[
        float | None, typer.Option("--hires", help="Enlarge by this and draw over it.", rich_help_panel=_OVER)
    ] = None,
    hires_strength: Annotated[float | None, typer.Option("--hires-strength", rich_help_panel=_OVER)] = None,
    hires_steps: Annotated[int | None, typer.Option("--hires-steps", rich_help_panel=_OVER)] = None,
    hires_upscaler: Annotated[
        str, typer.Option("--hires-upscaler", help="latent or lanczos.", rich_help_panel=_OVER)
    ] = "latent",
    vae_tiling: Annotated[
        bool, typer.Option("--vae-tiling", help="Large pictures in tiles.", rich_help_panel=_THRIFT)
    ] = False,
    vae_slicing: Annotated[
        bool, typer.Option("--vae-slicing", help="Decode a batch one by one.", rich_help_panel=_THRIFT)
    ] = False,
    offload: Annotated[
        str | None, typer.Option("--offload", help="model, or sequential: least memory.", rich_help_panel=_THRIFT)
    ] = None,
    attention: Annotated[str, typer.Option("--attention", help="sdpa, xformers.", rich_help_panel=_THRIFT)] = "sdpa",
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile: pays for many pictures.", rich_help_panel=_THRIFT)
    ] = False,
    stack: Annotated[
        Path | None, typer.Option("--stack", help="A stack file; its LoRAs are found by their hash.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="Of several LoRAs: sum, orthogonal, switch, composite, k-lora.")
    ] = None,
    lora_dir: LoraDir = Path("outputs"),
    wildcards: Annotated[Path, typer.Option("--wildcards", help="Where __name__ finds NAME.txt.")] = Path("wildcards"),
    preview_every: Annotated[
        int | None, typer.Option("--preview-every", help="Show the work in OUT/preview.png every N steps.", min=1)
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path("outputs/pictures"),
) -> None:
    """Draw pictures, with any number of LoRAs at their weights."""
    from sdlora.prompts import find_adapter, parse_adapter_argument, split_adapter_tags
    from sdlora.request import GenerationRequest
    from sdlora.wildcards import expand_prompt

    request = GenerationRequest(
        prompt="",
        negative_prompt=negative,
        num_images=num_images,
        seed=seed,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=height,
        width=width,
        scheduler=scheduler,
        batch_size=batch_size,
        clip_skip=clip_skip,
        prompt_syntax="plain" if plain else "weighted",
        init_image=init,
        strength=strength,
        hires_scale=hires,
        hires_strength=hires_strength,
        hires_steps=hires_steps,
        hires_upscaler=cast(Any, hires_upscaler),
    )
    request.check()
    always = [parse_adapter_argument(item) for item in lora or []]
    stacked: list[tuple[Path, Weight | None]] = []
    if stack is not None:
        from sdlora.stack_workflows import find_stack

        said, files = find_stack(stack, [lora_dir])
        stacked = [(file, entry.weight) for file, entry in zip(files, said.adapters, strict=True)]
        method, base = method or said.method, base or _known_base(said.base)
    found: list[tuple[str, list[tuple[Path, Weight | None]]]] = []
    texts, failed = _prompt_lines(prompt, prompts), 0
    for number, line in enumerate(texts):
        try:
            text, tagged = split_adapter_tags(expand_prompt(line, seed=seed, number=number, folder=wildcards))
            places = [Path(), lora_dir]
            chosen = [(find_adapter(c.source, places), c.weight) for c in (*always, *tagged)]
            found.append((text, [*stacked, *chosen]))
        except GenerationError as error:
            if len(texts) == 1:
                raise
            failed += 1
            _warn(f"left out: prompt {number + 1}, {line[:60]!r}: {error}")
    if found:
        from sdlora.generation import Thrift
        from sdlora.workflows import PromptJob, generate_files

        thrift = Thrift(
            vae_tiling=vae_tiling,
            vae_slicing=vae_slicing,
            offload=cast(Any, offload),
            attention=cast(Any, attention),
            compile=compiled,
        )
        jobs = [PromptJob(text, tuple(adapters)) for text, adapters in found]
        failed += _draw_files(
            lambda on_step: generate_files(
                jobs,
                request,
                base=base,
                precision=precision,
                out_dir=out_dir,
                warn=_warn,
                thrift=thrift,
                on_step=on_step,
                preview_every=preview_every,
                method=method or "sum",
            ),
            num_pictures=len(jobs) * num_images,
        )
    if failed:
        raise typer.Exit(GenerationError.exit_code)


def _known_base(name: str | None) -> str | None:
    """The base a stack file names, where it can be had by that name: the built-in one, or a Hub id."""
    return name if name == "tiny" or (name is not None and "/" in name) else None


def _draw_files(
    draw: Callable[[Callable[[StepDrawn], None]], Iterator[Path | GenerationError]], *, num_pictures: int
) -> int:
    """Tell each file as it is written; returns how many prompts could not be drawn."""
    from sdlora.progress import PictureBar

    failed = done = 0
    try:
        with PictureBar(sys.stderr, num_pictures) as bar:
            for made in draw(lambda step: bar.step(step.step, step.num_steps)):
                if isinstance(made, Path):
                    done += 1
                    bar.picture_done()
                    _say(str(made))
                else:
                    failed += 1
                    _warn(f"left out: {made}")
    except KeyboardInterrupt:
        _warn(f"Stopped. {done} of {num_pictures} pictures are done and stay.")
        raise typer.Exit(130) from None
    return failed


def _prompt_lines(prompt: str | None, file: str | None) -> list[str]:
    from sdlora.wildcards import read_prompts

    if (prompt is None) == (file is None):
        raise GenerationError("Give a prompt, or a file of prompts with --prompts FILE, and not both.")
    if prompt is not None:
        return [prompt]
    if file == "-":
        return read_prompts(sys.stdin.read())
    try:
        return read_prompts(Path(str(file)).read_text(encoding="utf-8"))
    except OSError as error:
        raise GenerationError(f"{file}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise GenerationError(f"{file} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error


@app.command()
def again(
    picture: Annotated[Path, typer.Argument(help="A PNG drawn by sdlora.")],
    base: Base = None,
    lora_dir: Annotated[
        list[Path] | None, typer.Option("--lora-dir", help="Where its LoRAs may be now; as often as needed.")
    ] = None,
    init: Annotated[Path | None, typer.Option("--init", help="The picture it was drawn over.")] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the picture.")] = Path("outputs/again"),
) -> None:
    """Draw a picture again from the recipe inside it."""
    from sdlora.picture_file import read_recipe

    read_recipe(picture)
    from sdlora.run_dir import run_of_preview
    from sdlora.workflows import draw_again

    folders = lora_dir or [Path("outputs"), run_of_preview(picture) or picture.resolve().parent]
    drawn = draw_again(picture, base=base, folders=folders, out_dir=out_dir, say=_say, warn=_warn, init_image=init)
    _say(str(drawn))


@app.command()
def compare(
    adapters: Annotated[list[Path], typer.Argument(help="LoRA files; a run's folder stands for all it saved.")],
    prompt: Prompts = None,
    weights: Annotated[str, typer.Option("--weights", help="E.g. 0.5,0.8,1.")] = "1",
    seeds: Seeds = "0",
    base: Base = None,
    steps: Steps = None,
    guidance: Guidance = None,
    precision: DrawPrecision = "auto",
    batch_size: Cells = 8,
    path: Sheet = Path("outputs/compare.png"),
) -> None:
    """One sheet of LoRAs or of a run's saves, by weights and seeds."""
    from sdlora.request import GenerationRequest

    try:
        numbers = [float(text) for text in weights.split(",")]
        wanted = [int(text) for text in seeds.split(",")]
    except ValueError as error:
        raise GenerationError(f"--weights and --seeds take numbers with commas between ({error}).") from error
    request = GenerationRequest(
        prompt="", num_inference_steps=steps, guidance_scale=guidance, batch_size=batch_size, seed=min(wanted)
    )
    request.check()
    from sdlora.workflows import compare_adapters, compared

    sheet = compare_adapters(
        compared(adapters),
        prompts=prompt or [],
        weights=numbers,
        seeds=wanted,
        request=request,
        base=base,
        precision=precision,
        path=path,
        say=_say,
        warn=_warn,
    )
    _say(str(sheet))


# Not in the list, which is to fit a screen: it is `compare` under the name of what it is asked for.
@app.command("sweep-weights", hidden=True)
def sweep_weights(
    adapters: Annotated[list[Path], typer.Argument(help="LoRA files, each at every weight.")],
    prompt: Prompts = None,
    weights: Annotated[str, typer.Option("--weights", help="With commas between.")] = "-0.5,0.25,0.5,0.75,1,1.25",
    seeds: Seeds = "0",
    base: Base = None,
    steps: Steps = None,
    guidance: Guidance = None,
    precision: DrawPrecision = "auto",
    batch_size: Cells = 8,
    path: Sheet = Path("outputs/weights.png"),
) -> None:
    """A sheet of LoRAs at growing weights, each row in one batch: `compare` with weights to begin with."""
    compare(adapters, prompt, weights, seeds, base, steps, guidance, precision, batch_size, path)


def main() -> None:
    """Run the command line; every error a user can cause becomes one message and its exit code."""
    # Notices of the libraries about each other (optional packages, renamed arguments) are not for our users.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        app(standalone_mode=True)
    except SdloraError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("Stopped.")
        sys.exit(130)
