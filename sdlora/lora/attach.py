"""The LoRA in a base: put there by peft, started from our own seed, read back for the file, taken out again."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import torch
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sdlora.adapter_file import LoraPair, Part
from sdlora.lora.plan import AdapterPlan, LayerPlan, layer_name
from sdlora.randomness import counter_generator

__all__ = ["LiveAdapter", "lora_pairs", "trainable_parameters"]

_NAME = "lora"


class LiveAdapter:
    """Trainable fp32 pairs in the models of a base, whose own weights are frozen and never change.

    `down` [r, in] starts Kaiming-uniform (a = sqrt(5), i.e. uniform in +-1/sqrt(in)) from `seed` and the layer's name,
    `up` [out, r] at zero, so that the adapter starts without effect (arXiv 2106.09685, sec. 4.1). The global random
    generator is left as it was. With a file to go on from, its change is the start, to the bit; `down` is brought to
    the size of a new one by a power of two, so that a learning rate means the same.

    On a base of another format than fp32, forward passes are made under autocast.
    """

    def __init__(self, models: Mapping[Part, nn.Module], plan: AdapterPlan, *, dropout: float = 0.0, seed: int = 0):
        """
        Raises:
            ValueError: a model has a LoRA already; all are left as they were.
        """
        if any(isinstance(module, LoraLayer) for part in plan.layers for module in models[part].modules()):
            raise ValueError("the model has a LoRA already; detach it first")
        self._models = {part: models[part] for part in plan.layers}
        self.named: dict[str, nn.Parameter] = {}
        """What training changes, as `LAYER.down` and `LAYER.up`: names of ours, which no version of peft changes."""
        self.scales: dict[str, float] = {}
        """alpha / rank by layer."""
        for part, model in self._models.items():
            _inject(model, plan.layers[part], dropout)
            for path, layer in _lora_layers(model):
                name, planned = layer_name(part, path), plan.layers[part][path]
                # Autocast brings input and weights together; peft's cast of the input to fp32 before it changes no bit
                # of a product. Dropout and the lengths of DoRA compute with that input themselves.
                layer.cast_input_dtype_enabled = bool(dropout or planned.num_lengths)
                known = plan.start.part(part)[path] if plan.start is not None else None
                down, up = _start(planned, known, seed, name)
                _fill(layer, planned, down, up, known.dora_scale if known is not None else None)
                self.named[f"{name}.down"] = layer.lora_A[_NAME].weight
                self.named[f"{name}.up"] = layer.lora_B[_NAME].weight
                if planned.num_lengths:
                    self.named[f"{name}.lengths"] = layer.lora_magnitude_vector[_NAME].weight
                self.scales[name] = planned.alpha / planned.rank
        assert len(self.scales) == plan.num_layers
        assert sum(parameter.numel() for parameter in self.named.values()) == plan.num_parameters

    def downs(self, part: Part) -> list[nn.Module]:
        """The modules that hold the down factors of a part."""
        return [layer.lora_A[_NAME] for _, layer in _lora_layers(self._models[part])] if part in self._models else []

    def pairs(self) -> dict[Part, dict[str, LoraPair]]:
        """The weights by part and module path, fp32 on the CPU, copied."""
        return {part: lora_pairs(model) for part, model in self._models.items()}

    def train(self, mode: bool = True) -> None:
        """Puts the adapted models into training (dropout is on) or evaluation."""
        for model in self._models.values():
            model.train(mode)

    def detach(self) -> None:
        """Takes it out; the base's modules and tensors are the ones from before, still frozen."""
        for model in self._models.values():
            recurse_remove_peft_layers(model)
            del model.peft_config


def lora_pairs(model: nn.Module) -> dict[str, LoraPair]:
    """The weights of the LoRA in one model by module path, fp32 on the CPU, copied."""
    return {
        path: LoraPair(
            down=_copied(layer.lora_A[_NAME].weight),
            up=_copied(layer.lora_B[_NAME].weight),
            alpha=float(layer.lora_alpha[_NAME]),
            dora_scale=_lengths(layer),
        )
        for path, layer in _lora_layers(model)
    }


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes, always as a list: an iterator would be empty at its second use."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _inject(model: nn.Module, layers: Mapping[str, LayerPlan], dropout: float) -> None:
    """Adds the layers, with peft's own start, and freezes all else."""
    model.requires_grad_(False)
    by_rank: dict[int, list[str]] = {}
    for path, layer in layers.items():
        by_rank.setdefault(layer.rank, []).append(path)
    most, *others = sorted(by_rank, key=lambda rank: -len(by_rank[rank]))
    config = LoraConfig(
        r=most,
        # One pattern a rank: peft compares each module with each pattern.
        rank_pattern={f"^(?:{'|'.join(map(re.escape, by_rank[rank]))})": rank for rank in others},
        lora_dropout=dropout,
        use_dora=any(layer.num_lengths for layer in layers.values()),
        target_modules=list(layers),
    )
    with torch.random.fork_rng():
        inject_adapter_in_model(config, model, _NAME)
    assert {path: layer.r[_NAME] for path, layer in _lora_layers(model)} == {
        path: layer.rank for path, layer in layers.items()
    }


def _start(planned: LayerPlan, pair: LoraPair | None, seed: int, name: str) -> tuple[Tensor, Tensor | None]:
    """(down, up) fp32; up None for zeros."""
    fan_in = math.prod(planned.shape[1:])
    if pair is None:
        down = torch.empty(planned.rank, *planned.shape[1:])
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=counter_generator(seed, "lora-start", name))
        return down, None
    size = pair.down.float().square().mean().sqrt().item()
    shift = round(math.log2(1 / math.sqrt(3 * fan_in) / size)) if size else 0
    return pair.down.float() * 2.0**shift, pair.up.float() * 2.0**-shift


@torch.no_grad()
def _fill(layer: LoraLayer, planned: LayerPlan, down: Tensor, up: Tensor | None, lengths: Tensor | None) -> None:
    """Lengths that are not given stay the base's own, which peft has measured."""
    layer.lora_alpha[_NAME], layer.scaling[_NAME] = planned.alpha, planned.alpha / planned.rank
    # peft takes over the base's fp16, which a gradient scaler refuses and small updates vanish in.
    layer.lora_A[_NAME].to(torch.float32).weight.copy_(down)
    layer.lora_B[_NAME].to(torch.float32).weight.copy_(torch.zeros(()) if up is None else up)
    if planned.num_lengths:
        magnitude = layer.lora_magnitude_vector[_NAME].to(torch.float32).weight
        if lengths is not None:
            magnitude.copy_(lengths.float().view_as(magnitude))


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def _lengths(layer: LoraLayer) -> Tensor | None:
    """DoRA's, [out, 1]; peft keeps those of a convolution as [1, out, 1, 1]."""
    if _NAME not in layer.lora_magnitude_vector:
        return None
    return _copied(layer.lora_magnitude_vector[_NAME].weight).reshape(-1, 1)


def _copied(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True)
