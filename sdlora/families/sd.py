"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, its last hidden state, no further conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel

from sdlora.families.base import Components, FamilyName, PromptEmbeds, tokenize

__all__ = ["SD1", "SD2", "StableDiffusionFamily"]


@dataclass(frozen=True)
class StableDiffusionFamily:
    """See `ModelFamily`."""

    name: FamilyName
    title: str

    @property
    def pipeline_class(self) -> Any:
        return StableDiffusionPipeline

    @property
    def image_to_image_class(self) -> Any:
        return StableDiffusionImg2ImgPipeline

    @property
    def hidden_state_from_end(self) -> int:
        return 1

    @property
    def hidden_state_normed(self) -> bool:
        return True

    @property
    def text_encoder_classes(self) -> tuple[Any, ...]:
        return (CLIPTextModel,)

    @property
    def pipeline_options(self) -> Mapping[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def encode_prompts(self, components: Components, captions: Sequence[str]) -> PromptEmbeds:
        (tokenizer,), (text_encoder,) = components.tokenizers, components.text_encoders
        with torch.no_grad():
            output = text_encoder(tokenize(tokenizer, captions).to(text_encoder.device))
        return PromptEmbeds(output.last_hidden_state)

    def encode_empty_prompt(self, components: Components) -> PromptEmbeds:
        return self.encode_prompts(components, [""])

    def added_cond_kwargs(
        self,
        embeds: PromptEmbeds,
        original_hw: Sequence[tuple[int, int]],
        crop_top_left_yx: Sequence[tuple[int, int]],
        target_hw: Sequence[tuple[int, int]],
    ) -> dict[str, Tensor] | None:
        return None


SD1 = StableDiffusionFamily("sd1", "Stable Diffusion 1.x")
SD2 = StableDiffusionFamily("sd2", "Stable Diffusion 2.x")
