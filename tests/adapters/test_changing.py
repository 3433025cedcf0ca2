"""Changing a merged stack, switching it off, saving it, and failing half-way: always exact, or as before."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sdlora.adapter_weight import as_weight
from sdlora.errors import AdapterError, AdapterFileError
from sdlora.stack import AdapterStack
from tests.tiny import tiny_sd1

from .builders import difference, predict, random_pairs, write
from .test_stack import assert_bits_equal, tensors_of

SAME = 1e-5
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
TARGETS = {"a": ("attn2.to_k",), "b": ("attn2.to_k", "attn1.to_q"), "c": ("attn2.to_v", "mid_block.resnets.0.conv1")}


@pytest.fixture
def stack(sd1, tmp_path) -> AdapterStack:
    """Three adapters on layers that are partly the same, all on at 1."""
    result = AdapterStack(sd1)
    for seed, (name, targets) in enumerate(TARGETS.items()):
        result.load(write(tmp_path / f"{name}.safetensors", random_pairs(sd1.unet, seed=seed, targets=targets)))
    return result


# --- a merged stack takes other weights -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.set_weight("a", -0.3),
        lambda s: s.set_adapters("b", 0.5),
        lambda s: s.set_adapters(["a", "c"], ["0.5:lbw=OUTALL", 2]),
        lambda s: s.set_adapters([]),
        lambda s: s.unload("c"),
        lambda s: s.unload(),
        lambda s: s.disable(),
    ],
)
def test_changing_a_merged_stack_gives_the_bits_of_merging_it_so_from_the_start(stack, sd1, change) -> None:
    before = tensors_of(sd1)
    with stack.merged():
        change(stack)
        changed = tensors_of(sd1)
    assert_bits_equal(sd1, before)
    with stack.merged():
        assert_bits_equal(sd1, changed)
    assert_bits_equal(sd1, before)


def test_many_changes_of_a_half_precision_base_leave_no_trace(stack, sd1) -> None:
    sd1.unet.half()
    before = tensors_of(sd1)
    with stack.merged():
        merged = tensors_of(sd1)
        for number in range(20):
            stack.set_weight("ab"[number % 2], number / 10 - 1)
        stack.set_adapters(["a", "b", "c"])
        assert_bits_equal(sd1, merged)
    assert_bits_equal(sd1, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.set_weight("a", "0@0,1@1"), r"cannot be merged; use applied"),
        (lambda s: s.set_weight("a", float("nan")), "finite"),
        (lambda s: s.set_weight("a", 1e300), "not finite in torch.float32"),
        (lambda s: s.unload("d"), "'d'"),
        (lambda s: s.load("nowhere.safetensors"), "no such file"),
    ],
)
def test_a_refused_change_leaves_a_merged_stack_as_it_was(stack, sd1, change, message) -> None:
    before, weights = tensors_of(sd1), dict(stack.weights)
    with stack.merged():
        inside = tensors_of(sd1)
        with pytest.raises(AdapterError, match=message):
            change(stack)
        assert_bits_equal(sd1, inside)
        assert stack.weights == weights
    assert_bits_equal(sd1, before)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("at", [1, 20, 40])
def test_a_failure_while_writing_other_weights_leaves_what_was_merged(stack, sd1, monkeypatch, error, at) -> None:
    before, weights = tensors_of(sd1), dict(stack.weights)
    with stack.merged():
        inside = tensors_of(sd1)
        copies, real = 0, torch.Tensor.copy_

        def failing(target: torch.Tensor, source: torch.Tensor, *rest: object) -> torch.Tensor:
            nonlocal copies
            copies += 1
            if copies == at:
                raise error
            return real(target, source, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", failing)
            with pytest.raises(error):
                stack.set_adapters(["a", "b"], [0.3, -2])
        assert copies > at
        assert_bits_equal(sd1, inside)
        assert stack.weights == weights
        stack.set_weight("a", 0.3)
    assert_bits_equal(sd1, before)


@pytest.mark.parametrize("allocation", [1, 9])
def test_no_memory_while_computing_leaves_the_stack_as_it_was(stack, sd1, monkeypatch, allocation) -> None:
    calls, real = 0, torch.cat

    def failing(*args: object, **options: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == allocation:
            raise torch.OutOfMemoryError
        return real(*args, **options)

    live, weights = predict(sd1), dict(stack.weights)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", failing)
        with pytest.raises(torch.OutOfMemoryError):
            stack.set_weight("a", 0.1)
    assert stack.weights == weights
    assert torch.equal(predict(sd1), live)


# --- off and on, saved and restored ---------------------------------------------------------------------------------


def test_disabled_is_the_base_and_enabled_what_was_set_meanwhile(stack, sd1) -> None:
    stack.set_weight("b", 0.5)
    drawn = predict(sd1)
    stack.disable()
    assert not stack.is_enabled and stack.mode == "base"
    off = predict(sd1)
    assert stack.weights == {"a": 1.0, "b": 0.5, "c": 1.0}
    stack.set_weight("b", -0.5)
    assert torch.equal(predict(sd1), off)
    stack.enable()
    assert stack.weights["b"] == -0.5
    assert difference(predict(sd1), drawn) > SAME
    stack.set_weight("b", 0.5)
    assert torch.equal(predict(sd1), drawn)


def test_a_restored_stack_is_the_saved_one(stack, sd1) -> None:
    stack.set_adapters(["b", "a"], ["0.5:lbw=OUTALL", "0@0,1@1"])
    stack.disable()
    state = json.loads(json.dumps(stack.state()))
    stack.enable()
    drawn, weights = predict(sd1), dict(stack.weights)
    stack.unload("a")
    stack.set_adapters("c", 3)
    stack.restore(state)
    assert stack.names == ("a", "b", "c")
    assert not stack.is_enabled
    stack.enable()
    assert stack.weights == weights
    assert torch.equal(predict(sd1), drawn)


def test_restoring_needs_the_same_tensors_and_sound_data(stack, sd1, tmp_path) -> None:
    state = stack.state()
    stack.unload("a")
    drawn = predict(sd1)
    shutil.copy(tmp_path / "b.safetensors", tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="holds other tensors than when the stack was saved"):
        stack.restore(state)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(AdapterFileError, match="no such file"):
        stack.restore(state)
    for broken in ({}, {"enabled": True, "adapters": [{"name": "x"}]}, {"enabled": True, "adapters": 3}):
        with pytest.raises(AdapterError, match="not the state of a stack"):
            stack.restore(broken)
    assert stack.names == ("b", "c")
    assert torch.equal(predict(sd1), drawn)


# --- any sequence of operations -------------------------------------------------------------------------------------

NAMES = st.sampled_from("abcd")
SETTINGS = st.sampled_from([0.0, 1.0, -0.5, 0.3, "0.8:lbw=OUTALL", "0.7:0.2"])


class AnySequence(RuleBasedStateMachine):
    """The base's bits after every operation, and one layer against the formula while it is merged.

    Not merged, the base must have its checksum; merged, a layer must hold base + sum of strength * up @ down.
    """

    folder: Path
    runs: list[Counter[str]]
    """Of every sequence: how often each operation was done."""

    @initialize()
    def start(self) -> None:
        self.done: Counter[str] = Counter()
        self.runs.append(self.done)
        self.pipeline = tiny_sd1()
        self.pairs = {
            name: random_pairs(self.pipeline.unet, seed=seed, rank=2, targets=targets)
            for seed, (name, targets) in enumerate(TARGETS.items())
        }
        for name, pairs in self.pairs.items():
            write(self.folder / f"{name}.safetensors", pairs)
        self.stack = AdapterStack(self.pipeline)
        self.layer = self.pipeline.unet.get_submodule(LAYER)
        self.original = self.layer.weight.detach().clone()
        self.checksum = self.stack.base_checksum()
        self.block: object = None
        self.loaded: list[str] = []
        self.weights: dict[str, object] = {}
        self.saved = (self.stack.state(), [], {})

    @rule(name=NAMES)
    def load(self, name: str) -> None:
        self.done["load"] += 1
        if name in self.loaded or name not in TARGETS:
            with pytest.raises(AdapterError):
                self.stack.load(self.folder / f"{name}.safetensors")
            return
        self.stack.load(self.folder / f"{name}.safetensors")
        self.loaded.append(name)
        self.weights[name] = 1.0

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        self.done["unload"] += 1
        if name not in self.loaded:
            with pytest.raises(AdapterError):
                self.stack.unload(name)
            return
        self.stack.unload(name)
        self.loaded.remove(name)
        self.weights.pop(name, None)

    @rule(name=NAMES, weight=SETTINGS)
    def weigh(self, name: str, weight: object) -> None:
        self.done["weigh"] += 1
        if name not in self.loaded:
            with pytest.raises(AdapterError):
                self.stack.set_weight(name, weight)
            return
        self.stack.set_weight(name, weight)
        self.weights[name] = weight

    @rule(weight=SETTINGS)
    def set_all(self, weight: object) -> None:
        self.done["set_all"] += 1
        self.stack.set_adapters(self.loaded, weight)
        self.weights = dict.fromkeys(self.loaded, weight)

    @rule(weight=st.sampled_from([float("nan"), 1e300, "0@1,0@0", "1:images=1:lbw=x"]))
    def fail(self, weight: object) -> None:
        self.done["fail"] += 1
        for name in self.loaded[:1]:
            if weight == 1e300 and not self.stack.is_enabled:
                # Nothing is computed while the stack is off: what cannot be is refused when it is switched on.
                self.stack.set_weight(name, weight)
                with pytest.raises(AdapterError):
                    self.stack.enable()
                self.stack.set_weight(name, self.weights[name])
                continue
            with pytest.raises(AdapterError):
                self.stack.set_weight(name, weight)

    @rule(is_on=st.booleans())
    def switch(self, is_on: bool) -> None:
        self.done["switch"] += 1
        (self.stack.enable if is_on else self.stack.disable)()

    @rule()
    def save(self) -> None:
        self.done["save"] += 1
        self.saved = (self.stack.state(), list(self.loaded), dict(self.weights))

    @rule()
    def restore(self) -> None:
        self.done["restore"] += 1
        state, loaded, weights = self.saved
        self.stack.restore(state)
        self.loaded, self.weights = list(loaded), dict(weights)

    @precondition(lambda self: self.block is None)
    @rule()
    def merge(self) -> None:
        self.done["merge"] += 1
        self.block = self.stack.merged()
        self.block.__enter__()

    @precondition(lambda self: self.block is not None)
    @rule(error=st.sampled_from([None, ValueError("drawing failed"), KeyboardInterrupt()]))
    def leave(self, error: BaseException | None) -> None:
        self.done["leave"] += 1
        block, self.block = self.block, None
        assert not block.__exit__(type(error) if error else None, error, None)

    @invariant()
    def is_what_was_asked_for(self) -> None:
        assert list(self.stack.names) == self.loaded
        expected = {name: as_weight(weight) for name, weight in self.weights.items()}
        assert {name: as_weight(weight) for name, weight in self.stack.weights.items()} == expected
        if self.block is None:
            assert self.stack.base_checksum() == self.checksum
            return
        delta = torch.zeros_like(self.original, dtype=torch.float64)
        for name, weight in self.stack.active.items():
            if pair := self.pairs[name].get(LAYER):
                # Of the weights used here, the one for OUTALL leaves the middle block out.
                strength = 0.0 if weight.blocks else weight.base
                delta += strength * pair.alpha / 2 * (pair.up.double() @ pair.down.double())
        assert (self.layer.weight.double() - self.original.double() - delta).abs().max() < SAME

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            if self.block is not None:
                self.leave(None)
            self.stack.unload()
            assert self.stack.base_checksum() == self.checksum


def run_machine(folder: Path, *, examples: int, steps: int) -> list[Counter[str]]:
    machine = type("Here", (AnySequence,), {"folder": folder, "runs": []})
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples,
        # One is `start`.
        stateful_step_count=steps + 1,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    case().runTest()
    return machine.runs


# Hypothesis begins with the simplest sequences, which do one thing over and over; the ones after them are random.


def test_any_short_sequence_of_operations_leaves_the_base_as_it_was(tmp_path) -> None:
    runs = run_machine(tmp_path, examples=3, steps=25)
    assert any(run.total() >= 25 and len(run) >= 7 for run in runs)


@pytest.mark.slow
def test_any_sequence_of_200_operations_leaves_the_base_as_it_was(tmp_path) -> None:
    runs = run_machine(tmp_path, examples=8, steps=200)
    long = [run for run in runs if run.total() >= 200]
    assert any(len(run) >= 7 for run in long)
    assert len(set().union(*long)) == 10
