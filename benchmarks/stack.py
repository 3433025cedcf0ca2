"""What a stack costs, beside diffusers' own in the same run: the rows about stacks in docs/PERFORMANCE.md.

    python benchmarks/stack.py                 # the embedded base: overhead of 1, 2 and 4 adapters, loading
    python benchmarks/stack.py --sd15          # SD 1.5's shapes with random weights: re-weighting, loading

Every figure is the median of repeated runs on this machine, with as many threads as OMP_NUM_THREADS says.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import peft
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel

from sdlora.adapter_file import AdapterMetadata, LoraPair, write_adapter
from sdlora.families import load_pipeline, resolve_base
from sdlora.stack import AdapterStack

RANK = 16
WEIGHTS = (0.7, 0.5, -0.3, 0.4)
VARYING = "0@0,0.8@0.4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sd15", action="store_true", help="SD 1.5's shapes, random weights (4 GB of memory)")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}, peft {peft.__version__}"
    )
    pipeline = load_pipeline(resolve_base("tiny"), weight_dtype=torch.float32, device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        if options.sd15:
            pipeline.register_modules(unet=sd15_unet())
            files = write_adapters(pipeline.unet, Path(folder), "sd1")
            measure_reweighting(pipeline, files)
            measure_loading(pipeline, files[0], repeats=3)
        else:
            files = write_adapters(pipeline.unet, Path(folder), "sd1")
            measure_overhead(pipeline, files, options.repeats)
            measure_loading(pipeline, files[0], options.repeats)


def measure_overhead(pipeline: Any, files: Sequence[Path], repeats: int) -> None:
    """A guided U-Net call (batch 2) with 1, 2 and 4 adapters, as a multiple of the base's, ours and diffusers'."""
    stack = AdapterStack(pipeline)
    rows: dict[str, list[float]] = {}
    # In turn and not one after the other, so that what else the machine does falls on all alike.
    for _ in range(repeats):
        for count in (0, 1, 2, 4):
            names = [stack.load(file) for file in files[:count]]
            for mode, weights in (("merged", list(WEIGHTS[:count])), ("varying", [VARYING] * count)):
                stack.set_adapters(names, weights)
                with stack.applied():
                    rows.setdefault(f"{mode} {count}", []).append(timed(lambda: call(pipeline), 3))
            stack.unload()
    for count in (1, 2, 4):
        for number in range(count):
            if number >= count // 2 or count == 1:
                pipeline.load_lora_weights(str(files[number]), adapter_name=f"a{number}")
        pipeline.set_adapters([f"a{number}" for number in range(count)], list(WEIGHTS[:count]))
        rows[f"diffusers {count}"] = [timed(lambda: call(pipeline), 3) for _ in range(repeats)]
    pipeline.unload_lora_weights()
    base = statistics.median(rows["merged 0"] + rows["varying 0"])
    print(f"base: {base * 1000:.1f} ms a guided call")
    for mode in ("merged", "varying", "diffusers"):
        shown = " / ".join(f"{statistics.median(rows[f'{mode} {count}']) / base:.2f}" for count in (1, 2, 4))
        print(f"1 / 2 / 4 adapters of rank {RANK}, {mode}: {shown} of the base")


def measure_loading(pipeline: Any, file: Path, repeats: int) -> None:
    """From a file to an adapter that acts."""
    stack = AdapterStack(pipeline)

    def ours() -> None:
        stack.load(file)

    def theirs() -> None:
        pipeline.load_lora_weights(str(file), adapter_name="a")

    raw = [timed(lambda: safetensors.torch.load_file(file)) for _ in range(repeats)]
    own, other = [], []
    for _ in range(repeats):
        own.append(timed(ours))
        stack.unload()
        other.append(timed(theirs))
        pipeline.unload_lora_weights()
    shown = [statistics.median(times) * 1000 for times in (raw, own, other)]
    print(
        f"{file.stat().st_size / 2**20:.1f} MiB file: raw read {shown[0]:.1f} ms, ready in our stack {shown[1]:.1f} ms "
        f"({shown[1] / shown[0]:.1f} x raw), by load_lora_weights {shown[2]:.1f} ms ({shown[2] / shown[1]:.1f} x ours)"
    )


def measure_reweighting(pipeline: Any, files: Sequence[Path]) -> None:
    """Other weights for a merged stack of 4, beside one U-Net call at 64 x 64 latents, without guidance."""
    stack = AdapterStack(pipeline)
    names = [stack.load(file) for file in files]
    with stack.merged():
        changes = [timed(lambda w=weight: stack.set_adapters(names, w)) for weight in (0.3, 0.6, -0.2)]
        step = timed(lambda: call(pipeline, batch=1, side=64))
    stack.unload()
    change = statistics.median(changes)
    print(f"re-weighting a merged stack of 4: {change:.2f} s; one U-Net call, 64 x 64, batch 1: {step:.2f} s")


@torch.inference_mode()
def call(pipeline: Any, *, batch: int = 2, side: int | None = None) -> None:
    """One forward pass of the U-Net."""
    config = pipeline.unet.config
    side = side or config.sample_size
    text = torch.zeros(batch, 77, config.cross_attention_dim)
    pipeline.unet(
        torch.zeros(batch, config.in_channels, side, side), 500, encoder_hidden_states=text, return_dict=False
    )


def timed(action: Callable[[], object], times: int = 1) -> float:
    """Seconds of one run."""
    begin = time.perf_counter()
    for _ in range(times):
        action()
    return (time.perf_counter() - begin) / times


def sd15_unet() -> UNet2DConditionModel:
    """SD 1.5's U-Net with random weights; diffusers' defaults are its configuration but for these."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    unet = unet.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    return unet


def write_adapters(unet: torch.nn.Module, folder: Path, family: Any) -> list[Path]:
    """Four adapters of all attention projections, as they are written after training: fp16."""
    files = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        pairs = {
            path: LoraPair(
                torch.randn(RANK, module.in_features, generator=generator) * 0.02,
                torch.randn(module.out_features, RANK, generator=generator) * 0.02,
                float(RANK),
            )
            for path, module in unet.named_modules()
            if isinstance(module, torch.nn.Linear) and (".attn1." in path or ".attn2." in path)
        }
        metadata = AdapterMetadata(title=f"a{seed}", base_model="random")
        files.append(write_adapter(folder / f"a{seed}.safetensors", pairs, family=family, metadata=metadata))
    return files


if __name__ == "__main__":
    main()
