"""Pictures drawn in the middle of training, with the LoRA as it is; their noise is their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from sdlora.config import PreviewConfig
from sdlora.families.base import Components, PromptEmbeds
from sdlora.precision import Precision
from sdlora.randomness import counter_generator
from sdlora.run_dir import RunDir

__all__ = ["PreviewDrawer"]


class PreviewDrawer:
    """Draws `settings.prompts` at the base's own size by DDIM; `into` a run's folder it is a function of the step."""

    def __init__(
        self,
        *,
        components: Components,
        settings: PreviewConfig,
        resolution: int,
        precision: Precision,
        keep_text: bool = False,
    ):
        """`keep_text`: the text encoders are trained, so that the prompts must be encoded anew each time."""
        self._settings, self._resolution = settings, resolution
        self._precision = precision
        self._embeds = None if keep_text else _embeds(components, settings.prompts)
        # Only U-Net and VAE are needed from here on, unless the encoders change.
        self._components = components if keep_text else replace(components, tokenizers=(), text_encoders=())

    def into(self, run_dir: RunDir) -> Callable[[int], list[Path]]:
        """Draws every prompt at a step; returns the files."""
        return partial(self._draw_all, run_dir)

    def _draw_all(self, run_dir: RunDir, step: int) -> list[Path]:
        paths = []
        embeds = self._embeds or _embeds(self._components, self._settings.prompts)
        for index in range(len(self._settings.prompts)):
            path = run_dir.preview_path(step, index)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._draw(index, embeds.select([0, 1 + index])).save(path)
            paths.append(path)
        return paths

    @torch.no_grad()
    def _draw(self, index: int, embeds: PromptEmbeds) -> Image.Image:
        """`embeds`: two rows, without and with the prompt."""
        components, settings = self._components, self._settings
        assert components.vae is not None
        device = components.unet.device
        scheduler = DDIMScheduler.from_config(components.noise_scheduler.config, clip_sample=False)
        scheduler.set_timesteps(settings.num_inference_steps)
        embeds = embeds.to(device)
        size = self._resolution // (2 ** (len(components.vae.config.block_out_channels) - 1))
        noise = torch.randn(1, 4, size, size, generator=counter_generator(settings.seed, "preview", index))
        latents = noise.to(device) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            with self._precision.autocast():
                without, with_prompt = self._predict(latents, timestep, embeds).chunk(2)
            model_pred = without + settings.guidance_scale * (with_prompt - without)
            latents = scheduler.step(model_pred.float(), timestep, latents).prev_sample
        vae = components.vae
        decoded = vae.decode((latents / vae.config.scaling_factor).to(vae.device, vae.dtype)).sample
        return _picture(decoded[0])

    def _predict(self, latents: Tensor, timestep: Tensor, embeds: PromptEmbeds) -> Tensor:
        sizes: Sequence[tuple[int, int]] = [(self._resolution, self._resolution)] * 2
        added = self._components.family.added_cond_kwargs(embeds, sizes, [(0, 0)] * 2, sizes)
        predicted: Tensor = self._components.unet(
            torch.cat([latents] * 2), timestep, embeds.encoder_hidden_states, added_cond_kwargs=added
        ).sample
        return predicted


def _embeds(components: Components, prompts: Sequence[str]) -> PromptEmbeds:
    """The empty prompt, then the others."""
    family = components.family
    return PromptEmbeds.concat([family.encode_empty_prompt(components), family.encode_prompts(components, prompts)])


def _picture(decoded: Tensor) -> Image.Image:
    """[3, H, W] in about [-1, 1] as an RGB picture."""
    bytes_hwc = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8).permute(1, 2, 0)
    return Image.fromarray(bytes_hwc.numpy())
