"""Preparing through the cache: nothing is encoded twice, nothing stale is taken, and the adapter is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdlora.adapter_file import read_adapter
from sdlora.cache import DiskCache
from sdlora.data.dataset import scan_dataset
from sdlora.errors import ConfigError, DatasetError, NonFiniteError
from sdlora.families import components_from_pipeline
from sdlora.prepare import TrainingSet, prepare_training_set
from sdlora.training import train_adapter
from tests.tiny import tiny_sd1, tiny_sdxl
from tests.training.helpers import make_config, write_pictures


def prepared(folder: Path, cache: DiskCache | None, pipeline: Any = None, **options: Any) -> TrainingSet:
    components = components_from_pipeline(pipeline or tiny_sd1())
    return prepare_training_set(components, scan_dataset(folder).examples, cache=cache, **options)


def counted(folder: Path, root: Path, pipeline: Any = None, **options: Any) -> tuple[int, int]:
    """Pictures and captions that had to be made."""
    cache = DiskCache(root)
    before = {kind: len(list(root.glob(f"{kind}/??/*"))) for kind in ("latents", "captions")}
    prepared(folder, cache, pipeline, **options)
    after = {kind: len(list(root.glob(f"{kind}/??/*"))) for kind in ("latents", "captions")}
    return after["latents"] - before["latents"], after["captions"] - before["captions"]


def same(one: TrainingSet, other: TrainingSet) -> bool:
    tensors = [
        [t for e in s.examples for v in (*e.views, *e.mirrored_views) for t in (v.latents.mean, v.latents.std)]
        + [s.captions.encoder_hidden_states]
        + ([s.captions.pooled_prompt_embeds] if s.captions.pooled_prompt_embeds is not None else [])
        for s in (one, other)
    ]
    return len(tensors[0]) == len(tensors[1]) and all(map(torch.equal, *tensors))


@pytest.mark.parametrize("build", [tiny_sd1, tiny_sdxl])
def test_empty_partly_filled_and_full_caches_give_the_same_bits(tmp_path: Path, build: Any) -> None:
    folder = write_pictures(tmp_path / "data")
    one = write_pictures(tmp_path / "one", count=1)
    plain = prepared(folder, None, build(), flip=True)
    prepared(one, DiskCache(tmp_path / "cache"), build())
    partly, full = (prepared(folder, DiskCache(tmp_path / "cache"), build(), flip=True) for _ in range(2))
    assert same(plain, partly) and same(plain, full)


def test_only_what_changed_is_encoded_again(tmp_path: Path) -> None:
    folder, root = write_pictures(tmp_path / "data"), tmp_path / "cache"
    assert counted(folder, root) == (3, 3)
    assert counted(folder, root) == (0, 0)
    (folder / "0.png").rename(folder / "moved.png")
    (folder / "0.txt").rename(folder / "moved.txt")
    assert counted(folder, root) == (0, 0)
    Image.new("RGB", (64, 64), (9, 9, 9)).save(folder / "1.png")
    assert counted(folder, root) == (1, 0)
    (folder / "2.txt").write_text("another thing", encoding="utf-8")
    assert counted(folder, root) == (0, 1)


def test_whatever_latents_depend_on_is_in_their_name(tmp_path: Path) -> None:
    folder, root = write_pictures(tmp_path / "data", count=1), tmp_path / "cache"
    assert counted(folder, root) == (1, 1)
    assert counted(folder, root, background=(0, 0, 0)) == (1, 0)
    assert counted(folder, root, resolution=128) == (1, 0)
    assert counted(folder, root, flip=True) == (1, 0)
    other = tiny_sd1()
    with torch.no_grad():
        other.vae.encoder.conv_in.weight.add_(1e-3)
    assert counted(folder, root, other) == (1, 0)
    other.text_encoder.to(torch.bfloat16)
    assert counted(folder, root, other) == (0, 1)


def test_a_half_precision_vae_that_overflows_gives_the_same_from_the_cache(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "data", count=2)
    Image.new("RGB", (64, 64), (255, 255, 255)).save(folder / "0.png")
    Image.new("RGB", (64, 64), (0, 0, 0)).save(folder / "1.png")

    def loud() -> Any:
        """A VAE whose first layer gives 0 for black and 1e5, too much for fp16, for white."""
        pipeline = tiny_sd1()
        with torch.no_grad():
            pipeline.vae.encoder.conv_in.weight.zero_()[:, :, 1, 1] = 5e4 / 3
            pipeline.vae.encoder.conv_in.bias.fill_(5e4)
        pipeline.vae.to(torch.float16)
        return pipeline

    plain = prepared(folder, None, loud())
    first, second = loud(), loud()
    fresh = prepared(folder, DiskCache(tmp_path / "cache"), first)
    assert first.vae.dtype == torch.float32  # for the previews
    Image.new("RGB", (64, 64), (0, 0, 1)).save(folder / "1.png")
    prepared(folder, DiskCache(tmp_path / "cache"), second)
    assert second.vae.dtype == torch.float32
    assert same(plain, fresh)
    Image.new("RGB", (64, 64), (0, 0, 0)).save(folder / "1.png")
    assert same(plain, prepared(folder, DiskCache(tmp_path / "cache"), loud()))


def test_what_is_not_finite_is_named_and_never_kept(tmp_path: Path) -> None:
    folder, broken = write_pictures(tmp_path / "data", count=1), tiny_sd1()
    with torch.no_grad():
        broken.vae.quant_conv.bias.fill_(float("nan"))
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"0\.png"):
            prepared(folder, DiskCache(tmp_path / "cache"), broken)
    assert not list((tmp_path / "cache").glob("latents/*/*"))


def test_a_picture_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pictures(tmp_path / "data", count=1)

    def edited_meanwhile(example: Any, *args: Any, **options: Any) -> Any:
        Image.new("RGB", (64, 64), (1, 2, 3)).save(example.path)
        return load_pixels(example, *args, **options)

    from sdlora.prepare import load_pixels

    monkeypatch.setattr("sdlora.prepare.load_pixels", edited_meanwhile)
    with pytest.raises(DatasetError, match=r"0\.png: changed while it was read"):
        prepared(folder, DiskCache(tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("latents/*/*"))


def test_a_run_with_the_cache_is_the_run_without(tmp_path: Path) -> None:
    components = components_from_pipeline(tiny_sd1())
    data = write_pictures(tmp_path / "data", count=2)

    def trained(name: str, **settings: Any) -> tuple[str, list[str]]:
        config = make_config(
            model={"precision": "fp32"},
            data={"path": data, "trigger": "ink style", "flip": True, "cache_dir": tmp_path / "cache", **settings},
            output={"dir": tmp_path / name, "name": "ink"},
        )
        said: list[str] = []
        path = train_adapter(config, components=components, say=said.append)
        return read_adapter(path).tensor_sha256, said

    without, _ = trained("without", cache=False)
    assert not (tmp_path / "cache").exists()
    filled, said = trained("first")
    assert filled == without and not any("damaged" in line for line in said)
    entry = next((tmp_path / "cache").rglob("latents/*/*"))
    entry.write_bytes(entry.read_bytes()[:-8])
    repaired, said = trained("second")
    assert repaired == without
    assert sum("1 entry of the cache" in line and "damaged" in line for line in said) == 1
    with pytest.raises(ConfigError, match=r"data\.cache_dir: the cache .* lies inside the dataset folder"):
        trained("inside", cache_dir=data / "cache")
    assert sorted(path.name for path in data.iterdir()) == sorted(f"{n}.{s}" for n in range(2) for s in ("png", "txt"))
