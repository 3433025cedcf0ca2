"""What our training step costs beside the arithmetic it cannot do without, and beside the usual loop.

    python benchmarks/step.py [--precision fp32 bf16] [--rounds 5] [--processor-time]

On a random checkpoint of SD 1.5's exact shapes at 256 pixels, batch 1, in one process, taking turns:

- bare: forward of the frozen U-Net and a backward pass for activations only, from the first adapted layer on;
- full: a step of `Trainer`, with everything it does (data, noise, loss, clipping, AdamW, events);
- saving: the same while a save is copied and then written beside it;
- stock: the loop of the diffusers and peft documentation, with VAE and text encoder in it.

To reach: full / bare <= 1.05; full / stock <= 0.76 in the same precision, and <= 0.36 with the default precision of a
CPU that multiplies bf16 (bf16, which needs --precision fp32 bf16 to be told) against stock fp32; a save holds the loop
up for <= 5 % of a step.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from sdlora.config import TrainConfig
from sdlora.events import StepDone
from sdlora.families import Components, PromptEmbeds
from sdlora.families.sd import SD1
from sdlora.families.shapes import STANDARD
from sdlora.precision import Precision
from sdlora.prepare import LatentDistribution, PreparedExample, TrainingSet, View
from sdlora.run_dir import RunDir
from sdlora.trainer import Trainer

SIDE = 256
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
FIRST_ADAPTED = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
RANK = 16
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def build(cls: Any, config: dict[str, Any], dtype: torch.dtype) -> Any:
    model = cls.from_config(config) if not isinstance(config, CLIPTextConfig) else cls(config)
    return torch.nn.Module.to(model, dtype=dtype).requires_grad_(False).eval()


def shared_copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Another U-Net on the same weights."""
    with torch.device("meta"):
        copy = UNet2DConditionModel.from_config(unet.config)
    copy.load_state_dict(unet.state_dict(), assign=True)
    return copy.requires_grad_(False).train()


def bare_step(unet: UNet2DConditionModel, precision: Precision) -> Callable[[], None]:
    inputs = torch.randn(1, 4, SIDE // 8, SIDE // 8), torch.tensor([500]), torch.randn(1, 77, 768)
    inputs = tuple(x if x.dtype == torch.int64 else x.to(precision.weight_dtype) for x in inputs)  # type: ignore

    def begin_graph(module: Any, args: Any, kwargs: Any) -> Any:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs

    unet.get_submodule(FIRST_ADAPTED).register_forward_pre_hook(begin_graph, with_kwargs=True)

    def step() -> None:
        with precision.autocast():
            unet(*inputs).sample.sum().backward()

    return step


def full_run(
    unet: UNet2DConditionModel, precision: Precision, folder: Path, rounds: int
) -> tuple[Trainer, list[float]]:
    """A run of two steps a round, with a save before the first of them; and the seconds that each save holds it up."""
    config = TrainConfig.model_validate(
        {
            "data": {"path": "none"},
            "lora": {"rank": RANK, "targets": "attention"},
            "train": {"exposures": 2 * rounds, "batch_size": 1, "save_every": 2},
        }
    )
    latents = LatentDistribution(torch.randn(4, SIDE // 8, SIDE // 8), torch.full((4, SIDE // 8, SIDE // 8), 0.1))
    example = PreparedExample("made up", (View(latents),), (), (1,), (SIDE, SIDE), (SIDE, SIDE))
    texts = TrainingSet((example,), PromptEmbeds(torch.randn(2, 77, 768)), ("", "made up"), SIDE)
    components = Components(SD1, unet, None, DDPMScheduler(**SCHEDULE), (), (), "random", "epsilon", SIDE, 64)
    trainer = Trainer(
        config=config,
        components=components,
        training_set=texts,
        run_dir=RunDir(folder, "step"),
        precision=precision,
    )
    begin_save, blocked = trainer._begin_save, []

    def timed(path: Path | None = None) -> None:
        started = time.perf_counter()
        begin_save(path)
        blocked.append(time.perf_counter() - started)

    trainer._begin_save = timed  # type: ignore[method-assign]
    return trainer, blocked


def stock_step(unet: UNet2DConditionModel, vae: Any, text_encoder: Any, dtype: torch.dtype) -> Callable[[], None]:
    """As the documentation of diffusers and peft teaches it."""
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    scheduler = DDPMScheduler(**SCHEDULE)
    pixels, tokens = torch.randn(1, 3, SIDE, SIDE).to(dtype), torch.randint(0, 49408, (1, 77))

    def step() -> None:
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * 0.18215
            hidden = text_encoder(tokens)[0]
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (1,))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            predicted = unet(noisy, timesteps, hidden).sample
        loss = F.mse_loss(predicted.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def measure(name: str, rounds: int, folder: Path, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each, and those for which a save holds up the loop."""
    precision = Precision(name, "cpu")  # type: ignore[arg-type]
    dtype = precision.weight_dtype
    shapes = STANDARD["sd1"]
    torch.manual_seed(0)
    unet = build(UNet2DConditionModel, dict(shapes.unet), dtype)
    vae = build(AutoencoderKL, dict(shapes.vae), dtype)
    text = build(CLIPTextModel, CLIPTextConfig(hidden_size=768, intermediate_size=3072), dtype)
    bare = bare_step(shared_copy(unet), precision)
    stock = stock_step(shared_copy(unet), vae, text, dtype)
    (folder / name).mkdir()
    trainer, blocked = full_run(shared_copy(unet), precision, folder / name, rounds + 1)
    steps = (event for event in trainer.run() if isinstance(event, StepDone))
    seconds: dict[str, list[float]] = {"bare": [], "saving": [], "stock": [], "full": []}

    def full() -> None:
        next(steps)

    for number in range(rounds + 1):
        # The save of the round before is begun in the first step of a round.
        for kind, step in (("bare", bare), ("saving", full), ("stock", stock), ("full", full)):
            started = clock()
            step()
            # The first round warms up.
            if number:
                seconds[kind].append(clock() - started)
    assert next(steps, None) is None
    seconds["blocked"] = blocked[:rounds]
    return {kind: statistics.median(values) for kind, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true", help="of one thread, beside other work")
    args = parser.parse_args()
    if args.processor_time:
        torch.set_num_threads(1)
    clock = time.process_time if args.processor_time else time.perf_counter
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in args.precision:
            found[name] = seconds = measure(name, args.rounds, Path(place), clock)
            print(
                f"{name}: bare {seconds['bare']:.2f} s, full {seconds['full']:.2f} s, stock {seconds['stock']:.2f} s; "
                f"full / bare {seconds['full'] / seconds['bare']:.3f}, "
                f"full / stock {seconds['full'] / seconds['stock']:.3f}; "
                f"a save holds the loop up for {seconds['blocked']:.3f} s, "
                f"{seconds['blocked'] / seconds['full']:.1%} of a step; "
                f"a step beside its writing {seconds['saving']:.2f} s",
                flush=True,
            )
    if {"fp32", "bf16"} <= found.keys():
        print(f"full bf16 / stock fp32 {found['bf16']['full'] / found['fp32']['stock']:.3f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{torch.get_num_threads()} threads; peak of memory {peak:.1f} GiB; torch {torch.__version__}")


if __name__ == "__main__":
    main()
