"""Too little memory, wherever it happens: the state is saved, and the message says what to change, in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora.adapter_file import read_adapter
from sdlora.config import TrainConfig
from sdlora.errors import MemoryShortError
from sdlora.generation import Generator
from sdlora.trainer import Trainer
from sdlora.training import resume_run, train_adapter
from tests.training.helpers import make_config, write_pictures


def config_for(tmp_path: Path, base: Path, **sections: Any) -> TrainConfig:
    if not (tmp_path / "data").exists():
        write_pictures(tmp_path / "data", count=4)
    return make_config(
        model={"base": str(base), "precision": "fp32"},
        data={"path": tmp_path / "data", "trigger": "ink style"},
        output={"dir": sections.pop("out", tmp_path), "name": "ink"},
        train={"exposures": 3, "batch_size": 4, "save_every": 1},
        **sections,
    )


def fail(*_: object, **__: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_in_training_the_state_is_kept_and_a_smaller_batch_goes_on_with_the_same_run(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_adapter(config_for(tmp_path, base, out=tmp_path / "whole"))
    config = config_for(tmp_path, base)
    with monkeypatch.context() as patched:
        real = Trainer._losses

        def small_gpu(self: Trainer, batch: Any, **options: Any) -> Any:
            return fail() if self.state.step == 1 else real(self, batch, **options)

        patched.setattr(Trainer, "_losses", small_gpu)
        with pytest.raises(MemoryShortError) as caught:
            train_adapter(config)
    root = tmp_path / "ink"
    first, advice, *lines = str(caught.value).splitlines()
    assert first == "Out of memory while training."
    assert advice == f"Go on with: sdlora resume {root} and one of these, the cheapest first:"
    assert lines[0].startswith("  --set train.batch_size=2 --set train.gradient_accumulation=2  (the same adapter")
    assert lines[1].startswith("  --set model.gradient_checkpointing=true")
    assert any("after step 1 is saved" in note for note in caught.value.__notes__)
    # The advice works, and changes nothing but roundings.
    path = resume_run(root, overrides=["train.batch_size=2", "train.gradient_accumulation=2"])
    for name, pair in read_adapter(path).unet.items():
        assert torch.allclose(pair.up, read_adapter(whole).unet[name].up, atol=1e-3), name


def test_while_encoding_nothing_is_left_behind(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdlora.training._prepare", fail)
    with pytest.raises(MemoryShortError, match=r"while encoding the pictures\.\nStart again with one of these"):
        train_adapter(config_for(tmp_path, base))
    assert not (tmp_path / "ink").exists()


def test_in_a_preview_the_run_goes_on_without_it(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train_adapter(config_for(tmp_path, base, out=tmp_path / "plain"))
    monkeypatch.setattr(Generator, "draw_many", fail)
    said: list[str] = []
    config = config_for(tmp_path, base, preview={"prompts": ["a fox"], "where": "between"})
    path = train_adapter(config, say=said.append)
    told = [sentence for sentence in said if "preview" in sentence]
    assert told == [f"No preview of step {step}: the memory does not suffice for drawing." for step in (1, 2, 3)]
    assert read_adapter(path).tensor_sha256 == read_adapter(plain).tensor_sha256


def test_the_cpu_allocator_is_understood_and_other_errors_are_not_touched(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"

    def raising(text: str) -> Any:
        def failing(*_: object) -> Any:
            raise RuntimeError(text)

        return failing

    monkeypatch.setattr("sdlora.training._prepare", raising(message))
    with pytest.raises(MemoryShortError):
        train_adapter(config_for(tmp_path, base))
    monkeypatch.setattr("sdlora.training._prepare", raising("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        train_adapter(config_for(tmp_path, base))
