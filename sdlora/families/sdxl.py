"""Stable Diffusion XL: two text encoders, a pooled embedding, and the picture's size and crop as conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdlora.families.base import Components, FamilyName, PromptEmbeds, gradient_if, tokenize

__all__ = ["SDXL", "StableDiffusionXLFamily"]


@dataclass(frozen=True)
class StableDiffusionXLFamily:
    """See `ModelFamily`."""

    name: FamilyName
    title: str

    @property
    def pipeline_class(self) -> Any:
        return StableDiffusionXLPipeline

    @property
    def image_to_image_class(self) -> Any:
        return StableDiffusionXLImg2ImgPipeline

    @property
    def hidden_state_from_end(self) -> int:
        return 2

    @property
    def hidden_state_normed(self) -> bool:
        return False

    @property
    def text_encoder_classes(self) -> tuple[Any, ...]:
        return (CLIPTextModel, CLIPTextModelWithProjection)

    @property
    def preset_blocks(self) -> Mapping[str, tuple[str, ...]]:
        """Of ten attention blocks one decides what is drawn and the next one how (B-LoRA, arXiv 2403.14572, sec. 3)."""
        content, style = "up_blocks.0.attentions.0.*", "up_blocks.0.attentions.1.*"
        return {"style-blocks": (content, style), "b-lora-style": (style,), "b-lora-content": (content,)}

    @property
    def unread_text_layers(self) -> tuple[int, ...]:
        # The second one's last layer still makes the pooled embedding.
        return (1, 0)

    @property
    def pipeline_options(self) -> Mapping[str, Any]:
        return {"add_watermarker": False}

    def encode_prompts(
        self, components: Components, captions: Sequence[str], *, with_gradient: bool = False
    ) -> PromptEmbeds:
        """Both encoders' last hidden state but one, side by side, and the second one's projection (SDXL,
        arXiv 2307.01952, sec. 2.1)."""
        hidden_states, pooled = [], None
        with gradient_if(with_gradient):
            for tokenizer, text_encoder in zip(components.tokenizers, components.text_encoders, strict=True):
                ids = tokenize(tokenizer, captions).to(text_encoder.device)
                output = text_encoder(ids, output_hidden_states=True)
                hidden_states.append(output.hidden_states[-2])
                pooled = output[0]
        return PromptEmbeds(torch.cat(hidden_states, dim=-1), pooled)

    def encode_empty_prompt(self, components: Components, *, with_gradient: bool = False) -> PromptEmbeds:
        embeds = self.encode_prompts(components, [""], with_gradient=with_gradient)
        if not components.zeros_for_empty_prompt:
            return embeds
        assert embeds.pooled_prompt_embeds is not None
        return PromptEmbeds(
            torch.zeros_like(embeds.encoder_hidden_states), torch.zeros_like(embeds.pooled_prompt_embeds)
        )

    def added_cond_kwargs(
        self,
        embeds: PromptEmbeds,
        original_hw: Sequence[tuple[int, int]],
        crop_top_left_yx: Sequence[tuple[int, int]],
        target_hw: Sequence[tuple[int, int]],
    ) -> dict[str, Tensor] | None:
        """`text_embeds` [B, 1280] and `time_ids` [B, 6] in pixels: original h w, crop top left, target h w."""
        assert embeds.pooled_prompt_embeds is not None
        rows = [
            (*sizes[0], *sizes[1], *sizes[2]) for sizes in zip(original_hw, crop_top_left_yx, target_hw, strict=True)
        ]
        # fp32 even where the U-Net is fp16, which has no odd number above 2048.
        time_ids = torch.tensor(rows, dtype=torch.float32, device=embeds.pooled_prompt_embeds.device)
        return {"text_embeds": embeds.pooled_prompt_embeds, "time_ids": time_ids}


SDXL = StableDiffusionXLFamily("sdxl", "Stable Diffusion XL")
