"""Tiny random pipelines with the real block topology of SD 1.x, SD 2.x and SDXL.

Every module name, hence every adapter key, equals the full model's; only the widths are small. Built offline from
configurations, seeded without touching the global generator. `tiny_*()` returns a fresh fp32 CPU pipeline in eval mode
on every call, so a test may do with it what it likes.

Cross-attention widths differ between the families (32, 48, 64), as 768, 1024 and 2048 do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

__all__ = ["CROSS_ATTENTION_DIM", "LATENT_SIZE", "tiny_sd1", "tiny_sd2", "tiny_sdxl", "tiny_tokenizer"]

CROSS_ATTENTION_DIM = {"sd1": 32, "sd2": 48, "sdxl": 64}
LATENT_SIZE = 8
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def tiny_sd1() -> StableDiffusionPipeline:
    """SD 1.x: four levels, convolutional proj_in/proj_out, epsilon prediction."""
    return copy.deepcopy(_build_sd1())


def tiny_sd2() -> StableDiffusionPipeline:
    """SD 2.x: four levels, linear proj_in/proj_out, heads per level, v prediction."""
    return copy.deepcopy(_build_sd2())


def tiny_sdxl() -> StableDiffusionXLPipeline:
    """SDXL: three levels of 0, 2 and 10 transformer blocks, two text encoders, text and time conditions."""
    return copy.deepcopy(_build_sdxl())


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of 514 tokens without merges: one token a character, 77 positions, end token 513."""
    letters = list(_byte_letters())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), _BOS, _EOS]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=77)


def _byte_letters() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE, as GPT-2 orders them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _seeded(build: Callable[[], torch.nn.Module], seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def _text_config(hidden_size: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def _scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def _sd_unet(cross_attention_dim: int, heads: int | tuple[int, ...], linear_projection: bool) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=heads,
        use_linear_projection=linear_projection,
    )


def _sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        norm_num_groups=8,
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=CROSS_ATTENTION_DIM["sdxl"],
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )


def _sd_pipeline(unet: UNet2DConditionModel, text_encoder: CLIPTextModel, prediction: str) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=_seeded(_vae, 2),
        text_encoder=text_encoder,
        tokenizer=tiny_tokenizer(),
        unet=unet,
        scheduler=_scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@cache
def _build_sd1() -> StableDiffusionPipeline:
    unet = _seeded(lambda: _sd_unet(CROSS_ATTENTION_DIM["sd1"], 8, False), 0)
    text_encoder = _seeded(lambda: CLIPTextModel(_text_config(32)), 1)
    return _sd_pipeline(unet, text_encoder, "epsilon")


@cache
def _build_sd2() -> StableDiffusionPipeline:
    unet = _seeded(lambda: _sd_unet(CROSS_ATTENTION_DIM["sd2"], (2, 4, 4, 4), True), 0)
    text_encoder = _seeded(lambda: CLIPTextModel(_text_config(48)), 1)
    return _sd_pipeline(unet, text_encoder, "v_prediction")


@cache
def _build_sdxl() -> StableDiffusionXLPipeline:
    tokenizer = tiny_tokenizer()
    return StableDiffusionXLPipeline(
        vae=_seeded(_vae, 2),
        text_encoder=_seeded(lambda: CLIPTextModel(_text_config(32)), 1),
        text_encoder_2=_seeded(lambda: CLIPTextModelWithProjection(_text_config(32)), 3),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=_seeded(_sdxl_unet, 0),
        scheduler=_scheduler("epsilon"),
        add_watermarker=False,
    )
