"""`sdlora stack ...`: stacks of adapters as files, what is in them, how strong each should be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sdlora.adapter_weight import Weight, written
from sdlora.errors import AdapterError

__all__ = ["app"]

app = typer.Typer(
    name="stack", help="Keep stacks of LoRAs, look into them, balance, export them.", no_args_is_help=True
)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Adapters = Annotated[list[str], typer.Argument(help="FILE or FILE:WEIGHT, as many as wanted; NAME below --lora-dir.")]
StackPath = Annotated[Path, typer.Argument(help="A stack file, as `sdlora stack save` writes it.")]
LoraDir = Annotated[list[Path] | None, typer.Option("--lora-dir", help="Where its LoRAs may be; as often as needed.")]
Base = Annotated[str | None, typer.Option("--base", help="Checkpoint, folder, Hub id, or `tiny` (built in).")]


def _say(message: str) -> None:
    out.print(message, markup=False)


def _warn(message: str) -> None:
    err.print(f"[yellow]warning:[/] {escape(message)}")


def _given(items: list[str], folders: list[Path] | None) -> list[tuple[Path, Weight | None]]:
    from sdlora.prompts import find_adapter, parse_adapter_argument

    choices = [parse_adapter_argument(item) for item in items]
    return [(find_adapter(choice.source, folders or [Path("outputs")]), choice.weight) for choice in choices]


@app.command()
def save(
    target: Annotated[Path, typer.Argument(help="The file to write, e.g. stack.toml.")],
    adapters: Adapters,
    base: Base = None,
    method: Annotated[str, typer.Option("--method", help="sum, orthogonal, switch, composite, k-lora.")] = "sum",
    lora_dir: LoraDir = None,
) -> None:
    """Write a stack of adapters with their weights into a file, to draw with again: generate --stack FILE."""
    from sdlora.stack_workflows import save_stack

    _say(str(save_stack(target, _given(adapters, lora_dir), base=base, method=method)))


@app.command()
def show(stack: StackPath, lora_dir: LoraDir = None) -> None:
    """What a stack file holds, and whether its adapters are here. Exit code 5 if one is not."""
    from sdlora.stack_file import read_stack_file
    from sdlora.stack_workflows import find_stack

    said = read_stack_file(stack)
    _say(f"{stack}: {len(said.adapters)} adapters, method {said.method}, base {said.base or 'not said'}")
    for entry in said.adapters:
        _say(f"  {entry.name}  {written(entry.weight)}  ({entry.file}, tensor hash {entry.tensor_hash[:12]})")
    _, files = find_stack(stack, lora_dir or [Path("outputs")])
    for file in files:
        _say(f"  found: {file}")


@app.command()
def export(
    stack: StackPath,
    target: Annotated[Path, typer.Argument(help="The LoRA file to write.")],
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="The most that a layer keeps.")] = None,
    energy: Annotated[float | None, typer.Option("--energy", min=0.0, max=1.0, help="Share to keep, 0 to 1.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="fp16, bf16 or fp32.")] = "fp16",
    lora_dir: LoraDir = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over a file of that name.")] = False,
) -> None:
    """One ordinary LoRA that does what the stack does, for every tool; exact, or of a lower rank with its errors."""
    from sdlora.precision import DTYPES
    from sdlora.stack_workflows import export_stack, find_stack

    if dtype not in DTYPES:
        raise AdapterError(f"--dtype {dtype}: fp16, bf16 or fp32.")
    said, files = find_stack(stack, lora_dir or [Path("outputs")])
    exported = export_stack(
        said, files, target, rank=rank, energy=energy, dtype=DTYPES[dtype], say=_say, overwrite=overwrite
    )
    _say(str(exported))


@app.command()
def inspect(
    adapters: Adapters,
    base: Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
    lora_dir: LoraDir = None,
) -> None:
    """Which adapters meet where, how strong each is, and weights that balance them; with --base also against it."""
    from sdlora.stack_workflows import inspect_stack

    report = inspect_stack(_given(adapters, lora_dir), base=base)
    if as_json:
        _say(json.dumps(dataclasses.asdict(report), ensure_ascii=False))
        return
    for meeting in report.meetings:
        does = "add up" if meeting.weight > 0 else "cancel each other"
        _say(f"{meeting.first} and {meeting.second}: cosine {meeting.cosine:+.3f}, {does} ({meeting.weight:+.1%})")
    for meeting in report.layers[:5]:
        _say(
            f"  {meeting.place}: {meeting.first}, {meeting.second} cosine {meeting.cosine:+.3f} ({meeting.weight:+.2%})"
        )
    table = Table("block", *report.names, *(["strength"] if report.strengths else []), box=None, pad_edge=False)
    for block, shares in report.shares.items():
        strength = [f"{report.strengths[block]:.3g}"] if report.strengths else []
        table.add_row(block, *(f"{shares[name]:.0%}" for name in report.names), *strength)
    out.print(table)
    for name, weight in report.balanced.items():
        _say(f"{name}: ||w dW|| {report.norms[name]:.3g}; balanced at weight {weight:.3g}")


@app.command()
def calibrate(
    lora: Annotated[Path, typer.Argument(help="A LoRA file.")],
    base: Base = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="As often as needed.")] = None,
    store: Annotated[bool, typer.Option("--store", help="Write the result into the file's header.")] = False,
    steps: Annotated[int | None, typer.Option("--steps")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance")] = None,
    precision: Annotated[str, typer.Option("--precision", help="auto, fp16, bf16, fp32.")] = "auto",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pictures computed at once.")] = 9,
) -> None:
    """Effect against weight, on fixed prompts and seeds: the weight to recommend, and the range that is usable."""
    from sdlora.request import GenerationRequest
    from sdlora.stack_workflows import calibrate_adapter

    request = GenerationRequest(prompt="", num_inference_steps=steps, guidance_scale=guidance, batch_size=batch_size)
    request.check()
    result = calibrate_adapter(
        lora,
        base=base,
        prompts=prompt or [],
        request=request,
        precision=precision,
        store=store,
        say=_say,
        warn=_warn,
    )
    table = Table("weight", "effect", "roughness", box=None, pad_edge=False)
    for weight, effect, rough in zip(result.weights, result.effects, result.roughnesses, strict=True):
        table.add_row(f"{weight:g}", f"{effect:.3f}", f"{rough:.2f}")
    out.print(table)
    low, high = result.usable
    _say(f"Recommended weight {result.recommended:g}, usable from {low:g} to {high:g}.")
    if store:
        _say(f"Stored in {lora}: `sdlora generate` uses it where no weight is given.")
