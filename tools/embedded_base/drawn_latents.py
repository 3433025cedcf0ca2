"""What the U-Net makes of the drawings it knows: noised part of the way, and denoised again with their captions.

    python drawn_latents.py --work WORK

Writes WORK/drawn.pt: latents [N, 4, 16, 16] beside the pixels [N, 3, 128, 128] of the drawings they come from. They
are off in the way in which generated latents are off; a decoder that also learns from them (train_vae.py --drawn 0.5)
draws even fills and clean edges where the encoder's own latents would have taught it to draw the stains.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from text import caption
from torch import Tensor
from train_unet import SCHEDULE, Base, Pictures, load_vae
from transformers import CLIPTokenizer

NUM_STEPS = 20
STARTS = (4, 6, 8, 10)
"""How many of the last steps are drawn again: up to half of the way, where the layout still is the drawing's."""
GUIDANCES = (1.0, 3.0)
CHUNK = 16


def load_base(work: Path) -> Base:
    """The averaged U-Net and text encoder of WORK/unet.pt."""
    base = Base(CLIPTokenizer.from_pretrained(work / "tokenizer"))
    saved = torch.load(work / "unet.pt", weights_only=True)
    base.load_state_dict(saved["model"])
    with torch.no_grad():
        for name, param in base.named_parameters():
            param.copy_(saved["ema"][name])
    return base.eval()


@torch.no_grad()
def redraw(base: Base, latents: Tensor, captions: list[str], last_steps: int, guidance: float, seed: int) -> Tensor:
    """Latents [B, 4, 16, 16], noised to the timestep `last_steps` from the end and drawn again by DDIM."""
    scheduler = DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(NUM_STEPS)
    timesteps = scheduler.timesteps[-last_steps:]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    drawn = scheduler.add_noise(latents, noise, timesteps[:1])
    with torch.autocast("cpu", torch.bfloat16):
        states = base.captioner([""] * len(captions) + captions)
        for t in timesteps:
            without, with_text = base.unet(torch.cat([drawn] * 2), t, states).sample.float().chunk(2)
            drawn = scheduler.step(without + guidance * (with_text - without), t, drawn).prev_sample
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base, pictures = load_base(args.work), Pictures(args.work, load_vae(args.work))
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    drawn, started = torch.empty_like(pictures.mean), time.time()
    for number, rows in enumerate(order.split(CHUNK)):
        captions = [caption(pictures.subjects[row], pictures.styles[row]) for row in rows.tolist()]
        start, guidance = STARTS[number % len(STARTS)], GUIDANCES[number // len(STARTS) % len(GUIDANCES)]
        drawn[rows] = redraw(base, pictures.mean[rows], captions, start, guidance, seed=number)
    off = (drawn - pictures.mean).square().mean((1, 2, 3)).sqrt()
    torch.save({"latents": drawn / pictures.scaling_factor, "pixels": pictures.pixels}, args.work / "drawn.pt")
    print(f"{len(drawn)} drawings in {time.time() - started:.0f} s, off by {np.median(off):.3f} of unit variance")


if __name__ == "__main__":
    main()
