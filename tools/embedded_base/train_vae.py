"""Train the embedded base's AutoencoderKL on every drawing of the base sets.

    python train_vae.py --work WORK --minutes 40

Writes WORK/vae.pt (weights, EMA, step) every minute and continues from it, or with --from-shipped from the package's
weights. The sets kept for adaptation are read only to print the PSNR on styles never seen; they are never trained on.
A second round with --decoder-only --colour 0.5 sharpens the colours; the latents, and so the U-Net, stay as they are.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from art import ADAPTATION_SETS, BASE_SETS, HERE, read_subjects
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from muon import Ema, Schedule, build_optimizers
from torch import Tensor

SHIPPED = HERE.parents[1] / "sdlora" / "embedded" / "base"
CHANNELS = (16, 32, 64, 96)
KL_WEIGHT = 5e-5


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
    )


def load_pixels(work: Path, package: str, subjects_only: bool = False) -> Tensor:
    """[N, 3, 128, 128] uint8."""
    data = np.load(work / "art" / f"{package}.npz")
    pixels, names = data["pixels"], data["names"]
    if subjects_only:
        wanted = set(read_subjects())
        pixels = pixels[[name in wanted for name in names]]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Flip, shift, scale and permute colours of uint8 [B, 3, H, W]; returns float in [-1, 1]."""
    batch = pixels.float().div_(127.5).sub_(1)
    count = len(batch)
    draw = torch.rand(count, 6, generator=generator)
    scale = torch.where(draw[:, 0] < 0.5, torch.ones(count), 0.8 + 0.5 * draw[:, 1])
    sign = torch.where(draw[:, 2] < 0.5, -1.0, 1.0)
    shift = (draw[:, 3:5] - 0.5) * 0.2 * (scale != 1)[:, None]
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = sign / scale, 1 / scale, shift
    grid = F.affine_grid(theta, list(batch.shape), align_corners=False)
    batch = F.grid_sample(batch - 1, grid, align_corners=False, padding_mode="zeros") + 1
    for row in torch.nonzero(draw[:, 5] < 0.25).flatten().tolist():
        batch[row] = batch[row, torch.randperm(3, generator=generator)]
    return batch


def to_lab(pixels: Tensor) -> Tensor:
    """sRGB [B, 3, H, W] in [-1, 1] to CIELAB under D65, with a gradient everywhere inside the cube."""
    rgb = ((pixels + 1) / 2).clamp(1e-4, 1)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = torch.einsum("ij,bjhw->bihw", to_xyz / to_xyz.sum(1, keepdim=True), linear)
    low = (6 / 29) ** 3
    x, y, z = torch.where(xyz > low, xyz.clamp(min=low) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def colour_error(y: Tensor, x: Tensor) -> Tensor:
    """Mean CIELAB distance over the pixels of `x` that are not paper white: the bar itself, as a loss."""
    inked = (x.amin(1) < 0.96).float()
    # Outside the cube a clamped colour has no gradient; the squared error beside it brings it back.
    distance = ((to_lab(y) - to_lab(x)).square().sum(1) + 1e-2).sqrt()
    return (distance * inked).sum() / inked.sum().clamp(min=1)


def latents_of(posterior: DiagonalGaussianDistribution, generator: torch.Generator, half_clean: bool) -> Tensor:
    """Samples; with `half_clean` every second picture is the mean itself, so that fine detail is learnt too."""
    latents = posterior.sample()
    if not half_clean:
        return latents
    clean = torch.rand(len(latents), 1, 1, 1, generator=generator) < 0.5
    return torch.where(clean, posterior.mean, latents)


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Mean over the pictures of the PSNR in dB, peak 255."""
    values = []
    for chunk in pixels.split(16):
        x = chunk.float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample.float().clamp(-1, 1)
        values += (-10 * torch.log10(((x - y) / 2).square().mean((1, 2, 3)) + 1e-12)).tolist()
    return float(np.mean(values))


@torch.no_grad()
def unseen_colour(vae: AutoencoderKL, pixels: Tensor) -> float:
    x = pixels.float() / 127.5 - 1
    y = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in x.split(16)])
    return float(np.mean([colour_error(a[None], b[None]) for a, b in zip(y.clamp(-1, 1), x, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--lr-matrix", type=float, default=0.01)
    parser.add_argument("--lr-other", type=float, default=2e-3)
    parser.add_argument("--adam", action="store_true")
    parser.add_argument("--decoder-only", action="store_true", help="keep the latents as they are")
    parser.add_argument("--colour", type=float, default=0.0, help="weight of the CIELAB error, per 100 units")
    parser.add_argument("--from-shipped", action="store_true", help="start from the package's weights")
    parser.add_argument("--state", default="vae.pt")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)

    every = torch.cat([load_pixels(args.work, s.package) for s in BASE_SETS])
    chosen = torch.cat([load_pixels(args.work, s.package, subjects_only=True) for s in BASE_SETS])
    unseen = {s.package: load_pixels(args.work, s.package, subjects_only=True)[::6] for s in ADAPTATION_SETS}
    print(f"{len(every)} drawings, {len(chosen)} of them subjects", flush=True)

    vae = build_vae()
    path, step = args.work / args.state, 0
    saved = torch.load(path, weights_only=True) if path.exists() else None
    if args.from_shipped and not saved:
        vae.load_state_dict(AutoencoderKL.from_pretrained(SHIPPED / "vae").state_dict())
    if saved:
        vae.load_state_dict(saved["model"])
        step = saved["step"]
    if args.decoder_only:
        if saved:
            # The encoder that the U-Net knows is the averaged one; it must be that in training too, and stay that.
            Ema.put(saved["ema"], vae)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    skip = ("",) if args.adam else ("conv_in", "conv_out", "quant_conv")
    optimizers = build_optimizers(vae, args.lr_matrix, args.lr_other, skip=skip)
    schedule, ema = Schedule(optimizers), Ema(vae, 0.999)
    if saved:
        ema.shadow = saved["ema"]
    started, first, losses, colours, told = time.time(), step, [], [0.0], time.time()
    while (progress := (time.time() - started) / (60 * args.minutes)) < 1:
        source = every if torch.rand((), generator=generator) < 0.5 else chosen
        picks = torch.randint(len(source), (args.batch,), generator=generator)
        x = augment(source[picks], generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(latents_of(posterior, generator, args.colour > 0)).sample
        error = (y.float() - x).square().mean()
        loss = error + KL_WEIGHT * posterior.kl().mean() / (4 * 16 * 16)
        if args.colour:
            colour = colour_error(y.float(), x)
            colours.append(colour.item())
            loss = loss + args.colour * colour / 100
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in vae.parameters() if p.requires_grad], 1.0)
        schedule.set(progress, step - first)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        ema.update(vae, step - first)
        losses.append(error.item())
        if time.time() - told > 60:
            rate = (step - first) * args.batch / (time.time() - started)
            std = posterior.mean.std().item()
            print(
                f"step {step} {progress:.0%} mse {np.mean(losses[-300:]):.5f} colour {np.mean(colours[-300:]):.2f} "
                f"{rate:.1f} img/s latent std {std:.2f}",
                flush=True,
            )
            told = time.time()
            save(path, vae, ema, step)
    save(path, vae, ema, step)
    ema.copy_to(vae)
    vae.eval()
    for name, pixels in unseen.items():
        print(f"{name}: PSNR {psnr(vae, pixels):.2f} dB, colour error {unseen_colour(vae, pixels):.2f}", flush=True)


def save(path: Path, vae: AutoencoderKL, ema: Ema, step: int) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save({"model": vae.state_dict(), "ema": ema.shadow, "step": step}, temporary)
    temporary.rename(path)


if __name__ == "__main__":
    main()
