"""Train the embedded base's U-Net and text encoder on the latents of the chosen subjects.

    python train_unet.py --work WORK --minutes 80

Needs WORK/art and WORK/vae.pt (or takes the shipped VAE). Writes WORK/unet.pt (weights, EMA, step) every few minutes
and continues from it; draws WORK/samples/STEP.png every --draw-every minutes. v-prediction, SD's betas, one weight for
all timesteps except the almost noiseless, whose velocity is mere noise; stratified timesteps.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from art import BASE_SETS, HERE, read_subjects
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from muon import Ema, Schedule, build_optimizers
from PIL import Image
from text import WIDTH, build_text_encoder, caption, write_tokenizer
from torch import Tensor, nn
from train_vae import build_vae
from transformers import CLIPTextModel, CLIPTokenizer

SHIPPED = HERE.parents[1] / "sdlora" / "embedded" / "base"
CHANNELS = (64, 128, 192)
SNR_CAP = 5.0
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
}
SHEET = ("fox", "rocket", "hamburger", "owl", "house", "tulip", "guitar", "car")


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
    )


def load_vae(work: Path) -> AutoencoderKL:
    """The averaged VAE of WORK/vae.pt, or the shipped one where there is none."""
    if not (work / "vae.pt").exists():
        return AutoencoderKL.from_pretrained(SHIPPED / "vae").float().eval().requires_grad_(False)
    saved = torch.load(work / "vae.pt", weights_only=True)
    vae = build_vae()
    vae.load_state_dict(saved["model"])
    with torch.no_grad():
        for name, param in vae.named_parameters():
            param.copy_(saved["ema"][name])
    return vae.eval().requires_grad_(False)


class Pictures:
    """Every subject in every style: uint8 pixels, posterior means and stds [N, 4, 16, 16] scaled to unit variance."""

    def __init__(self, work: Path, vae: AutoencoderKL):
        means, stds, drawings, self.subjects, self.styles = [], [], [], [], []
        wanted = read_subjects()
        for art_set in BASE_SETS:
            data = np.load(work / "art" / f"{art_set.package}.npz")
            pixels, names = data["pixels"], data["names"].tolist()
            rows = [names.index(name) for name in wanted if name in names]
            for chunk in np.array_split(pixels[rows], max(1, len(rows) // 16)):
                x = torch.from_numpy(chunk).permute(0, 3, 1, 2).float() / 127.5 - 1
                with torch.no_grad():
                    posterior = vae.encode(x).latent_dist
                means.append(posterior.mean)
                stds.append(posterior.std)
            drawings.append(torch.from_numpy(pixels[rows]).permute(0, 3, 1, 2))
            self.subjects += [wanted[names[row]] for row in rows]
            self.styles += [art_set.style] * len(rows)
        self.pixels, mean = torch.cat(drawings), torch.cat(means)
        self.scaling_factor = round(float(1 / mean.std()), 5)
        self.mean, self.std = mean * self.scaling_factor, torch.cat(stds) * self.scaling_factor

    def __len__(self) -> int:
        return len(self.subjects)


class Captioner(nn.Module):
    """Caption strings -> encoder_hidden_states [B, 77, WIDTH], as StableDiffusionPipeline computes them."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.tokenizer, self.encoder = tokenizer, build_text_encoder(tokenizer)
        self.cache: dict[str, Tensor] = {}

    def tokens(self, text: str) -> Tensor:
        if text not in self.cache:
            ids = self.tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids
            self.cache[text] = torch.tensor(ids)
        return self.cache[text]

    def forward(self, captions: list[str]) -> Tensor:
        unique = sorted(set(captions))
        states = self.encoder(torch.stack([self.tokens(text) for text in unique])).last_hidden_state
        return states[[unique.index(text) for text in captions]]


class Base(nn.Module):
    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.unet, self.captioner = build_unet(), Captioner(tokenizer)
        # On a CPU the backward pass of the fused attention takes a third of the whole step; plain products do not.
        self.unet.set_attn_processor(AttnProcessor())
        self.captioner.encoder.set_attn_implementation("eager")


@torch.no_grad()
def draw(base: Base, captions: list[str], seed: int, guidance: float, num_steps: int = 20) -> Tensor:
    """Latents [N, 4, 16, 16] by DDIM with classifier-free guidance; the same noise for every caption."""
    scheduler = DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(num_steps)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    latents = noise.repeat(len(captions), 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        states = base.captioner([""] * len(captions) + captions)
        for t in scheduler.timesteps:
            without, with_text = base.unet(torch.cat([latents] * 2), t, states).sample.float().chunk(2)
            latents = scheduler.step(without + guidance * (with_text - without), t, latents).prev_sample
    return latents


def write_sheet(base: Base, vae: AutoencoderKL, scaling_factor: float, path: Path) -> None:
    """Rows are styles (and the bare subject), columns are subjects."""
    styles = [*(s.style for s in BASE_SETS), None]
    captions = [caption(subject, style) for style in styles for subject in SHEET]
    latents = draw(base, captions, seed=7, guidance=3.0)
    pixels = torch.cat([vae.decode(part / scaling_factor).sample for part in latents.split(16)])
    pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    rows = pixels.reshape(len(styles), len(SHEET), 128, 128, 3).permute(0, 2, 1, 3, 4)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(rows.reshape(len(styles) * 128, len(SHEET) * 128, 3).numpy()).save(path)


def ensure_tokenizer(folder: Path) -> None:
    """What is there stays: trained anew, equally frequent pairs get other numbers, and the embeddings other words."""
    if (folder / "tokenizer.json").exists():
        return
    if (SHIPPED / "tokenizer").exists():
        CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer").save_pretrained(folder)
    else:
        write_tokenizer(folder)


def choose_caption(subject: str, style: str, chance: float) -> str:
    if chance < 0.06:
        return ""
    return caption(subject, None if chance < 0.14 else style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr-matrix", type=float, default=0.008)
    parser.add_argument("--lr-other", type=float, default=1.5e-3)
    parser.add_argument("--fall", type=float, default=1.0)
    parser.add_argument("--draw-every", type=float, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--from-shipped", action="store_true", help="start from the package's weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(int(time.time()))

    vae = load_vae(args.work)
    pictures = Pictures(args.work, vae)
    print(f"{len(pictures)} drawings, scaling factor {pictures.scaling_factor}", flush=True)
    ensure_tokenizer(args.work / "tokenizer")
    base = Base(CLIPTokenizer.from_pretrained(args.work / "tokenizer"))
    print({name: sum(p.numel() for p in m.parameters()) for name, m in base.named_children()}, flush=True)
    path, step = args.work / "unet.pt", 0
    saved = torch.load(path, weights_only=True) if path.exists() else None
    if args.from_shipped and not saved:
        base.unet.load_state_dict(UNet2DConditionModel.from_pretrained(SHIPPED / "unet").state_dict())
        base.captioner.encoder.load_state_dict(CLIPTextModel.from_pretrained(SHIPPED / "text_encoder").state_dict())
    if saved:
        base.load_state_dict(saved["model"])
        step = saved["step"]
    skip = ("conv_in", "conv_out", "time_embedding", "token_embedding", "position_embedding")
    optimizers = build_optimizers(base, args.lr_matrix, args.lr_other, skip=skip)
    schedule, ema = Schedule(optimizers, fall=args.fall), Ema(base, 0.997)
    if saved:
        ema.shadow = saved["ema"]
    noise_scheduler = DDPMScheduler(**SCHEDULE)
    alphas = noise_scheduler.alphas_cumprod
    # Min-SNR weights would give the noisiest timesteps, where only the caption says what to draw, next to nothing.
    signal_to_noise = alphas / (1 - alphas)
    weights = (signal_to_noise + 1).clamp(max=SNR_CAP + 1) / (signal_to_noise + 1)

    first, losses, queue = step, [], []
    started = told = drawn = time.time()
    while (progress := (time.time() - started) / (60 * args.minutes)) < 1:
        while len(queue) < args.batch:
            queue += torch.randperm(len(pictures), generator=generator).tolist()
        rows, queue = queue[: args.batch], queue[args.batch :]
        chances = torch.rand(args.batch, generator=generator).tolist()
        captions = [
            choose_caption(pictures.subjects[r], pictures.styles[r], c) for r, c in zip(rows, chances, strict=True)
        ]
        shape = (args.batch, 4, 16, 16)
        latents = pictures.mean[rows] + pictures.std[rows] * torch.randn(shape, generator=generator)
        noise = torch.randn(shape, generator=generator)
        strata = (torch.arange(args.batch) + torch.rand(args.batch, generator=generator)) / args.batch
        timesteps = (strata * 1000).long()
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            model_pred = base.unet(noisy_latents, timesteps, base.captioner(captions)).sample
        per_example = (model_pred.float() - target).square().mean((1, 2, 3))
        loss = (per_example * weights[timesteps]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        schedule.set(progress, step - first)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        ema.update(base, step - first if not saved else step)
        losses.append(loss.item())
        if time.time() - told > 60:
            rate = (step - first) * args.batch / (time.time() - started)
            print(f"step {step} {progress:.0%} loss {np.mean(losses[-300:]):.5f} {rate:.1f} img/s", flush=True)
            told = time.time()
        if (time.time() - drawn) / 60 > args.draw_every:
            drawn = time.time()
            finish(base, ema, step, path, vae, pictures.scaling_factor, args.work)
            told = time.time()
    finish(base, ema, step, path, vae, pictures.scaling_factor, args.work)


def finish(base: Base, ema: Ema, step: int, path: Path, vae: AutoencoderKL, scaling_factor: float, work: Path) -> None:
    """Save the state, and draw a sheet with the averaged weights."""
    state = {"model": base.state_dict(), "ema": ema.shadow, "step": step, "scaling_factor": scaling_factor}
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.rename(path)
    live = {name: param.detach().clone() for name, param in base.named_parameters()}
    ema.copy_to(base)
    base.eval()
    write_sheet(base, vae, scaling_factor, work / "samples" / f"{step:06d}.png")
    base.train()
    with torch.no_grad():
        for name, param in base.named_parameters():
            param.copy_(live[name])


if __name__ == "__main__":
    main()
