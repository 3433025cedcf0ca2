"""Random adapters for the tiny pipelines, their files in every dialect, and the truth: weights merged by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdlora.adapter_file import AdapterMetadata, LoraPair, write_adapter

METADATA = AdapterMetadata(title="ink", base_model="some/base")
ATTENTION2 = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
TEXT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


def layers_of(model: nn.Module, targets: tuple[str, ...] | None = ATTENTION2) -> dict[str, nn.Module]:
    """The Linear and Conv2d layers by path whose path ends in one of the targets; None for all of them."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and (targets is None or path.endswith(targets))
    }


def random_pairs(
    model: nn.Module,
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float | Callable[[str], float] = 2.0,
    targets: tuple[str, ...] | None = ATTENTION2,
    strength: float = 0.5,
) -> dict[str, LoraPair]:
    """Pairs whose change of a layer is about `strength` as large as the layer itself."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for path, layer in layers_of(model, targets).items():
        out_dim, in_dim, *kernel = layer.weight.shape
        down = torch.randn(rank, in_dim, *kernel, generator=generator) / (in_dim * max(1, *kernel, 1)) ** 0.5
        up = torch.randn(out_dim, rank, *([1] * len(kernel)), generator=generator) * strength / rank**0.5
        pairs[path] = LoraPair(down=down, up=up, alpha=alpha(path) if callable(alpha) else alpha)
    return pairs


def write(path: Path, pairs: Mapping[str, LoraPair], *, family: str = "sd1", **options: object) -> Path:
    """Our own file, in fp32 so that comparisons are exact."""
    return write_adapter(path, pairs, family=family, **{"dtype": torch.float32, "metadata": METADATA, **options})


def hand_merged(pipeline: object, *changes: tuple[str, Mapping[str, LoraPair], float]) -> object:
    """A deep copy of the pipeline with base + weight * alpha / rank * up @ down written into its layers."""
    merged = copy.deepcopy(pipeline)
    with torch.no_grad():
        for part, pairs, weight in changes:
            modules = dict(getattr(merged, part).named_modules())
            for path, pair in pairs.items():
                layer = modules[path]
                delta = torch.einsum("or,ri->oi", pair.up.flatten(1).double(), pair.down.flatten(1).double())
                delta = delta * (weight * pair.alpha / pair.down.shape[0])
                layer.weight.copy_((layer.weight.double() + delta.view_as(layer.weight)).to(layer.weight.dtype))
    return merged


def draw(pipeline: object) -> Tensor:
    """Latents of two guided steps, which depend on the U-Net and on the text encoders. [1, 4, 8, 8]"""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a fox",
        num_inference_steps=2,
        guidance_scale=3.0,
        height=64,
        width=64,
        output_type="latent",
        generator=torch.Generator().manual_seed(7),
    ).images


@torch.no_grad()
def predict(pipeline: object) -> Tensor:
    """The noise predicted for a fixed sample and the prompt "a fox", by text encoders and U-Net. [1, 4, 8, 8]

    A quarter of the cost of drawing, and nothing of an adapter's way into the picture is left out.
    """
    embeds, _, *pooled = pipeline.encode_prompt(
        "a fox", device="cpu", do_classifier_free_guidance=False, num_images_per_prompt=1
    )
    conditions = None
    if pooled:
        time_ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]], dtype=embeds.dtype)
        conditions = {"text_embeds": pooled[0], "time_ids": time_ids}
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7)).to(embeds.dtype)
    return pipeline.unet(sample, 500, embeds, added_cond_kwargs=conditions).sample


def difference(left: Tensor, right: Tensor) -> float:
    return (left.float() - right.float()).abs().max().item()


def kohya_tensors(pairs: Mapping[str, LoraPair], prefix: str = "lora_unet_") -> dict[str, Tensor]:
    tensors = {}
    for path, pair in pairs.items():
        key = prefix + path.replace(".", "_")
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = pair.down, pair.up
        tensors[f"{key}.alpha"] = torch.tensor(pair.alpha)
    return tensors


def peft_tensors(pairs: Mapping[str, LoraPair], prefix: str = "unet.") -> dict[str, Tensor]:
    return {
        f"{prefix}{path}.lora_{letter}.weight": factor
        for path, pair in pairs.items()
        for letter, factor in (("A", pair.down), ("B", pair.up))
    }


def peft_metadata(pairs: Mapping[str, LoraPair], part: str = "unet") -> dict[str, str]:
    """The header entry that diffusers writes for PEFT; alphas other than the first go to the pattern."""
    first = next(iter(pairs.values()))
    config = {
        f"{part}.r": first.rank,
        f"{part}.lora_alpha": first.alpha,
        f"{part}.alpha_pattern": {path: pair.alpha for path, pair in pairs.items() if pair.alpha != first.alpha},
        f"{part}.target_modules": list(pairs),
    }
    return {"format": "pt", "lora_adapter_metadata": json.dumps(config)}


def old_diffusers_tensors(pairs: Mapping[str, LoraPair], prefix: str = "unet.") -> dict[str, Tensor]:
    return {
        f"{prefix}{path}.lora.{word}.weight": factor
        for path, pair in pairs.items()
        for word, factor in (("down", pair.down), ("up", pair.up))
    }


def attention_processor_tensors(pairs: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """ "…attn2.to_out.0" was "…attn2.processor.to_out_lora" once."""
    tensors = {}
    for path, pair in pairs.items():
        parent, word = path.removesuffix(".0").rsplit(".", 1)
        tensors[f"{parent}.processor.{word}_lora.down.weight"] = pair.down
        tensors[f"{parent}.processor.{word}_lora.up.weight"] = pair.up
    return tensors


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    return path


def simple_pairs(*, rank: int = 4, alpha: float = 2.0, width: int = 32) -> dict[str, LoraPair]:
    """Two layers of SD 1.x without a model, for tests of files alone."""
    generator = torch.Generator().manual_seed(rank)
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    return {
        f"{block}.{name}": LoraPair(
            down=torch.randn(rank, in_dim, generator=generator) / 8,
            up=torch.randn(32, rank, generator=generator) / 8,
            alpha=alpha,
        )
        for name, in_dim in (("to_q", 32), ("to_k", width))
    }
