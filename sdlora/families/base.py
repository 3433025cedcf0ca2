"""What the model families have in common, and the questions that a family answers.

The training loop and the generator ask the family; they never compare its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor

__all__ = ["Components", "FamilyName", "ModelFamily", "PromptEmbeds", "embed_texts", "gradient_if", "tokenize"]

FamilyName: TypeAlias = Literal["sd1", "sd2", "sdxl"]


@dataclass(frozen=True, eq=False)
class PromptEmbeds:
    """Texts as the U-Net reads them."""

    encoder_hidden_states: Tensor
    """[B, 77, D]; D is 768 (SD 1.x), 1024 (SD 2.x) or 2048 (SDXL)."""

    pooled_prompt_embeds: Tensor | None = None
    """[B, 1280] for SDXL, else None."""

    def __len__(self) -> int:
        return int(self.encoder_hidden_states.shape[0])

    def select(self, rows: Sequence[int]) -> PromptEmbeds:
        """These rows, in this order; a row may occur more than once."""
        return self._map(lambda tensor: tensor[torch.as_tensor(rows, device=tensor.device)])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PromptEmbeds:
        """Moved or cast."""
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def is_finite(self) -> bool:
        """Whether no number is NaN or infinite."""
        pooled = self.pooled_prompt_embeds
        return bool(self.encoder_hidden_states.isfinite().all()) and (pooled is None or bool(pooled.isfinite().all()))

    @staticmethod
    def concat(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """All rows of all parts."""
        pooled = [part.pooled_prompt_embeds for part in parts if part.pooled_prompt_embeds is not None]
        return PromptEmbeds(
            torch.cat([part.encoder_hidden_states for part in parts]),
            torch.cat(pooled) if pooled else None,
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> PromptEmbeds:
        pooled = self.pooled_prompt_embeds
        return PromptEmbeds(change(self.encoder_hidden_states), None if pooled is None else change(pooled))


@dataclass(frozen=True, eq=False)
class Components:
    """A base model taken apart for training."""

    family: ModelFamily
    unet: UNet2DConditionModel
    vae: AutoencoderKL | None
    """None after `without_encoders`."""
    noise_scheduler: DDPMScheduler
    tokenizers: tuple[Any, ...]
    text_encoders: tuple[Any, ...]
    source: str
    """The folder or Hub id it came from."""
    prediction_type: str
    """"epsilon", "v_prediction" or "sample", as the scheduler's configuration says."""
    default_resolution: int
    """Side in pixels of the pictures that the base was trained on."""
    size_step: int
    """Picture sides must be multiples of this: VAE and U-Net halve the size again and again."""
    zeros_for_empty_prompt: bool = False
    """Whether the pipeline stands zeros for an empty prompt instead of encoding it (SDXL base does)."""
    sampler: Any = None
    """The scheduler that the base brings along to be drawn with."""

    def without_encoders(self, *, keep_text: bool = False) -> Components:
        """The same without VAE and, unless they are kept, text encoders, so that their memory can be freed."""
        return replace(self, vae=None) if keep_text else replace(self, vae=None, tokenizers=(), text_encoders=())


class ModelFamily(Protocol):
    """What differs between SD 1.x, SD 2.x and SDXL."""

    @property
    def name(self) -> FamilyName:
        """Short name, as in adapter metadata."""
        ...

    @property
    def title(self) -> str:
        """Name for people, e.g. "Stable Diffusion 1.x"."""
        ...

    @property
    def pipeline_class(self) -> Any:
        """The diffusers pipeline that draws with this family."""
        ...

    @property
    def image_to_image_class(self) -> Any:
        """The diffusers pipeline that draws over a picture, from the same parts."""
        ...

    @property
    def hidden_state_from_end(self) -> int:
        """Which of the text encoders' hidden states the U-Net reads, counted from the end; 1 is the last."""
        ...

    @property
    def hidden_state_normed(self) -> bool:
        """Whether that hidden state goes through the text encoder's final norm."""
        ...

    @property
    def text_encoder_classes(self) -> tuple[Any, ...]:
        """One class per text encoder; encoder n lies in `text_encoder`, `text_encoder_2`, ..."""
        ...

    @property
    def preset_blocks(self) -> Mapping[str, tuple[str, ...]]:
        """Target presets of this family alone: the U-Net blocks, as patterns, whose attention is adapted."""
        ...

    @property
    def unread_text_layers(self) -> tuple[int, ...]:
        """By text encoder, how many of its last layers have no say in what the U-Net is shown."""
        ...

    @property
    def pipeline_options(self) -> Mapping[str, Any]:
        """Further arguments of the pipeline's constructor."""
        ...

    def encode_prompts(
        self, components: Components, captions: Sequence[str], *, with_gradient: bool = False
    ) -> PromptEmbeds:
        """The captions' embeddings, on the encoders' device. Over-long captions are cut."""
        ...

    def encode_empty_prompt(self, components: Components, *, with_gradient: bool = False) -> PromptEmbeds:
        """One row: what the pipeline shows the U-Net when there is no prompt."""
        ...

    def added_cond_kwargs(
        self,
        embeds: PromptEmbeds,
        original_hw: Sequence[tuple[int, int]],
        crop_top_left_yx: Sequence[tuple[int, int]],
        target_hw: Sequence[tuple[int, int]],
    ) -> dict[str, Tensor] | None:
        """Further conditions of the U-Net, one entry of each sequence per row of `embeds`; None if it takes none."""
        ...


def embed_texts(components: Components, texts: Sequence[str]) -> PromptEmbeds:
    """One fp32 row for each text, with the gradient of what is trained in the encoders; "" is the empty prompt."""
    family, said = components.family, list(dict.fromkeys(text for text in texts if text))
    parts = [family.encode_prompts(components, said, with_gradient=True)] if said else []
    if "" in texts:
        parts.append(family.encode_empty_prompt(components, with_gradient=True))
    row = {text: number for number, text in enumerate([*said, ""])}
    return PromptEmbeds.concat(parts).select([row[text] for text in texts]).to(dtype=torch.float32)


def gradient_if(wanted: bool) -> AbstractContextManager[None]:
    """The gradient is recorded if it is wanted and the caller records one."""
    return nullcontext() if wanted else torch.no_grad()


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids, int64 [B, 77], padded and cut as the pipelines do it."""
    tokens = tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    ids: Tensor = tokens.input_ids
    return ids
