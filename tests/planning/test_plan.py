"""The plan of a run, what it proposes when memory is short, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sdlora import cli, probe
from sdlora.adapter_file import PARTS, LoraPair, read_adapter
from sdlora.cheaper import cheaper_settings
from sdlora.config import TrainConfig, load_config
from sdlora.data.dataset import ImageCaption, scan_dataset
from sdlora.errors import ModelError
from sdlora.events import RunFinished
from sdlora.families import base_shapes, components_from_pipeline
from sdlora.plan import largest_bucket, plan_run
from sdlora.planning import make_plan
from sdlora.precision import Precision
from sdlora.probe import fitting_config, memory_layouts, probe_steps
from sdlora.training import train_adapter
from tests.tiny import tiny_sd1
from tests.training.helpers import make_config, write_pictures

FP32 = Precision("fp32", "cpu")


def config_for(tmp_path: Path, base: Path, **sections: Any) -> TrainConfig:
    if not (tmp_path / "data").exists():
        write_pictures(tmp_path / "data", count=4)
    return make_config(
        model={"base": str(base), "precision": "fp32", **sections.pop("model", {})},
        data={"path": tmp_path / "data", "trigger": "ink style"},
        output={"dir": tmp_path, "name": "ink"},
        **sections,
    )


def tensor_bytes(path: Path) -> int:
    return path.stat().st_size - int.from_bytes(path.read_bytes()[:8], "little") - 8


@pytest.mark.parametrize("text_encoder", [False, True])
def test_the_plan_agrees_with_the_run(tmp_path: Path, base: Path, text_encoder: bool) -> None:
    config = config_for(tmp_path, base, lora={"rank": 4, "text_encoder": text_encoder})
    examples = scan_dataset(config.data.path, trigger="ink style").examples
    plan = plan_run(config, examples, base_shapes(str(base)), precision=FP32, flops_per_second=1e9, library_bytes=1000)
    events: list[Any] = []
    path = train_adapter(config, observers=[events.append])
    assert isinstance(events[-1], RunFinished) and plan.length.steps == events[-1].step
    assert tensor_bytes(path) == plan.file_bytes
    assert plan.memory["base"] == 4 * sum(p.numel() for p in tiny_sd1().unet.parameters())
    in_text = 4 * sum(p.numel() for p in tiny_sd1().text_encoder.parameters()) if text_encoder else None
    assert plan.memory.get("text encoders") == in_text
    assert plan.adapter_parameters == sum(p.up.numel() + p.down.numel() for p in all_pairs(path))
    assert plan.memory["adapter and optimizer"] == 4 * 3 * plan.adapter_parameters
    # What is copied for a save is the state and the adapter in fp32, each once more as bytes.
    state = tensor_bytes(next((path.parent / "state").glob("step-*/state.safetensors")))
    assert plan.memory["a save being written"] == pytest.approx(2 * (state + 4 * plan.adapter_parameters), rel=0.01)
    assert plan.seconds_per_step == pytest.approx(plan.step_flops / 0.6e9)
    assert plan.peak_bytes >= sum(plan.memory.values())
    assert plan.cost(3600.0) == pytest.approx(plan.seconds)


def test_previews_take_the_memory_of_where_they_are_drawn(tmp_path: Path, base: Path) -> None:
    pipeline = tiny_sd1()
    numbers = {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in ("vae", "text_encoder")}
    whole = sum(numbers.values()) + sum(p.numel() for p in pipeline.unet.parameters())

    def extra(where: str, precision: Precision = FP32) -> dict[str, int]:
        config = config_for(tmp_path, base, preview={"prompts": ["a fox"], "where": where})
        examples = scan_dataset(config.data.path, trigger="ink style").examples
        plan = plan_run(
            config, examples, base_shapes(str(base)), precision=precision, flops_per_second=None, library_bytes=1000
        )
        return {name: size for name, size in plan.memory.items() if "preview" in name}

    assert extra("between") == {"encoders for previews": 4 * sum(numbers.values())}
    # Another process: its libraries, and its own base in fp32, in which it writes the adapter.
    (beside,) = extra("auto").items()
    assert beside[0] == "previews, drawn beside" and 10**9 + 4 * whole < beside[1] < 1.1 * 10**9 + 8 * whole
    assert not extra("beside", Precision("fp16", "cuda"))


def all_pairs(path: Path) -> list[LoraPair]:
    adapter = read_adapter(path)
    return [pair for part in PARTS for pair in adapter.part(part).values()]


def test_the_largest_size_is_that_of_the_pictures() -> None:
    wide = ImageCaption(Path("a.png"), "", (300, 600))
    square = ImageCaption(Path("b.png"), "", (500, 500))
    assert largest_bucket([wide], 512, 64) == (320, 640)
    assert largest_bucket([wide, square], 512, 64) == (512, 512)


def test_a_base_that_is_not_here_is_planned_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdlora.families.load._cached", lambda base: None)
    for name, width in (("someone/their-sdxl-mix", 2048), ("someone/sd-2-1", 1024), ("someone/art", 768)):
        shapes = base_shapes(name)
        assert not shapes.known and shapes.unet["cross_attention_dim"] == width
    with pytest.raises(ModelError, match="There is no file or folder"):
        base_shapes("nowhere")


def test_cheaper_settings_come_in_order_and_each_is_a_setting(tmp_path: Path, base: Path) -> None:
    config = config_for(
        tmp_path, base, train={"batch_size": 6}, lora={"targets": "attention"}, preview={"prompts": ["a fox"]}
    )
    found = list(cheaper_settings(config, precision="fp32", resolution=512))
    assert [item.settings[0].split("=")[0] for item in found] == [
        "train.batch_size",
        "model.gradient_checkpointing",
        "preview.prompts",
        "model.precision",
        "lora.targets",
        "data.resolution",
    ]
    assert found[0].settings == ("train.batch_size=3", "train.gradient_accumulation=2")
    start = ["data.path=x", "lora.targets=attention", 'preview.prompts=["a fox"]']
    for item in found:
        assert load_config(None, [*start, *item.settings]) != load_config(None, start)
    least = config_for(tmp_path, base, train={"batch_size": 1}, model={"gradient_checkpointing": True})
    assert not list(cheaper_settings(least, precision="fp16", resolution=64))


def test_layouts_keep_the_number_of_pictures_a_step(tmp_path: Path, base: Path) -> None:
    config = config_for(tmp_path, base, train={"batch_size": 4, "gradient_accumulation": 3})
    layouts = [
        (c.train.batch_size, c.train.gradient_accumulation, c.model.gradient_checkpointing)
        for c in memory_layouts(config)
    ]
    assert layouts[:4] == [(4, 3, False), (3, 4, False), (2, 6, False), (1, 12, False)]
    assert layouts[4:] == [(4, 3, True), (3, 4, True), (2, 6, True), (1, 12, True)]


def test_the_first_layout_that_fits_is_taken(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = probe.probe_steps

    def small_gpu(config: TrainConfig, *args: Any, **options: Any) -> Any:
        if config.train.batch_size > 2:
            raise torch.OutOfMemoryError
        return real(config, *args, **options)

    monkeypatch.setattr(probe, "probe_steps", small_gpu)
    components = components_from_pipeline(tiny_sd1())
    config = config_for(tmp_path, base, train={"batch_size": 4})
    found = fitting_config(config, components, FP32, target_hw=(64, 64))
    assert found is not None
    assert (found[0].train.batch_size, found[0].train.gradient_accumulation) == (2, 2)
    assert found[1].seconds > 0 and found[1].peak_bytes is None
    # The base is as it was.
    assert components.unet.state_dict().keys() == tiny_sd1().unet.state_dict().keys()
    monkeypatch.setattr(probe, "probe_steps", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    assert fitting_config(config, components, FP32, target_hw=(64, 64)) is None


@pytest.mark.cuda
def test_a_probe_on_a_gpu_tells_its_memory_and_finds_what_fits(tmp_path: Path, base: Path) -> None:
    components = components_from_pipeline(tiny_sd1().to("cuda"))
    config = config_for(tmp_path, base, train={"batch_size": 64})
    precision = Precision("fp32", "cuda")
    whole = probe_steps(config, components, precision, target_hw=(512, 512))
    assert whole.peak_bytes is not None
    limit = 0.5 * whole.peak_bytes / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        found = fitting_config(config, components, precision, target_hw=(512, 512))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found is not None and found[0].train.batch_size < 64


def test_too_little_memory_is_told_with_the_way_out(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdlora.planning.psutil.virtual_memory", lambda: type("Memory", (), {"available": -(10**12)}))
    arguments = ["plan", str(write_pictures(tmp_path / "data")), "--base", str(base), "--set", "train.batch_size=4"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "too little" in result.output
    assert "--set train.batch_size=2 --set train.gradient_accumulation=2" in result.output


def test_the_command_tells_a_newcomer_and_a_script(tmp_path: Path, base: Path) -> None:
    data = write_pictures(tmp_path / "data")
    arguments = ["plan", str(data), "--base", str(base), "--set", "train.exposures=10", "--price", "2.5"]
    result = CliRunner().invoke(cli.app, [*arguments, "--set", "train.learning_rate=1e-3"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines] == ["steps", "adapter", "memory", "free", "time", "disk", "cost"]
    assert "3 images x 10 exposures = 30 pictures seen" in result.output
    assert "it fits" in result.output
    facts = json.loads(CliRunner().invoke(cli.app, [*arguments, "--json"]).output)
    assert facts["length"]["steps"] == 15 and facts["fits"] is True and facts["target_hw"] == [64, 64]
    assert facts["cost"] == pytest.approx(facts["seconds"] / 3600 * 2.5)
    assert not (tmp_path / "outputs").exists()


def test_a_probe_on_a_cpu_makes_real_steps(tmp_path: Path, base: Path) -> None:
    config = config_for(tmp_path, base)
    dataset = scan_dataset(config.data.path, trigger="ink style")
    planned = make_plan(config, dataset, probe=True)
    assert planned.plan.measured and planned.plan.seconds_per_step is not None
    assert planned.plan.seconds == pytest.approx(planned.plan.seconds_per_step * planned.plan.length.steps)
    assert set(tmp_path.iterdir()) == {config.data.path}
