"""LyCORIS' kinds of adapters, written by LyCORIS itself and read by us: the same change comes out."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from lycoris.functional.general import weight_decompose
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from sdlora.adapter_file import LoraPair, outline_adapter, read_adapter, resolve_layers, write_adapter
from sdlora.adapter_tools import merge_adapters
from sdlora.errors import AdapterError, AdapterFileError
from sdlora.stack import AdapterStack

from .builders import METADATA, kohya_tensors, save, simple_pairs

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
NARROW = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
CONV = "down_blocks.0.resnets.0.conv1"
ONE = "down_blocks.0.attentions.0.proj_in"


def layer_for(path: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if path == CONV:
            return nn.Conv2d(24, 32, 3, padding=1)
        if path == ONE:
            return nn.Conv2d(32, 48, 1)
        return nn.Linear(96, 32) if path == NARROW else nn.Linear(32, 48)


def model_of(**layers: nn.Module) -> nn.Module:
    """A module whose layers lie at the given paths (with underscores)."""
    root = nn.Module()
    for flat, layer in layers.items():
        parts = [LINEAR, NARROW, CONV, ONE][["linear", "narrow", "conv", "one"].index(flat)].split(".")
        place = root
        for part in parts[:-1]:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(parts[-1], layer)
    return root


def written_by_lycoris(folder: Path, path: str, make, seed: int = 0) -> tuple[Path, nn.Module, nn.Module]:
    """(file, LyCORIS' module, the layer it belongs to), all its numbers random."""
    layer = layer_for(path)
    flat = f"lora_unet_{path.replace('.', '_')}"
    module = make(flat, layer)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.startswith("org_"):
            continue
        noise = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data = parameter.data * (1 + noise.abs()) if name == "dora_scale" else noise
    tensors = {f"{flat}.{key}": value.detach().float() for key, value in module.custom_state_dict().items()}
    return save(folder / "lycoris.safetensors", tensors), module, layer


def effective(file: Path, path: str, layer: nn.Module) -> torch.Tensor:
    names = {LINEAR: "linear", NARROW: "narrow", CONV: "conv", ONE: "one"}
    layers = {name: layer if place == path else layer_for(place) for place, name in names.items()}
    found = resolve_layers(read_adapter(file), {"unet": model_of(**layers)}, cross_attention_dim=32)
    pair = found[layer]
    return (pair.scale * pair.up.flatten(1).double() @ pair.down.flatten(1).double()).view(layer.weight.shape)


KINDS = {
    "loha": functools.partial(LohaModule, lora_dim=3, alpha=2),
    "loha of large rank": functools.partial(LohaModule, lora_dim=9, alpha=2),
    "loha tucker": functools.partial(LohaModule, lora_dim=3, alpha=2, use_tucker=True),
    "lokr": functools.partial(LokrModule, lora_dim=2, alpha=1),
    "lokr both": functools.partial(LokrModule, lora_dim=1, alpha=0.5, decompose_both=True),
    "lokr tucker": functools.partial(LokrModule, lora_dim=2, alpha=1, use_tucker=True),
    "lokr whole": functools.partial(LokrModule, lora_dim=100_000, alpha=1, full_matrix=True),
    "locon": functools.partial(LoConModule, lora_dim=4, alpha=2),
    "locon tucker": functools.partial(LoConModule, lora_dim=4, alpha=2, use_tucker=True),
    "dora": functools.partial(LoConModule, lora_dim=4, alpha=2, weight_decompose=True),
    "dora by column": functools.partial(LoConModule, lora_dim=4, alpha=2, weight_decompose=True, wd_on_out=False),
    "dora on loha": functools.partial(LohaModule, lora_dim=3, alpha=2, weight_decompose=True),
    "dora on lokr": functools.partial(LokrModule, lora_dim=2, alpha=1, weight_decompose=True),
}


@pytest.mark.parametrize("path", [LINEAR, NARROW, CONV, ONE])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_lycoris_changes_the_layer_as_lycoris_does(tmp_path: Path, kind: str, path: str) -> None:
    """By its forward, as in training: merging of its version 4.1.3 applies alpha / rank of LoHa and LoKr twice."""
    file, module, layer = written_by_lycoris(tmp_path, path, KINDS[kind])
    shape = (24, 5, 5) if path == CONV else (32, 5, 5) if path == ONE else (layer.in_features,)
    inputs = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before, expected = layer(inputs), module.eval()(inputs)
        layer.weight += effective(file, path, layer)
        assert torch.allclose(layer(inputs), expected, atol=1e-4)
    assert float((expected - before).abs().max()) > 0.01


@pytest.mark.parametrize("path", [LINEAR, CONV])
def test_a_full_difference_is_read(tmp_path: Path, path: str) -> None:
    layer = layer_for(path)
    module = FullModule("lora_unet_x", nn.Linear(4, 4, bias=False))
    assert set(module.custom_state_dict()) == {"diff"}
    diff = torch.randn(layer.weight.shape)
    file = save(tmp_path / "a.safetensors", {f"lora_unet_{path.replace('.', '_')}.diff": diff})
    assert torch.allclose(effective(file, path, layer), diff.double(), atol=1e-6)
    assert outline_adapter(file).methods == ("full difference",)


def test_a_rank_below_the_square_of_lohas_stays_low(tmp_path: Path) -> None:
    file, _, _ = written_by_lycoris(tmp_path, LINEAR, KINDS["loha"])
    assert read_adapter(file).unet[LINEAR].rank == 9
    file, _, _ = written_by_lycoris(tmp_path, LINEAR, KINDS["loha of large rank"])
    assert read_adapter(file).unet[LINEAR].rank == 32
    assert outline_adapter(file).methods == ("LoHa",)


def test_dora_of_peft_changes_the_layer_as_peft_does(tmp_path: Path) -> None:
    layer, conv = layer_for(LINEAR), layer_for(CONV)
    model = model_of(linear=layer, conv=conv)
    before = [layer.weight.detach().clone(), conv.weight.detach().clone()]
    config = LoraConfig(r=4, lora_alpha=2, use_dora=True, target_modules=[LINEAR, CONV], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    state = get_peft_model_state_dict(model)
    state = {k: v * 1.3 if "magnitude" in k else v for k, v in state.items()}
    for module in (m for m in model.modules() if hasattr(m, "lora_magnitude_vector")):
        for vector in module.lora_magnitude_vector.values():
            vector.weight.data *= 1.3
    wrapped = [model.get_submodule(LINEAR), model.get_submodule(CONV)]
    for module in wrapped:
        module.merge()
    expected = [module.get_base_layer().weight.detach() - old for module, old in zip(wrapped, before, strict=True)]
    header = {"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 2, "unet.use_dora": true}'}
    file = save(tmp_path / "peft.safetensors", {f"unet.{name}": value for name, value in state.items()}, header)
    assert outline_adapter(file).methods == ("LoRA", "DoRA")
    for path, change in zip((LINEAR, CONV), expected, strict=True):
        fresh = layer_for(path)
        assert float(change.abs().max()) > 0.05
        assert torch.allclose(effective(file, path, fresh), change.double(), atol=2e-5)


@pytest.mark.parametrize("dialect", ["kohya", "peft"])
def test_dora_survives_writing_and_reading(tmp_path: Path, dialect: str) -> None:
    pairs = {
        LINEAR: LoraPair(torch.randn(4, 32), torch.randn(48, 4), 2.0, torch.rand(48, 1) + 0.5),
        CONV: LoraPair(torch.randn(4, 24, 3, 3), torch.randn(32, 4, 1, 1), 2.0, torch.rand(32, 1) + 0.5),
    }
    file = write_adapter(
        tmp_path / "a.safetensors", pairs, family="sd1", metadata=METADATA, dtype=torch.float32, dialect=dialect
    )
    read = read_adapter(file)
    assert read.metadata["ss_network_module"] == "lycoris.kohya"
    for path, pair in pairs.items():
        base = layer_for(path).weight.detach()
        change = (pair.scale * pair.up.flatten(1) @ pair.down.flatten(1)).view(base.shape)
        scale = pair.dora_scale.view(-1, *[1] * (base.ndim - 1))
        expected = weight_decompose(base + change, scale) - base
        assert torch.equal(read.unet[path].dora_scale, pair.dora_scale)
        assert torch.allclose(effective(file, path, layer_for(path)), expected.double(), atol=2e-5)


def test_dora_is_not_written_where_no_reader_could_tell(tmp_path: Path) -> None:
    by_column = {LINEAR: LoraPair(torch.randn(4, 32), torch.randn(48, 4), 2.0, torch.rand(1, 32) + 0.5)}
    for dialect in ("peft", "diffusers"):
        with pytest.raises(AdapterFileError, match=f"cannot be said in the {dialect} dialect"):
            write_adapter(tmp_path / "a.safetensors", by_column, family="sd1", metadata=METADATA, dialect=dialect)
    assert list(tmp_path.iterdir()) == []


def test_dora_is_stacked_at_weights_and_taken_out_again(tmp_path: Path, sd1) -> None:
    layer = sd1.unet.get_submodule(LINEAR)
    base = layer.weight.detach().clone()
    pair = LoraPair(torch.randn(2, base.shape[1]), torch.randn(base.shape[0], 2), 2.0, base.norm(dim=1)[:, None] * 1.2)
    file = write_adapter(
        tmp_path / "a.safetensors", {LINEAR: pair}, family="sd1", metadata=METADATA, dtype=torch.float32
    )
    stack = AdapterStack(sd1)
    checksum = stack.base_checksum()
    stack.load(file, "a")
    stack.set_adapters("a", 0.5)
    whole = weight_decompose(base + pair.up @ pair.down, pair.dora_scale)
    with stack.merged():
        assert torch.allclose(layer.weight, base + 0.5 * (whole - base), atol=1e-4)
    assert stack.base_checksum() == checksum


def test_a_dora_does_not_merge_without_its_base(tmp_path: Path) -> None:
    file, _, _ = written_by_lycoris(tmp_path, LINEAR, KINDS["dora"])
    with pytest.raises(AdapterError, match=r"is a DoRA, whose change depends on its base\. Put it into the base"):
        merge_adapters([(read_adapter(file), 1.0)])


def test_dora_on_a_base_without_weights_is_refused(tmp_path: Path) -> None:
    file, _, _ = written_by_lycoris(tmp_path, LINEAR, KINDS["dora"])
    layer = nn.Linear(32, 48, device="meta")
    with pytest.raises(AdapterFileError, match="needs the base's own weights"):
        effective(file, LINEAR, layer)


FLAT = f"lora_unet_{LINEAR.replace('.', '_')}"
ONES = torch.ones


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"hada_w1_a": ONES(8, 2), "hada_w1_b": ONES(2, 8), "hada_w2_a": ONES(9, 2), "hada_w2_b": ONES(2, 8)}, "fit"),
        ({"hada_w1_a": ONES(8, 2), "hada_w1_b": ONES(3, 8), "hada_w2_a": ONES(8, 2), "hada_w2_b": ONES(2, 8)}, "fit"),
        ({"lokr_w1": ONES(8, 8), "lokr_w2_a": ONES(8, 2), "lokr_w2_b": ONES(3, 8)}, "fit"),
        ({"lokr_w1": ONES(8, 8), "lokr_w1_a": ONES(8, 2), "lokr_w2": ONES(3, 8)}, "incomplete"),
        ({"lokr_w1": ONES(8, 8), "lokr_w2": ONES(3, 8), "lokr_t2": ONES(2, 2, 3, 3)}, "incomplete"),
        ({"lora_down.weight": ONES(4, 8), "lora_up.weight": ONES(8, 4), "lora_mid.weight": ONES(4, 4, 3, 3)}, "fit"),
        ({"lora_down.weight": ONES(4, 8), "lora_up.weight": ONES(8, 4), "hada_w1_a": ONES(8, 2)}, "incomplete"),
        # A few kilobytes that would become a matrix of gigabytes.
        ({"lokr_w1": ONES(256, 256), "lokr_w2": ONES(256, 256)}, "fit"),
        ({"diff": ONES(4)}, "fit"),
    ],
)
def test_tensors_that_make_no_layer_are_refused_before_they_are_read(tmp_path, monkeypatch, tensors, match) -> None:
    file = save(tmp_path / "a.safetensors", {f"{FLAT}.{role}": tensor for role, tensor in tensors.items()})
    monkeypatch.setattr("safetensors.torch.load", lambda content: pytest.fail("loaded"))
    with pytest.raises(AdapterFileError, match=match):
        read_adapter(file)


def test_one_file_may_mix_kinds(tmp_path: Path) -> None:
    tensors = {
        **kohya_tensors(simple_pairs()),
        f"lora_unet_{CONV.replace('.', '_')}.diff": torch.ones(4, 4, 3, 3),
        "lycoris_mid_block_attentions_0_proj_in.lokr_w1": torch.ones(2, 2),
        "lycoris_mid_block_attentions_0_proj_in.lokr_w2": torch.ones(3, 3),
    }
    file = save(tmp_path / "a.safetensors", tensors)
    assert outline_adapter(file).methods == ("LoKr", "LoRA", "full difference")
    assert read_adapter(file).unet["mid_block.attentions.0.proj_in"].up.shape[0] == 6
