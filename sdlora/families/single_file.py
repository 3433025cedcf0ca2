"""A base model from one `.safetensors` checkpoint in Stability's original layout, as most fine-tunings are shared.

Everything is read from the file: family, widths, depths; also what the U-Net predicts and whether the noise schedule
ends in pure noise, by the marks that trainers leave, by the header, or by asking the U-Net itself. The tokenizer comes
with the package. Nothing is downloaded, and nothing in the file can run code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.errors import ModelError
from sdlora.families.base import FamilyName
from sdlora.families.clip import clip_tokenizer
from sdlora.families.original_names import open_clip_text_name, unet_name, vae_name

__all__ = ["OriginalCheckpoint", "checkpoint_family", "open_checkpoint", "require_safetensors", "said_prediction_type"]

PredictionType = Literal["epsilon", "v_prediction"]

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_SD1_TEXT, _SD2_TEXT = "cond_stage_model.transformer.", "cond_stage_model.model."
_SDXL_TEXT, _SDXL_TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_NORM_GROUPS = 32
_HEAD_WIDTH = 64
_SD1_HEADS = 8
_TIME_IDS_WIDTH = 256
_SCALING = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True, eq=False)
class OriginalCheckpoint:
    """An opened checkpoint; its parts are read when asked for."""

    path: Path
    family: FamilyName
    _tensors: Mapping[str, Tensor]
    _metadata: Mapping[str, str]

    def unet(self) -> UNet2DConditionModel:
        """The U-Net, in the file's number format."""
        config = self.unet_config()
        levels = config["up_block_types"]
        attended = frozenset(i for i, kind in enumerate(levels) if kind == "CrossAttnUpBlock2D")
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
        self._fill(unet, lambda name: _UNET + unet_name(name, up_blocks_with_attention=attended), "U-Net")
        return unet

    def vae(self) -> AutoencoderKL:
        """The VAE."""
        config = self.vae_config()
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(config)
        num_levels = len(config["block_out_channels"])
        self._fill(vae, lambda name: _VAE + vae_name(name, num_levels=num_levels), "VAE")
        return vae

    def text_configs(self) -> tuple[CLIPTextConfig, ...]:
        """One for SD 1.x and 2.x, two for SDXL."""
        if self.family == "sd1":
            return (self._hugging_face_config(_SD1_TEXT),)
        if self.family == "sd2":
            # The pipeline takes the last but one layer, so the last is not built.
            return (self._open_clip_config(_SD2_TEXT, left_out=1),)
        return self._hugging_face_config(_SDXL_TEXT), self._open_clip_config(_SDXL_TEXT_2)

    def text_encoders(self) -> tuple[Any, ...]:
        """Those of `text_configs`, with their weights."""
        configs = self.text_configs()
        if self.family == "sd1":
            return (self._hugging_face_text(_SD1_TEXT, configs[0]),)
        if self.family == "sd2":
            return (self._open_clip_text(_SD2_TEXT, CLIPTextModel(configs[0])),)
        return (
            self._hugging_face_text(_SDXL_TEXT, configs[0]),
            self._open_clip_text(_SDXL_TEXT_2, CLIPTextModelWithProjection(configs[1])),
        )

    def tokenizers(self) -> tuple[Any, ...]:
        """In the order of the text encoders."""
        if self.family == "sdxl":
            return clip_tokenizer(), clip_tokenizer(for_open_clip=True)
        return (clip_tokenizer(for_open_clip=self.family == "sd2"),)

    def scheduler(self, unet: UNet2DConditionModel) -> Any:
        """A sampler's scheduler that says what the U-Net predicts and how the noise runs.

        Raises:
            ModelError: the file's marks contradict each other.
        """
        prediction_type = self.prediction_type(unet)
        zero_terminal = "ztsnr" in self._tensors
        if zero_terminal and prediction_type != "v_prediction":
            raise ModelError(
                f"{self.path} contradicts itself: its noise schedule ends in pure noise (ztsnr), which epsilon cannot "
                "learn from."
            )
        spacing = {"timestep_spacing": "trailing"} if zero_terminal else {"timestep_spacing": "leading"}
        options: dict[str, Any] = {**_BETAS, **spacing, "steps_offset": 1, "prediction_type": prediction_type}
        options["rescale_betas_zero_snr"] = zero_terminal
        if self.family == "sdxl":
            return EulerDiscreteScheduler(**options)
        return DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=False)

    def prediction_type(self, unet: UNet2DConditionModel | None = None) -> PredictionType:
        """What the U-Net predicts, as the file says; if it does not, by asking the U-Net.

        Raises:
            ModelError: the file's marks contradict each other.
        """
        said = said_prediction_type(self.path, self.family, self._tensors, self._metadata)
        return said or probe_prediction_type(self.unet() if unet is None else unet)

    def unet_config(self) -> dict[str, Any]:
        """What diffusers would have in `unet/config.json`."""
        channels: list[int] = []
        with_attention: list[bool] = []
        depths: list[int] = []
        while (key := f"{_UNET}input_blocks.{1 + 3 * len(channels)}.0.out_layers.3.weight") in self._tensors:
            block = f"{_UNET}input_blocks.{1 + 3 * len(channels)}.1.transformer_blocks."
            channels.append(self._tensors[key].shape[0])
            depths.append(self._count(block))
            with_attention.append(depths[-1] > 0)
        context = self._tensors[f"{_UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
        config: dict[str, Any] = {
            "sample_size": {"sd1": 64, "sd2": 96, "sdxl": 128}[self.family],
            "in_channels": self._tensors[f"{_UNET}input_blocks.0.0.weight"].shape[1],
            "out_channels": self._tensors[f"{_UNET}out.2.weight"].shape[0],
            "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in with_attention],
            "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(with_attention)],
            "block_out_channels": channels,
            "layers_per_block": 2,
            "norm_num_groups": _NORM_GROUPS,
            "cross_attention_dim": context,
            "transformer_layers_per_block": [max(1, depth) for depth in depths],
            # diffusers calls the number of heads by this name.
            "attention_head_dim": _SD1_HEADS if self.family == "sd1" else [c // _HEAD_WIDTH for c in channels],
            "use_linear_projection": self.family != "sd1",
        }
        if self.family == "sd1":
            config["transformer_layers_per_block"] = 1
        if self.family == "sdxl":
            config["addition_embed_type"] = "text_time"
            config["addition_time_embed_dim"] = _TIME_IDS_WIDTH
            config["projection_class_embeddings_input_dim"] = self._tensors[f"{_UNET}label_emb.0.0.weight"].shape[1]
        return config

    def vae_config(self) -> dict[str, Any]:
        """What diffusers would have in `vae/config.json`."""
        channels: list[int] = []
        while (key := f"{_VAE}encoder.down.{len(channels)}.block.0.conv2.weight") in self._tensors:
            channels.append(self._tensors[key].shape[0])
        if not channels:
            raise ModelError(f"{self.path} holds no VAE. Take the full version of this checkpoint, not a pruned one.")
        return {
            "down_block_types": ["DownEncoderBlock2D"] * len(channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(channels),
            "block_out_channels": channels,
            "layers_per_block": self._count(f"{_VAE}encoder.down.0.block."),
            "latent_channels": self._tensors[f"{_VAE}post_quant_conv.weight"].shape[1],
            "norm_num_groups": _NORM_GROUPS,
            "sample_size": {"sd1": 512, "sd2": 768, "sdxl": 1024}[self.family],
            "scaling_factor": _SCALING[self.family],
        }

    def _hugging_face_config(self, prefix: str) -> CLIPTextConfig:
        inner = f"{prefix}text_model."
        return self._text_config(
            f"{inner}embeddings.token_embedding.weight",
            f"{inner}encoder.layers.0.mlp.fc1.weight",
            self._count(f"{inner}encoder.layers."),
            activation="quick_gelu",
        )

    def _hugging_face_text(self, prefix: str, config: CLIPTextConfig) -> CLIPTextModel:
        """OpenAI's CLIP under transformers' own names, of which "text_model." comes and goes."""
        inner = f"{prefix}text_model."
        model = CLIPTextModel(config)
        self._fill(model, lambda name: f"{inner}{name.removeprefix('text_model.')}", "text encoder")
        return model

    def _open_clip_config(self, prefix: str, *, left_out: int = 0) -> CLIPTextConfig:
        return self._text_config(
            f"{prefix}token_embedding.weight",
            f"{prefix}transformer.resblocks.0.mlp.c_fc.weight",
            self._count(f"{prefix}transformer.resblocks.") - left_out,
            activation="gelu",
            projection=self._tensors.get(f"{prefix}text_projection"),
        )

    def _open_clip_text(self, prefix: str, model: Any) -> Any:
        def find(name: str) -> Tensor | None:
            joined = re.fullmatch(r"(.*)self_attn\.([qkv])_proj\.(weight|bias)", name)
            if joined is None:
                tensor = self._tensors.get(prefix + open_clip_text_name(name))
                # OpenCLIP multiplies from the left.
                return tensor.T if tensor is not None and name == "text_projection.weight" else tensor
            layer = open_clip_text_name(f"{joined[1]}mlp.fc1.{joined[3]}").removesuffix(f"mlp.c_fc.{joined[3]}")
            tensor = self._tensors.get(f"{prefix}{layer}attn.in_proj_{joined[3]}")
            return None if tensor is None else tensor.chunk(3)["qkv".index(joined[2])]

        self._assign(model, find, "text encoder")
        return model

    def _text_config(
        self, embedding: str, inner: str, layers: int, *, activation: str, projection: Tensor | None = None
    ) -> CLIPTextConfig:
        if embedding not in self._tensors or inner not in self._tensors:
            raise ModelError(
                f"{self.path} holds no complete text encoder. Take the full version of this checkpoint, not a pruned "
                "one."
            )
        vocabulary, width = self._tensors[embedding].shape
        return CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=self._tensors[inner].shape[0],
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // _HEAD_WIDTH),
            max_position_embeddings=77,
            hidden_act=activation,
            projection_dim=width if projection is None else projection.shape[1],
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1 if activation == "quick_gelu" else 0,
        )

    def _count(self, prefix: str) -> int:
        numbers = (re.match(r"\d+", key.removeprefix(prefix)) for key in self._tensors if key.startswith(prefix))
        return len({match[0] for match in numbers if match})

    def _fill(self, module: nn.Module, original: Callable[[str], str], what: str) -> None:
        self._assign(module, lambda name: self._tensors.get(original(name)), what)

    def _assign(self, module: nn.Module, find: Callable[[str], Tensor | None], what: str) -> None:
        state: dict[str, Tensor] = {}
        for name, wanted in module.state_dict().items():
            tensor = find(name)
            if tensor is None or tensor.numel() != wanted.numel():
                shape = "is not there" if tensor is None else f"is {list(tensor.shape)}, not {list(wanted.shape)}"
                raise ModelError(f"{self.path} is no complete Stable Diffusion: {name} of its {what} {shape}.")
            # 1x1 convolutions and Linears are written either way.
            state[name] = tensor.reshape(wanted.shape).contiguous()
        module.load_state_dict(state, assign=True)
        for name, buffer in module.named_buffers():
            assert not buffer.is_meta, name


def open_checkpoint(path: Path) -> OriginalCheckpoint:
    """Opens a `.safetensors` checkpoint of SD 1.x, SD 2.x or SDXL.

    Raises:
        ModelError: it is a pickle, damaged, or another kind of model; the message says which.
    """
    require_safetensors(path)
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys() if not key.startswith("model_ema.")}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Fetch it again.") from error
    return OriginalCheckpoint(path, checkpoint_family(path, tensors), tensors, metadata)


def require_safetensors(path: Path) -> None:
    """
    Raises:
        ModelError: the file begins as no safetensors file does; a pickle is named.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    if start[8:9] != b"{":
        is_pickle = start[:2] == b"PK" or start[:1] == b"\x80" or path.suffix in (".ckpt", ".pt", ".bin")
        reason = (
            "it is a pickle, which can run code when it is opened. Get the .safetensors version"
            if is_pickle
            else "it is not a safetensors file. Fetch it again"
        )
        raise ModelError(f"{path} cannot be used: {reason}.")


def said_prediction_type(
    path: Path, family: FamilyName, names: Container[str], metadata: Mapping[str, str]
) -> PredictionType | None:
    """What a checkpoint predicts by its tensors' names and its header; None of an SD 2.x without a mark.

    Raises:
        ModelError: the marks contradict each other.
    """
    said = {
        "v": "v_prediction",
        "v_prediction": "v_prediction",
        "epsilon": "epsilon",
        "eps": "epsilon",
    }.get(metadata.get("modelspec.prediction_type", "").lower())
    marked = "v_prediction" if "v_pred" in names else None
    if said and marked and said != marked:
        raise ModelError(f"{path} contradicts itself: marked for v-prediction, but its header says {said}.")
    known = marked or said
    if known:
        return "v_prediction" if known == "v_prediction" else "epsilon"
    # SD 1.x and SDXL without a mark are epsilon; SD 2.x was published as both.
    return None if family == "sd2" else "epsilon"


def checkpoint_family(path: Path, tensors: Mapping[str, Any]) -> FamilyName:
    """The family, by the names of the tensors and one shape (`tensors` may hold anything that has a `shape`).

    Raises:
        ModelError: it is another kind of model, or a part is missing.
    """
    entry = tensors.get(f"{_UNET}input_blocks.0.0.weight")
    if entry is None:
        raise ModelError(f"{path} {_what_instead(tensors)}")
    if entry.shape[1] != 4:
        raise ModelError(
            f"{path} is not a text-to-image model: its U-Net takes {entry.shape[1]} channels, not 4. Inpainting, depth "
            "and edit models cannot be trained."
        )
    if any(key.startswith(_SDXL_TEXT_2) for key in tensors):
        if not any(key.startswith(_SDXL_TEXT) for key in tensors):
            raise ModelError(f"{path} is an SDXL refiner. Train on the base model.")
        return "sdxl"
    if any(key.startswith(_SD2_TEXT) for key in tensors):
        return "sd2"
    if any(key.startswith(_SD1_TEXT) for key in tensors):
        return "sd1"
    raise ModelError(f"{path} holds no text encoder. Take the full version of this checkpoint, not a pruned one.")


def _what_instead(tensors: Mapping[str, Any]) -> str:
    names = list(tensors)
    if any("lora_" in name for name in names):
        return "is a LoRA, not a base model. Give it to `sdlora generate --lora`."
    if any("double_blocks" in name or "joint_blocks" in name for name in names):
        return "is a transformer model (such as Flux or SD 3). Supported: SD 1.x, SD 2.x and SDXL."
    if not names:
        return "is empty."
    return f"is no Stable Diffusion checkpoint: it holds {names[0]!r} and {len(names) - 1} more."


@torch.no_grad()
def probe_prediction_type(unet: UNet2DConditionModel) -> PredictionType:
    """What a U-Net predicts, by what it answers at the noisiest timestep: the noise itself if epsilon.

    There x_t is all but pure noise, and v = sqrt(a) * noise - sqrt(1 - a) * x_0 is all but free of it.
    """
    side = min(32, unet.config.sample_size)
    noise = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(0))
    embeds = torch.zeros(2, 77, unet.config.cross_attention_dim)
    weight = next(unet.parameters())
    answer = unet.to(torch.float32)(noise, 999, embeds).sample
    unet.to(weight.dtype)
    likeness = torch.nn.functional.cosine_similarity(answer.flatten(), noise.flatten(), dim=0).item()
    if not math.isfinite(likeness):
        raise ModelError("The U-Net answers with NaN or Inf. Is the checkpoint damaged?")
    return "epsilon" if likeness > 0.5 else "v_prediction"
