"""Any adapter, any dialect: `convert` there and back is the identity, and what a file does survives every dialect.

The truth is worked out from the pairs themselves, alpha / rank * up @ down in fp64; files of others are written by the
tests' own builders.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from sdlora.adapter_file import AdapterMetadata, AdapterWeights, LoraPair, read_adapter, write_adapter
from sdlora.lora_workflows import convert

from .builders import kohya_tensors, old_diffusers_tensors, peft_metadata, peft_tensors, save

DIALECTS = ("kohya", "peft", "diffusers")
DTYPES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
WIDTHS = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
PARTS = {"sd1": ("text_encoder",), "sd2": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
# (out, in, kernel); those that the families have in common, under names that differ in every dialect.
UNET = {
    f"{BLOCK}.attn1.to_q": (6, 6, 0),
    f"{BLOCK}.attn2.to_out.0": (6, 6, 0),
    f"{BLOCK}.ff.net.0.proj": (8, 6, 0),
    "up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_v": (5, 7, 0),
    "mid_block.attentions.0.proj_in": (6, 6, 1),
    "down_blocks.0.downsamplers.0.conv": (4, 4, 3),
    "up_blocks.1.resnets.2.conv_shortcut": (4, 8, 1),
    "up_blocks.0.upsamplers.0.conv": (4, 4, 3),
    "time_embedding.linear_1": (9, 5, 0),
    "conv_in": (5, 4, 3),
}
TEXT = {
    f"text_model.encoder.layers.{number}.{layer}": (6, 4, 0)
    for number in (0, 11)
    for layer in ("self_attn.k_proj", "self_attn.out_proj", "mlp.fc1")
}
ALPHAS = st.one_of(st.sampled_from((0.5, 1.0, 2.0, 3.0, 8.0)), st.floats(0.25, 16.0, width=32))

Parts = dict[str, dict[str, LoraPair]]


@st.composite
def pairs(draw: st.DrawFn, layer: tuple[int, int, int], *, rank: int | None = None) -> LoraPair:
    out, inner, kernel = layer
    rank = rank or draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    strength = 10 ** draw(st.floats(-3, 0))
    shape = ((kernel, kernel), (1, 1)) if kernel else ((), ())
    return LoraPair(
        down=torch.randn(rank, inner, *shape[0], generator=generator),
        up=torch.randn(out, rank, *shape[1], generator=generator) * strength,
        alpha=min(draw(ALPHAS), 16.0 * rank),
    )


@st.composite
def adapters(draw: st.DrawFn, family: str) -> Parts:
    """Some layers of the U-Net and the text encoders, each of its own rank and alpha."""
    width = WIDTHS[family]
    # By this layer tools know the family; its width is the only one that counts.
    unet = {f"{BLOCK}.attn2.to_k": (4, width, 0)} | {p: UNET[p] for p in draw(st.sets(st.sampled_from(sorted(UNET))))}
    parts = {"unet": {path: draw(pairs(layer)) for path, layer in unet.items()}}
    for part in PARTS[family]:
        chosen = draw(st.sets(st.sampled_from(sorted(TEXT)), max_size=4))
        parts[part] = {path: draw(pairs(TEXT[path])) for path in sorted(chosen)}
    return parts


def dense(pair: LoraPair) -> Tensor:
    return pair.alpha / pair.rank * pair.up.flatten(1).double() @ pair.down.flatten(1).double()


def assert_same(read: AdapterWeights, parts: Mapping[str, Mapping[str, LoraPair]], tolerance: float) -> None:
    for part in ("unet", "text_encoder", "text_encoder_2"):
        wanted = parts.get(part, {})
        assert read.part(part).keys() == wanted.keys()
        for path, pair in wanted.items():
            truth, found = dense(pair), dense(read.part(part)[path])
            assert read.part(part)[path].rank == pair.rank
            # Each entry is a sum over the rank, whose terms are rounded one by one.
            size = pair.alpha / pair.rank * pair.up.flatten(1).abs().double() @ pair.down.flatten(1).abs().double()
            assert ((found - truth).abs() <= tolerance * size + 1e-7 * size.max()).all(), f"{part}.{path}"


def write(path: Path, parts: Parts, family: str, dialect: str, dtype: torch.dtype = torch.float32) -> Path:
    metadata = AdapterMetadata(title="ink", base_model="some/base")
    text = {part: parts.get(part, {}) for part in ("text_encoder", "text_encoder_2")}
    return write_adapter(path, parts["unet"], family=family, metadata=metadata, dtype=dtype, dialect=dialect, **text)


def as_others_write(path: Path, parts: Parts, family: str, kind: str) -> Path:
    """The same adapter as another tool's file, with its own alphas; old diffusers has none, so that alpha is rank."""
    tensors: dict[str, Tensor] = {}
    configs: dict[str, object] = {}
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if family == "sdxl" else "lora_te_"}
    prefixes["text_encoder_2"] = "lora_te2_"
    for part, found in parts.items():
        match kind:
            case "kohya":
                tensors |= kohya_tensors(found, prefixes[part])
            case "peft":
                tensors |= peft_tensors(found, f"{part}.")
                configs |= json.loads(peft_metadata(found, part)["lora_adapter_metadata"]) if found else {}
            case "diffusers":
                tensors |= old_diffusers_tensors(found, f"{part}.")
    return save(path, tensors, {"lora_adapter_metadata": json.dumps(configs)} if configs else None)


def silently(source: Path, target: Path, dialect: str, dtype: torch.dtype = torch.float32) -> AdapterWeights:
    """`sdlora lora convert`, which says nothing of a file without strangers."""
    convert(source, target, dialect=dialect, dtype=dtype, say=lambda message: pytest.fail(message))
    return read_adapter(target)


def there_and_back(parts: Parts, family: str) -> None:
    """From every dialect to every other and back: the same numbers, and alphas that are exactly what they were."""
    with tempfile.TemporaryDirectory() as folder:
        for start, other in itertools.permutations(DIALECTS, 2):
            place = Path(folder) / f"{start}-{other}"
            place.mkdir()
            first = read_adapter(write(place / "first.safetensors", parts, family, start))
            there = silently(place / "first.safetensors", place / "there.safetensors", other)
            back = silently(place / "there.safetensors", place / "back.safetensors", start)
            for adapter in (first, there, back):
                assert_same(adapter, parts, DTYPES[torch.float32])
            one_rank = len({pair.rank for found in parts.values() for pair in found.values()}) == 1
            for part, path, pair in first.pairs():
                again = back.part(part)[path]
                assert (again.alpha, again.rank) == (pair.alpha, pair.rank)
                if one_rank:
                    assert torch.equal(again.down, pair.down) and torch.equal(again.up, pair.up)
            # Ranks that differ have one alpha for all, by which numbers are multiplied and divided again.
            assert not one_rank or back.tensor_sha256 == first.tensor_sha256


def survives(parts: Parts, family: str, kind: str, dtype: torch.dtype) -> None:
    """A file of another tool, converted into every dialect: what it does to each layer stays."""
    if kind == "diffusers":
        parts = {n: {p: LoraPair(x.down, x.up, float(x.rank)) for p, x in found.items()} for n, found in parts.items()}
    if kind == "peft":
        # One rank and a pattern of alphas is what the header of a part can say.
        parts = {n: {p: x for p, x in f.items() if x.rank == next(iter(f.values())).rank} for n, f in parts.items()}
    with tempfile.TemporaryDirectory() as folder:
        source = as_others_write(Path(folder) / "source.safetensors", parts, family, kind)
        assert_same(read_adapter(source), parts, 1e-12)
        for dialect in DIALECTS:
            target = Path(folder) / f"{dialect}.safetensors"
            assert_same(silently(source, target, dialect, dtype), parts, DTYPES[dtype])
            if dialect == "kohya":
                # The tools that default, ignore or misread alpha see one number everywhere.
                assert len({t.item() for name, t in load_file(target).items() if name.endswith(".alpha")}) == 1


few = settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
many = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
families = pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])


@families
@few
@given(data=st.data())
def test_there_and_back_is_the_identity(family: str, data: st.DataObject) -> None:
    there_and_back(data.draw(adapters(family)), family)


@pytest.mark.slow
@families
@many
@given(data=st.data())
def test_there_and_back_is_the_identity_of_many(family: str, data: st.DataObject) -> None:
    there_and_back(data.draw(adapters(family)), family)


@families
@few
@given(data=st.data(), rank=st.integers(1, 5))
def test_there_and_back_keeps_every_bit_where_all_ranks_are_one(family: str, data: st.DataObject, rank: int) -> None:
    layers = {"unet": {f"{BLOCK}.attn2.to_k": (4, WIDTHS[family], 0), **UNET}, **dict.fromkeys(PARTS[family], TEXT)}
    parts = {
        part: {path: data.draw(pairs(layer, rank=rank)) for path, layer in found.items()}
        for part, found in layers.items()
    }
    there_and_back(parts, family)


@families
@few
@given(data=st.data(), kind=st.sampled_from(DIALECTS), dtype=st.sampled_from(list(DTYPES)))
def test_what_a_file_does_survives_every_dialect(family: str, data: st.DataObject, kind: str, dtype) -> None:
    survives(data.draw(adapters(family)), family, kind, dtype)


@pytest.mark.slow
@families
@many
@given(data=st.data(), kind=st.sampled_from(DIALECTS), dtype=st.sampled_from(list(DTYPES)))
def test_what_a_file_does_survives_every_dialect_of_many(family: str, data: st.DataObject, kind: str, dtype) -> None:
    survives(data.draw(adapters(family)), family, kind, dtype)
