"""Faults that other adapter stacks are known for, one test each: none of them may happen here.

Each was reproduced with the fuse, unfuse, set_adapters and delete_adapters calls of widely used libraries.
"""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch

from sdlora.errors import AdapterError, AdapterFileError, AdapterMismatchError
from sdlora.stack import AdapterStack

from .builders import (
    ATTENTION2,
    TEXT,
    difference,
    hand_merged,
    kohya_tensors,
    peft_metadata,
    peft_tensors,
    predict,
    random_pairs,
    save,
    write,
)

SAME = 1e-5


@pytest.fixture
def ink(sd1):
    return random_pairs(sd1.unet, seed=1, alpha=2.0)


@pytest.fixture
def blob(sd1):
    return random_pairs(sd1.unet, seed=2, alpha=4.0)


@pytest.fixture
def stack(sd1, ink, blob, tmp_path) -> AdapterStack:
    result = AdapterStack(sd1)
    result.load(write(tmp_path / "ink.safetensors", ink))
    result.load(write(tmp_path / "blob.safetensors", blob))
    return result


def test_merging_then_setting_other_weights_has_its_effect_and_does_not_spoil_the_base(stack, sd1, ink) -> None:
    before = stack.base_checksum()
    expected = predict(hand_merged(_base(sd1, stack), ("unet", ink, 0.1)))
    with stack.merged():
        stack.set_adapters("ink", 0.1)
        assert difference(predict(sd1), expected) < SAME
    assert stack.base_checksum() == before


def test_unloading_while_merged_does_not_leave_the_adapter_in_the_base(stack, sd1) -> None:
    before = stack.base_checksum()
    with stack.merged():
        stack.unload("blob")
        assert stack.base_checksum() != before
        stack.unload()
        assert stack.base_checksum() == before
    assert stack.base_checksum() == before
    assert stack.names == ()


def test_switching_all_off_while_merged_gives_the_base_at_once_and_back(stack, sd1) -> None:
    with stack.merged():
        merged = stack.base_checksum()
        stack.disable()
        assert not stack.active
        off = stack.base_checksum()
        stack.enable()
        assert stack.base_checksum() == merged != off
    assert stack.base_checksum() == off
    assert stack.weights == {"ink": 1.0, "blob": 1.0}


def test_merging_does_not_change_the_weights_that_were_set(stack, sd1) -> None:
    stack.set_adapters("ink", 0.8)
    live = predict(sd1)
    for _ in range(3):
        with stack.merged():
            assert difference(predict(sd1), live) < SAME
        assert stack.weights == {"ink": 0.8}
        assert torch.equal(predict(sd1), live)


def test_merging_applies_each_adapter_with_its_own_weight_and_switches_none_off(stack, sd1, ink, blob) -> None:
    expected = predict(hand_merged(_base(sd1, stack), ("unet", ink, 0.5), ("unet", blob, 1.0)))
    stack.set_adapters(["ink", "blob"], [0.5, 1.0])
    with stack.merged():
        assert difference(predict(sd1), expected) < SAME


def test_a_scale_given_to_one_call_does_not_reset_the_weights(stack, sd1) -> None:
    stack.set_adapters("ink", 0.6)
    before = predict(sd1)
    sd1(
        "a fox", num_inference_steps=1, height=64, width=64, output_type="latent", cross_attention_kwargs={"scale": 0.0}
    )
    assert stack.weights == {"ink": 0.6}
    assert torch.equal(predict(sd1), before)


def test_a_merge_that_overflows_in_the_last_layer_leaves_all_layers_as_they_were(sd1, tmp_path) -> None:
    pairs = random_pairs(sd1.unet)
    sd1.unet.half()
    last = list(pairs)[-1]
    layer = sd1.unet.get_submodule(last)
    with torch.no_grad():
        layer.weight.fill_(65_504.0)
    pairs[last].down.fill_(30.0)
    pairs[last].up.fill_(30.0)
    stack = AdapterStack(sd1)
    stack.load(write(tmp_path / "ink.safetensors", pairs))
    before = stack.base_checksum()
    with pytest.raises(AdapterError, match=r"a merged layer is not finite in torch\.float16"), stack.merged():
        pytest.fail("entered")
    assert not stack.is_merged
    assert stack.base_checksum() == before


def test_loading_while_merged_does_not_unmerge_the_first_silently(stack, sd1, ink, blob, tmp_path) -> None:
    changes = (("unet", ink, 1.5), ("unet", blob, 1.0))
    expected = predict(hand_merged(_base(sd1, stack), *changes))
    with stack.merged():
        stack.load(tmp_path / "ink.safetensors", "again")
        stack.set_weight("again", 0.5)
        assert difference(predict(sd1), expected) < SAME


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ten_merges_of_a_half_precision_base_are_exact(stack, sd1, dtype) -> None:
    sd1.unet.to(dtype)
    before = stack.base_checksum()
    for weight in range(10):
        stack.set_adapters("ink", 0.1 * weight + 0.05)
        with stack.merged():
            assert stack.base_checksum() != before
    assert stack.base_checksum() == before


def test_a_failed_replacement_does_not_delete_the_adapter_that_was_there(stack, sd1, tmp_path) -> None:
    before = predict(sd1)
    bad = tmp_path / "new" / "ink.safetensors"
    bad.parent.mkdir()
    bad.write_bytes(b"")
    with pytest.raises(AdapterError):
        stack.load(bad)
    with pytest.raises(AdapterFileError):
        stack.load(bad, "new ink")
    assert stack.names == ("ink", "blob")
    assert torch.equal(predict(sd1), before)


def test_loading_a_second_adapter_keeps_the_first_active(stack, sd1, ink, blob) -> None:
    assert stack.weights == {"ink": 1.0, "blob": 1.0}
    assert difference(predict(sd1), predict(hand_merged(_base(sd1, stack), ("unet", ink, 1), ("unet", blob, 1)))) < SAME


def _base(pipeline, stack: AdapterStack):
    """A copy of the pipeline without the stack's hooks."""
    weights = dict(stack.weights)
    stack.set_adapters([])
    base = copy.deepcopy(pipeline)
    stack.set_adapters(list(weights), list(weights.values()))
    return base


def test_the_same_name_twice_is_an_error_and_not_the_last_weight_twice(stack) -> None:
    with pytest.raises(AdapterError, match="named twice"):
        stack.set_adapters(["ink", "ink"], [0.5, 0.2])
    assert stack.weights == {"ink": 1.0, "blob": 1.0}


def test_unloading_the_only_active_adapter_does_not_activate_another(stack, sd1) -> None:
    stack.set_adapters([])
    base = predict(sd1)
    stack.set_adapters("ink")
    stack.unload("ink")
    assert stack.weights == {}
    assert torch.equal(predict(sd1), base)


def test_replacing_a_file_by_one_of_another_alpha_uses_the_new_alpha(stack, sd1, tmp_path) -> None:
    stronger = random_pairs(sd1.unet, seed=1, rank=4, alpha=4.0)
    stack.unload()
    expected = predict(hand_merged(sd1, ("unet", stronger, 0.7)))
    stack.load(write(tmp_path / "ink.safetensors", random_pairs(sd1.unet, seed=1, rank=4, alpha=2.0)))
    stack.unload("ink")
    stack.load(write(tmp_path / "ink.safetensors", stronger))
    stack.set_adapters("ink", 0.7)
    assert difference(predict(sd1), expected) < SAME


def test_alphas_that_differ_from_layer_to_layer_are_all_honoured(sd1, tmp_path) -> None:
    pairs = random_pairs(sd1.unet, rank=4, alpha=lambda path: 1.0 if path.endswith("to_q") else 4.0)
    uniform = random_pairs(sd1.unet, rank=4, alpha=4.0)
    expected = predict(hand_merged(sd1, ("unet", pairs, 1.0)))
    assert difference(expected, predict(hand_merged(sd1, ("unet", uniform, 1.0)))) > 1000 * SAME
    AdapterStack(sd1).load(save(tmp_path / "mixed.safetensors", kohya_tensors(pairs)))
    assert difference(predict(sd1), expected) < SAME


def test_a_text_encoder_adapter_of_queries_keys_and_values_alone_is_read(sd1, tmp_path) -> None:
    unet, text = random_pairs(sd1.unet), random_pairs(sd1.text_encoder, targets=TEXT[:3])
    expected = predict(hand_merged(sd1, ("unet", unet, 1.0), ("text_encoder", text, 1.0)))
    tensors = {**kohya_tensors(unet), **kohya_tensors(text, "lora_te_text_model_")}
    AdapterStack(sd1).load(save(tmp_path / "qkv.safetensors", tensors))
    assert difference(predict(sd1), expected) < SAME


def test_dora_is_not_loaded_as_plain_lora(sd1, ink, tmp_path) -> None:
    tensors = kohya_tensors(ink)
    key = next(iter(tensors)).split(".")[0]
    plain = save(tmp_path / "plain.safetensors", tensors)
    path = save(tmp_path / "dora.safetensors", {**tensors, f"{key}.dora_scale": torch.full((32, 1), 3.0)})
    pictures = []
    for file in (plain, path):
        pipeline = copy.deepcopy(sd1)
        AdapterStack(pipeline).load(file)
        pictures.append(predict(pipeline))
    assert difference(*pictures) > 0.01


@pytest.mark.parametrize("name", ["v1.5", "keys", "to", "type", "default", "two words", "a/b", "weight", "ü"])
def test_any_name_will_do(sd1, ink, tmp_path, name) -> None:
    stack = AdapterStack(sd1)
    assert stack.load(write(tmp_path / "ink.safetensors", ink), name) == name
    stack.set_adapters([name], [0.5])
    assert stack.weights == {name: 0.5}
    stack.unload(name)
    assert stack.names == ()


def test_one_file_for_another_base_is_one_sentence_and_leaves_no_wrapped_layers(sd1, sd2, tmp_path) -> None:
    classes = [type(module) for module in sd1.unet.modules()]
    with pytest.raises(AdapterMismatchError) as caught:
        AdapterStack(sd1).load(write(tmp_path / "sd2.safetensors", random_pairs(sd2.unet), family="sd2"))
    assert str(caught.value).count("\n") == 0
    assert [type(module) for module in sd1.unet.modules()] == classes


def test_a_unet_only_file_is_loaded_without_a_word(sd1, ink, tmp_path, capfd) -> None:
    path = write(tmp_path / "ink.safetensors", ink)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdapterStack(sd1).load(path)
    assert capfd.readouterr() == ("", "")


def test_a_missing_whole_pair_or_half_is_noticed(sd1, ink, tmp_path) -> None:
    tensors = kohya_tensors(ink)
    key = next(iter(tensors)).split(".")[0]
    half = {name: tensor for name, tensor in tensors.items() if name != f"{key}.lora_up.weight"}
    with pytest.raises(AdapterFileError, match="up factor is missing"):
        AdapterStack(sd1).load(save(tmp_path / "half.safetensors", half))
    alone = {name: tensor for name, tensor in tensors.items() if not name.startswith(key) or name.endswith("alpha")}
    with pytest.raises(AdapterFileError, match="down and up factor is missing"):
        AdapterStack(sd1).load(save(tmp_path / "alone.safetensors", alone))


def test_the_order_of_loading_and_of_naming_does_not_change_a_bit(sd1, ink, blob, tmp_path) -> None:
    files = [write(tmp_path / "ink.safetensors", ink), write(tmp_path / "blob.safetensors", blob)]
    drawn, merged = [], []
    for order in (files, files[::-1]):
        stack = AdapterStack(sd1)
        for path in order:
            stack.load(path)
        for names, weights in ((["ink", "blob"], [0.7, 0.5]), (["blob", "ink"], [0.5, 0.7])):
            stack.set_adapters(names, weights)
            drawn.append(predict(sd1))
            with stack.merged():
                merged.append(predict(sd1))
        stack.unload()
    assert all(torch.equal(latents, drawn[0]) for latents in drawn)
    assert all(torch.equal(latents, merged[0]) for latents in merged)


def test_a_time_embedding_or_conv_in_adapter_alone_is_loaded(sd1, tmp_path) -> None:
    pairs = random_pairs(sd1.unet, targets=("conv_in", "time_embedding.linear_1"))
    expected = predict(hand_merged(sd1, ("unet", pairs, 1.0)))
    AdapterStack(sd1).load(write(tmp_path / "locon.safetensors", pairs))
    assert difference(predict(sd1), expected) < SAME


def test_a_file_of_other_dropout_rank_alphas_and_targets_takes_the_place_of_another(stack, sd1, tmp_path) -> None:
    pairs = random_pairs(
        sd1.unet, seed=9, rank=3, alpha=lambda path: 1.0 if "mid" in path else 2.0, targets=("attn1.to_k", "ff.net.2")
    )
    header = peft_metadata(pairs)
    config = json.loads(header["lora_adapter_metadata"]) | {"unet.lora_dropout": 0.1}
    header["lora_adapter_metadata"] = json.dumps(config)
    stack.unload("blob")
    stack.set_adapters([])
    expected = predict(hand_merged(sd1, ("unet", pairs, 0.6)))
    stack.unload("ink")
    stack.load(save(tmp_path / "other.safetensors", peft_tensors(pairs), header), "ink")
    stack.set_weight("ink", 0.6)
    assert difference(predict(sd1), expected) < SAME


def test_block_weights_reach_resnets_and_what_is_in_no_block_and_leave_the_unlisted_off(sd1, tmp_path) -> None:
    targets = ("conv_in", "time_embedding.linear_1", "conv1", "attn2.to_k", "downsamplers.0.conv")
    pairs = random_pairs(sd1.unet, targets=targets, strength=0.2)
    strengths = {"conv_in": 0.5, "time_embedding": 0.25, "mid_block": 2.0, "down_blocks.0.downsamplers": -1.0}
    changes = [
        ("unet", {path: pair}, next((w for start, w in strengths.items() if path.startswith(start)), 0.0))
        for path, pair in pairs.items()
    ]
    expected = predict(hand_merged(sd1, *changes))
    stack = AdapterStack(sd1)
    stack.load(write(tmp_path / "locon.safetensors", pairs))
    stack.set_weight("locon", "1:lbw=BASE=0.25,IN00=0.5,M00=2,IN03=-1")
    assert difference(predict(sd1), expected) < SAME


def test_summing_ranks_is_exact_where_adding_factors_would_not_be(stack, sd1, ink, blob) -> None:
    """(B1 + B2)(A1 + A2) has cross terms; B1 A1 + B2 A2 has none."""
    stack.set_adapters([])
    expected = predict(hand_merged(sd1, ("unet", ink, 1.0), ("unet", blob, 1.0)))
    mixed = {path: type(ink[path])(ink[path].down + blob[path].down, ink[path].up + blob[path].up, 3.0) for path in ink}
    stack.set_adapters(["ink", "blob"])
    assert difference(predict(sd1), expected) < SAME
    stack.set_adapters([])
    assert difference(predict(hand_merged(sd1, ("unet", mixed, 1.0))), expected) > 1000 * SAME


def test_the_default_targets_are_those_that_invokeai_needs_to_tell_the_family(sd1, ink, tmp_path) -> None:
    names = {path.split("attn2.")[1] for path in ink}
    assert names == {target.removeprefix("attn2.") for target in ATTENTION2} >= {"to_k", "to_v"}
