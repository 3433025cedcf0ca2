"""Checkpoints in Stability's original layout, written by a table of their own, and the models they hold.

The models are small but keep what the layout fixes: 32 norm groups, heads of 64, two layers a block.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.families.clip import clip_tokenizer

VOCABULARY = 49408


def pipeline_of(family: str, prediction_type: str = "epsilon"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**UNETS[family]).eval()
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 64, 64),
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.13025 if family == "sdxl" else 0.18215,
        ).eval()
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        )
        if family == "sdxl":
            return StableDiffusionXLPipeline(
                vae=vae,
                unet=unet,
                scheduler=scheduler,
                text_encoder=CLIPTextModel(text_config("quick_gelu", 2)).eval(),
                text_encoder_2=CLIPTextModelWithProjection(text_config("gelu", 3)).eval(),
                tokenizer=clip_tokenizer(),
                tokenizer_2=clip_tokenizer(for_open_clip=True),
                add_watermarker=False,
            )
        activation = "quick_gelu" if family == "sd1" else "gelu"
        return StableDiffusionPipeline(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            text_encoder=CLIPTextModel(text_config(activation, 2)).eval(),
            tokenizer=clip_tokenizer(for_open_clip=family == "sd2"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def text_config(activation: str, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_hidden_layers=layers,
        num_attention_heads=1,
        hidden_act=activation,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1 if activation == "quick_gelu" else 0,
    )


_SD = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 64,
}
UNETS = {
    "sd1": {**_SD, "block_out_channels": (32, 64, 64, 64), "attention_head_dim": 8},
    "sd2": {
        **_SD,
        "block_out_channels": (64, 128, 128, 128),
        "attention_head_dim": (1, 2, 2, 2),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (64, 64, 128),
        "transformer_layers_per_block": (1, 2, 3),
        "cross_attention_dim": 128,
        "attention_head_dim": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 64,
    },
}


def write_original(path: Path, pipeline, family: str, metadata: dict[str, str] | None = None, **extra: Tensor) -> Path:
    """The pipeline's weights as Stability's scripts would have saved them."""
    tensors = {f"model.diffusion_model.{name}": t for name, t in original_unet(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{name}": t for name, t in original_vae(pipeline.vae).items()}
    if family == "sd1":
        tensors |= hugging_face_text(pipeline.text_encoder, "cond_stage_model.transformer.")
    elif family == "sd2":
        tensors |= open_clip_text(pipeline.text_encoder, "cond_stage_model.model.", spare_layer=True)
    else:
        tensors |= hugging_face_text(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        tensors |= open_clip_text(pipeline.text_encoder_2, "conditioner.embedders.1.model.", spare_layer=False)
    tensors["model_ema.decay"] = torch.ones(1)
    save_file({k: v.detach().contiguous().clone() for k, v in (tensors | extra).items()}, path, metadata)
    return path


def original_unet(unet: nn.Module) -> dict[str, Tensor]:
    """By walking the blocks in Stability's order, and not by taking names apart."""
    result: dict[str, Tensor] = {}

    def put(prefix: str, module: nn.Module, renamed: tuple[tuple[str, str], ...] = ()) -> None:
        for name, tensor in module.state_dict().items():
            for ours, theirs in renamed:
                name = re.sub(rf"^{ours}\.", f"{theirs}.", name)
            result[f"{prefix}.{name}"] = tensor

    resnet = (
        ("norm1", "in_layers.0"),
        ("conv1", "in_layers.2"),
        ("time_emb_proj", "emb_layers.1"),
        ("norm2", "out_layers.0"),
        ("conv2", "out_layers.3"),
        ("conv_shortcut", "skip_connection"),
    )
    put("time_embed.0", unet.time_embedding.linear_1)
    put("time_embed.2", unet.time_embedding.linear_2)
    if getattr(unet, "add_embedding", None) is not None:
        put("label_emb.0.0", unet.add_embedding.linear_1)
        put("label_emb.0.2", unet.add_embedding.linear_2)
    put("input_blocks.0.0", unet.conv_in)
    number = 1
    for block in unet.down_blocks:
        for index, layer in enumerate(block.resnets):
            put(f"input_blocks.{number}.0", layer, resnet)
            if hasattr(block, "attentions"):
                put(f"input_blocks.{number}.1", block.attentions[index])
            number += 1
        if block.downsamplers:
            put(f"input_blocks.{number}.0.op", block.downsamplers[0].conv)
            number += 1
    put("middle_block.0", unet.mid_block.resnets[0], resnet)
    put("middle_block.1", unet.mid_block.attentions[0])
    put("middle_block.2", unet.mid_block.resnets[1], resnet)
    number = 0
    for block in unet.up_blocks:
        for index, layer in enumerate(block.resnets):
            modules = [layer]
            if hasattr(block, "attentions"):
                modules.append(block.attentions[index])
            for place, module in enumerate(modules):
                put(f"output_blocks.{number}.{place}", module, resnet if place == 0 else ())
            if index == len(block.resnets) - 1 and block.upsamplers:
                put(f"output_blocks.{number}.{len(modules)}.conv", block.upsamplers[0].conv)
            number += 1
    put("out.0", unet.conv_norm_out)
    put("out.2", unet.conv_out)
    return result


def original_vae(vae: nn.Module) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}

    def put(prefix: str, module: nn.Module) -> None:
        for name, tensor in module.state_dict().items():
            name = name.replace("conv_shortcut", "nin_shortcut").replace("group_norm", "norm")
            name = re.sub(r"^to_([qkv])\.", r"\1.", re.sub(r"^to_out\.0\.", "proj_out.", name))
            if isinstance(module, nn.Module) and ".attn_1" in prefix and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
            result[f"{prefix}.{name}"] = tensor

    for half, blocks, flip in (("encoder", vae.encoder.down_blocks, False), ("decoder", vae.decoder.up_blocks, True)):
        coder = getattr(vae, half)
        put(f"{half}.conv_in", coder.conv_in)
        way = "up" if flip else "down"
        for level, block in enumerate(blocks):
            place = f"{half}.{way}.{len(blocks) - 1 - level if flip else level}"
            for index, layer in enumerate(block.resnets):
                put(f"{place}.block.{index}", layer)
            scaler = block.upsamplers if flip else block.downsamplers
            if scaler:
                put(f"{place}.{'upsample' if flip else 'downsample'}.conv", scaler[0].conv)
        put(f"{half}.mid.block_1", coder.mid_block.resnets[0])
        put(f"{half}.mid.attn_1", coder.mid_block.attentions[0])
        put(f"{half}.mid.block_2", coder.mid_block.resnets[1])
        put(f"{half}.norm_out", coder.conv_norm_out)
        put(f"{half}.conv_out", coder.conv_out)
    put("quant_conv", vae.quant_conv)
    put("post_quant_conv", vae.post_quant_conv)
    return result


def hugging_face_text(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    tensors = {f"{prefix}text_model.{k.removeprefix('text_model.')}": v for k, v in encoder.state_dict().items()}
    return {**tensors, f"{prefix}text_model.embeddings.position_ids": torch.arange(77)[None]}


def open_clip_text(encoder: nn.Module, prefix: str, *, spare_layer: bool) -> dict[str, Tensor]:
    ours = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    layers = encoder.config.num_hidden_layers
    result = {
        "token_embedding.weight": ours["embeddings.token_embedding.weight"],
        "positional_embedding": ours["embeddings.position_embedding.weight"],
        "ln_final.weight": ours["final_layer_norm.weight"],
        "ln_final.bias": ours["final_layer_norm.bias"],
        "text_projection": ours.get("text_projection.weight", torch.eye(64)).T,
        "logit_scale": torch.ones(()),
    }
    for number in range(layers + spare_layer):
        source = f"encoder.layers.{min(number, layers - 1)}"
        block = f"transformer.resblocks.{number}"
        for kind in ("weight", "bias"):
            joined = [ours[f"{source}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            result[f"{block}.attn.in_proj_{kind}"] = torch.cat(joined)
            for theirs, name in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                result[f"{block}.{theirs}.{kind}"] = ours[f"{source}.{name}.{kind}"]
    return {f"{prefix}{name}": tensor for name, tensor in result.items()}


def diffusers_unet(path: Path, unet: nn.Module) -> dict[str, Tensor]:
    """The U-Net of the file as diffusers' own converter reads it."""
    checkpoint = single_file_utils.load_single_file_checkpoint(str(path))
    return single_file_utils.convert_ldm_unet_checkpoint(checkpoint, unet.config)


def diffusers_vae(path: Path, vae: nn.Module) -> dict[str, Tensor]:
    checkpoint = single_file_utils.load_single_file_checkpoint(str(path))
    return single_file_utils.convert_ldm_vae_checkpoint(checkpoint, vae.config)
