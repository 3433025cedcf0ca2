"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, its last hidden state, no further conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel

from sdlora.families.base import Components, FamilyName, PromptEmbeds, gradient_if, tokenize

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
    def preset_blocks(self) -> Mapping[str, tuple[str, ...]]:
        """Style lives on the way up (P+, arXiv 2303.09522, sec. 4: coarse layers draw shapes, fine ones how they look;
        InstantStyle, arXiv 2404.02733, takes `up_blocks.1` for SD 1.5, "experimental"), in no block alone."""
        return {"style-blocks": ("up_blocks.*",)}

    @property
    def unread_text_layers(self) -> tuple[int, ...]:
        return (0,)

    @property
    def pipeline_options(self) -> Mapping[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def encode_prompts(
        self, components: Components, captions: Sequence[str], *, with_gradient: bool = False
    ) -> PromptEmbeds:
        (tokenizer,), (text_encoder,) = components.tokenizers, components.text_encoders
        with gradient_if(with_gradient):
            output = text_encoder(tokenize(tokenizer, captions).to(text_encoder.device))
        return PromptEmbeds(output.last_hidden_state)

    def encode_empty_prompt(self, components: Components, *, with_gradient: bool = False) -> PromptEmbeds:
        return self.encode_prompts(components, [""], with_gradient=with_gradient)

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
