"""The loop: what it learns, what it leaves alone, how it stops, and what it does when numbers go wrong."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora import trainer as trainer_module
from sdlora.adapter_file import LoraPair, read_adapter
from sdlora.errors import ModelError, NonFiniteError, NothingToTrainError
from sdlora.events import CheckpointSaved, Event, PreviewReady, RunFinished, StepDone
from sdlora.families import components_from_pipeline
from sdlora.lora import PRESETS, lora_pairs, target_modules
from sdlora.optimizers import learning_rate_at
from sdlora.precision import Precision
from sdlora.trainer import Trainer
from tests.tiny import tiny_sd1
from tests.training.helpers import TINY, CalledPreviews, make_trainer, make_training_set


def steps_of(events: list[Event]) -> list[StepDone]:
    return [event for event in events if isinstance(event, StepDone)]


@pytest.mark.parametrize("family", TINY)
def test_each_family_trains_a_step_and_saves(family: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, family=family, train={"exposures": 1, "batch_size": 4, "warmup_fraction": 0.0})
    components = components_from_pipeline(TINY[family]())
    events = list(trainer.run())
    assert [type(event) for event in events] == [StepDone, RunFinished]
    adapter = read_adapter(tmp_path / "ink.safetensors")
    assert set(adapter.unet) == set(target_modules(components.unet, PRESETS["cross-attention"]))
    assert adapter.metadata["sdlora.family"] == family
    assert adapter.metadata["modelspec.trigger_phrase"] == "ink style"
    # After one update `up` has left zero in every layer.
    assert all(pair.up.abs().max() > 0 for pair in adapter.unet.values())


def test_the_loss_falls_on_a_few_images(tmp_path: Path) -> None:
    """Against a run that does not learn, step by step on the same images, noise and timesteps."""
    components = components_from_pipeline(tiny_sd1())
    losses = []
    for rate in (1e-12, 3e-2):
        trainer = make_trainer(
            tmp_path / str(rate),
            components=components,
            train={"exposures": 10, "batch_size": 4, "learning_rate": rate, "warmup_fraction": 0.0},
            lora={"rank": 4, "targets": ["conv_in", "conv_out"]},
        )
        losses.append([event.loss for event in steps_of(list(trainer.run()))])
    idle, learning = losses
    assert learning[0] == idle[0]
    assert all(learnt < 0.8 * without for learnt, without in zip(learning[-3:], idle[-3:], strict=True))


def test_the_base_is_bit_identical_and_free_of_adapters_afterwards(tmp_path: Path) -> None:
    components = components_from_pipeline(tiny_sd1())
    list(make_trainer(tmp_path, components=components).run())
    state, expected = components.unet.state_dict(), tiny_sd1().unet.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not any(parameter.requires_grad for parameter in components.unet.parameters())
    assert not components.unet.training


def test_two_runs_in_one_process_are_equal_and_the_global_generator_is_untouched(tmp_path: Path) -> None:
    components = components_from_pipeline(tiny_sd1())
    settings: dict[str, Any] = {"lora": {"rank": 4, "dropout": 0.1}, "train": {"noise_offset": 0.05}}
    first = [
        event.loss for event in steps_of(list(make_trainer(tmp_path / "a", components=components, **settings).run()))
    ]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = [
        event.loss for event in steps_of(list(make_trainer(tmp_path / "b", components=components, **settings).run()))
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert first == second
    adapters = [read_adapter(tmp_path / folder / "ink.safetensors") for folder in "ab"]
    assert adapters[0].tensor_sha256 == adapters[1].tensor_sha256


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    losses = [
        [event.loss for event in steps_of(list(make_trainer(tmp_path / str(seed), train={"seed": seed}).run()))]
        for seed in (0, 1)
    ]
    assert losses[0] != losses[1]


def test_the_run_does_not_depend_on_how_a_step_is_cut_into_batches(tmp_path: Path) -> None:
    runs = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        train = {"exposures": 2, "batch_size": batch_size, "gradient_accumulation": accumulation}
        runs.append(steps_of(list(make_trainer(tmp_path / str(batch_size), train=train).run())))
    # fp32 sums in another order; the second step has seen an update by the first.
    for name in ("loss", "grad_norm", "learning_rate"):
        values = [[getattr(event, name) for event in events] for events in runs]
        assert values[0] == pytest.approx(values[1], rel=1e-3), name


def test_images_of_several_sizes_share_a_step(tmp_path: Path) -> None:
    components = components_from_pipeline(tiny_sd1())
    training_set = make_training_set(components, sizes_hw=[(64, 64), (64, 128), (64, 64), (128, 64)])
    trainer = make_trainer(
        tmp_path, components=components, training_set=training_set, train={"exposures": 1, "batch_size": 4}
    )
    events = steps_of(list(trainer.run()))
    assert [event.step for event in events] == [1]


def test_the_saved_file_holds_what_was_trained(tmp_path: Path) -> None:
    kept: list[dict[str, LoraPair]] = []
    components = components_from_pipeline(tiny_sd1())

    def keep(step: int) -> list[Path]:
        kept.append(lora_pairs(components.unet))
        return []

    trainer = make_trainer(
        tmp_path, components=components, previews=CalledPreviews(keep), lora={"rank": 4, "alpha": 2.0}
    )
    list(trainer.run())
    (trained,) = kept
    saved = read_adapter(tmp_path / "ink.safetensors").unet
    assert saved.keys() == trained.keys()
    for path, pair in trained.items():
        effect = pair.scale * pair.up @ pair.down
        in_file = saved[path].scale * saved[path].up.float() @ saved[path].down.float()
        # Two factors are rounded to fp16, each by at most 2^-11 of itself.
        assert (in_file - effect).abs().max() <= 2**-10 * (pair.scale * pair.up.abs() @ pair.down.abs()).max(), path


def test_saves_and_previews_come_when_planned(tmp_path: Path) -> None:
    def draw(step: int) -> list[Path]:
        return [tmp_path / f"{step}.png"]

    trainer = make_trainer(tmp_path, previews=CalledPreviews(draw), train={"exposures": 4, "save_every": 3})
    events = [event for event in trainer.run() if not isinstance(event, StepDone)]
    files = [tmp_path / "checkpoints" / f"step-00000{step}" / f"ink-step-00000{step}.safetensors" for step in (3, 6, 8)]
    assert events[:6] == [
        CheckpointSaved(step=3, path=str(files[0])),
        PreviewReady(step=3, path=str(tmp_path / "3.png")),
        CheckpointSaved(step=6, path=str(files[1])),
        PreviewReady(step=6, path=str(tmp_path / "6.png")),
        CheckpointSaved(step=8, path=str(files[2])),
        PreviewReady(step=8, path=str(tmp_path / "8.png")),
    ]
    finished = events[6]
    assert isinstance(finished, RunFinished)
    assert (finished.step, finished.path, finished.stopped_early) == (8, str(tmp_path / "ink.safetensors"), False)
    assert read_adapter(Path(events[0].path)).metadata["sdlora.steps"] == "3"


def test_progress_is_told_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    every = steps_of(list(make_trainer(tmp_path / "1", train={"exposures": 4}).run()))
    third = steps_of(list(make_trainer(tmp_path / "3", train={"exposures": 4, "log_every": 3}).run()))
    assert [event.step for event in third] == [3, 6, 8]
    assert third[0].loss == pytest.approx(sum(event.loss for event in every[:3]) / 3)
    assert all(event.images_per_second > 0 for event in every)


def test_gradients_are_really_clipped(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, train={"max_grad_norm": 1e-6})
    norms: list[float] = []

    def measure(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients])).item())

    trainer._optimizer.register_step_pre_hook(measure)
    events = steps_of(list(trainer.run()))
    assert len(norms) == len(events) == 4
    assert all(norm <= 1.001e-6 for norm in norms)
    assert all(event.grad_norm is not None and event.grad_norm > 1e-5 for event in events)


def test_weight_decay_and_learning_rate_reach_the_optimizer(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, train={"weight_decay": 0.03, "learning_rate": 2e-3, "warmup_fraction": 0.5})
    events = steps_of(list(trainer.run()))
    assert [event.learning_rate for event in events] == pytest.approx([2e-3 / 3, 4e-3 / 3, 2e-3, 1e-3])
    for group in trainer._optimizer.param_groups:
        assert group["weight_decay"] == 0.03
        assert group["lr"] == pytest.approx(1e-3)


def test_the_learning_rate_rises_and_then_falls_as_a_cosine() -> None:
    rates = [learning_rate_at(n, peak=1.0, warmup_steps=4, num_steps=24) for n in range(25)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[14] == pytest.approx(0.5)
    assert rates[24] == pytest.approx(0.0)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate_at(0, peak=1.0, warmup_steps=0, num_steps=1) == 1.0


# fp16 on a CPU: the path of a GPU.


@dataclass(frozen=True)
class LoudPrecision(Precision):
    """fp16 whose scaler starts so high that the first gradients overflow."""

    start: float = 2.0**30
    growth_interval: int = 2000

    def grad_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=self.start, backoff_factor=2.0**-12)


def fp16_trainer(folder: Path, precision: Precision, **settings: Any) -> Trainer:
    components = components_from_pipeline(tiny_sd1(), weight_dtype=torch.float16)
    return make_trainer(folder, components=components, precision=precision, **settings)


def test_fp16_trains_as_fp32_does(tmp_path: Path) -> None:
    half = steps_of(list(fp16_trainer(tmp_path / "16", Precision("fp16", "cpu")).run()))
    full = steps_of(list(make_trainer(tmp_path / "32").run()))
    assert half[-1].skipped == 0
    # fp16 has 11 bits of mantissa; some hundred layers add their roundings.
    assert [event.loss for event in half] == pytest.approx([event.loss for event in full], rel=0.02)
    assert [event.grad_norm for event in half] == pytest.approx([event.grad_norm for event in full], rel=0.1)
    saved = read_adapter(tmp_path / "16" / "ink.safetensors").unet
    assert all(pair.up.abs().max() > 0 for pair in saved.values())


def test_bf16_trains_as_fp32_does(tmp_path: Path) -> None:
    components = components_from_pipeline(tiny_sd1(), weight_dtype=torch.bfloat16)
    trainer = make_trainer(tmp_path / "16", components=components, precision=Precision("bf16", "cpu"))
    assert {parameter.dtype for parameter in trainer._parameters} == {torch.float32}
    half = steps_of(list(trainer.run()))
    full = steps_of(list(make_trainer(tmp_path / "32").run()))
    # bf16 has 8 bits of mantissa.
    assert [event.loss for event in half] == pytest.approx([event.loss for event in full], rel=0.05)


def test_an_overflow_skips_the_step_and_the_schedule_waits(tmp_path: Path) -> None:
    trainer = fp16_trainer(tmp_path, LoudPrecision("fp16", "cpu"), train={"warmup_fraction": 0.5})
    seen: list[tuple[StepDone, bool]] = []
    for event in trainer.run():
        if isinstance(event, StepDone):
            ups = [parameter for parameter in trainer._parameters if parameter.abs().max() == 0]
            seen.append((event, len(ups) == len(trainer._parameters) // 2))
    (first, first_untrained), (second, second_untrained) = seen[0], seen[1]
    assert (first.skipped, first.grad_norm, first_untrained) == (1, None, True)
    assert (second.skipped, second_untrained) == (1, False)
    assert second.grad_norm is not None
    assert second.learning_rate == first.learning_rate < seen[2][0].learning_rate
    assert seen[-1][0].step == 4 and trainer.state.updates == 3


def test_endless_overflow_ends_the_run_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "_MAX_SKIPPED_IN_A_ROW", 3)

    class Hopeless(LoudPrecision):
        def grad_scaler(self) -> torch.amp.GradScaler:
            return torch.amp.GradScaler("cpu", init_scale=2.0**100, backoff_factor=0.99)

    trainer = fp16_trainer(tmp_path, Hopeless("fp16", "cpu"), train={"exposures": 20})
    with pytest.raises(NonFiniteError, match="3 times in a row"):
        list(trainer.run())


# What goes wrong.


def poisoned(tmp_path: Path, index: int, **settings: Any) -> Trainer:
    components = components_from_pipeline(tiny_sd1())
    training_set = make_training_set(components)
    training_set.examples[index].views[0].latents.mean[0, 0, 0] = float("nan")
    return make_trainer(tmp_path, components=components, training_set=training_set, **settings)


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_image(tmp_path: Path) -> None:
    trainer = poisoned(tmp_path, 2, train={"batch_size": 1, "exposures": 1})
    bad_step = [trainer._entries[entry] for entry in trainer._order.epoch(0)].index(2) + 1
    events: list[Event] = []
    with pytest.raises(NonFiniteError, match=rf"Step {bad_step}: the loss is NaN or Inf for 2\.png \(timestep \d+\)"):
        events.extend(trainer.run())
    assert [event.step for event in steps_of(events)] == list(range(1, bad_step))
    assert all(parameter.isfinite().all() for parameter in trainer._parameters)
    assert trainer.state.step == bad_step - 1
    assert (tmp_path / "ink.safetensors").exists() == (bad_step > 1)


def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    kept = [parameter.detach().clone() for parameter in trainer._parameters]
    trainer._parameters[0].register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match="Step 1: the gradient is NaN or Inf"):
        list(trainer.run())
    assert all(torch.equal(a, b) for a, b in zip(kept, trainer._parameters, strict=True))


def test_an_interrupt_saves_and_ends_in_order(tmp_path: Path) -> None:
    def interrupt() -> None:
        if trainer.state.step == 2:
            raise KeyboardInterrupt

    previews = CalledPreviews(lambda step: [tmp_path / "never.png"], interrupt)
    trainer = make_trainer(tmp_path, previews=previews, train={"save_every": 2})
    events = list(trainer.run())
    # Nothing is drawn any more.
    assert not previews.asked
    assert isinstance(events[-1], RunFinished)
    assert (events[-1].step, events[-1].stopped_early) == (2, True)
    assert read_adapter(tmp_path / "ink.safetensors").metadata["sdlora.steps"] == "2"


def test_a_requested_stop_ends_after_the_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    events = []
    for event in trainer.run():
        events.append(event)
        trainer.request_stop()
    assert [type(event) for event in events] == [StepDone, RunFinished]
    assert isinstance(events[-1], RunFinished) and events[-1].stopped_early


def test_a_closed_run_has_saved_and_recorded_it(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with closing(trainer.run()) as events:
        next(events)
    assert trainer.finished is not None
    assert (trainer.finished.step, trainer.finished.stopped_early) == (1, True)
    assert read_adapter(tmp_path / "ink.safetensors").metadata["sdlora.steps"] == "1"


def test_an_error_of_a_watcher_comes_through_after_the_save(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(ZeroDivisionError), closing(trainer.run()) as events:
        for _ in events:
            _ = 1 / 0
    assert (tmp_path / "ink.safetensors").exists()


def test_previews_do_not_change_the_training(tmp_path: Path) -> None:
    def draw(step: int) -> list[Path]:
        torch.rand(7)
        return []

    plain = steps_of(list(make_trainer(tmp_path / "a", train={"save_every": 1, "exposures": 1}).run()))
    drawn = steps_of(
        list(make_trainer(tmp_path / "b", train={"save_every": 1, "exposures": 1}, previews=CalledPreviews(draw)).run())
    )
    assert [event.loss for event in plain] == [event.loss for event in drawn]


def test_a_pattern_that_matches_nothing_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(NothingToTrainError, match="no_such_layer"):
        make_trainer(tmp_path, lora={"rank": 4, "targets": ["no_such_layer"]})


def test_a_base_that_predicts_the_image_itself_is_refused(tmp_path: Path) -> None:
    components = replace(components_from_pipeline(tiny_sd1()), prediction_type="sample")
    with pytest.raises(ModelError, match="'sample'"):
        make_trainer(tmp_path, components=components)
