"""From a folder of pictures to an adapter file, by the one function that puts everything together."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdlora.adapter_file import read_adapter
from sdlora.config import TrainConfig, load_config
from sdlora.errors import DatasetError, ModelError, NothingToTrainError
from sdlora.events import Event, PreviewReady, RunFinished, StepDone, from_json
from sdlora.families import components_from_pipeline
from sdlora.training import require_attention, train_adapter
from tests.tiny import tiny_sd1
from tests.training.helpers import make_config, write_pictures


def config_for(tmp_path: Path, base: Path | str, **sections: dict[str, Any]) -> TrainConfig:
    data = tmp_path / "data"
    if not data.exists():
        write_pictures(data)
    return make_config(
        model={"base": str(base), "precision": "fp32", **sections.pop("model", {})},
        data={"path": data, "trigger": "ink style"},
        output={"dir": tmp_path / "outputs", "name": "ink"},
        **sections,
    )


def test_a_folder_of_pictures_becomes_an_adapter(tmp_path: Path, base: Path) -> None:
    config = config_for(tmp_path, base)
    events: list[Event] = []
    said: list[str] = []
    path = train_adapter(config, observers=[events.append], say=said.append)
    run = tmp_path / "outputs" / "ink"
    assert path == run / "ink.safetensors"
    assert len(read_adapter(path).unet) == 64
    assert load_config(run / "config.toml") == config
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert [from_json(line) for line in lines] == events
    assert isinstance(events[-1], RunFinished) and not events[-1].stopped_early
    assert "Stable Diffusion 1.x, epsilon prediction, on cpu in fp32." in said
    assert any("3 images x 2 exposures = 6 pictures seen" in sentence for sentence in said)
    assert any("parameters, " in sentence and "%" in sentence for sentence in said)


def test_nothing_private_is_in_the_file(tmp_path: Path, base: Path) -> None:
    path = train_adapter(config_for(tmp_path, base))
    content = path.read_bytes()
    for private in (str(tmp_path), "thing 0", "0.png", str(base)):
        assert private.encode() not in content


def test_the_dataset_folder_is_only_read(tmp_path: Path, base: Path) -> None:
    config = config_for(tmp_path, base)
    before = {path: path.stat().st_mtime_ns for path in config.data.path.rglob("*")}
    train_adapter(config)
    assert {path: path.stat().st_mtime_ns for path in config.data.path.rglob("*")} == before


def test_a_second_run_gets_its_own_folder(tmp_path: Path, base: Path) -> None:
    config = config_for(tmp_path, base, train={"exposures": 1, "batch_size": 4})
    assert [train_adapter(config).parent.name for _ in range(2)] == ["ink", "ink-2"]


def test_given_components_are_used_and_given_back(tmp_path: Path) -> None:
    pipeline = tiny_sd1()
    components = components_from_pipeline(pipeline)
    train_adapter(config_for(tmp_path, "nowhere"), components=components)
    expected = tiny_sd1().unet.state_dict()
    state = pipeline.unet.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert components.vae is pipeline.vae


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill cannot send SIGINT to itself there")
def test_ctrl_c_ends_the_run_after_the_step_with_the_adapter_saved(tmp_path: Path, base: Path) -> None:
    events: list[Event] = []

    def interrupt_first_step(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepDone) and event.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    path = train_adapter(config_for(tmp_path, base), observers=[interrupt_first_step])
    assert isinstance(events[-1], RunFinished)
    assert (events[-1].step, events[-1].stopped_early) == (1, True)
    assert read_adapter(path).metadata["sdlora.steps"] == "1"
    assert signal.getsignal(signal.SIGINT) is handler


def test_training_works_in_another_thread(tmp_path: Path, base: Path) -> None:
    paths: list[Path] = []
    config = config_for(tmp_path, base, train={"exposures": 1, "batch_size": 4})
    thread = threading.Thread(target=lambda: paths.append(train_adapter(config)))
    thread.start()
    thread.join()
    assert paths[0].exists()


def test_previews_are_drawn_at_saves(tmp_path: Path, base: Path) -> None:
    config = config_for(
        tmp_path, base, train={"save_every": 2}, preview={"prompts": ["a fox"], "num_inference_steps": 2}
    )
    events: list[Event] = []
    train_adapter(config, observers=[events.append])
    previews = [event for event in events if isinstance(event, PreviewReady)]
    assert [event.step for event in previews] == [2, 3]
    with Image.open(previews[0].path) as picture:
        assert picture.size == (64, 64)
        assert max(high for _, high in picture.getextrema()) > 0  # not black


def test_bad_pictures_are_told_before_any_model_is_looked_for(tmp_path: Path) -> None:
    config = config_for(tmp_path, tmp_path / "no-such-model")
    (config.data.path / "0.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"0\.png"):
        train_adapter(config)


def test_no_run_folder_is_left_behind_by_a_run_that_cannot_start(tmp_path: Path, base: Path) -> None:
    with pytest.raises(NothingToTrainError):
        train_adapter(config_for(tmp_path, base, lora={"targets": ["nothing"]}))
    assert not (tmp_path / "outputs").exists()


def test_xformers_on_a_cpu_is_refused_with_the_way_out(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ModelError, match=r'xformers attention needs a CUDA device, not cpu.*model\.attention = "sdpa"'):
        train_adapter(config_for(tmp_path, base, model={"attention": "xformers"}))


def test_xformers_that_is_not_installed_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install sdlora\[xformers\]"):
        require_attention("xformers", torch.device("cuda"))
    require_attention("sdpa", torch.device("cuda"))
