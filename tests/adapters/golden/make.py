"""The golden files: adapters for the tiny pipelines in every dialect, and what each must make them predict.

    python -m tests.adapters.golden.make

The truth does not come from sdlora: each layer's change is worked out here by the formula of its kind, written into a
copy of the base, and the base itself is made anew from its seed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny import tiny_sd1, tiny_sd2, tiny_sdxl

from ..builders import predict

FOLDER = Path(__file__).parent
BLOCKS = ("down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.2")
ATTENTION = tuple(
    f"{block}.transformer_blocks.0.{layer}"
    for block in BLOCKS
    for layer in ("attn1.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
)
CONV = ("down_blocks.1.resnets.0.conv1", "down_blocks.1.resnets.0.conv_shortcut", "mid_block.resnets.0.conv2")
TEXT = tuple(f"text_model.encoder.layers.1.{layer}" for layer in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"))
XL = tuple(
    f"{block}.transformer_blocks.{n}.{layer}"
    for block, n in (
        ("down_blocks.1.attentions.0", 1),
        ("down_blocks.2.attentions.1", 9),
        ("up_blocks.0.attentions.2", 4),
    )
    for layer in ("attn2.to_k", "attn2.to_out.0", "ff.net.0.proj")
)
# Stability's numbers of those blocks, as published files have them.
XL_STABILITY = {
    "down_blocks_1_attentions_0": "input_blocks_4_1",
    "down_blocks_2_attentions_1": "input_blocks_8_1",
    "up_blocks_0_attentions_2": "output_blocks_2_1",
}

Deltas = dict[str, dict[str, Tensor]]
Tensors = dict[str, Tensor]


class Maker:
    """One golden file in the making: its tensors, and the change of every layer."""

    def __init__(self, pipeline: object, seed: int):
        self.pipeline = pipeline
        self.tensors: Tensors = {}
        self.deltas: Deltas = {}
        self._generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int, size: float = 0.4) -> Tensor:
        return torch.randn(*shape, generator=self._generator) * size

    def weight(self, part: str, path: str) -> Tensor:
        model = getattr(self.pipeline, part)
        # transformers 5 leaves "text_model." out of CLIPTextModel.
        own = path if part == "unet" or hasattr(model, "text_model") else path.removeprefix("text_model.")
        return model.get_submodule(own).weight.detach()

    def factors(self, part: str, path: str, rank: int = 2) -> tuple[Tensor, Tensor]:
        out, into, *kernel = self.weight(part, path).shape
        return self.random(rank, into, *kernel, size=1 / into**0.5), self.random(out, rank, *([1] * len(kernel)))

    def change(self, part: str, path: str, delta: Tensor) -> None:
        self.deltas.setdefault(part, {})[path] = delta.reshape(self.weight(part, path).shape)

    def pairs(self, part: str, paths: tuple[str, ...], name: Callable[[str], tuple[str, str]], scale: float) -> None:
        """Plain pairs under the names that `name` gives down and up, at the scale that the dialect will mean."""
        for path in paths:
            down, up = self.factors(part, path)
            names = name(path)
            self.tensors |= {names[0]: down, names[1]: up}
            self.change(part, path, scale * up.flatten(1) @ down.flatten(1))

    def output(self) -> Tensor:
        """[4, 8, 8]: what the pipeline with the changes in its weights predicts."""
        merged = copy.deepcopy(self.pipeline)
        for part, deltas in self.deltas.items():
            for path, delta in deltas.items():
                model = getattr(merged, part)
                own = path if part == "unet" or hasattr(model, "text_model") else path.removeprefix("text_model.")
                model.get_submodule(own).weight.data += delta
        return predict(merged)[0]


def flat(prefix: str) -> Callable[[str], tuple[str, str]]:
    return lambda path: (
        f"{prefix}{path.replace('.', '_')}.lora_down.weight",
        f"{prefix}{path.replace('.', '_')}.lora_up.weight",
    )


def dotted(prefix: str, down: str, up: str) -> Callable[[str], tuple[str, str]]:
    return lambda path: (f"{prefix}{path}.{down}.weight", f"{prefix}{path}.{up}.weight")


def processor(path: str) -> tuple[str, str]:
    parent, word = path.removesuffix(".0").rsplit(".", 1)
    return f"{parent}.processor.{word}_lora.down.weight", f"{parent}.processor.{word}_lora.up.weight"


def add_alpha(maker: Maker, value: float, dtype: torch.dtype = torch.float32) -> None:
    stems = [name.removesuffix(".lora_down.weight") for name in maker.tensors if name.endswith("lora_down.weight")]
    maker.tensors |= {f"{stem}.alpha": torch.tensor(value).to(dtype) for stem in stems}


def peft_header(**config: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}


def kohya(maker: Maker) -> None:
    maker.pairs("unet", (*ATTENTION, *CONV), flat("lora_unet_"), 0.5)
    add_alpha(maker, 1.0)


def kohya_without_alpha(maker: Maker) -> None:
    maker.pairs("unet", ATTENTION, flat("lora_unet_"), 1.0)


def kohya_integer_alpha(maker: Maker) -> None:
    maker.pairs("unet", ATTENTION, flat("lora_unet_"), 0.5)
    add_alpha(maker, 1, torch.int64)


def kohya_mixed_alphas(maker: Maker) -> None:
    maker.pairs("unet", ATTENTION[:4], flat("lora_unet_"), 0.5)
    add_alpha(maker, 1.0)
    other = Maker(maker.pipeline, 99)
    other.pairs("unet", ATTENTION[4:], flat("lora_unet_"), 2.0)
    add_alpha(other, 4.0)
    maker.tensors |= other.tensors
    maker.deltas["unet"] |= other.deltas["unet"]


def kohya_text_encoder(maker: Maker) -> None:
    maker.pairs("unet", ATTENTION[:4], flat("lora_unet_"), 0.5)
    maker.pairs("text_encoder", TEXT, flat("lora_te_"), 0.5)
    add_alpha(maker, 1.0)


def kohya_text_encoder_alone(maker: Maker) -> None:
    maker.pairs("text_encoder", TEXT, flat("lora_te_"), 0.5)
    add_alpha(maker, 1.0)


def peft_with_alpha(maker: Maker) -> dict[str, str]:
    maker.pairs("unet", ATTENTION, dotted("unet.", "lora_A", "lora_B"), 2.5)
    return peft_header(r=2, lora_alpha=5)


def peft_rslora(maker: Maker) -> dict[str, str]:
    maker.pairs("unet", ATTENTION, dotted("unet.", "lora_A", "lora_B"), 3 / 2**0.5)
    return peft_header(r=2, lora_alpha=3, use_rslora=True)


def peft_without_alpha(maker: Maker) -> None:
    maker.pairs("unet", ATTENTION, dotted("base_model.model.", "lora_A", "lora_B"), 1.0)


def old_diffusers(maker: Maker) -> None:
    maker.pairs("unet", ATTENTION, dotted("unet.", "lora.down", "lora.up"), 1.0)


def attention_processors(maker: Maker) -> None:
    maker.pairs("unet", ATTENTION, processor, 1.0)


def locon_with_middle(maker: Maker) -> None:
    for path in (CONV[0], CONV[2]):
        out, into, side, _ = maker.weight("unet", path).shape
        down, mid, up = maker.random(2, into, 1, 1), maker.random(2, 2, side, side), maker.random(out, 2, 1, 1)
        stem = f"lora_unet_{path.replace('.', '_')}"
        maker.tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_mid.weight": mid,
            f"{stem}.lora_up.weight": up,
        }
        composed = torch.einsum("om,mnkl,ni->oikl", up.flatten(1), mid, down.flatten(1))
        maker.change("unet", path, 0.5 * composed)
    add_alpha(maker, 1.0)


def loha(maker: Maker) -> None:
    for path in (*ATTENTION, CONV[0]):
        out, *rest = maker.weight("unet", path).shape
        into = torch.Size(rest).numel()
        a1, b1, a2, b2 = (maker.random(*shape, size=0.6) for shape in ((out, 2), (2, into), (out, 2), (2, into)))
        stem = f"lora_unet_{path.replace('.', '_')}"
        maker.tensors |= {f"{stem}.hada_w1_a": a1, f"{stem}.hada_w1_b": b1, f"{stem}.hada_w2_a": a2}
        maker.tensors |= {f"{stem}.hada_w2_b": b2, f"{stem}.alpha": torch.tensor(1.0)}
        maker.change("unet", path, 0.5 * (a1 @ b1) * (a2 @ b2))


def lokr(maker: Maker) -> None:
    for number, path in enumerate(ATTENTION):
        out, into = maker.weight("unet", path).shape
        w1, a2, b2 = maker.random(4, 4), maker.random(out // 4, 2), maker.random(2, into // 4)
        stem = f"lora_unet_{path.replace('.', '_')}"
        if number % 2:
            # Both halves whole: the alpha that is stored means nothing.
            maker.tensors |= {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": a2 @ b2, f"{stem}.alpha": torch.tensor(9e9)}
        else:
            maker.tensors |= {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2_a": a2, f"{stem}.lokr_w2_b": b2}
            maker.tensors |= {f"{stem}.alpha": torch.tensor(1.0)}
        maker.change("unet", path, (1.0 if number % 2 else 0.5) * torch.kron(w1, a2 @ b2))


def full_difference(maker: Maker) -> None:
    for path in (ATTENTION[1], CONV[1]):
        diff = maker.random(*maker.weight("unet", path).shape, size=0.05)
        maker.tensors[f"lora_unet_{path.replace('.', '_')}.diff"] = diff
        maker.change("unet", path, diff)


def dora(maker: Maker, axis: int) -> None:
    for path in (*ATTENTION, CONV[0]):
        base = maker.weight("unet", path)
        down, up = maker.factors("unet", path)
        turned = base + 0.5 * (up.flatten(1) @ down.flatten(1)).view(base.shape)
        others = [n for n in range(base.ndim) if n != axis]
        lengths = base.square().sum(dim=others, keepdim=True).sqrt() * (1 + maker.random(1, size=0.2).abs())
        stem = f"lora_unet_{path.replace('.', '_')}"
        maker.tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        maker.tensors |= {f"{stem}.dora_scale": lengths, f"{stem}.alpha": torch.tensor(1.0)}
        maker.change("unet", path, lengths * turned / turned.square().sum(dim=others, keepdim=True).sqrt() - base)


def dora_by_row(maker: Maker) -> None:
    dora(maker, 0)


def dora_by_column(maker: Maker) -> None:
    dora(maker, 1)


def xl_diffusers_names(maker: Maker) -> None:
    maker.pairs("unet", XL, flat("lora_unet_"), 0.5)
    maker.pairs("text_encoder", TEXT, flat("lora_te1_"), 0.5)
    maker.pairs("text_encoder_2", TEXT, flat("lora_te2_"), 0.5)
    add_alpha(maker, 1.0)


def xl_stability_names(maker: Maker) -> None:
    xl_diffusers_names(maker)
    for ours, theirs in XL_STABILITY.items():
        maker.tensors = {name.replace(ours, theirs): tensor for name, tensor in maker.tensors.items()}


MAKERS: Mapping[str, tuple[Callable[[], object], Callable[[Maker], dict[str, str] | None]]] = {
    "kohya": (tiny_sd1, kohya),
    "kohya_without_alpha": (tiny_sd1, kohya_without_alpha),
    "kohya_integer_alpha": (tiny_sd1, kohya_integer_alpha),
    "kohya_mixed_alphas": (tiny_sd1, kohya_mixed_alphas),
    "kohya_text_encoder": (tiny_sd1, kohya_text_encoder),
    "kohya_text_encoder_alone": (tiny_sd1, kohya_text_encoder_alone),
    "peft_with_alpha": (tiny_sd1, peft_with_alpha),
    "peft_rslora": (tiny_sd1, peft_rslora),
    "peft_without_alpha": (tiny_sd1, peft_without_alpha),
    "old_diffusers": (tiny_sd1, old_diffusers),
    "attention_processors": (tiny_sd1, attention_processors),
    "locon_with_middle": (tiny_sd1, locon_with_middle),
    "loha": (tiny_sd1, loha),
    "lokr": (tiny_sd1, lokr),
    "full_difference": (tiny_sd1, full_difference),
    "dora_by_row": (tiny_sd1, dora_by_row),
    "dora_by_column": (tiny_sd1, dora_by_column),
    "sd2_kohya": (tiny_sd2, kohya),
    "sd2_loha": (tiny_sd2, loha),
    "sd2_text_encoder": (tiny_sd2, kohya_text_encoder),
    "sdxl_diffusers_names": (tiny_sdxl, xl_diffusers_names),
    "sdxl_stability_names": (tiny_sdxl, xl_stability_names),
}


def main() -> None:
    expected = {}
    for seed, (name, (build, fill)) in enumerate(MAKERS.items()):
        maker = Maker(build(), seed)
        header = fill(maker)
        tensors = {key: tensor.contiguous().clone() for key, tensor in maker.tensors.items()}
        # The difference to the base is what is stored, so that a file without effect cannot pass.
        expected[name] = (maker.output() - predict(maker.pipeline)[0]).clone()
        save_file(tensors, FOLDER / f"{name}.safetensors", header)
    save_file(expected, FOLDER / "expected.safetensors")


if __name__ == "__main__":
    main()
