"""`sdlora lora ...`: tools on adapter files. None of them changes the files it is given, unless told to."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sdlora.errors import AdapterError, AdapterFileError, GenerationError

__all__ = ["app"]

app = typer.Typer(
    name="lora", help="Look into adapter files, merge, shrink, convert, share them.", no_args_is_help=True
)
out = Console(highlight=False, soft_wrap=True)

File = Annotated[Path, typer.Argument(help="A .safetensors file. It is only read.")]
Target = Annotated[Path, typer.Argument(help="The file to write.")]
Rank = Annotated[int | None, typer.Option("--rank", min=1, help="The most that a layer keeps.")]
Energy = Annotated[
    float | None, typer.Option("--energy", min=0.0, max=1.0, help="Share of the change to keep, 0 to 1.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="fp16, bf16 or fp32.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write over a file of that name.")]
Weighted = Annotated[list[str], typer.Argument(help="FILE or FILE:WEIGHT, as many as wanted.")]


def _say(message: str) -> None:
    out.print(message, markup=False)


def _dtype(name: str):  # type: ignore[no-untyped-def]
    from sdlora.precision import DTYPES

    if name not in DTYPES:
        raise AdapterError(f"--dtype {name}: fp16, bf16 or fp32.")
    return DTYPES[name]


def _weighted(items: list[str]) -> list[tuple[Path, float]]:
    from sdlora.prompts import find_adapter, parse_adapter_argument

    try:
        choices = [parse_adapter_argument(item) for item in items]
        places = [find_adapter(choice.source, [Path()]) for choice in choices]
    except GenerationError as error:
        # Nothing is drawn here: the exit code is that of adapters.
        raise AdapterError(str(error)) from error
    weights = [1.0 if choice.weight is None else choice.weight for choice in choices]
    numbers = [weight for weight in weights if isinstance(weight, float)]
    if len(numbers) < len(choices):
        raise AdapterError("These weights must be plain numbers. `sdlora stack export` makes a file of more than that.")
    return list(zip(places, numbers, strict=True))


@app.command()
def inspect(
    paths: Annotated[list[Path], typer.Argument(help="Files, or folders of files.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for scripts.")] = False,
) -> None:
    """What a file is, how strong it is where, and which tools will load it. Exit code 5 if one is not sound."""
    from sdlora.lora_workflows import inspect_all

    refused = []
    for report in inspect_all(paths):
        if isinstance(report, AdapterFileError):
            refused.append(report)
            _say(json.dumps({"path": str(report.path), "error": report.reason}) if as_json else f"\n{report}")
        elif as_json:
            values = dataclasses.asdict(report)
            _say(json.dumps(values | {"hashes": {**values["hashes"]}}, default=str, ensure_ascii=False))
        else:
            _print_report(report)
    if refused:
        raise typer.Exit(refused[0].exit_code)


def _print_report(report) -> None:  # type: ignore[no-untyped-def]
    ranks = ", ".join(map(str, report.ranks))
    alphas = ", ".join(f"{alpha:g}" for alpha in report.alphas)
    _say(f"\n{report.path}  ({report.size_bytes / 1024:.0f} kB)")
    kind = " and ".join(report.methods)
    _say(f"  {kind} for {report.family or 'an unknown base'}, {'/'.join(report.dialects)} keys, {report.dtype}")
    _say(f"  rank {ranks}, alpha {alphas}; layers: {', '.join(f'{n} {kind}' for kind, n in report.targets.items())}")
    if report.trigger:
        _say(f"  trigger: {report.trigger}")
    _say(f"  hashes: AutoV1 {report.hashes.auto_v1}  AutoV2 {report.hashes.auto_v2}  AutoV3 {report.hashes.auto_v3}")
    table = Table("block", "layers", "strength", "rank used", box=None, pad_edge=False)
    for block in report.blocks:
        table.add_row(block.block, str(block.layers), f"{block.norm:.3g}", f"{block.rank_used:.0%}")
    out.print(table)
    base = report.metadata.get("sdlora.base_model") or report.metadata.get("ss_sd_model_name")
    told = f"base {base}; " if base else ""
    _say(f"  header: {told}{len(report.metadata)} texts (`sdlora lora metadata` shows them)")
    for tool in report.tools:
        _say(f"  {tool.tool}: {tool.loads}{f' ({tool.why})' if tool.why else ''}")


@app.command()
def convert(
    source: File,
    target: Target,
    form: Annotated[str, typer.Option("--format", help="kohya (loads everywhere), peft or diffusers.")] = "kohya",
    dtype: Dtype = "fp16",
    drop_foreign: Annotated[
        bool, typer.Option("--drop-foreign", help="Leave out, and name, tensors that are no part of a LoRA.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """The same adapter in another dialect; its strength stays exactly what it was."""
    from sdlora.lora_workflows import convert as run

    if form not in ("kohya", "peft", "diffusers"):
        raise AdapterError(f"--format {form}: kohya, peft or diffusers.")
    options = {"dtype": _dtype(dtype), "drop_foreign": drop_foreign, "overwrite": overwrite, "say": _say}
    _say(str(run(source, target, dialect=form, **options)))  # type: ignore[arg-type]


@app.command()
def resize(
    source: File,
    target: Target,
    rank: Rank = None,
    energy: Energy = None,
    dtype: Dtype = "fp16",
    overwrite: Overwrite = False,
) -> None:
    """A smaller file of lower rank, as near as can be, of LoHa and LoKr too; says what was lost."""
    from sdlora.lora_workflows import resize as run

    options = {"dtype": _dtype(dtype), "overwrite": overwrite, "say": _say}
    _say(str(run(source, target, rank=rank, energy=energy, **options)))


@app.command()
def merge(
    target: Target,
    adapters: Weighted,
    rank: Rank = None,
    energy: Energy = None,
    dtype: Dtype = "fp16",
    overwrite: Overwrite = False,
) -> None:
    """Several adapters as one ordinary file that does what they do together at their weights."""
    from sdlora.lora_workflows import merge as run

    options = {"dtype": _dtype(dtype), "overwrite": overwrite, "say": _say}
    _say(str(run(_weighted(adapters), target, rank=rank, energy=energy, **options)))


@app.command()
def diff(left: File, right: File) -> None:
    """How far two adapters are apart, layer by layer. Exit code 1 if they differ by more than rounding."""
    from sdlora.lora_workflows import compare

    gaps = compare(left, right)
    for name, gap in sorted(gaps.items(), key=lambda item: -item[1])[:20]:
        if gap >= 5e-5:
            _say(f"{gap:8.2%}  {name}")
    worst = max(gaps.values())
    _say(f"{len(gaps)} layers, largest difference {worst:.2%}")
    raise typer.Exit(int(worst > 2e-3))


@app.command()
def metadata(
    words: Annotated[
        list[str], typer.Argument(metavar="[show|set|strip] FILE [KEY=VALUE]...", help="FILE alone is shown.")
    ],
    changes: Annotated[list[str] | None, typer.Option("--set", help="key=value, as often as needed.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", help="A key to take away.")] = None,
    strip: Annotated[bool, typer.Option("--strip", help="Take away all that no loader needs.")] = False,
    target: Annotated[Path | None, typer.Option("--out", help="Where to; without it FILE itself is rewritten.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Show the header's texts, or write them anew. The tensors and their hash stay the same."""
    from sdlora.adapter_file import outline_adapter
    from sdlora.lora_workflows import edit_metadata

    verb, file, more = _metadata_words(words)
    pairs = [item.partition("=") for item in [*(changes or []), *more]]
    if any(not separator for _, separator, _ in pairs) or (verb == "set" and not pairs):
        raise AdapterError("A text is set by `sdlora lora metadata set FILE key=value`.")
    edits: dict[str, str | None] = {key: value for key, _, value in pairs} | dict.fromkeys(remove or [])
    strip = strip or verb == "strip"
    if edits or strip:
        if verb == "show":
            raise AdapterError("`show` changes nothing; leave it out, or say `set` or `strip`.")
        _say(str(edit_metadata(file, target or file, changes=edits, strip=strip, overwrite=overwrite)))
        return
    if target is not None:
        raise AdapterError("Nothing to change is said: --set, --remove or --strip.")
    texts = outline_adapter(file, allow_foreign=True).metadata
    if not texts:
        _say(f"{file}: its header has no texts.")
    for key, value in sorted(texts.items()):
        _say(f"{key} = {value if len(value) <= 200 else value[:197] + '...'}")


def _metadata_words(words: list[str]) -> tuple[str | None, Path, list[str]]:
    """(show, set, strip or None; FILE; the key=value after it)."""
    verb = words[0] if len(words) > 1 and words[0] in ("show", "set", "strip") else None
    file, *more = words if verb is None else words[1:]
    if more and verb != "set":
        raise AdapterError(f"{more[0]!r} is one word too many: `sdlora lora metadata set FILE key=value`.")
    return verb, Path(file), more


@app.command()
def extract(
    tuned: Annotated[str, typer.Argument(help="The fine-tuned model: checkpoint file, diffusers folder or Hub id.")],
    base: Annotated[str, typer.Argument(help="What it was tuned from.")],
    target: Target,
    rank: Annotated[int, typer.Option("--rank", min=1, max=512, help="The most that a layer keeps.")] = 32,
    energy: Energy = None,
    targets: Annotated[
        str,
        typer.Option("--targets", help="Of the U-Net: cross-attention, attention, attention+ff, attention+ff+conv."),
    ] = "attention",
    text_encoders: Annotated[
        bool, typer.Option("--text-encoders/--unet-only", help="Text encoders too, where they differ.")
    ] = True,
    dtype: Dtype = "fp16",
    overwrite: Overwrite = False,
) -> None:
    """An adapter of what a fine-tuned model has that its base has not; says what did not go into the rank."""
    from sdlora.lora_base_workflows import extract as run

    options = {"dtype": _dtype(dtype), "overwrite": overwrite, "say": _say, "text_encoders": text_encoders}
    _say(str(run(tuned, base, target, rank=rank, energy=energy or None, targets=targets, **options)))


@app.command()
def bake(
    target: Annotated[
        Path, typer.Argument(help="The .safetensors file (of a base that is one) or diffusers folder to write.")
    ],
    adapters: Weighted,
    base: Annotated[str, typer.Option("--base", help="Checkpoint file, folder, Hub id, or `tiny` (built in).")],
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of a folder: fp16, bf16 or fp32. A file keeps its formats.")
    ] = "fp32",
) -> None:
    """The base model with adapters merged in, as a model of its own."""
    from sdlora.lora_base_workflows import bake as run

    run(_weighted(adapters), base, target, say=_say, dtype=_dtype(dtype))


@app.command()
def publish(
    file: File,
    target: Annotated[Path, typer.Argument(help="The folder to write, or a .zip for Civitai.")],
    licence: Annotated[str | None, typer.Option("--license", help="E.g. cc-by-4.0; yours to choose.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="The file's new name, and its title.")] = None,
    author: Annotated[str | None, typer.Option("--author")] = None,
    description: Annotated[str | None, typer.Option("--description")] = None,
    trigger: Annotated[str | None, typer.Option("--trigger", help="The phrase that calls the style.")] = None,
    tags: Annotated[list[str] | None, typer.Option("--tag", help="As often as needed.")] = None,
    weight: Annotated[float | None, typer.Option("--weight", min=0.01, max=10, help="To begin with.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="The base model as the Hub calls it.")] = None,
    pictures: Annotated[
        list[Path] | None, typer.Option("--picture", help="Examples; the first is the preview.")
    ] = None,
    upload: Annotated[str | None, typer.Option("--upload", help="owner/name on the Hub; private if new.")] = None,
) -> None:
    """A folder (or zip) to share: file, preview, model card. Nothing is sent without --upload."""
    from sdlora.publishing import Publication, publish_adapter, upload_folder

    if upload is not None and target.suffix == ".zip":
        raise AdapterError("The Hub takes a folder, not a zip: give TARGET another name.")
    publication = Publication(
        name=name,
        license=licence,
        author=author,
        description=description,
        trigger=trigger,
        tags=tuple(tags or ()),
        recommended_weight=weight,
        base_model=base,
        pictures=tuple(pictures or ()),
    )
    _say(str(publish_adapter(file, target, publication)))
    if upload is not None:
        _say(f"{upload_folder(target, upload)} (private, if it was not there before)")


@app.command()
def install(
    file: File,
    places: Annotated[list[str], typer.Argument(help="comfyui=DIR, a1111=DIR, forge=DIR or invokeai=DIR.")],
    picture: Annotated[Path | None, typer.Option("--picture", help="The preview.")] = None,
) -> None:
    """Copy a file to where other tools look for it, with the sidecars they read. Nothing there is overwritten."""
    from sdlora.lora_workflows import install as run

    pairs = [place.partition("=") for place in places]
    if not all(separator for _, separator, _ in pairs):
        raise AdapterError("Say where each tool lies: comfyui=DIR, a1111=DIR, forge=DIR, invokeai=DIR.")
    run(file, [(tool.lower(), Path(root).expanduser()) for tool, _, root in pairs], picture=picture, say=_say)


@app.command()
def library(
    folders: Annotated[list[Path], typer.Argument(help="Folders with LoRAs, searched with all below them.")],
    find: Annotated[
        str | None, typer.Option("--find", help="The first digits of a hash: AutoV1, AutoV2, AutoV3, SHA-256.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for scripts.")] = False,
) -> None:
    """What LoRAs lie in folders: family, trigger, hash, size. With --find, exit code 1 if none has the hash."""
    from sdlora.adapter_tools import list_library

    if find is not None and not re.fullmatch(r"(0x)?[0-9a-fA-F]{6,64}", find):
        raise AdapterError(f"--find {find}: 6 to 64 digits of 0-9 and a-f are wanted.")
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        raise AdapterError(f"{missing[0]}: there is no such folder.")
    shown = 0
    for entry in list_library(folders):
        if isinstance(entry, AdapterFileError):
            if find is None:
                _say(json.dumps({"path": str(entry.path), "error": entry.reason}) if as_json else str(entry))
            continue
        if find is not None and not entry.has_hash(find):
            continue
        shown += 1
        values = dataclasses.asdict(entry)
        _say(json.dumps(values, default=str, ensure_ascii=False) if as_json else _library_line(entry))
    if not shown and find is None and not as_json:
        _say(f"No LoRA lies in {', '.join(map(str, folders))}.")
    raise typer.Exit(int(find is not None and not shown))


def _library_line(entry) -> str:  # type: ignore[no-untyped-def]
    facts = [
        entry.family or "unknown",
        "/".join(entry.methods),
        entry.hashes.auto_v3,
        f"{entry.size_bytes / 1024:.0f} kB",
    ]
    facts += [f"trigger: {entry.trigger}"] if entry.trigger else []
    facts += [f"preview: {entry.picture.name}"] if entry.picture else []
    return f"{entry.path}  {'  '.join(facts)}"


@app.command()
def verify(
    file: File,
    base: Annotated[str, typer.Option("--base", help="Checkpoint file, folder, Hub id, or `tiny` (built in).")],
) -> None:
    """Does diffusers make the same of this file as we do? Exit code 1 if not, 5 if it does not load it at all."""
    from sdlora.lora_base_workflows import verify as run

    gap = run(file, base, say=_say)
    _say("The same." if gap < 1e-4 else "Not the same: diffusers reads this file differently.")
    raise typer.Exit(int(gap >= 1e-4))
