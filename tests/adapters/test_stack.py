"""AdapterStack against weights merged by hand, in fp64 arithmetic, into a deep copy.

Tolerance: the predictions of the tiny pipelines in fp32 differ by at most 1e-5 between two ways to add equal numbers
(measured on attention adapters, SD 1.x and SDXL: 5e-7 to 8e-7, where the adapters move them by 0.08 to 0.26).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdlora.adapter_file import AdapterMetadata, LoraPair
from sdlora.errors import (
    AdapterError,
    AdapterFileError,
    AdapterMismatchError,
    DuplicateAdapterError,
    UnknownAdapterError,
)
from sdlora.stack import AdapterStack

from .builders import (
    TEXT,
    attention_processor_tensors,
    difference,
    hand_merged,
    kohya_tensors,
    old_diffusers_tensors,
    peft_metadata,
    peft_tensors,
    predict,
    random_pairs,
    save,
    write,
)

SAME = 1e-5
EFFECT = 0.05


def tensors_of(pipeline) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor.detach().clone()
        for part in ("unet", "text_encoder", "text_encoder_2")
        if (model := getattr(pipeline, part, None)) is not None
        for name, tensor in model.state_dict().items()
    }


def assert_bits_equal(pipeline, before: dict[str, torch.Tensor]) -> None:
    after = tensors_of(pipeline)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)) for name in before)


def module_graph(pipeline) -> list[tuple[str, type, int]]:
    return [
        (name, type(module), len(module._forward_hooks))
        for part in (pipeline.unet, pipeline.text_encoder)
        for name, module in part.named_modules()
    ]


# --- the result is that of hand-merged weights ----------------------------------------------------------------------


def test_one_adapter_equals_hand_merged_weights(sd1, tmp_path) -> None:
    pairs = random_pairs(sd1.unet, rank=4, alpha=2.0)
    base, expected = predict(sd1), predict(hand_merged(sd1, ("unet", pairs, 0.8)))
    stack = AdapterStack(sd1)
    stack.load(write(tmp_path / "ink.safetensors", pairs))
    stack.set_adapters("ink", 0.8)
    assert difference(predict(sd1), expected) < SAME
    assert difference(expected, base) > EFFECT


@pytest.mark.parametrize("weights", [(0.7, 0.5), (1.0, -0.6), (0.0, 1.2)])
def test_a_stack_of_different_ranks_alphas_and_targets_equals_hand_merged_weights(sd1, tmp_path, weights) -> None:
    ink = random_pairs(sd1.unet, seed=1, rank=4, alpha=2.0)
    blob = random_pairs(sd1.unet, seed=2, rank=3, alpha=6.0, targets=("attn1.to_q", "attn2.to_k", "ff.net.0.proj"))
    expected = predict(hand_merged(sd1, ("unet", ink, weights[0]), ("unet", blob, weights[1])))
    stack = AdapterStack(sd1)
    stack.load(write(tmp_path / "ink.safetensors", ink))
    stack.load(write(tmp_path / "blob.safetensors", blob))
    stack.set_adapters(["ink", "blob"], weights)
    assert difference(predict(sd1), expected) < SAME
    with stack.merged():
        assert difference(predict(sd1), expected) < SAME


def test_every_linear_and_convolution_of_the_unet_can_be_adapted(sd1, tmp_path) -> None:
    pairs = random_pairs(sd1.unet, rank=2, targets=None, strength=0.1)
    assert {"conv_in", "time_embedding.linear_1", "mid_block.resnets.0.conv1"} <= pairs.keys()
    assert any("downsamplers" in path for path in pairs)
    expected = predict(hand_merged(sd1, ("unet", pairs, 1.0)))
    AdapterStack(sd1).load(write(tmp_path / "all.safetensors", pairs))
    assert difference(predict(sd1), expected) < SAME


def test_text_encoder_layers_are_adapted_too(sd1, tmp_path) -> None:
    unet, text = random_pairs(sd1.unet), random_pairs(sd1.text_encoder, targets=TEXT)
    expected = predict(hand_merged(sd1, ("unet", unet, 1.0), ("text_encoder", text, 1.0)))
    without_text = predict(hand_merged(sd1, ("unet", unet, 1.0)))
    AdapterStack(sd1).load(write(tmp_path / "both.safetensors", unet, text_encoder=text))
    assert difference(predict(sd1), expected) < SAME
    assert difference(expected, without_text) > 1000 * SAME


def test_sdxl_with_both_text_encoders_equals_hand_merged_weights(sdxl, tmp_path) -> None:
    unet = random_pairs(sdxl.unet, seed=1)
    text, text_2 = (random_pairs(model, targets=TEXT) for model in (sdxl.text_encoder, sdxl.text_encoder_2))
    changes = (("unet", unet, 0.9), ("text_encoder", text, 0.9), ("text_encoder_2", text_2, 0.9))
    base, expected = predict(sdxl), predict(hand_merged(sdxl, *changes))
    path = write(tmp_path / "xl.safetensors", unet, family="sdxl", text_encoder=text, text_encoder_2=text_2)
    stack = AdapterStack(sdxl)
    before = stack.base_checksum()
    stack.load(path)
    stack.set_weight("xl", 0.9)
    assert difference(predict(sdxl), expected) < SAME
    assert difference(expected, base) > EFFECT
    with stack.merged():
        assert difference(predict(sdxl), expected) < SAME
    stack.unload()
    assert stack.base_checksum() == before
    assert torch.equal(predict(sdxl), base)


def test_every_dialect_of_one_adapter_draws_the_same(sd1, tmp_path) -> None:
    pairs = random_pairs(sd1.unet, rank=4, alpha=4.0)
    files = {
        "ours": write(tmp_path / "ours.safetensors", pairs),
        "kohya": save(tmp_path / "kohya.safetensors", kohya_tensors(pairs)),
        "peft": save(tmp_path / "peft.safetensors", peft_tensors(pairs), peft_metadata(pairs)),
        "plain peft": save(tmp_path / "plain.safetensors", peft_tensors(pairs, "base_model.model.")),
        "old": save(tmp_path / "old.safetensors", old_diffusers_tensors(pairs)),
        "processors": save(tmp_path / "processors.safetensors", attention_processor_tensors(pairs)),
    }
    expected = predict(hand_merged(sd1, ("unet", pairs, 1.0)))
    stack = AdapterStack(sd1)
    for name, path in files.items():
        stack.load(path, name)
    for name in files:
        stack.set_adapters(name)
        assert difference(predict(sd1), expected) < SAME, name


def test_a_linear_adapter_fits_a_1x1_convolution_and_the_other_way_round(sd1, sd2, tmp_path) -> None:
    for pipeline, axes, family in ((sd1, 2, "sd1"), (sd2, 4, "sd2")):
        pairs = random_pairs(pipeline.unet, targets=("proj_in",))
        expected = predict(hand_merged(pipeline, ("unet", pairs, 1.0)))
        shape = (1, 1) if axes == 4 else ()
        other = {
            path: LoraPair(
                down=pair.down.reshape(*pair.down.shape[:2], *shape),
                up=pair.up.reshape(*pair.up.shape[:2], *shape),
                alpha=pair.alpha,
            )
            for path, pair in pairs.items()
        }
        AdapterStack(pipeline).load(write(tmp_path / f"{family}.safetensors", other, family=family))
        assert difference(predict(pipeline), expected) < SAME


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_bases_are_adapted_and_merged(sd1, tmp_path, dtype) -> None:
    pairs = random_pairs(sd1.unet)
    reference = predict(hand_merged(sd1, ("unet", pairs, 1.0)))
    base_error = difference(predict(copy.deepcopy(sd1).to(dtype)), predict(sd1))
    effect = difference(reference, predict(sd1))
    sd1.to(dtype)
    stack = AdapterStack(sd1)
    before = tensors_of(sd1)
    stack.load(write(tmp_path / "ink.safetensors", pairs))
    # The type itself errs by base_error on the base; the adapter may err as much again, and some rounding more.
    assert difference(predict(sd1), reference) < 4 * base_error < effect
    with stack.merged():
        assert difference(predict(sd1), reference) < 4 * base_error
    assert_bits_equal(sd1, before)


def test_autocast_and_a_pipeline_moved_to_another_type_keep_working(sd1, tmp_path) -> None:
    pairs = random_pairs(sd1.unet)
    expected = predict(hand_merged(sd1, ("unet", pairs, 1.0)))
    AdapterStack(sd1).load(write(tmp_path / "ink.safetensors", pairs))
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(sd1.unet(sample, 10, text).sample).all()
    sd1.to(torch.bfloat16)
    predict(sd1)
    sd1.to(torch.float32)
    # The base itself is rounded to bf16 by the round trip, the adapter is not.
    assert difference(predict(sd1), expected) < EFFECT


# --- the stack's state ----------------------------------------------------------------------------------------------


@pytest.fixture
def stack(sd1, tmp_path) -> AdapterStack:
    """Three adapters, "a" at 1.0, "b" at 0.5 and "c" off."""
    result = AdapterStack(sd1)
    for seed, name in enumerate("abc"):
        result.load(write(tmp_path / f"{name}.safetensors", random_pairs(sd1.unet, seed=seed, alpha=seed + 1.0)))
    result.set_adapters(["a", "b"], [1.0, 0.5])
    return result


def test_a_name_is_the_stem_unless_given(sd1, tmp_path) -> None:
    path = write(tmp_path / "ink v1.5.safetensors", random_pairs(sd1.unet))
    stack = AdapterStack(sd1)
    assert stack.load(path) == "ink v1.5"
    assert stack.load(path, "again") == "again"
    assert stack.names == ("ink v1.5", "again")


def test_loading_and_setting_follow_the_documented_meaning(stack) -> None:
    assert stack.names == ("a", "b", "c")
    assert stack.weights == {"a": 1.0, "b": 0.5}
    stack.set_adapters("c")
    assert stack.weights == {"c": 1.0}
    stack.set_adapters(["a", "b"], 0.3)
    assert stack.weights == {"a": 0.3, "b": 0.3}
    stack.set_adapters(["a", "b"], [None, -0.5])
    assert stack.weights == {"a": 1.0, "b": -0.5}
    stack.set_weight("c", 0.2)
    assert stack.weights == {"a": 1.0, "b": -0.5, "c": 0.2}


def test_an_adapter_is_known_by_its_file_and_by_a_hash_that_new_metadata_does_not_change(sd1, tmp_path) -> None:
    path = write(tmp_path / "ink.safetensors", random_pairs(sd1.unet))
    (tmp_path / "other").mkdir()
    renamed = write(
        tmp_path / "other" / "pen.safetensors", random_pairs(sd1.unet), metadata=AdapterMetadata("pen", "b")
    )
    assert path.read_bytes() != renamed.read_bytes()
    stack = AdapterStack(sd1)
    stack.load(path, "first")
    stack.load(renamed, "second")
    assert stack.file_name("second") == "pen.safetensors"
    assert stack.tensor_hash("first") == stack.tensor_hash("second")
    assert len(stack.tensor_hash("first")) == 64
    with pytest.raises(UnknownAdapterError):
        stack.file_name("third")


def test_the_weights_shown_cannot_be_changed_from_outside(stack) -> None:
    with pytest.raises(TypeError):
        stack.weights["a"] = 3.0


@pytest.mark.parametrize("off", [([], None), (["a", "b"], 0.0)])
def test_with_everything_off_the_pipeline_is_the_base_bit_for_bit(stack, sd1, tmp_path, off) -> None:
    drawn = predict(sd1)
    stack.set_adapters(*off)
    without = predict(sd1)
    stack.unload()
    assert torch.equal(without, predict(sd1))
    assert difference(drawn, without) > EFFECT
    assert not any(hooks for *_, hooks in module_graph(sd1))


def test_unloading_one_leaves_the_others_as_they_are(stack, sd1) -> None:
    stack.set_adapters("b", 0.5)
    alone = predict(sd1)
    stack.set_adapters(["a", "b"], [1.0, 0.5])
    stack.unload("a")
    assert stack.names == ("b", "c")
    assert stack.weights == {"b": 0.5}
    assert torch.equal(predict(sd1), alone)


def test_after_unload_every_base_tensor_and_the_module_graph_are_as_before(sd1, tmp_path) -> None:
    before, graph, base = tensors_of(sd1), module_graph(sd1), predict(sd1)
    stack = AdapterStack(sd1)
    checksum = stack.base_checksum()
    stack.load(write(tmp_path / "ink.safetensors", random_pairs(sd1.unet)))
    predict(sd1)
    with stack.merged():
        predict(sd1)
    assert [row[:2] for row in module_graph(sd1)] == [row[:2] for row in graph]
    stack.unload()
    assert_bits_equal(sd1, before)
    assert module_graph(sd1) == graph
    assert stack.base_checksum() == checksum
    assert torch.equal(predict(sd1), base)


def test_the_checksum_sees_one_changed_bit_and_a_changed_type(sd1) -> None:
    stack = AdapterStack(sd1)
    before = stack.base_checksum()
    assert stack.base_checksum() == before
    weight = sd1.text_encoder.state_dict()["encoder.layers.1.mlp.fc2.weight"]
    weight.view(torch.uint8)[0, 0] ^= 1
    assert stack.base_checksum() != before
    weight.view(torch.uint8)[0, 0] ^= 1
    assert stack.base_checksum() == before
    sd1.unet.half()
    assert stack.base_checksum() != before


# --- merged ---------------------------------------------------------------------------------------------------------


def test_merged_writes_the_layers_and_gives_them_back_bit_for_bit(stack, sd1) -> None:
    before, live, checksum = tensors_of(sd1), predict(sd1), stack.base_checksum()
    with stack.merged() as same:
        assert same is stack
        assert stack.is_merged
        assert stack.base_checksum() != checksum
        assert not any(hooks for *_, hooks in module_graph(sd1))
        assert difference(predict(sd1), live) < SAME
    assert not stack.is_merged
    assert_bits_equal(sd1, before)
    assert torch.equal(predict(sd1), live)


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interrupted])
def test_an_exception_inside_merged_gives_the_base_back(stack, sd1, error) -> None:
    before, live = tensors_of(sd1), predict(sd1)
    with pytest.raises(error), stack.merged():
        raise error
    assert_bits_equal(sd1, before)
    assert torch.equal(predict(sd1), live)


def test_an_exception_while_writing_gives_the_base_back(stack, sd1, monkeypatch) -> None:
    before, live = tensors_of(sd1), predict(sd1)
    copies = 0
    real = torch.Tensor.copy_

    def failing(target: torch.Tensor, source: torch.Tensor, *rest: object) -> torch.Tensor:
        nonlocal copies
        copies += 1
        if copies == 20:
            raise MemoryError
        return real(target, source, *rest)

    monkeypatch.setattr(torch.Tensor, "copy_", failing)
    with pytest.raises(MemoryError), stack.merged():
        pass
    monkeypatch.undo()
    assert copies > 20
    assert_bits_equal(sd1, before)
    assert torch.equal(predict(sd1), live)


def test_merged_without_active_adapters_is_the_base(sd1) -> None:
    stack, base = AdapterStack(sd1), predict(sd1)
    with stack.merged():
        assert torch.equal(predict(sd1), base)


# --- refusals leave everything as it was ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda s: s.set_adapters(["a", "d"]), UnknownAdapterError, "No adapter is called 'd'. Loaded: 'a', 'b', 'c'"),
        (lambda s: s.set_adapters("d"), UnknownAdapterError, "'d'"),
        (lambda s: s.set_weight("d", 1.0), UnknownAdapterError, "'d'"),
        (lambda s: s.unload("d"), UnknownAdapterError, "'d'"),
        (lambda s: s.set_adapters(["a", "b", "a"], [0.5, 0.1, 0.2]), AdapterError, "'a' is named twice"),
        (lambda s: s.set_adapters(["a", "c"], [0.5, float("nan")]), AdapterError, "weight of 'c' must be a finite"),
        (lambda s: s.set_weight("c", float("inf")), AdapterError, "finite"),
        (lambda s: s.set_weight("c", "1:start"), AdapterError, "weight of 'c': .*'start' is not a number"),
        (lambda s: s.set_adapters("c", {"unet": 1.0}), AdapterError, "finite"),
        (lambda s: s.set_weight("c", 1e300), AdapterError, "not finite in torch.float32"),
        (lambda s: s.set_adapters(["c", "b"], [1.0]), AdapterError, "2 adapters are named, but 1 weights"),
        (lambda s: s.load(Path("nowhere.safetensors")), AdapterFileError, "no such file"),
        (lambda s: s.load(Path("other/a.safetensors")), DuplicateAdapterError, "'a' is loaded already"),
        (lambda s: s.load(Path("x.safetensors"), ""), AdapterError, "needs a name"),
    ],
)
def test_a_failing_call_leaves_the_stack_as_it_was(stack, sd1, call, error, match) -> None:
    drawn, names, weights, graph = predict(sd1), stack.names, dict(stack.weights), module_graph(sd1)
    with pytest.raises(error, match=match):
        call(stack)
    assert stack.names == names
    assert stack.weights == weights
    assert module_graph(sd1) == graph
    assert torch.equal(predict(sd1), drawn)


def test_a_merged_stack_is_not_merged_again(stack, sd1) -> None:
    before = tensors_of(sd1)
    with stack.merged():
        inside = predict(sd1)
        with pytest.raises(AdapterError, match="merged already; leave that `with` block first"), stack.merged():
            pytest.fail("entered")
        assert stack.is_merged
        assert torch.equal(predict(sd1), inside)
    assert_bits_equal(sd1, before)


def refuse(pipeline, path: Path) -> AdapterMismatchError:
    """Loading must fail in one line and leave no trace."""
    stack, graph = AdapterStack(pipeline), module_graph(pipeline)
    with pytest.raises(AdapterMismatchError) as caught:
        stack.load(path)
    assert stack.names == ()
    assert module_graph(pipeline) == graph
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))
    return caught.value


def test_an_adapter_for_sd2_is_refused_on_sd1_by_its_cross_attention_width(sd1, sd2, tmp_path) -> None:
    error = refuse(sd1, write(tmp_path / "sd2.safetensors", random_pairs(sd2.unet), family="sd2"))
    assert "cross-attention width 48" in error.found
    assert "cross-attention width 32" in error.expected


def test_an_adapter_for_sdxl_is_refused_on_sd1_and_the_other_way_round(sd1, sdxl, tmp_path) -> None:
    xl = refuse(sd1, write(tmp_path / "xl.safetensors", random_pairs(sdxl.unet), family="sdxl"))
    assert "cross-attention width 64" in xl.found
    one = refuse(sdxl, write(tmp_path / "sd1.safetensors", random_pairs(sd1.unet)))
    assert "cross-attention width 32" in one.found


@pytest.mark.parametrize(("width", "family"), [(768, "SD 1.x"), (1024, "SD 2.x"), (2048, "SDXL")])
def test_the_families_people_know_are_called_by_their_names(sd1, tmp_path, width, family) -> None:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    pairs = {layer: LoraPair(down=torch.ones(1, width), up=torch.ones(320, 1), alpha=1.0)}
    assert refuse(sd1, write(tmp_path / "a.safetensors", pairs)).found.startswith(family)


def test_an_adapter_without_cross_attention_is_refused_by_the_layers_that_are_missing(sd1, sdxl, tmp_path) -> None:
    pairs = random_pairs(sdxl.unet, targets=("transformer_blocks.9.attn1.to_q",))
    error = refuse(sd1, write(tmp_path / "xl.safetensors", pairs, family="sdxl"))
    assert "has the layers unet.down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_q" in error.found


def test_one_missing_layer_of_many_refuses_the_whole_adapter(sd1, tmp_path) -> None:
    pairs = random_pairs(sd1.unet)
    extra = "down_blocks.3.attentions.0.transformer_blocks.0.attn2.to_q"
    pairs[extra] = next(iter(pairs.values()))
    assert extra in refuse(sd1, write(tmp_path / "a.safetensors", pairs)).found


def test_layers_of_another_shape_are_named(sd1, tmp_path) -> None:
    pairs = random_pairs(sd1.unet, targets=("attn1.to_q",))
    path = next(iter(pairs))
    pairs[path] = LoraPair(down=torch.ones(2, 33), up=torch.ones(32, 2), alpha=2.0)
    assert path in refuse(sd1, write(tmp_path / "a.safetensors", pairs)).found


def test_a_second_text_encoder_is_refused_where_there_is_one_only(sd1, tmp_path) -> None:
    text = random_pairs(sd1.text_encoder, targets=TEXT)
    path = save(tmp_path / "a.safetensors", kohya_tensors(text, "lora_te2_text_model_"))
    assert "text_encoder_2" in refuse(sd1, path).found


def test_a_base_with_fused_projections_or_peft_layers_is_refused(sd1, tmp_path) -> None:
    path = write(tmp_path / "ink.safetensors", random_pairs(sd1.unet))
    other = copy.deepcopy(sd1)
    other.load_lora_weights(str(path))
    with pytest.raises(AdapterError, match="already carries a LoRA of PEFT"):
        AdapterStack(other).load(path)
    sd1.fuse_qkv_projections()
    with pytest.raises(AdapterError, match="fused projections"):
        AdapterStack(sd1).load(path)


def test_something_without_a_unet_is_a_programming_error() -> None:
    with pytest.raises(TypeError, match="has no unet"):
        AdapterStack(object())


# --- cost -----------------------------------------------------------------------------------------------------------


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


def count_calls(action: Callable[[], object]) -> int:
    with torch.no_grad(), CountOperations() as counter:
        action()
    return counter.count


def operations(pipeline) -> int:
    sample, text = torch.zeros(1, 4, 8, 8), torch.zeros(1, 77, 32)
    return count_calls(lambda: pipeline.unet(sample, 10, text))


def test_five_adapters_cost_as_many_operations_as_one_and_merged_ones_none(sd1, tmp_path) -> None:
    base = operations(sd1)
    stack = AdapterStack(sd1)
    for seed in range(5):
        stack.load(write(tmp_path / f"{seed}.safetensors", random_pairs(sd1.unet, seed=seed)))
    stack.set_adapters("0")
    one = operations(sd1)
    stack.set_adapters(list("01234"), 0.2)
    assert operations(sd1) == one > base
    with stack.merged():
        assert operations(sd1) == base
